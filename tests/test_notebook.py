"""The notebook runs, its outputs are those of a run, and the site shows it."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

import abliterate
from abliterate.extraction.options import ExtractionOptions
from abliterate.prompt_sets import load_prompt_set
from scripts import notebook, site
from tests.support.documents import shape
from tests.support.paths import REPOSITORY

TEXT = notebook.NOTEBOOK.read_text(encoding="utf-8")
COMMITTED = json.loads(TEXT)
# Which prompts are refused most, and what their tokens are, is the model's affair.
PROMPTS = [
    text for kind in ("harmless", "borderline") for text in load_prompt_set("bundled", kind=kind, part="test").texts
]


def run_on(model: Path, folder: Path, **options: Any) -> dict[str, Any]:
    (folder / "model").symlink_to(model)
    extraction = abliterate.extract_direction(model=model, options=ExtractionOptions(**options))
    extraction.direction.save(folder / "refusal.safetensors")
    return notebook.executed(COMMITTED, folder=notebook.NOTEBOOK.parent, demo=folder)


def shapes(of: dict[str, Any]) -> list[list[tuple[str, frozenset[str]]]]:
    """Return for each cell the kinds of its outputs, each with the different lines or words that it shows."""
    return [[_shape(output) for output in cell.get("outputs", ())] for cell in of["cells"]]


def _shape(output: dict[str, Any]) -> tuple[str, frozenset[str]]:
    if "data" in output and "image/svg+xml" in output["data"]:
        kind, text = (
            "svg",
            "\n".join(re.findall(r">([^<>]+)</t(?:ext|itle)>", "".join(output["data"]["image/svg+xml"]))),
        )
        # A cell of a heat map says its own value.
        text = "\n".join(line for line in html.unescape(text).splitlines() if not re.search(r", \d+: -?[\d.]+$", line))
    else:
        kind, text = output["output_type"], "".join(output.get("text", "") or output["data"]["text/plain"])
    for prompt in PROMPTS:
        text = text.replace(prompt, "PROMPT")
    text = re.sub(r"(?m)^.* \.\.\.$", "PROMPT", text)
    text = re.sub(r"""(?m)(['"]).*\1$""", "TOKEN", text)
    return kind, frozenset(shape(text))


def test_the_outputs_are_those_of_a_run(small_demo_directory, tmp_path):
    done = run_on(small_demo_directory, tmp_path)
    assert shapes(done) == shapes(COMMITTED)
    assert [cell["source"] for cell in done["cells"]] == [cell["source"] for cell in COMMITTED["cells"]]


@pytest.mark.demo
@pytest.mark.proof
def test_it_runs_on_the_demo_model(demo_directory, tmp_path):
    done = run_on(demo_directory, tmp_path, n_train=16, n_val=4)
    assert shapes(done) == shapes(COMMITTED)


def test_what_is_committed_is_one_whole_run_without_anything_harmful():
    counts = [cell["execution_count"] for cell in COMMITTED["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in COMMITTED["cells"] for output in cell.get("outputs", ())]
    assert {output["output_type"] for output in outputs} == {"stream", "execute_result"}
    assert sum("image/svg+xml" in output.get("data", {}) for output in outputs) >= 5
    assert len(TEXT.encode()) < 300_000
    for part in ("train", "validation", "test"):
        assert not any(text in TEXT for text in load_prompt_set("bundled", kind="harmful", part=part).texts)


def test_the_file_is_as_the_script_writes_it():
    assert notebook.written(COMMITTED) == TEXT
    assert COMMITTED["nbformat"] == 4
    assert len({cell["id"] for cell in COMMITTED["cells"]}) == len(COMMITTED["cells"])


def code(text: str) -> dict[str, Any]:
    return {"cells": [{"cell_type": "code", "id": "a", "metadata": {}, "source": text.splitlines(keepends=True)}]}


def test_a_cell_shows_what_it_prints_and_its_last_value(tmp_path):
    def outputs(text: str) -> list[dict[str, Any]]:
        done = notebook.executed(code(text), folder=tmp_path, demo=tmp_path / "d")
        assert done["cells"][0]["execution_count"] == 1
        return done["cells"][0]["outputs"]

    assert outputs("x = 1") == outputs("None") == outputs("") == []
    assert outputs("print(1)\nprint(2)") == [{"name": "stdout", "output_type": "stream", "text": ["1\n", "2\n"]}]
    (shown,) = outputs("x = 1\nx + 1")
    assert shown["data"] == {"text/plain": ["2"]}
    (shown,) = outputs("class A:\n    def _repr_svg_(self):\n        return '<svg/>'\nA()")
    assert shown["data"] == {"image/svg+xml": ["<svg/>"]}
    (shown,) = outputs("import os\nos.environ['ABLITERATE_DEMO'], os.getcwd()")
    assert shown["data"]["text/plain"] == [repr((str(tmp_path / "d"), str(tmp_path)))]


def test_a_cell_that_fails_ends_the_run_and_leaves_the_file(tmp_path, monkeypatch):
    file = tmp_path / "a.ipynb"
    file.write_text(json.dumps(code("1 / 0")))
    monkeypatch.setattr(notebook, "NOTEBOOK", file)
    monkeypatch.setattr("sys.argv", ["notebook", "--demo", str(tmp_path)])
    with pytest.raises(ZeroDivisionError):
        notebook.main()
    assert json.loads(file.read_text()) == code("1 / 0")
    file.write_text(json.dumps(code("1 / 1")))
    notebook.main()
    assert json.loads(file.read_text())["cells"][0]["outputs"][0]["data"] == {"text/plain": ["1.0"]}


def test_the_site_shows_code_text_and_figures():
    page = site.notebook_page(COMMITTED)
    assert page.startswith("# ")
    n_code = sum(cell["cell_type"] == "code" for cell in COMMITTED["cells"])
    assert page.count("```python\n") == n_code
    assert page.count('<p><img alt="') == sum(kind == "svg" for cell in shapes(COMMITTED) for kind, _ in cell)
    assert page.count("```text\n") == sum(kind == "stream" for cell in shapes(COMMITTED) for kind, _ in cell)
    place = site.OUTSIDE[notebook.NOTEBOOK.relative_to(REPOSITORY).as_posix()]
    assert "](../library.md)" in site.with_links_of_the_site(page, place)
