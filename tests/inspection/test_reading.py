"""`inspect` on pairs of checkpoints: what comes along, what is hostile, what is read at all."""

import json
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.checkpoints.model_source import ModelSource
from abliterate.directions import load_direction, make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import AbliterateError, CheckpointError, DirectionError, InputError
from abliterate.inspection.claims import read_claims
from abliterate.inspection.findings import part_of
from abliterate.inspection.pair_report import PARTS
from abliterate.inspection.reading import Inspection, inspect_model
from abliterate.inspection.sources import resolve_pair
from abliterate.inspection.verdict import thresholds
from tests.support.changed_models import D_MODEL, N_LAYERS, SIZES, changed, each_writer, noise, project
from tests.support.fake_hub import FakeHub
from tests.support.tiny_models import random_direction, save_tiny_llama, save_tiny_model


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(path: Path) -> ModelSource:
    return ModelSource(path=path, name=path.name, revision=None)


def inspected(model: Path, base: Path | None = None, *directions: Path) -> Inspection:
    return inspect_model(model=source(model), base=None if base is None else source(base), directions=directions)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    work = tmp_path_factory.mktemp("pair")
    base = save_tiny_model(work / "base", dtype=torch.bfloat16, **SIZES)
    make_direction(mean_difference=random_direction(D_MODEL)).save(work / "r.safetensors")
    orthogonalize_checkpoint(source=base, direction=work / "r.safetensors", output=work / "out")
    return work


@pytest.fixture
def work(kept, tmp_path):
    shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
    return tmp_path


def edit_record(work: Path, change) -> None:
    path = work / "out" / "abliteration.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_recovered_direction_is_a_direction_file_and_its_cosine_is_told(work):
    found = inspected(work / "out", work / "base", work / "r.safetensors")
    pair = found.report.pair
    assert pair.directions.cosines[0] > 0.9999
    ((added, direction),) = found.directions().items()
    assert added == ""
    direction.save(work / "again.safetensors")
    again = load_direction(work / "again.safetensors", d_model=D_MODEL)
    # A given direction lends its sign.
    assert float(again.vector.double() @ random_direction(D_MODEL)) > 0.9999
    assert again.metadata["recovered"]["tensors"] == 7
    assert found.report.left < 0.01
    orthogonalize_checkpoint(source=work / "base", direction=work / "again.safetensors", output=work / "second")
    assert inspected(work / "second", work / "base").report.verdict == "directional"


def test_directions_of_layers_are_written_a_file_each(work):
    vectors = [random_direction(D_MODEL, seed=20 + layer) for layer in range(N_LAYERS)]
    edit = each_writer(
        lambda w, layer: project(w, vectors[layer]), which=re.compile(r"o_proj\.weight|down_proj\.weight")
    )
    changed(work / "base", work / "own", edit)
    make_direction(mean_difference=-vectors[1]).save(work / "second.safetensors")
    found = inspected(work / "own", work / "base", work / "second.safetensors")
    pair = found.report.pair
    assert (pair.verdict, pair.directions.scope, pair.directions.disagreeing) == ("directional", "per_layer", ())
    assert pair.directions.cosines[0] > 0.9999
    assert all(tensor.cosine > 0.9999 for tensor in pair.changed)
    made = found.directions()
    assert list(made) == ["layer0", "layer1", "layer2"]
    assert [each.metadata["recovered"]["layer"] for each in made.values()] == [0, 1, 2]
    for direction, vector in zip(made.values(), vectors, strict=True):
        assert abs(float(direction.vector.double() @ vector)) > 0.9999
    # A given direction lends its sign to what is like it.
    assert float(made["layer1"].vector.double() @ vectors[1]) < 0


def test_a_merge_lies_on_the_line_between_both(work):
    changed(work / "base", work / "tuned", noise(0.1))
    tuned = load_file(work / "tuned" / "model.safetensors")
    changed(
        work / "base", work / "merged", lambda w: {n: 0.7 * each + 0.3 * tuned[n].double() for n, each in w.items()}
    )
    changed(work / "base", work / "other", noise(0.03, seed=9))
    whole = moved(work / "tuned", work / "base")
    for model, is_merge in (("merged", True), ("other", False)):
        here, there = moved(work / model, work / "base"), moved(work / model, work / "tuned")
        for part in ("embed", "attn", "mlp", "reader", "head"):
            assert here[part] / whole[part] == pytest.approx(0.3, abs=0.01)
            assert ((here[part] + there[part]) / whole[part] < 1.01) == is_merge


