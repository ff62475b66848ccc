"""The tables of docs/quantisation.md and docs/editing.md: each format edited on a tiny model, run and measured."""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import torch
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.stored_tensors import read_tensor
from abliterate.directions import make_direction
from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import AbliterateError
from abliterate.files import read_json_report
from abliterate.formats.gguf_checkpoint import open_weights
from abliterate.formats.quantized import plain_view
from abliterate.inspection.reading import inspect_model
from abliterate.models.gguf_loading import load_gguf
from abliterate.models.options import ModelOptions
from abliterate.release.options import VerificationOptions
from abliterate.release.verification import verify_checkpoint
from tests.support.conformance import stream_component
from tests.support.gguf_models import tiny, write
from tests.support.paths import DOCS
from tests.support.quantized_models import save_mxfp4_gpt_oss, save_quantized_llama
from tests.support.tiny_models import random_direction

PAGE, SHORT_PAGE = DOCS / "quantisation.md", DOCS / "editing.md"
_BEGIN, _END = "<!-- formats: made by `python -m scripts.format_table` -->", "<!-- /formats -->"
# Layout of the tests -> what it is called, and bits of a code.
SAFETENSORS = {
    "block": ("FP8, blocks of 128 x 128", 8),
    "ue8m0": ("FP8, blocks, scales ue8m0", 8),
    "per tensor": ("FP8, a scale a tensor", 8),
    "compressed": ("FP8 of compressed-tensors", 8),
    "mxfp8": ("MXFP8 of compressed-tensors", 8),
    "modelopt fp8": ("FP8 of ModelOpt", 8),
    "int8 groups": ("int8 of compressed-tensors, packed", 8),
    "int8 rows": ("int8 of compressed-tensors", 8),
    "int4 groups": ("int4 of compressed-tensors", 4),
    "int4 groups with zeros": ("int4 of compressed-tensors, zero points", 4),
    "int4 rows": ("int4 of compressed-tensors, a scale a row", 4),
    "gptq": ("GPTQ, 4 bits, no desc_act", 4),
    "gptq, 8 bits": ("GPTQ, 8 bits, no desc_act", 8),
    "awq": ("AWQ, 4 bits", 4),
    "nvfp4": ("NVFP4 of compressed-tensors", 4),
    "modelopt nvfp4": ("NVFP4 of ModelOpt", 4),
    "mxfp4": ("MXFP4 of gpt-oss", 4),
    "packed mxfp4": ("MXFP4 of compressed-tensors", 4),
    "fp4 in bytes": ("FP4 in bytes beside `.scale`", 4),
}
GGUF = {
    "F32": 32, "F16": 16, "BF16": 16, "Q8_0": 8, "Q6_K": 6, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5, "Q4_0": 4, "Q4_1": 4,
    "Q4_K": 4, "IQ4_NL": 4, "IQ4_XS": 4, "MXFP4": 4, "Q3_K": 3, "Q2_K": 2,
}  # fmt: skip
NAMES = (*SAFETENSORS, *(f"GGUF {kind}" for kind in GGUF))
_REQUANTIZE = EditOptions(quantized="requantize")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatRow:
    """What was found of one format.

    Attributes:
        name: What it is called.
        bits: Of a code.
        runs: Whether transformers loads what was edited, here, and its stream is clean.
        verified: Whether `verify` passes with running it.
        left: Share of the component that is left in the quantised writers.
        plain: The same with plain rounding.
    """

    name: str
    bits: int
    runs: bool
    verified: bool
    left: float
    plain: float


def measure(name: str, work: Path) -> FormatRow:
    """Save a tiny model in a format, edit it there and look at what came out.

    Raises:
        AbliterateError: It is not edited, or its files do not verify.
    """
    kind = name.removeprefix("GGUF ")
    base, label, bits = work / "base", *(SAFETENSORS[name] if name in SAFETENSORS else (name, GGUF[kind]))
    d_model = 64 if name == "mxfp4" else 256
    if name in SAFETENSORS:
        save_mxfp4_gpt_oss(base) if name == "mxfp4" else save_quantized_llama(base, name)
    else:
        base.mkdir()
        model = tiny(hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=64)
        base = write(base, model, kind=gguf.GGMLQuantizationType[kind])
    direction = make_direction(mean_difference=random_direction(d_model))
    direction.save(work / "r.safetensors")
    options = _REQUANTIZE if name in SAFETENSORS else EditOptions()
    made: dict[str, float] = {}
    for way in ("ours", "plain"):
        with plain_rounding() if way == "plain" else nullcontext():
            orthogonalize_checkpoint(source=base, direction=direction, output=work / way, options=options)
        made[way] = _left(work / way, base, work / "r.safetensors", quantized=name in SAFETENSORS)
    quick = verify_checkpoint(checkpoint=work / "ours", options=VerificationOptions(quick=True))
    if quick.failures:
        raise AbliterateError(f"{name}: {quick.failures[0]}")
    return FormatRow(
        name=label,
        bits=bits,
        runs=_runs(base, work / "ours", direction.vector.double()),
        verified=_is_verified(work / "ours"),
        left=made["ours"],
        plain=made["plain"],
    )


