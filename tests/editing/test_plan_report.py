"""Plans are right about what would be edited, and read nothing but headers, on disk and on the Hub."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.editing.plan_report import PlanReport, format_ranges, pattern_of, plan_layout, read_layout
from abliterate.errors import (
    AbliterateError,
    CheckpointError,
    HubError,
    InputError,
    QuantizedCheckpointError,
    UnsupportedArchitectureError,
)
from tests.support.fake_hub import FakeHub
from tests.support.quantized_models import save_mxfp4_gpt_oss, save_quantized_llama
from tests.support.tiny_models import (
    N_LAYERS,
    random_direction,
    save_tiny_model,
)

CARD = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\n---\n# Card\n"
# Wide enough that the weights are many times the 100 kB that the client asks for in each file.
WIDE = {"intermediate_size": 4000, "vocab_size": 3000}


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    path = save_tiny_model(tmp_path_factory.mktemp("plan") / "wide", attention_bias=True, max_shard_size="1MB", **WIDE)
    (path / "README.md").write_text(CARD)
    (path / "pytorch_model.bin").write_bytes(b"pickle")
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with FakeHub() as server:
        server.use(monkeypatch, tmp_path)
        yield server


def files_of(path: Path) -> dict[str, bytes]:
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def plan_edit(*, model: str, revision: str | None = None, options: EditOptions | None = None) -> PlanReport:
    return plan_layout(read_layout(model=model, revision=revision), options=options)


def refused(kind: type[AbliterateError], match: str, model: object, **options) -> None:
    with pytest.raises(kind, match=match) as error:
        plan_edit(model=str(model), **options)
    assert "\n" not in str(error.value)


def test_it_names_what_orthogonalize_edits(wide, tmp_path):
    plan = plan_edit(model=str(wide))
    direction = random_direction()
    done = orthogonalize_checkpoint(
        source=wide, direction=make_direction(mean_difference=direction), output=tmp_path / "out"
    )
    assert [tensor.described() for tensor in plan.tensors] == [tensor.edit.described() for tensor in done.tensors]
    assert (plan.counts, plan.bytes_edited) == (done.counts, done.bytes_edited)
    written = sum(file.stat().st_size for file in (tmp_path / "out").iterdir())
    record = (tmp_path / "out" / "abliteration.json").stat().st_size
    assert plan.disk_bytes == written - record


def test_facts_of_a_directory(wide):
    plan = plan_edit(model=str(wide))
    assert (plan.model, plan.revision, plan.gated) == (str(wide), None, None)
    assert (plan.model_type, plan.d_model, plan.n_layers, plan.tied_embeddings) == ("llama", 32, N_LAYERS, False)
    assert (plan.license, plan.license_name, plan.license_link) == ("other", "own", "LICENSE")
    assert plan.download_bytes == 0
    assert plan.largest_tensor == "model.layers.0.mlp.down_proj.weight"
    assert plan.memory_bytes == 2 * 32 * 4000 * 4 + 40_000_000
    assert plan.bytes_weights == sum(
        json.loads((wide / "model.safetensors.index.json").read_text())["metadata"][key] for key in ("total_size",)
    )


def test_identical_layers_are_one_group(wide):
    groups = {group.pattern: group for group in plan_edit(model=str(wide)).groups}
    assert set(groups) == {
        "model.embed_tokens.weight",
        "model.layers.*.self_attn.o_proj.weight",
        "model.layers.*.self_attn.o_proj.bias",
        "model.layers.*.mlp.down_proj.weight",
    }
    down = groups["model.layers.*.mlp.down_proj.weight"]
    assert (down.role, down.layers, down.count, down.shape, down.dtype) == ("mlp", "0-2", 3, (32, 4000), "F32")
    assert down.bytes == 3 * 32 * 4000 * 4
    assert groups["model.embed_tokens.weight"].layers == ""


def test_options_select(wide):
    plan = plan_edit(model=str(wide), options=EditOptions(components=("mlp",), layers=(1, 3)))
    assert [tensor.writer.layer for tensor in plan.tensors] == [1, 2]
    assert "model.layers.0.mlp.down_proj.weight" in plan.not_selected
    assert "model.embed_tokens.weight" in plan.not_selected
    assert plan.groups[0].layers == "1-2"


@pytest.mark.parametrize(
    ("damage", "kind", "match"),
    [
        ({"model_type": "minimax"}, UnsupportedArchitectureError, "minimax"),
        ({"model_type": "new_one"}, UnsupportedArchitectureError, "'new_one'"),
        ({"quantization_config": {"quant_method": "gptq"}}, QuantizedCheckpointError, "gptq"),
        ({"num_hidden_layers": 9}, CheckpointError, "incomplete"),
    ],
)
@pytest.mark.parametrize("where", ["directory", "hub"])
def test_what_orthogonalize_refuses_is_refused(hub, tmp_path, damage, kind, match, where):
    path = save_tiny_model(tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | damage))
    if where == "hub":
        hub.add_repo("org/model", files_of(path))
    refused(kind, match, path if where == "directory" else "org/model")


def test_options_that_do_not_fit_are_refused(wide):
    refused(InputError, "beyond the 3 layers", wide, options=EditOptions(layers=(0, 4)))
    refused(InputError, "select no tensor", wide, options=EditOptions(layers=(1, 2), components=("embed",)))
    refused(InputError, "no such directory", wide / "nowhere")
    refused(InputError, "only Hub models have revisions", wide, revision="main")


@pytest.mark.parametrize("policy", ["requantize", "dequantize"])
@pytest.mark.parametrize("make", [lambda path: save_quantized_llama(path, "block"), save_mxfp4_gpt_oss])
def test_a_quantised_model_is_planned_as_it_would_be_edited(tmp_path, make, policy):
    base, out = tmp_path / "base", tmp_path / "out"
    make(base)
    refused(QuantizedCheckpointError, "--quantized requantize", base)
    plan = plan_edit(model=str(base), options=EditOptions(quantized=policy))
    direction = make_direction(mean_difference=random_direction(plan.d_model))
    report = orthogonalize_checkpoint(
        source=base, direction=direction, output=out, options=EditOptions(quantized=policy)
    )
    assert [tensor.described() for tensor in plan.tensors] == [done.edit.described() for done in report.tensors]
    assert plan.bytes_edited == report.bytes_edited
    sizes = {path.name: path.stat().st_size for path in out.iterdir() if path.suffix == ".safetensors"}
    headers = sum(len(shard.header_bytes) for shard in open_checkpoint(out).shards)
    assert plan.bytes_weights == sum(sizes.values()) - headers


class TestOnTheHub:
    def test_the_same_plan_without_downloading_weights(self, hub, wide):
        files = files_of(wide)
        repo = hub.add_repo("org/model", files)
        plan, local = plan_edit(model="org/model"), plan_edit(model=str(wide))
        for name in (*PlanReport.__dataclass_fields__.keys(),):
            if name not in {"model", "revision", "download_bytes", "disk_bytes"}:
                assert getattr(plan, name) == getattr(local, name), name
        assert plan.revision == repo.refs["main"]
        # The pickled copy would not be downloaded, so it is in the directory alone.
        assert plan.download_bytes == plan.disk_bytes == local.disk_bytes - len(b"pickle")
        shards = {path: size for path, size in hub.sent.items() if path.endswith(".safetensors")}
        assert len(shards) == plan.n_shards == len([name for name in files if name.endswith(".safetensors")]) > 2
        assert all(sent <= 100_000 for sent in shards.values())
        assert sum(shards.values()) < plan.bytes_weights / 5
        held = [path for path in Path(hub_cache()).rglob("*") if path.is_file() and path.stat().st_size > 100_000]
        assert held == []

    def test_a_single_file_with_a_header_beyond_the_first_range(self, hub, tmp_path):
        path = save_tiny_model(tmp_path / "long", num_hidden_layers=120)
        header = int.from_bytes((path / "model.safetensors").read_bytes()[:8], "little")
        assert header > 100_000
        hub.add_repo("org/long", files_of(path))
        assert plan_edit(model="org/long").counts == {"embed": 1, "attn": 120, "mlp": 120}
        sent = next(size for name, size in hub.sent.items() if name.endswith("model.safetensors"))
        assert sent == 8 + header

    def test_a_revision(self, hub, tmp_path):
        old = save_tiny_model(tmp_path / "old", num_hidden_layers=2)
        new = save_tiny_model(tmp_path / "new")
        repo = hub.add_repo("org/model", files_of(new), revisions={"v1": files_of(old)})
        plan = plan_edit(model="org/model", revision="v1")
        assert (plan.n_layers, plan.revision) == (2, repo.refs["v1"])
        assert plan_edit(model="org/model").n_layers == N_LAYERS

    def test_a_gated_model_shows_that_it_is(self, hub, wide):
        repo = hub.add_repo("org/gated", files_of(wide), gated=True)
        refused(HubError, "this model is gated", "org/gated")
        repo.granted = True
        assert plan_edit(model="org/gated").gated == "manual"

    @pytest.mark.parametrize(
        ("status", "match"), [(401, "did not accept the token"), (403, "may not read"), (500, "out of order")]
    )
    def test_the_hub_refuses(self, hub, wide, status, match):
        hub.add_repo("org/model", files_of(wide))
        hub.fail_next("GET /org/model/resolve/.*safetensors", status=status, times=-1)
        refused(HubError, match, "org/model")

    def test_there_is_no_such_model(self, hub):
        refused(HubError, "no such model", "org/nothing")
        hub.add_repo("org/model", {"config.json": b"{}"})
        refused(HubError, "no revision 'v9'", "org/model", revision="v9")

    def test_no_safetensors_no_config(self, hub):
        hub.add_repo("org/old", {"config.json": b"{}", "pytorch_model.bin": b"x"})
        refused(HubError, "org/old: the repository has no safetensors weights", "org/old")
        hub.add_repo("org/gguf", {"model.gguf": b"x"})
        refused(HubError, r"org/gguf: the repository has no config\.json", "org/gguf")

    @pytest.mark.parametrize(
        ("name", "content", "match"),
        [
            ("config.json", b"{", "is not valid JSON"),
            ("config.json", b"[]", "is not a JSON object"),
            ("model.safetensors", b"\xff" * 64, "its header claims 18446744073709551615 bytes, the file has 64"),
            ("model.safetensors", b"", "its header claims 0 bytes, the file has 0"),
            ("model.safetensors", b"\x02" + b"\0" * 7 + b"{}x", "describes 10 bytes, the file has 11"),
            ("model.safetensors", b"\x0e" + b"\0" * 7 + b'{"a\\u001b": 1}', "cannot be shown"),
        ],
    )
    def test_damaged_files(self, hub, tmp_path, name, content, match):
        path = save_tiny_model(tmp_path / "base")
        hub.add_repo("org/model", files_of(path) | {name: content})
        refused(CheckpointError, f"^org/model/{name}: .*{match}", "org/model")

    @pytest.mark.parametrize("index", [b"[]", b"{", b'{"weight_map": 3}', b'{"weight_map": {"a": "no.safetensors"}}'])
    def test_damaged_index(self, hub, wide, index):
        hub.add_repo("org/model", files_of(wide) | {"model.safetensors.index.json": index})
        refused(CheckpointError, r"^org/model/model\.safetensors\.index\.json: ", "org/model")

    def test_an_index_that_lies_is_found(self, hub, wide):
        files = files_of(wide)
        index = json.loads(files["model.safetensors.index.json"])
        index["weight_map"]["model.layers.9.mlp.down_proj.weight"] = next(iter(index["weight_map"].values()))
        hub.add_repo("org/model", files | {"model.safetensors.index.json": json.dumps(index).encode()})
        refused(CheckpointError, r"model\.layers\.9", "org/model")


def hub_cache() -> str:
    from huggingface_hub import constants

    return constants.HF_HUB_CACHE


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("model.layers.12.mlp.experts.3.down_proj.weight", "model.layers.*.mlp.experts.*.down_proj.weight"),
        ("h.0.mlp.fc2.weight", "h.*.mlp.fc2.weight"),
        ("7", "*"),
    ],
)
def test_patterns(name, pattern):
    assert pattern_of(name) == pattern


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([5, 0, 1, 2], "0-2, 5"), (range(30), "0-29"), ([0, 2], "0, 2")]
)
def test_ranges(numbers, text):
    assert format_ranges(numbers) == text


def test_norm_chains_are_shown_and_what_is_left_alone_says_why(tmp_path):
    path = save_tiny_model(tmp_path / "base", "gemma2")
    plan = plan_edit(model=str(path))
    groups = {group.pattern: group for group in plan.groups}
    attention = groups["model.layers.*.self_attn.o_proj.weight"]
    assert attention.norms == ("model.layers.*.post_attention_layernorm.weight",)
    assert attention.count == N_LAYERS
    tensor = next(each for each in plan.tensors if each.name == "model.layers.1.mlp.down_proj.weight")
    assert [norm.weight for norm in tensor.writer.norm_chain] == ["model.layers.1.post_feedforward_layernorm.weight"]
    assert tensor.writer.norm_chain[0].plus_one


def test_a_layer_beyond_the_configs_count_is_left_alone_and_named(tmp_path):
    path = save_tiny_model(tmp_path / "base")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": N_LAYERS - 1}))
    plan = plan_edit(model=str(path))
    assert plan.counts == {"embed": 1, "attn": N_LAYERS - 1, "mlp": N_LAYERS - 1}
    reasons = {kept.tensor_name: kept.reason for kept in plan.left_alone}
    assert "model.layers.2.mlp.down_proj.weight" in reasons
    assert all(reasons.values())

    @pytest.mark.parametrize("differs", [True, False])
    def test_head_and_embedding_are_compared_by_parts(self, hub, tmp_path, differs):
        path = save_tiny_model(tmp_path / "model", tied=True, vocab_size=8000)
        tensors = load_file(path / "model.safetensors")
        head = tensors["model.embed_tokens.weight"].clone()
        head[4000:4010] += float(differs)
        save_file(tensors | {"lm_head.weight": head}, path / "model.safetensors", metadata={"format": "pt"})
        hub.add_repo("org/model", files_of(path))
        assert plan_edit(model="org/model").tied_embeddings == (not differs)
        sent = next(size for name, size in hub.sent.items() if name.endswith("model.safetensors"))
        assert sent < head.nbytes
