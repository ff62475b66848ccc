"""What the machine gives: memory, for batches of rows with little padding and for a whole model, and fast products.

torch gives float32 products on a CPU to MKL, which uses AVX-512 on Intel's processors alone; on others it computes with
half of the processor's width. oneDNN, which comes with torch, too, uses what is there, on the same tensors and in the
same precision; sums are added up in another order. See benchmarks/products.py.
"""

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from abliterate.errors import ModelError
from abliterate.formats.gguf_file import read_gguf


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLimits:
    """How large a batch may be, and what starting one costs.

    Attributes:
        tokens: most tokens of one batch, padding included; a single longer row is a batch of its own.
        rows: most rows of one batch, or None.
        overhead: cost of one more batch, in tokens of computation.
        equal: rows of one batch have one width: the model would take padding in.
    """

    tokens: int
    rows: int | None = None
    overhead: int = 0
    equal: bool = False

    def most_rows(self, length: int) -> int:
        """Return how many rows of this length fit into one batch."""
        fitting = max(1, self.tokens // max(1, length))
        return fitting if self.rows is None else min(fitting, self.rows)


def plan_batches(
    lengths: Sequence[int], *, limits: BatchLimits, widths: Sequence[int] | None = None
) -> list[list[int]]:
    """Return batches of row indices, longest rows first, of least cost: padded tokens plus overhead per batch.

    Rows are cut where their length changes, by dynamic programming over the distinct lengths; a part that is larger
    than one batch is divided evenly.

    Args:
        lengths: what each row costs, in tokens.
        limits: see `BatchLimits`.
        widths: tokens of each row, where what it costs is something else.
    """
    batches = _plan(lengths, limits)
    if not limits.equal:
        return batches
    width = (lengths if widths is None else widths).__getitem__
    return [list(rows) for batch in batches for _, rows in groupby(sorted(batch, key=width, reverse=True), key=width)]


def _plan(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    cuts = [i for i in range(len(order)) if i == 0 or lengths[order[i]] != lengths[order[i - 1]]]
    cuts.append(len(order))
    best: list[tuple[float, int]] = [(0.0, 0)]
    for end in range(1, len(cuts)):
        best.append(
            min((best[start][0] + _cost(lengths[order[cuts[start]]], cuts[end] - cuts[start], limits), start)
                for start in range(end))
        )  # fmt: skip
    chosen = [len(cuts) - 1]
    while chosen[-1] > 0:
        chosen.append(best[chosen[-1]][1])
    batches = []
    for start, end in pairwise(cuts[i] for i in reversed(chosen)):
        n_parts = _n_batches(lengths[order[start]], end - start, limits)
        bounds = [start + (end - start) * part // n_parts for part in range(n_parts + 1)]
        batches += [order[low:high] for low, high in pairwise(bounds)]
    return batches


def _n_batches(longest: int, n_rows: int, limits: BatchLimits) -> int:
    return -(-n_rows // limits.most_rows(longest))


def _cost(longest: int, n_rows: int, limits: BatchLimits) -> float:
    return n_rows * longest + _n_batches(longest, n_rows, limits) * limits.overhead


def is_out_of_memory(error: RuntimeError) -> bool:
    """Tell whether an error says that memory ran out."""
    said = str(error).lower()
    # In order: the GPU's; the CPU's on Windows; the CPU's elsewhere.
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in said or "can't allocate memory" in said


_WIDTHS = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2, "float64": 8}
_GIGABYTE = 1e9


def check_memory(path: Path, *, name: str, dtype: str, device: torch.device) -> None:
    """Refuse to load a model whose weights alone are more than what is free.

    Args:
        path: the model's directory.
        name: what to call it in the message.
        dtype: see `ModelOptions`.
        device: where the whole model is to go.

    Raises:
        ModelError: it does not fit; the message says what would.
    """
    needed, free = estimate_bytes(path, dtype=dtype, device=device), free_bytes(device)
    if free is None or needed <= free:
        return
    raise ModelError(
        f"{name}: its weights take about {needed / _GIGABYTE:.1f} GB on {device.type}, and {free / _GIGABYTE:.1f} GB "
        "are free; `extract` takes --stream-layers (one layer in memory at a time) or --device-map auto (GPUs, memory "
        "and disk together), and --dtype bfloat16 makes it smaller"
    )


def estimate_bytes(path: Path, *, dtype: str, device: torch.device) -> int:
    """Return how many bytes the weights of a directory or GGUF file take once loaded; 0 where no weights are known.

    Half formats are run in float32 on a CPU unless `dtype` says otherwise.

    Args:
        path: the model's directory.
        dtype: auto, float32, bfloat16 or float16.
        device: where the model is to go.
    """
    if path.is_file():
        header = read_gguf(path)
        as_run = "float32" if device.type == "cpu" else header.stored_dtype()
        return header.n_values * _WIDTHS[as_run if dtype == "auto" else dtype]
    stored = sum(file.stat().st_size for file in _weight_files(path))
    config = _read(path / "config.json")
    if config.get("quantization_config"):
        return stored
    stored_width = _WIDTHS.get(_stored_dtype(config), 4)
    width = 4 if stored_width == 2 and device.type == "cpu" else stored_width
    return stored * _WIDTHS.get(dtype, width) // stored_width


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory a device or container has left, swap and what can be freed included; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        memory, swap = 1024 * kilobytes["MemAvailable"], 1024 * kilobytes["SwapFree"]
        groups = [line.split(":", 2)[1:] for line in (_PROC / "self/cgroup").read_text().splitlines()]
    except (OSError, KeyError, ValueError, IndexError):
        return None
    for controllers, path in groups:
        if controllers and "memory" not in controllers.split(","):
            continue
        top = _CGROUPS / "memory" if controllers else _CGROUPS
        limit, used = _NAMES_1 if controllers else _NAMES_2
        group = top / path.lstrip("/")
        for each in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            left = _value(each / limit) - _value(each / used, 0) + _value(each / "memory.stat", 0, "inactive_file")
            memory = int(min(left, memory))
            left = _value(each / "memory.swap.max") - _value(each / "memory.swap.current", 0)
            swap = int(min(left, swap))
    return max(0, memory) + max(0, swap)


_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_NAMES_1, _NAMES_2 = ("memory.limit_in_bytes", "memory.usage_in_bytes"), ("memory.max", "memory.current")


def _value(file: Path, otherwise: float = math.inf, name: str = "") -> float:
    try:
        return next(float(line.split()[-1]) for line in file.read_text().splitlines() if line.startswith(name))
    except (OSError, ValueError, IndexError, StopIteration):  # "max" is no number
        return otherwise


def _weight_files(path: Path) -> list[Path]:
    # Some repositories hold the weights a second time in a layout of their own, which is not what is loaded.
    named = _read(path / "model.safetensors.index.json").get("weight_map")
    if isinstance(named, dict):
        return [path / str(name) for name in sorted(set(named.values())) if (path / str(name)).is_file()]
    if (path / "model.safetensors").is_file():
        return [path / "model.safetensors"]
    return list(path.glob("pytorch_model*.bin"))


def _stored_dtype(config: dict[str, Any]) -> str:
    text = config.get("text_config")
    sections = (config, text if isinstance(text, dict) else {})
    return str(next((s[key] for s in sections for key in ("dtype", "torch_dtype") if s.get(key)), "float32"))


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


LEAST_MULTIPLICATIONS = 2**24
"""Smaller products are about as fast by MKL, or faster."""


@functools.cache
def wider_by_onednn() -> bool:
    """Tell whether torch's own float32 products leave half of the processor's width unused, and oneDNN does not."""
    find: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)
    found, backends = find(), cast(Any, torch.backends)
    is_wide = bool(found.get("avx512_f")) and "AMD" in str(found.get("cpu_name", ""))
    return is_wide and bool(backends.mkldnn.is_available() and backends.mkl.is_available())


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return what `torch.nn.functional.linear` does, to rounding; gradients flow.

    Args:
        hidden: [..., d_in].
        weight: [d_out, d_in].
        bias: [d_out].
    """
    is_plain = hidden.dtype == weight.dtype == torch.float32 and hidden.device.type == weight.device.type == "cpu"
    n_rows = hidden.numel() // max(1, hidden.shape[-1])
    if not (is_plain and wider_by_onednn()) or n_rows * weight.numel() < LEAST_MULTIPLICATIONS:
        return functional.linear(hidden, weight, bias)
    return _by_onednn(hidden, weight, bias)


def _by_onednn(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    given = [each for each in (hidden, weight, bias) if each is not None]
    if torch.is_grad_enabled() and any(each.requires_grad for each in given):
        return cast(Tensor, torch.ops.aten.mkldnn_linear(hidden.to_mkldnn(), weight, bias).to_dense())
    # Without gradients, and without copies into tensors of oneDNN and out of them.
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(hidden, weight, bias, "none", [], ""))


def widen_products(model: nn.Module) -> None:
    """Have a model's plain linear layers compute by `product`; each keeps its class, its weight and its hooks."""
    for layer in model.modules() if wider_by_onednn() else ():
        if type(layer) is nn.Linear and "forward" not in layer.__dict__:
            # A bound method, so that a copy of the model computes with the copy's weights.
            cast(Any, layer).forward = MethodType(_forward, layer)


def _forward(layer: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - its name in torch
    return product(input, layer.weight, layer.bias)
