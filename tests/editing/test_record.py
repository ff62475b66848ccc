"""The record: what is written is what is read back, and what does not hold is said."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abliterate.cli.output import to_plain
from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import plan_layout, read_layout
from abliterate.editing.record import AbliterationRecord, check_hashes, check_sizes, read_record, write_record
from abliterate.errors import AbliterateError, InputError, VerificationError
from abliterate.release.options import VerificationOptions
from abliterate.release.verification import verify_checkpoint
from tests.support.fake_hub import write_checkpoint
from tests.support.paths import SOURCES
from tests.support.tiny_models import random_direction, save_tiny_model

SHARD = "model-00002-of-00002.safetensors"


@pytest.fixture
def out(tmp_path):
    return write_checkpoint(tmp_path / "out")


def edit(out: Path, change: Callable[[dict[str, Any]], object]) -> None:
    record = json.loads((out / "abliteration.json").read_text())
    change(record)
    (out / "abliteration.json").write_text(json.dumps(record))


def refused(kind: type[AbliterateError], match: str, call: Callable[[], object]) -> None:
    with pytest.raises(kind, match=match) as error:
        call()
    assert "\n" not in str(error.value)


def test_what_is_written_is_read_back(tmp_path):
    direction = make_direction(mean_difference=random_direction(), metadata={"layer": 1})
    base, out = save_tiny_model(tmp_path / "base"), tmp_path / "out"
    report = orthogonalize_checkpoint(source=base, direction=direction, output=out)
    record = read_record(out)
    assert record.content == json.loads(json.dumps(report.record()))
    assert record.files == {**report.shards, **report.side_files}
    assert record.files.keys() == {path.name for path in out.iterdir()} - {"abliteration.json"}
    assert record.base_evaluation is None
    check_sizes(record)
    check_hashes(record)
    with pytest.raises(FileExistsError):
        write_record(report, out)
    (tmp_path / "other").mkdir()
    write_record(dataclasses.replace(report, notes=("not part of the record",)), tmp_path / "other")
    assert (tmp_path / "other" / "abliteration.json").read_bytes() == (out / "abliteration.json").read_bytes()


# Scripts of others read these keys; a new one is a change of the format.
LISTED = ["name", "role", "layer", "residual_axis", "shape", "dtype", "shard"]
RECORDED = [*LISTED, "stored_as", "norm_chain", "kind", "component_before", "component_after", "survivor"]


def test_each_list_of_tensors_has_the_keys_that_it_always_had(tmp_path):
    base, out = save_tiny_model(tmp_path / "base", "gemma2"), tmp_path / "out"
    direction = make_direction(mean_difference=random_direction())
    report = orthogonalize_checkpoint(source=base, direction=direction, output=out)
    recorded = json.loads((out / "abliteration.json").read_text())["tensors"]
    assert json.loads(json.dumps(to_plain(report)))["tensors"] == recorded
    planned = to_plain(plan_layout(read_layout(model=str(base))))["tensors"]
    checked = to_plain(verify_checkpoint(checkpoint=out, options=VerificationOptions(quick=True)))["files"]["tensors"]
    assert len(planned) == len(checked) == len(recorded) == 7
    for plan, check, record in zip(planned, checked, recorded, strict=True):
        assert list(record) == RECORDED
        assert list(plan) == [*LISTED, "bytes", "norm_chain"]
        assert {key: plan[key] for key in [*LISTED, "norm_chain"]} == {
            key: record[key] for key in [*LISTED, "norm_chain"]
        }
        assert list(check) == [
            *("name", "role", "layer", "kind", "dtype", "component_before", "component_after", "survivor"),
            *("expected", "bound"),
        ]
        assert all(check[key] == record[key] for key in ("name", "role", "layer", "kind", "dtype"))
    assert recorded[-1] == {
        "name": "model.layers.2.self_attn.o_proj.weight",
        "role": "attn",
        "layer": 2,
        "residual_axis": 0,
        "shape": [32, 32],
        "dtype": "F32",
        "shard": "model.safetensors",
        "stored_as": [],
        "norm_chain": [
            {"weight": "model.layers.2.post_attention_layernorm.weight", "plus_one": True, "centered": False}
        ],
        "kind": "projected",
        **{key: recorded[-1][key] for key in RECORDED[-3:]},
    }


def test_no_directory(tmp_path):
    refused(InputError, "no such directory", lambda: read_record(tmp_path / "nowhere"))


def test_no_record(tmp_path):
    refused(InputError, r"no abliteration\.json; .*abliterate orthogonalize", lambda: read_record(tmp_path))


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "no JSON object"),
        ('{"format_version": 1}', "version 1 is not 2"),
        ("{}", "version None is not 2"),
    ],
)
def test_a_record_that_is_none(out, content, match):
    (out / "abliteration.json").write_text(content)
    refused(InputError, match, lambda: read_record(out))


@pytest.mark.parametrize("key", ["base", "directions", "shards", "side_files"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_an_incomplete_record(out, key, value):
    edit(out, lambda record: record.pop(key) if value is None else record.update({key: value}))
    refused(InputError, "is missing", lambda: read_record(out))


@pytest.mark.parametrize("entry", [{"bytes": 1}, {"sha256": "0"}, {"sha256": "0", "bytes": "1"}, [], None])
def test_an_entry_without_hash_or_size(out, entry):
    edit(out, lambda record: record["side_files"].update({"config.json": entry}))
    refused(InputError, r"no sha256 and bytes for config\.json", lambda: read_record(out))


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "a/../../b", "..\\secret"])
def test_paths_out_of_the_directory(out, path):
    edit(out, lambda record: record["side_files"].update({path: {"bytes": 1, "sha256": "0"}}))
    refused(VerificationError, "outside the directory", lambda: read_record(out))


def test_a_record_and_an_evaluation_of_the_base_are_no_files_of_this_checkpoint(out):
    entries = {name: {"bytes": 1, "sha256": "0"} for name in ("abliteration.json", "evaluation.json")}
    before = read_record(out).files
    edit(out, lambda record: record["side_files"].update(entries))
    record = read_record(out)
    assert record.files == before
    assert record.base_evaluation is not None
    assert record.base_evaluation.sha256 == "0"
    check_sizes(record)


class TestFiles:
    @pytest.fixture
    def record(self, out) -> AbliterationRecord:
        record = read_record(out)
        check_sizes(record)
        check_hashes(record)
        return record

    def test_a_missing_file(self, out, record):
        (out / SHARD).unlink()
        refused(VerificationError, f"{SHARD}: missing, but", lambda: check_sizes(record))

    def test_a_longer_file(self, out, record):
        with (out / SHARD).open("ab") as stream:
            stream.write(b"x")
        refused(VerificationError, r"bytes, not \d+ as in", lambda: check_sizes(record))

    @pytest.mark.parametrize("name", [SHARD, "config.json", "README.md"])
    def test_a_changed_byte(self, out, record, name):
        data = bytearray((out / name).read_bytes())
        data[-2] ^= 1
        (out / name).write_bytes(data)
        check_sizes(record)
        refused(VerificationError, f"{name}: its SHA-256 is not the one", lambda: check_hashes(record))


def test_reading_needs_no_torch():
    code = "import sys; import abliterate.editing.record; print({'torch', 'safetensors'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
