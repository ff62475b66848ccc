"""An edit whose strengths and directions differ by layer: in the files, proved, undone, as an adapter, and refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import Direction, encode_rows, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.model_card import what_was_done
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.record import read_record
from abliterate.editing.strengths import Strengths
from abliterate.errors import InputError
from abliterate.release.file_checks import verify_files
from abliterate.release.reverting import revert_checkpoint
from tests.support.loaded_models import load, stored, tree
from tests.support.tiny_models import D_MODEL, random_direction, save_tiny_model

ATTN, MLP = (0.0, 0.5, 1.0), (1.7, -0.4, 0.0)


@pytest.fixture(scope="module")
def direction() -> Direction:
    return make_direction(mean_difference=5 * random_direction())


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("strengths") / "base", max_shard_size="20KB")


def own_directions(n_layers: int = 3) -> torch.Tensor:
    rows = torch.stack([random_direction(seed=20 + layer) for layer in range(n_layers)]).double()
    return rows / rows.norm(dim=1, keepdim=True)


def strengths_for(direction: Direction, *, own: bool, embed: float = 0.0) -> Strengths:
    directions = encode_rows(own_directions().numpy()) if own else None
    return Strengths(
        file="s.json", direction_sha256=direction.sha256, embed=embed, attn=ATTN, mlp=MLP, directions=directions
    )


def by_hand(base: Path, direction: Direction, *, own: bool, embed: float) -> dict[str, torch.Tensor]:
    found = {name: tensor.double() for name, tensor in stored(base).items()}
    rows = own_directions() if own else direction.vector.double()[None].expand(3, -1)
    for layer in range(3):
        for role, module in (("attn", "self_attn.o_proj"), ("mlp", "mlp.down_proj")):
            strength, name = (ATTN if role == "attn" else MLP)[layer], f"model.layers.{layer}.{module}.weight"
            found[name] = found[name] - strength * torch.outer(rows[layer], rows[layer] @ found[name])
    name = "model.embed_tokens.weight"
    found[name] = found[name] - embed * torch.outer(found[name] @ rows[0], rows[0])
    return found


@pytest.mark.parametrize("own", [False, True], ids=["the direction", "each layer's own"])
@pytest.mark.parametrize("embed", [0.0, 0.3])
def test_each_writer_is_edited_as_far_as_its_layer_and_role_say(tmp_path, base, direction, own, embed):
    options = EditOptions(strengths=strengths_for(direction, own=own, embed=embed))
    report = orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    wanted, before = by_hand(base, direction, own=own, embed=embed), stored(base)
    for name, tensor in stored(tmp_path / "out").items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=1e-6, atol=1e-6)
    edited = {tensor.name for tensor in report.tensors}
    assert len(edited) == 4 + bool(embed)
    same = {name for name, tensor in stored(tmp_path / "out").items() if torch.equal(tensor, before[name])}
    assert same == before.keys() - edited

    record = read_record(tmp_path / "out")
    check = verify_files(record, base=open_checkpoint(base))
    assert check.failures == ()
    assert len(check.tensors) == len(edited)
    assert verify_files(record, base=None).failures == ()
    card = what_was_done(record.content)
    assert "by layer and role, -0.4 to 1.7" in card
    assert ("each layer's own" in card) == own

    revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "restored")
    assert tree(tmp_path / "restored") == tree(base)


def test_the_adapter_is_the_same_edit(tmp_path, base, direction):
    options = EditOptions(strengths=strengths_for(direction, own=True))
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    write_adapter(source=base, direction=direction, output=tmp_path / "adapter", options=options)
    merged = PeftModel.from_pretrained(load(base), tmp_path / "adapter").merge_and_unload().state_dict()
    for name, tensor in load(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6)


def test_a_record_whose_strengths_were_changed_does_not_pass(tmp_path, base, direction):
    options = EditOptions(strengths=strengths_for(direction, own=True))
    orthogonalize_checkpoint(source=base, direction=direction, output=tmp_path / "out", options=options)
    path = tmp_path / "out" / "abliteration.json"
    for change in (
        lambda strengths: strengths["mlp"].__setitem__(0, 1.0),
        lambda strengths: strengths["mlp"].__setitem__(0, 0.0),
        lambda strengths: strengths.update(directions=None),
    ):
        content = json.loads(path.read_text())
        change(content["options"]["strengths"])
        (tmp_path / "out" / "abliteration.json").write_text(json.dumps(content))
        assert verify_files(read_record(tmp_path / "out"), base=open_checkpoint(base), hashes=False).failures
        # As it was, for the next change.
        content["options"]["strengths"] = json.loads(json.dumps(_plain(options.strengths)))
        path.write_text(json.dumps(content))
    assert not verify_files(read_record(tmp_path / "out"), base=open_checkpoint(base), hashes=False).failures


def _plain(strengths: Strengths | None) -> dict[str, object]:
    assert strengths is not None
    names = ("file", "direction_sha256", "embed", "attn", "mlp", "directions", "arguments", "prompt_hashes")
    return {name: getattr(strengths, name) for name in names}


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path, base, direction):
    fits = strengths_for(direction, own=True)
    other = make_direction(mean_difference=random_direction(seed=99))
    wide = encode_rows(torch.eye(3, D_MODEL + 1, dtype=torch.float64).numpy())
    for given, strengths, message in (
        (other, fits, "another direction"),
        ([direction, other], fits, "another direction"),
        (direction, _with(fits, attn=(1.0,), mlp=(1.0,)), "strengths for 1 layers"),
        (direction, _with(fits, directions=wide), "one unit vector of"),
        (direction, _with(fits, directions=encode_rows(2 * own_directions().numpy())), "one unit vector of"),
    ):
        with pytest.raises(InputError, match=message):
            orthogonalize_checkpoint(
                source=base, direction=given, output=tmp_path / "out", options=EditOptions(strengths=strengths)
            )
    assert not list(tmp_path.iterdir())


def _with(strengths: Strengths, **changes: object) -> Strengths:
    return Strengths(**(_plain(strengths) | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [{"strength": 0.5}, {"layers": (0, 1)}, {"components": ("attn",)}, {"preserve_norms": True}, {"add": 1.0}],
)
def test_nothing_else_says_what_is_edited(direction, options):
    with pytest.raises(InputError, match="--strengths says what is edited"):
        EditOptions(strengths=strengths_for(direction, own=False), **options)
