"""Checkpoints that are damaged, or made to deceive: one clear line, exit code 1, and nothing is written."""

import json
import os
import shutil
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.plan import make_edit_plan
from abliterate.editing.plan_report import plan_layout, read_layout
from tests.support.fake_hub import FakeHub
from tests.support.tiny_models import D_MODEL, random_direction, save_tiny_llama

INDEX = "model.safetensors.index.json"
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("sound") / "base", max_shard_size="30KB")


@pytest.fixture
def base(sound, tmp_path) -> Path:
    """A small checkpoint of several shards, alone in a directory, that a test may damage."""
    return Path(shutil.copytree(sound, tmp_path / "work" / "base"))


@pytest.fixture
def direction(tmp_path) -> Path:
    path = tmp_path / "refusal.safetensors"
    make_direction(mean_difference=random_direction()).save(path)
    return path


@pytest.fixture
def refused(call_main, base, direction):
    """Damage the checkpoint, and check that both commands refuse it in one line and leave everything as it was."""

    def check(damage: Damage, message: str) -> str:
        damage(base)
        before = listing(base.parent)
        for command in (
            ["plan", base],
            ["orthogonalize", base, "--direction", direction, "-o", base.parent / "out"],
            ["orthogonalize", base, "--direction", direction, "-o", base.parent / "out", "--dry-run"],
        ):
            code, stdout, stderr = call_main(*command)
            assert code == 1
            assert stdout == ""
            assert stderr.startswith("error: ")
            assert stderr.endswith("\n")
            assert stderr[:-1].isprintable()
            assert len(stderr) < 1500
            assert "unexpected" not in stderr
            assert str(base) in stderr
            assert message in stderr
            assert listing(base.parent) == before
        return stderr

    return check


def listing(path: Path) -> dict[str, tuple[int, int, int]]:
    found = [path, *sorted(path.rglob("*"))]
    return {str(p): (s.st_mode, s.st_size, s.st_mtime_ns) for p in found for s in [p.lstat()]}


def a_shard(base: Path) -> Path:
    return min(base.glob("*.safetensors"))


def edit_config(**values: object) -> Damage:
    def damage(base: Path) -> None:
        config = json.loads((base / "config.json").read_text()) | values
        (base / "config.json").write_text(json.dumps(config))

    return damage


def edit_index(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(base: Path) -> None:
        index = json.loads((base / INDEX).read_text())
        change(index)
        (base / INDEX).write_text(json.dumps(index))

    return damage


def name_shard(name: object) -> Damage:
    return edit_index(lambda index: index["weight_map"].update({"model.norm.weight": name}))


def edit_header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Change a shard's header, and write its length anew."""

    def damage(base: Path) -> None:
        path = a_shard(base)
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:end])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[end:])

    return damage


def edit_entry(**values: object) -> Damage:
    return edit_header(lambda header: header[first_name(header)].update(values))


def first_name(header: dict[str, Any]) -> str:
    return min((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])


