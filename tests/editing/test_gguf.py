"""GGUF files edited in place: transformers loads what comes out, its stream is clean, all else keeps its bytes."""

import errno
import hashlib
import json
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from abliterate.checkpoints.file_assembly import _Assembly
from abliterate.directions import Direction, make_direction
from abliterate.editing.adapter import write_adapter
from abliterate.editing.options import EditOptions, WriteOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import AbliterateError, CheckpointError, InputError, QuantizedCheckpointError
from abliterate.formats.gguf_checkpoint import open_gguf
from abliterate.models.gguf_loading import load_gguf
from abliterate.models.options import ModelOptions
from abliterate.progress import SilentProgress
from abliterate.release.options import VerificationOptions
from abliterate.release.report import VerificationReport
from abliterate.release.reverting import revert_checkpoint
from abliterate.release.verification import verify_checkpoint
from tests.support.conformance import stream_component
from tests.support.gguf_models import BF16, F16, F32, Q8_0, tiny, write
from tests.support.tiny_models import random_direction

D_MODEL = 256
KINDS = [
    gguf.GGMLQuantizationType[name]
    for name in [
        "F32",
        "F16",
        "BF16",
        "Q8_0",
        "Q4_0",
        "Q4_1",
        "Q5_0",
        "Q5_1",
        "Q3_K",
        "Q4_K",
        "Q5_K",
        "Q6_K",
        "IQ4_NL",
        "IQ4_XS",
    ]
]
INPUTS = {"input_ids": torch.arange(4, 44)[None]}


def make(path: Path, model_type: str = "llama", *, kind: gguf.GGMLQuantizationType = Q8_0, **options) -> Path:
    """Write a tiny model whose rows are whole blocks of any type."""
    path.mkdir()
    sizes = {"hidden_size": D_MODEL, "intermediate_size": D_MODEL, "num_hidden_layers": 2, "head_dim": 64}
    return write(path, tiny(model_type, **{**sizes, **options}), kind=kind)


def direction() -> Direction:
    return make_direction(mean_difference=random_direction(D_MODEL))


def edit(file: Path, out: Path, **options):
    return orthogonalize_checkpoint(source=file, direction=direction(), output=out, options=EditOptions(**options))


def component(file: Path) -> float:
    model = load_gguf(file, name=file.name, choose_class=lambda _: AutoModelForCausalLM)
    model.set_attn_implementation("eager")
    return stream_component(model, INPUTS, direction().vector.double())


def verify(out: Path, *, quick: bool = True, base: Path | None = None) -> VerificationReport:
    return verify_checkpoint(
        checkpoint=out,
        base=base,
        options=VerificationOptions(n_prompts=1, quick=quick),
        model_options=ModelOptions(device="cpu"),
    )


