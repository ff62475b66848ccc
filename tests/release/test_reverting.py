"""Every file of the base comes back with its SHA-256; a base that is not the one is told apart."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from abliterate.directions import Direction, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import InputError, VerificationError
from abliterate.release.reverting import revert_checkpoint
from tests.support.conformance import build_model
from tests.support.loaded_models import stored, tree
from tests.support.tiny_models import random_direction, save_tiny_model


@pytest.fixture(scope="module")
def direction() -> Direction:
    return make_direction(mean_difference=5 * random_direction())


@pytest.fixture
def base(tmp_path) -> Path:
    path = save_tiny_model(tmp_path / "base", tied=True, dtype=torch.bfloat16, max_shard_size="20KB")
    (path / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (path / "original").mkdir()
    (path / "original" / "params.json").write_text("{}")
    return path


def sha256s(path: Path) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in tree(path).items()}


@pytest.mark.parametrize(
    "options",
    [
        EditOptions(),
        EditOptions(tied="untie"),
        EditOptions(layers=(1, 2), strength=0.5),
        EditOptions(preserve_norms=True),
    ],
    ids=str,
)
def test_a_checkpoint_comes_back_with_every_hash(tmp_path, base, direction, options):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    edited = sha256s(tmp_path / "out")
    report = revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert sha256s(tmp_path / "restored") == sha256s(base)
    assert {name: file.sha256 for name, file in report.files.items()} == sha256s(base)
    assert sha256s(tmp_path / "out") == edited
    assert report.bytes_compared > 0
    assert report.bytes_total == sum(file.bytes for file in report.files.values())
    assert (report.format, report.base, report.base_revision) == ("checkpoint", str(base), None)


def test_a_record_from_before_the_hash_of_the_config_had_its_name(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    path = tmp_path / "out" / "abliteration.json"
    record = json.loads(path.read_text())
    record["base"]["config_sha256"] = record["base"].pop("config_file_sha256")
    path.write_text(json.dumps(record))
    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert sha256s(tmp_path / "restored") == sha256s(base)


def test_an_addition_comes_back(tmp_path, base):
    direction = make_direction(mean_difference=5 * random_direction(), metadata={"layer": 1})
    options = EditOptions(add=-1.0)
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    assert sha256s(tmp_path / "out") != sha256s(base)
    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert sha256s(tmp_path / "restored") == sha256s(base)


def test_an_adapter_needs_the_base_alone(tmp_path, base, direction):
    write_adapter(source=base, direction=direction, output=tmp_path / "adapter")
    report = revert_checkpoint(checkpoint=tmp_path / "adapter", output=tmp_path / "restored")
    assert sha256s(tmp_path / "restored") == sha256s(base)
    assert (report.format, report.bytes_compared) == ("adapter", 0)


def test_a_base_that_moved_is_named(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="--base"):
        revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored", base=moved)
    assert sha256s(tmp_path / "restored") == sha256s(moved)


def test_an_edit_of_an_edit_goes_back_by_one_step(tmp_path, base, direction):
    first = EditOptions(components=("attn",))
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "one", options=first)
    orthogonalize_checkpoint(source=tmp_path / "one", direction=direction, output=tmp_path / "two")
    revert_checkpoint(checkpoint=tmp_path / "two", output=tmp_path / "restored")
    assert sha256s(tmp_path / "restored") == sha256s(tmp_path / "one")


def change_norm(path: Path) -> None:
    single = next(iter(sorted(path.glob("*.safetensors"))))
    shards = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    name = "model.norm.weight"
    single = path / shards[name]
    tensors = {key: tensor for key, tensor in stored(path).items() if shards[key] == single.name}
    tensors[name] = tensors[name] + 1
    save_file(tensors, single, metadata={"format": "pt"})


@pytest.mark.parametrize("changed", ["base", "out"])
def test_an_unedited_tensor_that_differs_is_named_and_nothing_is_written(tmp_path, base, direction, changed):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    change_norm(tmp_path / changed)
    for dry_run in (True, False):
        with pytest.raises(VerificationError, match=r"model\.norm\.weight.*nothing was restored"):
            revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored", dry_run=dry_run)
    assert not (tmp_path / "restored").exists()


def test_a_side_file_that_differs_is_named(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    (base / "tokenizer.json").write_bytes(b"{}")
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")


def test_another_model_is_no_base(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    other = save_tiny_model(tmp_path / "other", intermediate_size=64)
    with pytest.raises(InputError, match="is not the model that was edited"):
        revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored", base=other)


def test_a_dry_run_compares_and_writes_nothing_and_targets_are_kept(tmp_path, base, direction):
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out")
    before = tree(tmp_path)
    report = revert_checkpoint(checkpoint=tmp_path / "out", output=None, dry_run=True)
    assert report.dry_run
    assert report.bytes_compared > 0
    assert report.files == {}
    for output, match in ((None, "no output directory"), (tmp_path / "out", "is, contains"), (base, "is, contains")):
        with pytest.raises(InputError, match=match):
            revert_checkpoint(checkpoint=tmp_path / "out", output=output, overwrite=True)
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.json").write_text("{}")
    with pytest.raises(InputError, match="--overwrite"):
        revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "kept")
    (tmp_path / "kept" / "config.json").unlink()
    (tmp_path / "kept").rmdir()
    assert tree(tmp_path) == before


def test_a_partial_edit_comes_back_with_every_hash(tmp_path):
    build_model("gemma3n_text").save_pretrained(tmp_path / "base", max_shard_size="60KB")
    orthogonalize_checkpoint(
        source=tmp_path / "base",
        direction=make_direction(mean_difference=random_direction(64)),
        output=tmp_path / "out",
        options=EditOptions(partial=True),
    )
    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert sha256s(tmp_path / "restored") == sha256s(tmp_path / "base")