def moved(model: Path, base: Path) -> dict[str, float]:
    pair = inspected(model, base).report.pair
    assert pair.verdict == "fine_tuned"
    return {part.part: part.change for part in pair.parts}


def test_parts_say_what_was_changed(work):
    pair = inspected(work / "out", work / "base").report.pair
    assert {part.part: (part.tensors, part.changed) for part in pair.parts} == {
        "embed": (1, 1), "attn": (3, 3), "mlp": (3, 3), "head": (1, 0), "reader": (16, 0), "norm": (6, 0),
    }  # fmt: skip
    assert [part.part for part in pair.parts] == [part for part in PARTS if part in {p.part for p in pair.parts}]
    assert pair.thresholds == thresholds()
    assert (pair.shards, pair.shards_changed) == (1, 1)
    assert part_of("model.vision_tower.layers.0.o_proj.weight", None, None)[0] == "tower"


@pytest.mark.parametrize(("change", "said"), [
    (lambda r: r["tensors"].pop(), "does not name 1 of the tensors"),
    (lambda r: r["tensors"].append({**r["tensors"][0], "name": "lm_head.weight"}), "names 1 .*lm_head.*which is not"),
    (lambda r: r["tensors"].append({**r["tensors"][0], "name": "nothing"}), "nothing.*which is not there"),
    (lambda r: r["options"].update(strength=0.5), "says strength 0.5"),
    (lambda r: r["options"].update(preserve_norms=True), "says that lengths were kept"),
    (lambda r: r["base"].update(config_file_sha256="0" * 64), "another config.json"),
    (lambda r: r["shards"]["model.safetensors"].update(bytes=7), "not 7"),
    (lambda r: r.update(format_version=9), "format version 9"),
])  # fmt: skip
def test_a_record_that_does_not_describe_the_bytes_is_named(work, change, said):
    assert inspected(work / "out", work / "base").report.record.problems == ()
    edit_record(work, change)
    problems = inspected(work / "out", work / "base").report.record.problems
    assert len(problems) == 1
    assert re.search(said, problems[0])


def test_another_direction_than_the_recorded_one_is_named(work):
    changed(work / "base", work / "plain", each_writer(lambda w, _: project(w, random_direction(D_MODEL, seed=3))))
    shutil.copy(work / "plain" / "model.safetensors", work / "out" / "model.safetensors")
    problems = inspected(work / "out", work / "base").report.record.problems
    assert any("directions are not" in problem for problem in problems)


def test_without_a_base_only_what_the_files_say_is_said(work):
    report = inspected(work / "out").report
    assert (report.base, report.verdict, report.exact, report.pair) == (None, None, None, None)
    # The direction is the record's.
    assert report.k == 1
    assert all(tensor.component < 0.01 * report.random for tensor in report.tensors)
    assert report.record.claims["tensors"] == 7
    bare = inspected(work / "base").report
    assert (bare.k, bare.random, bare.tensors, bare.record.record) == (0, None, (), None)
    with pytest.raises(InputError, match="nothing was held against a base"):
        inspected(work / "out").directions()


def test_the_card_is_read(work):
    card = '---\nbase_model: org/base\ntags:\n- abliterated\n- chat\n- "heretic\\x1b[2J"\n---\n'
    (work / "out" / "README.md").write_text(card)
    _, claims = read_claims(work / "out")
    assert claims.base_model == "org/base"
    assert claims.tags[0] == "abliterated"
    assert not any("\x1b" in tag for tag in claims.tags)


def test_config_and_other_files_that_differ_are_named(work):
    config = json.loads((work / "out" / "config.json").read_text())
    config |= {"rope_theta": 7.0, "transformers_version": "1"}
    (work / "out" / "config.json").write_text(json.dumps(config))
    for name in ("base", "out"):
        (work / name / "chat_template.jinja").write_text(name)
    pair = inspected(work / "out", work / "base").report.pair
    assert pair.config_changes == ("rope_theta",)
    assert "chat_template.jinja" in pair.files_changed