def write(name: str, content: str | bytes) -> Damage:
    return lambda base: (base / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def instead_of(name: str, make: Callable[[Path], object]) -> Damage:
    """Put something else in the place of a file."""

    def damage(base: Path) -> None:
        path = a_shard(base) if name == "shard" else base / name
        path.unlink()
        make(path)

    return damage


def linked_outside(name: str) -> Damage:
    """Move a file out of the directory, and leave a link to it."""

    def damage(base: Path) -> None:
        path = a_shard(base) if name == "shard" else base / name
        outside = base.parent / f"outside-{path.name}"
        path.rename(outside)
        path.symlink_to(outside)

    return damage


def make_socket(path: Path) -> None:
    # The name of a socket may not be long.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


class TestIndex:
    @pytest.mark.parametrize(
        "name",
        [
            "../../x.safetensors", "/etc/passwd", "/tmp/x.safetensors", "..", ".", "", "a/b.safetensors",
            "a\\b.safetensors", "x\0.safetensors", "x\x1b[31m.safetensors", "x\n.safetensors", "x\u202e.safetensors",
            "config.json", "abliteration.json", ".hidden.safetensors", "n" * 300 + ".safetensors", 3, None, ["x"],
            {"a": "b"},
        ],
    )  # fmt: skip
    def test_a_shard_that_is_no_file_of_the_directory(self, refused, name):
        refused(name_shard(name), "which is not a safetensors file of this directory; do not trust this checkpoint")

    def test_a_missing_shard(self, refused):
        refused(lambda base: a_shard(base).unlink(), "which is not there; download the checkpoint again")

    def test_a_tensor_in_two_shards(self, refused):
        def damage(base: Path) -> None:
            first, second, *_ = sorted(base.glob("*.safetensors"))
            save_file(load_file(second) | load_file(first), second, metadata={"format": "pt"})

        refused(damage, "download the checkpoint again")

    def test_a_tensor_in_another_shard_than_it_says(self, refused):
        def swap(index: dict[str, Any]) -> None:
            names = index["weight_map"]
            first, last = min(names, key=names.get), max(names, key=names.get)
            names[first], names[last] = names[last], names[first]

        refused(edit_index(swap), "says that tensor")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", "is not valid JSON"),
            ("[]", "is not a JSON object"),
            ('{"weight_map": []}', "has no weight_map"),
            ('{"weight_map": {"a": "x.safetensors"}, "metadata": []}', "its metadata is [], expected an object"),
            ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the name 'a' occurs twice"),
            ('{"weight_map": {"a": "x.safetensors"}, "weight_map": {}}', "the name 'weight_map' occurs twice"),
            ('{"weight_map": {"a\\u001b[2J": "x.safetensors"}}', "the name 'a\\x1b[2J' has characters"),
            ('{"weight_map": {"a\\ud800": "x.safetensors"}}', "the name 'a\\ud800' has characters"),
            ('{"weight_map": {"a": "\\udfff.safetensors"}}', "half of a surrogate pair"),
            ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": NaN}}', "NaN is not JSON"),
            ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": -Infinity}}', "-Infinity is not JSON"),
            ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"total_size": 1e999}}', "1e999 is not finite"),
            ('{"weight_map": {"a": "x.safetensors"}, "metadata": {"t": ' + "9" * 5000 + "}}", "has 5000 digits"),
            ('{"weight_map": {"' + "n" * 2000 + '": "x.safetensors"}}', "a name has 2000 characters"),
            ('{"a": ' + "[" * 70 + "1" + "]" * 70 + "}", "it nests more than 64 levels"),
            ("[" * 100_000, "it nests too deeply"),
            ("\ufeff{}", "is not valid JSON"),
        ],
    )
    def test_json_that_is_none_or_means_two_things(self, refused, text, message):
        refused(write(INDEX, text), message)


