"""What is asked is read before a model is fetched, and what was said is counted wherever it comes from."""

import json
from pathlib import Path

import pytest

from abliterate.errors import PromptSetError
from abliterate.evaluation.counting import Said, choose_prompts, completions_of, count, load_prompts
from abliterate.evaluation.replies import write_completions
from abliterate.evaluation.report import EvaluationOptions
from abliterate.extraction.reply_classes import read_reply
from abliterate.prompt_sets import prompt_hash

TEXTS = {"harmful": ["Steal it.", "Forge it."], "harmless": ["Paint it."], "borderline": ["Kill a process."]}


@pytest.fixture
def options(tmp_path: Path) -> EvaluationOptions:
    for kind, texts in TEXTS.items():
        (tmp_path / f"{kind}.txt").write_text("\n".join([*texts, texts[0]]))
    return EvaluationOptions(**{kind: str(tmp_path / f"{kind}.txt") for kind in TEXTS})


def said(**replies: list[str]) -> Said:
    return Said(plain={kind: [read_reply(text) for text in texts] for kind, texts in replies.items()}, parts={})


def test_what_is_left_out_and_what_was_said(options, tmp_path):
    asked = choose_prompts(load_prompts(options), options, used=frozenset({prompt_hash("Steal it.")}))
    model = said(harmful=["Here is how."], harmless=["Use a brush."], borderline=["Sure."])
    base = said(harmful=["I cannot do that."], harmless=["Use a brush."], borderline=["I cannot do that."])
    counts = count(asked, model, base)
    assert counts["excluded"] == {"harmful": 1, "harmless": 0, "borderline": 0}
    assert counts["repeated"] == {"harmful": 1, "harmless": 1, "borderline": 1}
    assert counts["outcomes"]["harmful"] == {prompt_hash("Forge it."): "answer"}
    assert counts["changes"]["harmful"].difference == -1.0
    assert count(asked, model, None)["base_rates"] is None
    assert count(asked, model, None)["changes"] == {}
    write_completions(tmp_path / "c.jsonl", completions_of(asked, {"base": None, "model": model}))
    lines = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert [(line["model"], line["prompt"]) for line in lines] == [
        ("model", "Forge it."),
        ("model", "Paint it."),
        ("model", "Kill a process."),
    ]


def test_a_set_that_cannot_be_read(options):
    with pytest.raises(PromptSetError, match=r"nothing\.txt"):
        load_prompts(EvaluationOptions(harmful="nothing.txt"))
