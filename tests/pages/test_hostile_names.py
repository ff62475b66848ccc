"""Names, prompts and categories that come from elsewhere, on the pages and in the model card."""

import html
import json
import re
from pathlib import Path

import pytest
import yaml  # type: ignore[import-untyped]

from abliterate.editing.model_card import build_model_card
from abliterate.pages import page
from abliterate.pages.charts import share_chart
from tests.support.fake_hub import evaluation_report, write_checkpoint

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onload='alert(1)",
    "</title></style></section><script>",
    "</code></pre><script>",
    "&lt;script&gt;",
]
EVIL = [
    "---\nlicense: mit\n---\n# Mine",
    "a: b",
    "x\n# Heading",
    "[link](javascript:alert(1))",
    "<script>alert(1)</script>",
    "a|b`c`*d*",
    "!!python/object/apply:os.system ['true']",
    "\x1b[31m",
    "'\"",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_every_block_of_a_page_escapes_its_text(text):
    blocks = (
        page.paragraph(text),
        page.headline(text),
        page.facts([(text, text)]),
        page.table([text, text], [[text, text]], caption=text),
        page.commands([text]),
        page.folded(text, []),
        page.quoted(text),
        share_chart([(text, [])], legend=[(text, "--a")], caption=text).html,
    )
    whole = page.build_page(title=text, subtitle=text, sections=[page.Section(heading=text, blocks=blocks)])
    plain = page.build_page(title="x", subtitle="x", sections=[page.Section(heading="x", blocks=())])
    tags = {tag.lower() for tag in re.findall(r"<\s*([a-zA-Z]+)", whole)}
    assert not tags & {"script", "img", "iframe", "object"}
    assert not re.search(r"<[^>]*\son\w+\s*=", re.sub(r'"[^"]*"', '""', whole))
    assert html.escape(text) in whole
    assert whole.count("</title>") == plain.count("</title>") == 1


@pytest.mark.parametrize("name", EVIL)
def test_a_card_stays_one_card(tmp_path: Path, name: str):
    record = json.loads((write_checkpoint(tmp_path / "out") / "abliteration.json").read_text())
    record["base"] |= {"model": name, "revision": None, "model_type": name}
    record["directions"][0]["metadata"] = {"model": name, "layer": 1, "position": -1, "model_type": name}
    evaluation = evaluation_report()
    card = build_model_card(record=record, evaluation=evaluation, facts=None, title=name)
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts.get("license") in {None, "other", "unknown"}
    assert "abliterate" in str(facts)
    plain = re.sub(r"```.*?```|`[^`]*`", "", body, flags=re.DOTALL)
    assert not re.search(r"(?<!\\)<script", plain)
    # Outside code spans, brackets are escaped: nothing becomes a link.
    assert "[link]" not in re.sub(r"`[^`]*`", "", body)
    assert not re.search(r"(?m)^# (Mine|Heading)$", body)
    assert "\x1b" not in card