class TestConfig:
    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "is not valid JSON"),
            (b"", "is not valid JSON"),
            (b"null", "is not a JSON object"),
            (b"\xff\xfe{\0}\0", "byte 0 is not UTF-8"),
            ("{}".encode("utf-16"), "is not UTF-8"),
            (b'{"model_type": "llama", "model_type": "gpt2"}', "the name 'model_type' occurs twice"),
            (b'{"a": {"b": 1, "b": 2}}', "the name 'b' occurs twice"),
            (b'{"a\\u009b31m": 1}', "has characters that cannot be shown"),
            (b'{"rope": NaN}', "NaN is not JSON"),
            (b"[" * 100_000, "it nests too deeply"),
            (b'{"a": ' * 65 + b"1" + b"}" * 65, "it nests more than 64 levels"),
            (b'{"hidden_size": ' + b"1" * 4999 + b"}", "has 4999 digits"),
        ],
    )
    def test_content_that_is_no_config(self, refused, content, message):
        refused(write("config.json", content), message)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"model_type": 3}, "model type 3 cannot be orthogonalized"),
            ({"model_type": ["llama"]}, "model type ['llama'] cannot be orthogonalized"),
            ({"model_type": None}, "model type None cannot be orthogonalized"),
            ({"model_type": "\x1b]0;x\x07"}, "model type '\\x1b]0;x\\x07' cannot be orthogonalized"),
            ({"model_type": "x" * 100_000}, "cannot be orthogonalized"),
            ({"num_hidden_layers": "3"}, "num_hidden_layers is '3', expected a positive integer"),
            ({"num_hidden_layers": -1}, "num_hidden_layers is -1, expected a positive integer"),
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0, expected a positive integer"),
            ({"num_hidden_layers": 2**63}, "num_hidden_layers is 9223372036854775808, expected at most 10000"),
            ({"num_hidden_layers": 3.0}, "num_hidden_layers is 3.0, expected a positive integer"),
            ({"num_hidden_layers": True}, "num_hidden_layers is True, expected a positive integer"),
            ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000, expected at most 10000"),
            ({"num_hidden_layers": 10**300}, "expected at most 10000"),
            ({"hidden_size": [D_MODEL]}, "hidden_size is [32], expected a positive integer"),
            ({"hidden_size": {}}, "hidden_size is {}, expected a positive integer"),
            ({"hidden_size": 10**300}, "do config.json and the weights belong together?"),
            ({"hidden_size": list(range(100_000))}, "hidden_size is [0, 1, 2, 3, 4, 5, ...], expected"),
            ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false', expected true or false"),
            ({"tie_word_embeddings": [1]}, "tie_word_embeddings is [1], expected true or false"),
            ({"quantization_config": "gptq"}, "the checkpoint is quantised"),
            ({"quantization_config": {"quant_method": "\x1b[1m"}}, "the checkpoint is quantised"),
            ({"quantization_config": {"quant_method": {"a": 1}}}, "the checkpoint is quantised"),
            ({"model_type": "llava", "text_config": "llama"}, "text_config is 'llama', expected an object"),
            ({"model_type": "llava", "text_config": [1, 2]}, "text_config is [1, 2], expected an object"),
            ({"model_type": "llava", "text_config": {"model_type": ["llama"]}}, "cannot be orthogonalized"),
            ({"model_type": "llava", "text_config": {"hidden_size": "x"}}, "hidden_size is 'x', expected a positive"),
            ({"model_type": "opt", "do_layer_norm_before": {"a": 1}}, "do_layer_norm_before = {'a': 1}"),
        ],
    )
    def test_fields_of_wrong_types(self, refused, values, message):
        refused(edit_config(**values), message)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"model_type": ["llama"]}, "model type ['llama'] cannot be orthogonalized"),
            ({"model_type": {"a": 1}}, "model type {'a': 1} cannot be orthogonalized"),
            ({"model_type": "new", "text_config": "llama"}, "text_config is 'llama', expected an object"),
            ({"model_type": "new", "llm_config": [1]}, "llm_config is [1], expected an object"),
            ({"model_type": "new", "auto_map": "x"}, "its auto_map names Python code"),
            (
                {"model_type": "new", "auto_map": {"a": "b"}, "text_config": {"model_type": "llama"}},
                "its auto_map names",
            ),
            ({"model_type": "new", "text_config": {"model_type": "llama", "auto_map": 1}}, "its auto_map names"),
            ({"model_type": "new", "hidden_size": 10**300}, "do config.json and the weights belong together?"),
            ({"model_type": "\x1b[2J"}, "model type '\\x1b[2J' is not known"),
        ],
    )
    def test_fields_of_wrong_types_of_an_unknown_type(self, base, call_main, values, message):
        edit_config(**values)(base)
        code, stdout, stderr = call_main("plan", base, "--unverified")
        assert (code, stdout) == (1, "")
        assert message in stderr.splitlines()[-1]
        assert {c for c in stderr if not c.isprintable()} <= {"\n"}

    @pytest.mark.parametrize("value", ["4", -4, 10**12, [4], 4.0, None])
    def test_a_number_of_experts_that_is_not_theirs(self, refused, value):
        def damage(base: Path) -> None:
            for shard in base.glob("*.safetensors"):
                shard.unlink()
            (base / INDEX).unlink()
            tensors = {"model.embed_tokens.weight": torch.ones(9, D_MODEL)}
            for name in ("self_attn.o_proj", *(f"block_sparse_moe.experts.{n}.w2" for n in range(4))):
                tensors[f"model.layers.0.{name}.weight"] = torch.ones(D_MODEL, 2)
            save_file(tensors, base / "model.safetensors")
            edit_config(model_type="mixtral", num_hidden_layers=1, num_local_experts=value)(base)

        refused(damage, "has 4 experts, but config.json")

    def test_infinity_passes_where_released_configs_have_it(self, base, direction):
        # transformers 4 wrote `"time_step_limit": [0.0, Infinity]`.
        edit_config(time_step_limit=[0.0, float("inf")])(base)
        assert plan_layout(read_layout(model=str(base))).counts["embed"] == 1


