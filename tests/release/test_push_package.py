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
from abliterate.release.push_package import find_base_card_facts, read_push_package, stage_package, without_folders
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
    (out / name).parent.mkdir(exist_ok=True)
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


def of_a_local_base(out: Path) -> Path:
    """Return the folder of a base that is local."""
    folder = out.parent / "folder"
    edit_record(out, lambda record: record["base"].update(model=str(folder / "base"), revision=None))
    return folder


def test_logs_of_training_stay_and_are_not_named(out):
    """TensorBoard puts the host's name into the names of its files."""
    add_side_file(out, "runs/events.out.tfevents.1.host.2.0", b"host")
    package = read_push_package(out)
    assert package.left_out == ("runs/events.out.tfevents.1.host.2.0",)
    assert package.left_out[0] not in package.sources()
    assert b"tfevents" not in package.rewritten()["abliteration.json"]


def test_the_configs_of_a_local_base_go_without_its_folders(out):
    folder = of_a_local_base(out)
    config = {"model_type": "llama", "_name_or_path": "/elsewhere/run", "text_config": {"_name_or_path": "org/name"}}
    add_side_file(out, "config.json", json.dumps({**config, "vision_config": {"path": f"{folder}/v"}}).encode())
    add_side_file(out, "tokenizer_config.json", json.dumps({"tokenizer_file": f"{Path.home()}/t.json"}).encode())
    add_side_file(out, "generation_config.json", json.dumps({"a": ["/usr/share/x", f"{Path.home()}x/y"]}).encode())
    add_side_file(out, "odd.json", b"{" + str(folder).encode() + b"}")
    rewritten = read_push_package(out).rewritten()
    assert rewritten.keys() == {"config.json", "tokenizer_config.json", "odd.json", "abliteration.json"}
    assert rewritten["odd.json"] == b"{folder}"
    assert json.loads(rewritten["config.json"]) == {
        **config,
        "_name_or_path": "run",
        "vision_config": {"path": "v"},
    }
    assert json.loads(rewritten["tokenizer_config.json"]) == {"tokenizer_file": "t.json"}
    record = json.loads(rewritten["abliteration.json"])
    assert record["config_changes"] == {"_name_or_path": "run", "vision_config.path": "v"}
    for name in ("config.json", "tokenizer_config.json", "odd.json"):
        digest = hashlib.sha256(rewritten[name]).hexdigest()
        assert record["side_files"][name] == {"sha256": digest, "bytes": len(rewritten[name])}


def test_what_a_base_on_the_hub_says_of_folders_is_public(out):
    add_side_file(out, "config.json", b'{"_name_or_path": "/elsewhere/run"}')
    add_side_file(out, "odd.bytes", b"\xff" + str(Path.home()).encode() + b"/x")
    assert read_push_package(out).rewritten() == {}


def test_other_texts_of_a_local_base_and_what_is_no_text(out):
    folder = of_a_local_base(out)
    add_side_file(out, "merge.yml", f"model: {folder}/run/1 # not {folder}s/run\n".encode())
    add_side_file(out, "trainer.json", json.dumps({"command": f"train --out {folder}/x"}).encode())
    rewritten = read_push_package(out).rewritten()
    assert rewritten["merge.yml"] == b"model: run/1 # not folders/run\n"
    assert json.loads(rewritten["trainer.json"]) == {"command": "train --out x"}
    assert "config_changes" not in json.loads(rewritten["abliteration.json"])
    add_side_file(out, "tokenizer.model", b"\xff" + str(folder).encode() + b"/corpus.txt\x00")
    with pytest.raises(
        VerificationError, match=r"tokenizer\.model: names .*folder, a folder of this machine, and is no"
    ):
        read_push_package(out).rewritten()


def test_a_vocabulary_is_never_rewritten(out):
    folder = of_a_local_base(out)
    add_side_file(out, "merges.txt", b"/d ata/\n")
    assert "merges.txt" not in read_push_package(out).rewritten()
    add_side_file(out, "vocab.json", json.dumps({f"{folder}/": 7}).encode())
    with pytest.raises(VerificationError, match=r"vocab\.json: names .*folder, a folder of this machine, and is no"):
        read_push_package(out).rewritten()


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ({"model": "folder/m", "revision": None}, {"model": "m", "revision": None}),
        ({"model": "org/m", "revision": "c"}, {"model": "org/m", "revision": "c"}),
        (
            {"arguments": ["--server", "https://me@host:80/v1?k=1", "~/x.txt:goal", "org/set:train"]},
            {"arguments": ["--server", "https://HOST/v1", "x.txt:goal", "org/set:train"]},
        ),
        (
            {"server": {"url": "http://[bad", "described": {"root": "/home/me/m"}}},
            {"server": {"url": "HOST", "described": {"root": "m"}}},
        ),
        ({"name": str(Path.home())}, {"name": "~"}),
        ({"other": "/home/me/m"}, {"other": "/home/me/m"}),
    ],
)
def test_what_names_a_folder_is_its_last_part(value, told):
    assert without_folders(value) == told


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
