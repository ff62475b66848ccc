"""What goes in a push and what does not, decided from the record and the directory alone."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.checkpoints.provenance import values_sha256
from abliterate.errors import AbliterateError, InputError, VerificationError
from abliterate.progress import SILENT
from abliterate.release.push_package import find_base_card_facts, read_push_package, stage_package
from tests.support.fake_hub import evaluation_report, write_checkpoint

SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
OF_THE_BASE = {"model.safetensors.index.json", "config.json", "tokenizer.json", "LICENSE"}


@pytest.fixture
def out(tmp_path):
    return write_checkpoint(tmp_path / "out")


def edit_record(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((out / "abliteration.json").read_text())
    change(record)
    (out / "abliteration.json").write_text(json.dumps(record))


def add_side_file(out: Path, name: str, data: bytes) -> None:
    (out / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_record(out, lambda record: record["side_files"].update({name: entry}))


def evaluated(out: Path) -> bool:
    return read_push_package(out).evaluation is not None


def refused(kind: type[AbliterateError], match: str, out: Path, evaluation: Path | None = None) -> str:
    with pytest.raises(kind, match=match) as error:
        read_push_package(out, evaluation=evaluation)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_recorded_files_the_record_and_a_card_go(out):
    package = read_push_package(out)
    assert package.sources() == {
        **{name: out / name for name in {*SHARDS, *OF_THE_BASE, "abliteration.json"}},
        "README.md": None,
    }
    assert (package.left_out, package.evaluation) == ((), None)


def test_files_of_ones_own_and_unedited_weights_stay(out):
    add_side_file(out, "pytorch_model.bin", b"base")
    (out / "notes.txt").write_text("mine")
    package = read_push_package(out)
    assert package.left_out == ("notes.txt", "pytorch_model.bin")
    assert not package.sources().keys() & set(package.left_out)


def test_weights_that_the_record_does_not_name(out):
    (out / "adapter.PT").write_bytes(b"x")
    assert "adapter.PT" in refused(VerificationError, "does not name", out)


def test_a_recorded_file_must_be_there_whole(out):
    (out / "tokenizer.json").write_text("{}")
    refused(VerificationError, "bytes, not", out)


def test_staging_puts_the_card_in_place_of_the_bases_and_leaves_that(out, tmp_path):
    before = (out / "README.md").read_text()
    stage_package(read_push_package(out), card="# Card\n", staging=tmp_path / "staging")
    staged = {path.name: path.read_bytes() for path in (tmp_path / "staging").iterdir()}
    assert staged.pop("README.md") == b"# Card\n"
    assert staged == {name: (out / name).read_bytes() for name in {*SHARDS, *OF_THE_BASE, "abliteration.json"}}
    assert (out / "README.md").read_text() == before


def test_the_licence_is_that_of_the_card_beside_the_checkpoint(out):
    facts = find_base_card_facts(read_push_package(out), online=False, progress=SILENT)
    assert facts is not None
    assert facts.license == "apache-2.0"


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no such file"),
        ("{", "cannot be read as JSON"),
        ("{}", "no refusal rates"),
        (json.dumps(evaluation_report(intervention="ablate")), "intervention 'ablate', not these weights"),
    ],
)
def test_an_evaluation_that_cannot_be_used(out, tmp_path, content, match):
    path = tmp_path / "measured.json"
    if content is not None:
        path.write_text(content)
    assert str(path) in refused(InputError, match, out, path)


def test_an_evaluation_of_another_model(out, tmp_path):
    other = write_checkpoint(tmp_path / "other")
    (out / "evaluation.json").write_text(json.dumps(evaluation_report(model=str(other))))
    assert evaluated(out)
    edit_record(other, lambda record: record["shards"].popitem())
    refused(InputError, f"measured {other}, not {out}", out)
    (other / "abliteration.json").unlink()
    refused(InputError, f"measured {other}, not {out}", out)


def test_an_evaluation_says_which_weights_it_measured(out):
    """What was measured may lie on another machine by now, or under another name."""
    shards = json.loads((out / "abliteration.json").read_text())["shards"]
    evaluation = evaluation_report(model="/gone/out", shards_sha256=values_sha256(shards))
    (out / "evaluation.json").write_text(json.dumps(evaluation))
    assert evaluated(out)
    for other in ("0" * 64, None):
        (out / "evaluation.json").write_text(json.dumps(evaluation | {"shards_sha256": other}))
        refused(InputError, f"measured /gone/out, not {out}", out)
    # Merged, an adapter has no record.
    edit_record(out, lambda record: record.update(format="adapter"))
    assert evaluated(out)


def test_the_evaluation_of_the_base_is_not_taken_for_this_ones(out):
    add_side_file(out, "evaluation.json", json.dumps(evaluation_report()).encode())
    assert not evaluated(out)
    (out / "evaluation.json").write_text(json.dumps(evaluation_report(kl_harmless=1.0)))
    assert evaluated(out)