class TestHeaders:
    @pytest.mark.parametrize("length", [10**11, 2**64 - 1, 2**63, 10**8 + 1])
    def test_a_length_beyond_the_file(self, refused, length):
        def damage(base: Path) -> None:
            with a_shard(base).open("r+b") as file:
                file.write(struct.pack("<Q", length))

        refused(damage, f"its header claims {length} bytes, the file has")

    def test_a_sparse_file_that_has_the_length_it_claims(self, refused):
        def damage(base: Path) -> None:
            with a_shard(base).open("r+b") as file:
                file.write(struct.pack("<Q", 10**11))
                file.truncate(10**11 + 8)

        refused(damage, "its header claims 100000000000 bytes")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda _: b"[" * 200_000, "it nests too deeply"),
            (lambda _: b'{"a": ' * 100 + b"1" + b"}" * 100, "it nests more than 64 levels"),
            (lambda _: b'{"a": NaN}', "NaN is not JSON"),
            (lambda _: b'{"a": {"dtype": "F32", "dtype": "F16"}}', "the name 'dtype' occurs twice"),
            (lambda _: b'{"a": {}, "a": {}}', "the name 'a' occurs twice"),
            (lambda _: b'{"__metadata__": {"x": "1", "x": "2"}}', "the name 'x' occurs twice"),
            (lambda _: b'{"a\\u0007": {}}', "the name 'a\\x07' has characters that cannot be shown"),
            (lambda _: b'{"a\\nb": {}}', "the name 'a\\nb' has characters that cannot be shown"),
            (lambda _: '{"a\u202eb": {}}'.encode(), "the name 'a\\u202eb' has characters that cannot be shown"),
            (lambda _: b'{"a\\udc80": {}}', "the name 'a\\udc80' has characters that cannot be shown"),
            (lambda _: b'{"__metadata__": {"x": "\\ud800"}}', "half of a surrogate pair"),
            (lambda header: header.update(__metadata__=["x"]), "its __metadata__ is not a map of strings"),
        ],
    )
    def test_json_that_is_none_or_means_two_things(self, refused, change, message):
        refused(edit_header(change), message)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"dtype": "F33"}, "has the unknown dtype 'F33'"),
            ({"dtype": "\x1b[0m"}, "has the unknown dtype '\\x1b[0m'"),
            ({"dtype": ["F32"]}, "has the unknown dtype ['F32']"),
            ({"dtype": "F16"}, "does not fill its"),
            ({"dtype": "F64"}, "does not fill its"),
            ({"shape": [2**32, 2**32]}, "does not fill its"),
            ({"shape": [2**62, 4]}, "does not fill its"),
            ({"shape": [2**63]}, "malformed shape"),
            ({"shape": [10**300]}, "malformed shape"),
            ({"shape": [1] * 1000}, "malformed shape"),
            ({"shape": [-1, -2]}, "malformed shape"),
            ({"shape": "32"}, "malformed shape"),
            ({"shape": [1.0]}, "malformed shape"),
            ({"shape": None}, "malformed shape"),
            ({"data_offsets": [0]}, "malformed shape or data_offsets"),
            ({"data_offsets": [-8, 0]}, "malformed shape or data_offsets"),
            ({"data_offsets": [0, 2**64]}, "malformed shape or data_offsets"),
            ({"data_offsets": {"0": 1}}, "malformed shape or data_offsets"),
            ({"data_offsets": [8, 0]}, "does not fill its -8 bytes"),
        ],
    )
    def test_entries_of_wrong_types_and_sizes(self, refused, values, message):
        refused(edit_entry(**values), message)

    def test_tensors_that_overlap(self, refused):
        def overlap(header: dict[str, Any]) -> None:
            first, second = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"])[
                :2
            ]
            header[second] = dict(header[first])

        refused(edit_header(overlap), "starts at byte")

    def test_tensors_with_a_gap_between_them(self, refused):
        def shift(header: dict[str, Any]) -> None:
            for name, entry in header.items():
                if name not in {"__metadata__", first_name(header)}:
                    entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]

        refused(edit_header(shift), "starts at byte")

    @pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: data[:5]])
    def test_a_file_of_another_size(self, refused, change):
        refused(lambda base: a_shard(base).write_bytes(change(a_shard(base).read_bytes())), "the file has")


