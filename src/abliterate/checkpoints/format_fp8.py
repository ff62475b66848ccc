"""FP8: codes of e4m3, one a byte, with a scale for each block, row or whole matrix.

Beside `x.weight` of dtype F8_E4M3 stand its scales, called `x.weight_scale_inv`, `x.weight_scale` (compressed-tensors)
or, in some releases, `x.scale` or `x.qscale_weight`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from abliterate.checkpoints.block_scaled import BlockEncoding, BlockLayout, Grid
from abliterate.checkpoints.encoding import EncodingError, QuantizedFormat, encoded_tensor
from abliterate.checkpoints.safetensors_file import TensorInfo

_METHODS = {"fp8", "mxfp8"}
_E4M3_NAMES = {None, "e4m3", "e4m3fn", "float8_e4m3fn"}
_ACTIVATION_SCALES = ("activation_scale", "input_scale", "qscale_act")
_SIGN_BIT = 0x80


@dataclass(frozen=True, slots=True)
class _E4M3(Grid):
    """Codes of eight bits, of dtype float8_e4m3fn."""

    magnitudes: ClassVar[Tensor] = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    most_left: ClassVar[float] = 0.005

    def levels(self, codes: Tensor) -> Tensor:
        plain = codes.view(torch.uint8).short()
        magnitude = plain & (_SIGN_BIT - 1)
        return torch.where(plain >= _SIGN_BIT, -magnitude, magnitude)

    def codes(self, levels: Tensor) -> Tensor:
        return torch.where(levels < 0, _SIGN_BIT - levels, levels).to(torch.uint8).view(torch.float8_e4m3fn)

    def replaced(self, codes: Tensor, levels: Tensor) -> Tensor:
        new, same = self.codes(levels), self.levels(codes) == levels
        return torch.where(same, codes.view(torch.uint8), new.view(torch.uint8)).view(codes.dtype)

    def nearest(self, values: Tensor) -> Tensor:
        return self.levels(values.clamp(-448.0, 448.0).to(torch.float8_e4m3fn))


E4M3: Grid = _E4M3()


class _Fp8:
    names = ("fp8", "float-quantized of compressed-tensors")

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:
        if method == "compressed-tensors":
            return content.get("format") == "float-quantized"
        return method in _METHODS and content.get("fmt") in _E4M3_NAMES

    def find(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], content: Mapping[str, Any]
    ) -> TensorInfo | None:
        if info.dtype != "F8_E4M3":
            return None
        stem = info.name.removesuffix(".weight")
        names = [f"{info.name}_scale_inv", f"{info.name}_scale"]
        names += [f"{stem}.scale", f"{stem}.qscale_weight"] if stem != info.name else []
        scales = next((tensors[name] for name in names if name in tensors), None)
        if scales is None:
            return None
        if scales.dtype not in {"F32", "BF16", "F16", "U8", "F8_E8M0"}:
            raise EncodingError(info, scales, "of a dtype that is not known")
        block = _block_of(info.shape, scales.shape, content)
        if block is None:
            raise EncodingError(info, scales, "whose blocks are not those that config.json names")
        power_of_two = scales.dtype in {"U8", "F8_E8M0"} or content.get("scale_fmt") == "ue8m0"
        layout = BlockLayout(grid=E4M3, block=block, power_of_two=power_of_two)
        unused = tuple(f"{stem}.{each}" for each in _ACTIVATION_SCALES)
        encoding = BlockEncoding(codes=info, companions=(scales,), layout=layout, unused=unused)
        return encoded_tensor(encoding, name=info.name, shape=info.shape)


FORMAT: QuantizedFormat = _Fp8()


def _block_of(codes: tuple[int, ...], scales: tuple[int, ...], content: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return how many rows and columns share a scale; None where that cannot be told."""
    if len(codes) not in {2, 3}:
        return None
    *leading, rows, columns = codes
    found = list(scales)
    if found[: len(leading)] != leading:
        return (rows, columns) if not leading and found in ([], [1]) else None
    found = found[len(leading) :]
    found += [1] * (2 - len(found))
    given = content.get("weight_block_size") or [None, None]
    block = []
    for size, n_scales, wanted in zip((rows, columns), found, given, strict=False):
        if n_scales == 1:
            block.append(size)
        elif n_scales == size:
            block.append(1)
        elif isinstance(wanted, int) and wanted > 0 and -(-size // wanted) == n_scales:
            block.append(wanted)
        else:
            return None
    return (block[0], block[1]) if len(block) == len(found) == 2 else None
