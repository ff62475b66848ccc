"""MXFP4 as gpt-oss is released: 32 numbers of a row share a power of two, two codes of e2m1 fill a byte.

A stack of experts `experts.down_proj` is stored as `experts.down_proj_blocks`, [expert, out, group, byte], and
`experts.down_proj_scales`, [expert, out, group], of dtype U8: exponents with a bias of 127.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from abliterate.checkpoints.block_scaled import BlockEncoding, BlockLayout, Grid
from abliterate.checkpoints.encoding import EncodingError, QuantizedFormat, encoded_tensor
from abliterate.checkpoints.safetensors_file import TensorInfo

_GROUP = 32
_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_SIGN_BIT = 0x08


@dataclass(frozen=True, slots=True)
class _E2M1(Grid):
    """Codes of four bits; a matrix is [rows, groups, bytes] of dtype uint8, the first code in the low four bits."""

    magnitudes: ClassVar[Tensor] = _MAGNITUDES
    most_left: ClassVar[float] = 0.05

    def levels(self, codes: Tensor) -> Tensor:
        pairs = torch.stack([codes & 0x0F, codes >> 4], dim=-1)
        plain = pairs.flatten(start_dim=-3).short()
        magnitude = plain & (_SIGN_BIT - 1)
        return torch.where(plain >= _SIGN_BIT, -magnitude, magnitude)

    def codes(self, levels: Tensor) -> Tensor:
        plain = torch.where(levels < 0, _SIGN_BIT - levels, levels).to(torch.uint8)
        pairs = plain.reshape(*plain.shape[:-1], -1, _GROUP // 2, 2)
        return pairs[..., 0] | (pairs[..., 1] << 4)

    def replaced(self, codes: Tensor, levels: Tensor) -> Tensor:
        new = self.codes(levels)
        low, high = (self.levels(codes) == levels).reshape(*codes.shape, 2).unbind(dim=-1)
        kept = low.to(torch.uint8) * 0x0F + high.to(torch.uint8) * 0xF0
        return (codes & kept) | (new & ~kept)

    def nearest(self, values: Tensor) -> Tensor:
        magnitudes = _MAGNITUDES.to(values.device)
        between = (magnitudes[1:] + magnitudes[:-1]) / 2
        size = values.abs()
        low = torch.bucketize(size, between, right=False)
        high = torch.bucketize(size, between, right=True)
        level = torch.where(low % 2 == 0, low, high).short()
        return torch.where(values < 0, -level, level)


E2M1: Grid = _E2M1()
LAYOUT = BlockLayout(grid=E2M1, block=(1, _GROUP), power_of_two=True)


class _Mxfp4:
    names = ("mxfp4",)

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:  # noqa: ARG002
        return method == "mxfp4"

    def find(
        self,
        info: TensorInfo,
        tensors: Mapping[str, TensorInfo],
        content: Mapping[str, Any],  # noqa: ARG002
    ) -> TensorInfo | None:
        plain = info.name.removesuffix("_blocks")
        scales = tensors.get(f"{plain}_scales")
        if info.dtype != "U8" or plain == info.name or scales is None:
            return None
        if scales.dtype not in {"F32", "BF16", "F16", "U8", "F8_E8M0"}:
            raise EncodingError(info, scales, "of a dtype that is not known")
        if scales.dtype != "U8" or info.shape[:-1] != scales.shape or info.shape[-1:] != (_GROUP // 2,):
            raise EncodingError(info, scales, "which are not one for 32 numbers of a row")
        *leading, rows, groups, _ = info.shape
        turned = bool(leading)
        matrix = (groups * _GROUP, rows) if turned else (rows, groups * _GROUP)
        encoding = BlockEncoding(codes=info, companions=(scales,), layout=LAYOUT, turned=turned)
        return encoded_tensor(encoding, name=plain, shape=(*leading, *matrix))


FORMAT: QuantizedFormat = _Mxfp4()