def tensors_of(file: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.data.tobytes() for tensor in gguf.GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_stream_is_clean_and_all_else_keeps_its_bytes(tmp_path, kind):
    file = make(tmp_path / "base", kind=kind)
    report = edit(file, tmp_path / "out")
    new = tmp_path / "out" / file.name
    old_tensors, new_tensors = tensors_of(file), tensors_of(new)
    changed = {name for name in old_tensors if old_tensors[name] != new_tensors[name]}
    assert changed == {
        "token_embd.weight",
        *(f"blk.{i}.{w}.weight" for i in (0, 1) for w in ("attn_output", "ffn_down")),
    }
    header = open_gguf(file).shards[0].header_bytes
    assert new.read_bytes().startswith(header)
    assert new.stat().st_size == file.stat().st_size
    assert {tensor.edit.stored_dtype for tensor in report.tensors} == {kind.name}
    assert all(tensor.survivor < (5e-3 if kind in {F16, BF16} else 1e-3) for tensor in report.tensors)
    before, after = component(file), component(new)
    assert before > 0.05
    assert after < (0.02 if kind == BF16 else 2e-3) * before
    assert verify(tmp_path / "out").failures == ()


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize("kind", [F32, Q8_0], ids=["F32", "Q8_0"])
def test_each_type_has_its_names_and_its_norms(tmp_path, model_type, kind):
    # Gemma's norms stand between the writers and the stream, and GGUF stores them with one added.
    file = make(tmp_path / "base", model_type, kind=kind)
    edit(file, tmp_path / "out")
    before, after = component(file), component(tmp_path / "out" / file.name)
    assert after < (1e-5 if kind == F32 else 2e-3) * before
    assert verify(tmp_path / "out").failures == ()


def test_it_verifies_by_running_it_and_goes_back(tmp_path):
    file = make(tmp_path / "base", tied=True)
    edit(file, tmp_path / "out")
    report = verify(tmp_path / "out", quick=False)
    assert report.failures == ()
    assert report.stream is not None
    assert verify(tmp_path / "out" / file.name).failures == ()
    back = revert_checkpoint(checkpoint=tmp_path / "out", output=tmp_path / "back")
    assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()
    assert set(back.files) == {file.name}


@pytest.mark.parametrize(("where", "said"), [
    ("blk.0.attn_q.weight", "no edit of it was planned"),
    ("blk.1.ffn_down.weight", "changed since"),
    (None, "the header is not that of the base"),
])  # fmt: skip
def test_what_was_changed_afterwards_is_found(tmp_path, where, said):
    file = make(tmp_path / "base")
    edit(file, tmp_path / "out")
    new = tmp_path / "out" / file.name
    data = bytearray(new.read_bytes())
    if where is None:
        at = data.index(b"tiny")
        data[at : at + 4] = b"tony"
    else:
        start = next(int(tensor.data_offset) for tensor in gguf.GGUFReader(new).tensors if tensor.name == where)
        # The half that scales the first block.
        data[start + 1] ^= 0x10
    new.write_bytes(bytes(data))
    report = verify(tmp_path / "out")
    assert not report.passed
    assert said in report.failures[0]


def test_another_file_is_not_the_base(tmp_path):
    file = make(tmp_path / "base")
    edit(file, tmp_path / "out")
    other = make(tmp_path / "other", kind=F16)
    with pytest.raises(InputError, match="is not the model that was edited"):
        verify(tmp_path / "out", base=other)


def test_parts_of_a_split_model_are_shards(tmp_path):
    whole = make(tmp_path / "whole")
    edit(whole, tmp_path / "edited")
    parts = split(whole, tmp_path / "parts")
    assert len(parts) == 2
    edit(parts[1], tmp_path / "out")
    found = {name: data for part in parts for name, data in tensors_of(tmp_path / "out" / part.name).items()}
    assert found == tensors_of(tmp_path / "edited" / whole.name)
    assert verify(tmp_path / "out").failures == ()
    parts[1].unlink()
    with pytest.raises(CheckpointError, match=r"-00002-of-00002\.gguf, a part of the same model, is not there"):
        open_gguf(parts[0])


def test_a_split_model_goes_on_where_the_disk_was_full(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")
    parts = split(whole, tmp_path / "parts")
    edit(parts[0], tmp_path / "undisturbed")
    finish, finished = _Assembly._finish, []

    def full_after_the_first(self, *arguments):
        if finished:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(self, *arguments)
        finished.append(arguments)

    monkeypatch.setattr(_Assembly, "_finish", full_after_the_first)
    with pytest.raises(CheckpointError, match="No space left"):
        edit(parts[0], tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    said: list[str] = []
    orthogonalize_checkpoint(
        source=parts[0],
        direction=direction(),
        output=tmp_path / "out",
        writing=WriteOptions(resume=True),
        progress=Told(said),
    )
    assert any("1 files are finished" in line for line in said), said
    for part in parts:
        assert (tmp_path / "out" / part.name).read_bytes() == (tmp_path / "undisturbed" / part.name).read_bytes()


class Told(SilentProgress):
    """Keeps what the user is told."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines

    def message(self, text: str) -> None:
        self._lines.append(text)


def split(file: Path, directory: Path) -> list[Path]:
    """Write a file's tensors in two parts, as llama.cpp's `llama-gguf-split` does."""
    directory.mkdir()
    reader = gguf.GGUFReader(file)
    half = len(reader.tensors) // 2
    paths = []
    for number, tensors in enumerate((reader.tensors[:half], reader.tensors[half:])):
        path = directory / f"{file.stem}-{number + 1:05d}-of-00002.gguf"
        paths.append(path)
        writer = gguf.GGUFWriter(path, "llama")
        if number:
            writer.kv_data[0].pop("general.architecture")
        else:
            for field in reader.fields.values():
                if not field.name.startswith(("GGUF.", "general.architecture")):
                    kind = field.types[0]
                    writer.add_key_value(
                        field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
                    )
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize(("options", "said"), [
    ({"quantized": "dequantize"}, "never dequantised"),
    ({"preserve_norms": True}, "--preserve-norms scales rows"),
    ({"tied": "untie"}, "adds tensors"),
])  # fmt: skip
def test_what_a_file_cannot_become_is_refused(tmp_path, options, said):
    file = make(tmp_path / "base", tied=True)
    with pytest.raises(AbliterateError, match=said):
        edit(file, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_adapter_or_a_file_for_an_output_is_refused(tmp_path):
    file = make(tmp_path / "base")
    with pytest.raises(InputError, match="this is a GGUF file"):
        write_adapter(source=file, direction=direction(), output=tmp_path / "out")
    with pytest.raises(InputError, match="-o names a directory"):
        edit(file, tmp_path / "out.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_a_type_that_is_not_written_is_named(tmp_path):
    file = make(tmp_path / "base", kind=gguf.GGMLQuantizationType.IQ2_XXS)
    with pytest.raises(QuantizedCheckpointError, match="is stored as IQ2_XXS, which is not written here"):
        edit(file, tmp_path / "out")


def test_the_record_says_which_file_it_was(tmp_path):
    file = make(tmp_path / "base")
    edit(file, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "abliteration.json").read_text())
    header = open_gguf(file).shards[0].header_bytes
    assert record["base"]["config_file_sha256"] == hashlib.sha256(header).hexdigest()
    assert record["shards"].keys() == {file.name}
    assert record["base"]["model"] == str(file)


def test_a_factor_that_is_no_number_names_the_file(tmp_path):
    file = make(tmp_path / "base")
    start = next(
        int(each.data_offset) for each in gguf.GGUFReader(file).tensors if each.name == "blk.0.ffn_down.weight"
    )
    data = bytearray(file.read_bytes())
    data[start : start + 2] = b"\x00\x7e"
    file.write_bytes(bytes(data))
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: tensor model\.layers\.0\.mlp\.down_proj\.weight: it holds NaN"
    ):
        edit(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()
