"""How much memory a model takes, known before it is loaded."""

import json
from pathlib import Path
from typing import Any

import torch

from abliterate.errors import ModelError

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
    """Return how many bytes the weights in a directory take once loaded; 0 where no weight files are known.

    Half formats are run in float32 on a CPU unless `dtype` says otherwise.

    Args:
        path: the model's directory.
        dtype: auto, float32, bfloat16 or float16.
        device: where the model is to go.
    """
    stored = sum(file.stat().st_size for file in _weight_files(path))
    config = _read(path / "config.json")
    if config.get("quantization_config"):
        return stored
    stored_width = _WIDTHS.get(_stored_dtype(config), 4)
    as_run = 4 if stored_width == 2 and device.type == "cpu" else stored_width
    return stored * _WIDTHS.get(dtype, as_run) // stored_width


def free_bytes(device: torch.device) -> int | None:
    """Return how much memory can be had on a device, swap and what the system can free included; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        return 1024 * (kilobytes["MemAvailable"] + kilobytes["SwapFree"])
    except (OSError, KeyError, ValueError, IndexError):
        return None


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