class TestFiles:
    @pytest.mark.parametrize("name", ["config.json", INDEX, "shard"])
    def test_a_link_out_of_the_directory(self, refused, name):
        refused(linked_outside(name), "is a link that leads out of its directory")

    @pytest.mark.parametrize("name", [INDEX, "shard"])
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (os.mkfifo, "is a named pipe, where a file is expected"),
            (Path.mkdir, "is a directory, where a file is expected"),
            (make_socket, "is a socket, where a file is expected"),
            (lambda path: path.symlink_to("/dev/zero"), "is a link that leads out of its directory"),
            (lambda path: path.symlink_to("nothing"), "cannot be read: No such file"),
            (lambda path: path.symlink_to(path.name), "is a link that leads out of its directory"),
        ],
    )
    def test_something_else_in_the_place_of_a_file(self, refused, name, make, message):
        refused(instead_of(name, make), message)

    @pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, make_socket, lambda path: path.symlink_to(path.name)])
    def test_a_config_that_is_no_file(self, refused, make):
        refused(instead_of("config.json", make), "no config.json in this directory")

    def test_pickled_weights(self, refused):
        def damage(base: Path) -> None:
            for path in (*base.glob("*.safetensors"), base / INDEX):
                path.unlink()
            (base / "pytorch_model.bin").write_bytes(b"\x80\x04c__main__\nboom\n.")

        refused(damage, "pickled weights are not read; convert them with python -c")

    def test_side_files_that_are_links_are_copied_only_from_inside(self, base, direction, call_main):
        secret = base.parent / "secret.txt"
        secret.write_text("a key")
        (base / "inside.txt").symlink_to("generation_config.json")
        (base / "outside.txt").symlink_to(secret)
        (base / "up").symlink_to(base.parent)
        (base / "sub").mkdir()
        (base / "sub" / "outside\x1b.txt").symlink_to("../../secret.txt")
        os.mkfifo(base / "pipe")
        out = base.parent / "out"
        code, _, stderr = call_main("orthogonalize", base, "--direction", direction, "-o", out)
        assert code == 0
        assert "not copied, as they are links that lead out of the directory" in " ".join(stderr.split())
        assert "\x1b" not in stderr
        assert (out / "inside.txt").read_text() == (base / "generation_config.json").read_text()
        names = {path.name for path in out.rglob("*")}
        assert not names & {"outside.txt", "up", "pipe", "outside\x1b.txt"}
        assert not any(path.is_symlink() for path in out.rglob("*"))
        assert "a key" not in "".join(p.read_text(errors="ignore") for p in out.rglob("*") if p.is_file())

    def test_an_addition_beside_a_matrix_that_is_missing(self, base, tmp_path, call_main):
        tensors: dict[str, torch.Tensor] = {}
        for shard in base.glob("*.safetensors"):
            tensors |= load_file(shard)
            shard.unlink()
        (base / INDEX).unlink()
        del tensors["model.layers.0.mlp.gate_proj.weight"]
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        path = tmp_path / "layer-1.safetensors"
        make_direction(mean_difference=random_direction(), metadata={"layer": 1}).save(path)
        code, stdout, stderr = call_main(
            "orthogonalize", base, "--direction", path, "-o", base.parent / "out", "--add", "1"
        )
        assert (code, stdout) == (1, "")
        assert "model.layers.0.mlp.gate_proj.weight must be a matrix" in stderr
        assert [path.name for path in base.parent.iterdir()] == ["base"]

    @pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
    def test_a_directory_in_the_place_of_the_record(self, base, direction, call_main, dry_run):
        (base / "abliteration.json").mkdir()
        (base / "abliteration.json" / "x").write_text("x")
        out = base.parent / "out"
        code, stdout, stderr = call_main("orthogonalize", base, "--direction", direction, "-o", out, *dry_run)
        assert (code, stdout) == (1, "")
        assert "abliteration.json: is a directory, where a file is expected" in stderr
        assert [path.name for path in base.parent.iterdir()] == ["base"]

    def test_what_a_run_keeps_for_itself_is_not_taken_from_the_base(self, base, direction, call_main):
        (base / ".abliterate").mkdir()
        (base / ".abliterate" / "journal-0.jsonl").write_text("{}")
        out = base.parent / "out"
        assert call_main("orthogonalize", base, "--direction", direction, "-o", out)[0] == 0
        assert not (out / ".abliterate").exists()

    @pytest.mark.parametrize("name", [b"\xff.txt", b"sub/\xe9.json", b"a\nb\x1b[31m.txt"])
    def test_a_name_that_cannot_be_shown(self, refused, name):
        def damage(base: Path) -> None:
            path = os.path.join(os.fsencode(base), name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(os.fsdecode(path)).write_text("x")

        refused(damage, "has characters that cannot be shown; rename or remove it")

    def test_blobs_beside_a_snapshot_may_not_be_a_link_themselves(self, base, refused):
        def damage(base: Path) -> None:
            pass

        repository = base.parent / "models--a--b"
        elsewhere = base.parent / "elsewhere"
        (repository / "snapshots").mkdir(parents=True)
        snapshot = repository / "snapshots" / "0123"
        base.rename(snapshot)
        elsewhere.mkdir()
        (snapshot / "config.json").rename(elsewhere / "config")
        (snapshot / "config.json").symlink_to("../../blobs/config")
        (repository / "blobs").symlink_to(elsewhere)
        base.symlink_to(snapshot)
        refused(damage, "is a link that leads out of its directory")


class TestWhatReachesTheTerminal:
    def test_a_licence_a_direction_and_a_directory(self, base, tmp_path, call_main):
        (base / "README.md").write_text('---\nlicense: "x\\e[31m"\n---\n')
        path = tmp_path / "evil.safetensors"
        make_direction(mean_difference=random_direction(), metadata={"model_type": "\x1b[2J\x9b1m"}).save(path)
        for command in (["plan", base], ["orthogonalize", base, "--direction", path, "--dry-run"]):
            code, stdout, stderr = call_main(*command)
            assert code == 0
            assert not {c for c in stdout + stderr if not c.isprintable()} - {"\n"}

    def test_a_message_is_escaped_at_the_boundary(self, call_main, tmp_path):
        code, stdout, stderr = call_main("plan", tmp_path / "no\x1b[31msuch\u202e")
        assert (code, stdout) == (1, "")
        assert "no\\x1b[31msuch\\u202e" in stderr


def test_a_record_that_is_no_record(base, tmp_path, direction, call_main):
    plan = make_edit_plan(source=base, direction=direction, options=EditOptions())
    assert plan.edits
    out = tmp_path / "out"
    assert call_main("orthogonalize", base, "--direction", direction, "-o", out)[0] == 0
    record = out / "abliteration.json"
    for content, message in (
        (b"[" * 100_000, "it nests too deeply"),
        (b'{"base": 1, "base": 2}', "the name 'base' occurs twice"),
        (b"\xff", "not UTF-8"),
    ):
        record.write_bytes(content)
        code, stdout, stderr = call_main("verify", out, "--quick")
        assert (code, stdout) == (1, "")
        assert stderr.startswith("error: ")
        assert message in stderr


def test_a_model_of_the_hub_is_edited_through_the_links_of_its_cache(base, direction, call_main, monkeypatch, tmp_path):
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path)
        hub.add_repo("org/model", {path.name: path.read_bytes() for path in base.iterdir()})
        assert call_main("orthogonalize", "org/model", "--direction", direction, "-o", tmp_path / "out")[0] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "abliteration.json",
        *(path.name for path in base.iterdir()),
    }


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (name_shard("../x.safetensors"), "do not trust this checkpoint"),
        (write(INDEX, '{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'), "occurs twice"),
        (edit_entry(shape=[2**32, 2**32]), "does not fill its"),
        (edit_header(lambda _: b'{"a": {}, "a": {}}'), "occurs twice"),
        (write("config.json", b'{"model_type": "llama", "model_type": "gpt2"}'), "occurs twice"),
        (lambda base: a_shard(base).write_bytes(a_shard(base).read_bytes() + b"x"), "the file has"),
    ],
)
def test_on_the_hub_the_same_checks_hold(base, call_main, monkeypatch, tmp_path, damage, message):
    damage(base)
    with FakeHub() as hub:
        hub.use(monkeypatch, tmp_path)
        hub.add_repo("org/model", {path.name: path.read_bytes() for path in base.iterdir()})
        code, stdout, stderr = call_main("plan", "org/model")
    assert (code, stdout) == (1, "")
    assert stderr.startswith("error: org/model/")
    assert message in stderr