def weights(path: Path, change) -> None:
    found = load_file(path / "model.safetensors")
    change(found)
    save_file(found, path / "model.safetensors")


def test_a_tensor_that_is_missing_added_or_of_another_shape_is_no_projection(work):
    weights(work / "out", lambda w: w.pop("model.layers.1.input_layernorm.weight"))
    weights(work / "out", lambda w: w.update({"model.layers.1.extra.weight": torch.ones(4, 4)}))
    pair = inspected(work / "out", work / "base").report.pair
    assert (pair.verdict, pair.missing) == ("fine_tuned", ("model.layers.1.input_layernorm.weight",))
    assert pair.added == ("model.layers.1.extra.weight",)
    weights(work / "out", lambda w: w.update({"model.layers.0.mlp.gate_proj.weight": torch.ones(4, 4)}))
    pair = inspected(work / "out", work / "base").report.pair
    assert pair.reshaped == ("model.layers.0.mlp.gate_proj.weight",)


def test_another_architecture_is_unrelated(work):
    other = save_tiny_model(work / "gpt2", "gpt2")
    found = inspected(other, work / "base")
    assert found.report.verdict == "unrelated"
    with pytest.raises(InputError, match="no direction was recovered"):
        found.directions()


def in_one(parts: str, whole: str):
    first, *_ = names = parts.split()

    def change(made):
        for name in [each for each in made if f".{first}." in each]:
            stack = [made.pop(name.replace(f".{first}.", f".{part}.")) for part in names]
            made[name.replace(f".{first}.", f".{whole}.")] = torch.cat(stack)

    return change


def test_q_k_v_and_gate_up_in_one_are_compared_part_by_part_on_either_side(work):
    for parts, whole in (("q_proj k_proj v_proj", "qkv_proj"), ("gate_proj up_proj", "gate_up_proj")):
        weights(work / "out", in_one(parts, whole))
    report = inspected(work / "out", work / "base").report
    assert (report.verdict, report.exact) == ("directional", True)
    assert report.pair is not None
    assert (len(report.pair.fused), report.pair.missing, report.pair.added) == (2 * N_LAYERS, (), ())
    assert "compared part by part" in " ".join(report.pair.notes)
    back = inspected(work / "base", work / "out").report
    assert back.pair is not None
    assert (len(back.pair.fused), back.pair.missing) == (2 * N_LAYERS, ())

    def wrong_order(made):
        name = "model.layers.1.self_attn.qkv_proj.weight"
        made[name] = made[name].flip(0)

    weights(work / "out", wrong_order)
    assert inspected(work / "out", work / "base").report.verdict == "fine_tuned"


def test_what_cannot_be_paired_is_named_and_does_not_make_a_model_unrelated(work):
    """Most numbers are under names that nothing is known of; what is left of the model is the base's."""

    def hide(made):
        for name in [each for each in made if re.search("mlp|q_proj|k_proj", each)]:
            made[name.replace("layers", "blocks").replace("proj", "w")] = made.pop(name).reshape(-1)

    weights(work / "base", hide)
    found = inspected(work / "out", work / "base").report
    assert found.pair is not None
    assert found.verdict == "fine_tuned"
    assert "of the base's numbers have a place in the model" in found.pair.reason
    assert len(found.pair.missing) == len(found.pair.added) == 5 * N_LAYERS
    assert "were not paired" in " ".join(found.pair.notes)


def test_an_architecture_that_is_not_known_is_read_all_the_same(work):
    for name in ("base", "out"):
        config = json.loads((work / name / "config.json").read_text())
        (work / name / "config.json").write_text(json.dumps({**config, "model_type": "novel"}))
        weights(work / name, lambda w: w.update({"model.odd.thing": torch.ones(D_MODEL, D_MODEL)}))
    pair = inspected(work / "out", work / "base").report.pair
    assert (pair.verdict, pair.exact) == ("directional", False)
    assert any("not known" in note for note in pair.notes)