@contextmanager
def plain_rounding() -> Iterator[None]:
    """Let an edit round to the nearest number and accept whatever that leaves."""
    rounding = "abliterate.formats.block_scaled"
    with (
        mock.patch(f"{rounding}._MOST_ROUNDS", 0),
        mock.patch(f"{rounding}._MOST_STEPS", 0),
        mock.patch("abliterate.editing.orthogonalization._check_survivor"),
    ):
        yield


def _left(out: Path, base: Path, direction: Path, *, quantized: bool) -> float:
    report = inspect_model(model=_source(out), base=_source(base), directions=[direction]).report
    plain = {"BF16", "F32"} if quantized else set()
    return max(tensor.left or 0.0 for tensor in report.tensors if tensor.dtype not in plain)


def _source(path: Path) -> ModelSource:
    return ModelSource(path=path, name=path.name, revision=None)


def _runs(base: Path, out: Path, vector: torch.Tensor) -> bool:
    try:
        models = [_load(each) for each in (base, out)]
        before, after = (stream_component(model, _INPUTS, vector) for model in models)
    except (AbliterateError, ImportError, RuntimeError, ValueError, KeyError, AssertionError):
        return False
    # transformers decodes to bfloat16, of which each tensor keeps its own rounding.
    return after < 0.03 * before and _means_the_same(models[0], base)


def _means_the_same(model: Any, base: Path) -> bool:
    """Return whether a writer has the numbers that are stored: some programs read codes and forget their scales."""
    view = plain_view(open_weights(base))
    info = next(info for info in view.tensors() if info.name.endswith(("o_proj.weight", "experts.down_proj")))
    wanted, found = read_tensor(view.path, info).float(), model.get_parameter(info.name).detach().float()
    return float((wanted - found).norm()) < 0.01 * float(wanted.norm())


_INPUTS = {"input_ids": torch.arange(4, 44)[None]}


def _load(path: Path) -> Any:
    file = path if path.suffix == ".gguf" else next(path.glob("*.gguf"), None)
    if file is not None:
        model: Any = load_gguf(file, name=file.name, choose_class=lambda _: AutoModelForCausalLM)
        model.set_attn_implementation("eager")
        return model
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    if "config_groups" in read_json_report(path / "config.json").get("quantization_config", {}):
        options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path, **options).eval().float()


def _is_verified(out: Path) -> bool:
    options = VerificationOptions(n_prompts=1)
    try:
        return verify_checkpoint(checkpoint=out, options=options, model_options=ModelOptions(device="cpu")).passed
    except (AbliterateError, ImportError):
        return False


def cells(row: FormatRow) -> str:
    """Return the row of the page."""
    verified = "yes" if row.verified else "files"
    return f"| {row.name} | {row.bits} | yes | {'yes' if row.runs else 'no'} | {verified} | {_share(row.plain)} |"


def _share(value: float) -> str:
    return f"{100 * value:.1f} %" if value >= 0.001 else "< 0.1 %"


def table(rows: list[FormatRow]) -> str:
    """Return the table of the page."""
    head = "| format | bits | edit | run | verify | left by plain rounding |\n|---|---|---|---|---|---|\n"
    return head + "\n".join(cells(row) for row in rows)


def short_table(rows: list[FormatRow]) -> str:
    """Return the table of docs/editing.md: formats that have the same cells in one row."""
    groups: dict[tuple[bool, bool, bool], list[str]] = {}
    for row in rows:
        groups.setdefault((row.name.startswith("GGUF"), row.runs, row.verified), []).append(row.name)
    lines = ["| format | edit | run | verify |", "|---|---|---|---|"]
    for (is_gguf, runs, verified), names in groups.items():
        shown = "GGUF: " + ", ".join(name.removeprefix("GGUF ") for name in names) if is_gguf else "; ".join(names)
        lines.append(f"| {shown} | yes | {'yes' if runs else 'no'} | {'yes' if verified else 'files'} |")
    return "\n".join(lines)


def written(path: Path) -> str:
    """Return the table that is in a page."""
    found = re.search(f"{re.escape(_BEGIN)}\n\n(.*?)\n\n{re.escape(_END)}", path.read_text(encoding="utf-8"), re.DOTALL)
    if found is None:
        raise LookupError(f"{path} has no table of formats")
    return found[1]


def with_table(text: str, new: str) -> str:
    """Return a page with another table."""
    before, _, rest = text.partition(_BEGIN)
    return f"{before}{_BEGIN}\n\n{new}\n\n{_END}{rest.partition(_END)[2]}"
