"""The results in the documents are what the script makes of the measurements that lie in the repository."""

import json
import math
from pathlib import Path

import pytest

from abliterate.evaluation.audit_report import AuditThresholds
from benchmarks.extended_refusal.models import SUBJECTS
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
    real = None
    if (results.RESULTS / results.REAL).is_file():
        real = tmp_path / "real"
        real.mkdir()
        (real / "report.json").write_text((results.RESULTS / results.REAL).read_text())
    procedures = tmp_path / "procedures"
    procedures.mkdir()
    for found in json.loads((results.RESULTS / results.PROCEDURES).read_text()):
        (procedures / f"{found['model']}.result.json").write_text(json.dumps(found))
    variants = (results.RESULTS / name for name in ("variants.json", "variants.real.json"))
    results.take(demo, audits, next(variants), taken, real, procedures, next(variants))
    # `benchmarks.quantisation` files its own.
    assert {path.name: path.read_text() for path in taken.iterdir()} == {
        path.name: path.read_text() for path in results.RESULTS.iterdir() if path.name != results.QUANTISATION
    }


def test_a_model_aligned_by_its_makers_has_its_block_before_and_after_it_is_measured(tmp_path: Path) -> None:
    assert results.real_block(None) == results.NOT_MEASURED
    demo = json.loads((results.RESULTS / "demo.json").read_text())
    harmless = {"rate": 0.5, "low": 0.25, "high": 0.75, "n": 8, "degenerate": 0}
    report = demo | {
        "added": {"before": harmless | {"rate": 0.0}, "after": harmless},
        "verified": {"bfloat16": True, "float32": False},
        "source": {"model": "org/model", "from": "parts in the package index", "sha256": "0123456789abcdef"},
    }
    block = results.real_block(report)
    assert "| harmless prompts, direction added (8) | 0.0 % [25.0, 75.0] | 50.0 % [25.0, 75.0] |\n\nPosition" in block
    assert block.startswith(results.demo_block(demo).split("\n\n")[0])
    assert block.endswith(
        "`verify`: bfloat16 passed, float32 FAILED. org/model, from parts in the package index "
        "(SHA-256 0123456789ab...)."
    )
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "report.json").write_text(json.dumps(report))
    results.take(None, None, None, tmp_path / "results", tmp_path / "real")
    assert json.loads((tmp_path / "results" / results.REAL).read_text()) == report


def test_a_procedure_that_finds_nothing_has_a_line_without_numbers() -> None:
    counts = {"n": 64, "refused": 16, "not_complied": 17, "coherent": 63, "overview": 0, "rationale": 8}
    none = {"procedure": "ours", "position": None, "layer": None, "remark": "none is found", "counts": None}
    near = {"procedure": "theirs", "position": -1, "layer": 16, "remark": "kl", "counts": counts}
    block = results.procedures_block([{"model": "plain", "lines": [none, near]}]).splitlines()
    assert block[2] == "| plain | ours | none is found |  |  |  |  |  |"
    shares = "25.0 % [16.0, 36.8] | 26.6 % [17.3, 38.5] | 98.4 % [91.7, 99.7] | 0 % | 12 %"
    assert block[3] == f"| plain | theirs | -1, 16 (kl) | {shares} |"
    assert len({line.count("|") for line in block}) == 1


def test_the_models_of_the_procedures_are_those_of_their_benchmark() -> None:
    assert tuple(SUBJECTS) == results.PROCEDURE_MODELS


def test_results_of_procedures_are_taken_in_the_order_of_the_models(tmp_path: Path) -> None:
    for name in ("aligned", "plain"):
        (tmp_path / f"{name}.result.json").write_text(json.dumps({"model": name, "lines": []}))
    results.take(None, None, None, tmp_path / "taken", procedures=tmp_path)
    assert [one["model"] for one in json.loads((tmp_path / "taken" / "procedures.json").read_text())] == [
        "plain",
        "aligned",
    ]


def test_models_that_were_not_tried_anew_stay_as_they_are_filed(tmp_path: Path) -> None:
    (tmp_path / "procedures.json").write_text(json.dumps([{"model": "plain", "n": 1}, {"model": "aligned", "n": 1}]))
    (tmp_path / "aligned.result.json").write_text(json.dumps({"model": "aligned", "n": 2}))
    results.take(None, None, None, tmp_path, procedures=tmp_path)
    assert [one["n"] for one in json.loads((tmp_path / "procedures.json").read_text())] == [1, 2]


def test_the_number_format_of_a_model_is_said_where_it_is_not_float32() -> None:
    line = {"procedure": "ours", "position": None, "layer": None, "remark": "none is found", "counts": None}
    block = results.procedures_block([{"model": "plain", "dtype": "bfloat16", "lines": [line]}])
    assert "| plain, in bfloat16 | ours |" in block


def test_variants_on_the_aligned_model_are_filed_beside_those_on_the_demo(tmp_path: Path) -> None:
    filed = json.loads((results.RESULTS / "variants.json").read_text())
    (tmp_path / "new.json").write_text(json.dumps(filed))
    results.take(None, None, None, tmp_path, variants_real=tmp_path / "new.json")
    assert json.loads((tmp_path / "variants.real.json").read_text()) == filed
    assert not (tmp_path / "variants.json").exists()