@pytest.mark.parametrize("side", ["base", "out"])
def test_what_cannot_be_read_is_one_line(work, side):
    weights(work / side, lambda w: w["model.layers.0.mlp.down_proj.weight"].fill_(float("nan")))
    with pytest.raises(CheckpointError, match=r"down_proj.*NaN"):
        inspected(work / "out", work / "base")
    file = work / side / "model.safetensors"
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 100)
    with pytest.raises(CheckpointError, match="damaged or incomplete"):
        inspected(work / "out", work / "base")
    file.unlink()
    with pytest.raises(AbliterateError, match=r"model.safetensors"):
        inspected(work / "out", work / "base")


def test_a_direction_of_another_width_is_refused(work):
    make_direction(mean_difference=random_direction(16)).save(work / "narrow.safetensors")
    for base in (None, work / "base"):
        with pytest.raises(DirectionError, match="16 entries"):
            inspected(work / "out", base, work / "narrow.safetensors")


def test_both_models_are_found(work):
    with resolve_pair(str(work / "out"), str(work / "base")) as pair:
        assert (pair.model.path, pair.base.path) == (work / "out", work / "base")
    with resolve_pair(str(work / "out"), None) as pair:
        assert pair.base is None
    with pytest.raises(InputError), resolve_pair(str(work / "out"), "./nowhere"):
        pass


def sharded(path: Path, where: Path) -> Path:
    """Store a checkpoint in four shards, each with what the others have not."""
    shutil.copytree(path, where)
    found = load_file(where / "model.safetensors")
    (where / "model.safetensors").unlink()
    names = sorted(found)
    parts = {
        f"model-{n:05d}-of-00004.safetensors": [
            name for index, name in enumerate(names) if index * 4 // len(names) == n - 1
        ]
        for n in range(1, 5)
    }
    for file, members in parts.items():
        save_file({name: found[name] for name in members}, where / file)
    weight_map = {name: file for file, members in parts.items() for name in members}
    (where / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return where


@pytest.mark.parametrize("local", ["neither", "model", "base"])
def test_of_models_on_the_hub_only_what_differs_is_downloaded(work, tmp_path, monkeypatch, local):
    base = sharded(work / "base", work / "base4")
    out = work / "out4"
    shutil.copytree(base, out)
    name = "model-00002-of-00004.safetensors"
    changed_weights = load_file(out / name)
    key = next(key for key in changed_weights if key.endswith(("down_proj.weight", "o_proj.weight")))
    changed_weights[key] = project(changed_weights[key].double()).bfloat16()
    save_file(changed_weights, out / name)
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        for repo, path in (("org/base", base), ("org/out", out)):
            server.add_repo(repo, {file.name: file.read_bytes() for file in path.iterdir()})
        named = [str(out) if local == "model" else "org/out", str(base) if local == "base" else "org/base"]
        with resolve_pair(*named) as pair:
            assert len(pair.same_files) == 3
            found = inspect_model(model=pair.model, base=pair.base, opened=pair.opened, same_files=pair.same_files)
        sizes = {file.name: file.stat().st_size for file in base.iterdir()}
        weights_sent = sum(size for path, size in server.sent.items() if "safetensors" in path and "index" not in path)
    pair = found.report.pair
    assert (pair.verdict, pair.edited, pair.missing, pair.added) == ("directional", 1, (), ())
    assert pair.changed[0].name == key
    downloads = 2 if local == "neither" else 1
    assert weights_sent < downloads * sizes[name] + 0.1 * sum(sizes.values())
    assert not list(Path(tempfile.gettempdir()).glob("abliterate-inspect-*"))


def test_shards_that_are_known_to_be_the_same_are_not_read(work):
    copy = work / "copy"
    shutil.copytree(work / "base", copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\1\1\1")
    found = inspect_model(model=source(copy), base=source(work / "base"), same_files=frozenset({"model.safetensors"}))
    assert found.report.verdict == "identical"
    assert inspected(copy, work / "base").report.verdict == "fine_tuned"


def test_a_base_of_one_layer_less_is_no_base_of_the_whole(work):
    small = save_tiny_llama(work / "small", dtype=torch.bfloat16, **{**SIZES, "num_hidden_layers": 1})
    report = inspected(work / "out", small).report
    assert report.verdict in {"unrelated", "fine_tuned"}
    assert report.pair.added
