"""The results in the documents are what the script makes of the measurements that lie in the repository."""

import json
import math
from pathlib import Path

import pytest

from abliterate.evaluation.audit_report import AuditThresholds
from scripts import results
from tests.support.paths import REPOSITORY


def test_the_documents_say_what_was_measured() -> None:
    for path, text in results.documents(results.RESULTS, REPOSITORY).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run `python scripts/results.py`"


def test_both_demo_models_were_audited_alike() -> None:
    plain, hardened = (json.loads((results.RESULTS / f"{name}.audit.json").read_text()) for name in results.MODELS)
    assert plain["options"] == hardened["options"]
    assert plain["prompt_sets"] == hardened["prompt_sets"]
    assert plain["options"]["thresholds"] == {
        field: getattr(AuditThresholds(), field) for field in AuditThresholds.__slots__
    }


def test_no_measurement_holds_a_reply() -> None:
    for path in results.RESULTS.iterdir():
        assert "completion" not in path.read_text().replace("completions", "").replace("max_new_tokens", "")
        longest = max(len(text) for text in strings(json.loads(path.read_text())))
        assert longest < 200, path.name


def strings(value: object) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in strings(item)]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_a_block_is_replaced_and_nothing_else() -> None:
    text = (
        "a\n<!-- results: x -->\nold\nolder\n<!-- end of results -->\nb\n<!-- results: y -->\n<!-- end of results -->\n"
    )
    assert results.with_block(text, "x", r"new \1") == text.replace("old\nolder", r"new \1")
    assert results.with_block(results.with_block(text, "y", "1"), "y", "").replace("\n\n", "\n") == text
    for broken in ("", text + text):
        with pytest.raises(ValueError, match="x"):
            results.with_block(broken, "x", "new")


def test_perplexity_is_that_of_nats() -> None:
    assert float(results.perplexity(math.log(12.5))) == 12.5


def test_new_measurements_are_taken_from_where_the_commands_leave_them(tmp_path: Path) -> None:
    demo, audits, taken = (tmp_path / name for name in ("demo", "audits", "results"))
    demo.mkdir()
    audits.mkdir()
    (demo / "report.json").write_text((results.RESULTS / "demo.json").read_text())
    for name in results.MODELS:
        (audits / f"{name}.audit.json").write_text((results.RESULTS / f"{name}.audit.json").read_text())
    results.take(demo, audits, results.RESULTS / "variants.json", taken)
    assert {path.name: path.read_text() for path in taken.iterdir()} == {
        path.name: path.read_text() for path in results.RESULTS.iterdir()
    }
