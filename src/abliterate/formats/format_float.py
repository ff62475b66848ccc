"""Codes that are floating-point numbers of few bits, with scales: FP8 (e4m3) and FP4 (e2m1: MXFP4, NVFP4).

FP8: beside `x.weight` of dtype F8_E4M3, one code a byte, stand its scales, called `x.weight_scale_inv`,
`x.weight_scale` (compressed-tensors, ModelOpt) or, in some releases, `x.scale` or `x.qscale_weight`. MXFP8: these are
the exponents of 32 numbers of a row each, U8 or F8_E8M0.

FP4: two codes of a row share a byte, the first in the low half, and each 32 (MXFP4) or 16 (NVFP4) of them a scale.

gpt-oss, a stack of experts    `x_blocks`, U8, [expert, out, group, 16]; `x_scales`, U8: exponents with a bias of 127
compressed-tensors, mxfp4      `x.weight_packed`, U8; `x.weight_scale`, U8: the same
compressed-tensors, nvfp4      `x.weight_packed`, U8; `x.weight_scale`, F8_E4M3; over `x.weight_global_scale`
ModelOpt, NVFP4                `x.weight`, U8; `x.weight_scale`, F8_E4M3; times `x.weight_scale_2`
DeepSeek, experts              `x.weight`, I8; `x.scale`, F8_E8M0
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from abliterate.checkpoints.encoding import EncodingError, QuantizedFormat, compressed_formats, encoded_tensor
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.formats.block_scaled import BlockEncoding, BlockLayout, Grid

_METHODS = {"fp8", "mxfp8"}
# Of a scale that is an exponent, where the config does not say.
_MX_BLOCK = (1, 32)
# A tuple, since what a config says may be something that no set can be asked for.
_E4M3_NAMES = (None, "e4m3", "e4m3fn", "float8_e4m3fn")
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
    names = ("fp8", "mxfp8", "float-quantized and mxfp8 of compressed-tensors", "FP8 and MXFP8 of ModelOpt")

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:
        if method == "compressed-tensors":
            return bool(compressed_formats(content) & {"float-quantized", "mxfp8-quantized"})
        if method == "modelopt":
            return content.get("quant_algo") in ("FP8", "MXFP8")
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
        block = _block_of(info.shape, scales.shape, _named_block(content))
        if block is None and scales.dtype in {"U8", "F8_E8M0"}:
            block = _block_of(info.shape, scales.shape, _MX_BLOCK)
        if block is None:
            raise EncodingError(info, scales, "whose blocks are not those that config.json names")
        power_of_two = scales.dtype in {"U8", "F8_E8M0"} or content.get("scale_fmt") == "ue8m0"
        layout = BlockLayout(grid=E4M3, block=block, power_of_two=power_of_two)
        unused = tuple(f"{stem}.{each}" for each in _ACTIVATION_SCALES)
        encoding = BlockEncoding(codes=info, companions=(scales,), layout=layout, unused=unused)
        return encoded_tensor(encoding, name=info.name, shape=info.shape)


_FP4_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_FP4_SIGN_BIT = 0x08
# The greatest number of the matrix is 6 * 448 of it; where it is more than this it has been taken the other way up.
_LARGEST_UNIT = 1.0


@dataclass(frozen=True, slots=True)
class _E2M1(Grid):
    """Codes of four bits, two a byte, the first in the low half; stored in uint8, or in int8 as the same bits.

    Attributes:
        group: Entries of a group where the bytes of each have an axis of their own, [rows, groups, bytes]; None where
            a matrix is [rows, bytes].
    """

    group: int | None = None
    magnitudes: ClassVar[Tensor] = _FP4_MAGNITUDES
    most_left: ClassVar[float] = 0.05

    def levels(self, codes: Tensor) -> Tensor:
        plain = codes.view(torch.uint8)
        pairs = torch.stack([plain & 0x0F, plain >> 4], dim=-1)
        levels = pairs.flatten(start_dim=-2 if self.group is None else -3).short()
        magnitude = levels & (_FP4_SIGN_BIT - 1)
        return torch.where(levels >= _FP4_SIGN_BIT, -magnitude, magnitude)

    def codes(self, levels: Tensor) -> Tensor:
        plain = torch.where(levels < 0, _FP4_SIGN_BIT - levels, levels).to(torch.uint8)
        bytes_each = () if self.group is None else (self.group // 2,)
        pairs = plain.reshape(*plain.shape[:-1], -1, *bytes_each, 2)
        return pairs[..., 0] | (pairs[..., 1] << 4)

    def replaced(self, codes: Tensor, levels: Tensor) -> Tensor:
        old, new = codes.view(torch.uint8), self.codes(levels)
        low, high = (self.levels(codes) == levels).reshape(*codes.shape, 2).unbind(dim=-1)
        kept = low.to(torch.uint8) * 0x0F + high.to(torch.uint8) * 0xF0
        return ((old & kept) | (new & ~kept)).view(codes.dtype)

    def nearest(self, values: Tensor) -> Tensor:
        magnitudes = _FP4_MAGNITUDES.to(values.device)
        between = (magnitudes[1:] + magnitudes[:-1]) / 2
        size = values.abs().contiguous()
        low = torch.bucketize(size, between, right=False)
        high = torch.bucketize(size, between, right=True)
        level = torch.where(low % 2 == 0, low, high).short()
        return torch.where(values < 0, -level, level)


MXFP4 = BlockLayout(grid=_E2M1(group=32), block=(1, 32), power_of_two=True)
"""As gpt-oss is released."""
PACKED_MXFP4 = BlockLayout(grid=_E2M1(), block=(1, 32), power_of_two=True)
NVFP4 = BlockLayout(grid=_E2M1(), block=(1, 16))


@dataclass(frozen=True, slots=True, kw_only=True)
class TwoLevelEncoding(BlockEncoding):
    """Scales of blocks that are themselves scaled, by one number for the whole matrix: the second companion.

    That number stays what it is. The matrix is edited in its units, where a projection is the same.

    Attributes:
        divides: The numbers are divided by it, not multiplied.
    """

    divides: bool

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """See `Encoding.decode`."""
        return BlockEncoding.decode(self, codes, companions[:1]) * self._unit(companions)

    def refit(
        self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float
    ) -> tuple[Tensor, ...]:
        """See `EditableEncoding.refit`."""
        scales = BlockEncoding.refit(self, codes, companions[:1], directions=directions, strength=strength)
        return *scales, companions[1]

    def requantize(self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float) -> Tensor:
        """See `EditableEncoding.requantize`."""
        self._unit(companions)
        return BlockEncoding.requantize(self, codes, companions, directions=directions, strength=strength)

    def _unit(self, companions: Sequence[Tensor]) -> Tensor:
        """Return what blocks' numbers are multiplied with; ValueError if it is not positive or the other way up."""
        whole = companions[1].float().reshape(())
        unit = whole.reciprocal() if self.divides else whole
        if not 0 < float(unit) <= _LARGEST_UNIT:
            raise ValueError(f"the scale of the whole matrix, {float(whole):g}, cannot be right")
        return unit

    @property
    def rewritten(self) -> tuple[TensorInfo, ...]:
        """See `EditableEncoding.rewritten`."""
        return self.codes, self.companions[0]


class _Fp4:
    names = ("mxfp4", "mxfp4 and nvfp4 of compressed-tensors", "NVFP4 of ModelOpt")

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:
        if method == "compressed-tensors":
            return bool(compressed_formats(content) & {"nvfp4-pack-quantized", "mxfp4-pack-quantized"})
        return method == "mxfp4" or (method == "modelopt" and content.get("quant_algo") == "NVFP4")

    def find(
        self,
        info: TensorInfo,
        tensors: Mapping[str, TensorInfo],
        content: Mapping[str, Any],
    ) -> TensorInfo | None:
        stem, _, kind = info.name.rpartition(".")
        if info.dtype == "U8" and info.name.endswith("_blocks"):
            return _of_gpt_oss(info, tensors)
        if info.dtype == "U8" and kind in {"weight_packed", "weight"}:
            return _packed_fp4(info, tensors, stem=stem)
        if info.dtype == "I8" and kind == "weight" and str(content.get("quant_method")) in _METHODS:
            return _packed_fp4(info, tensors, stem=stem, scale="scale")
        return None


def _of_gpt_oss(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    plain = info.name.removesuffix("_blocks")
    scales = tensors.get(f"{plain}_scales")
    if scales is None:
        return None
    _check_dtype(info, scales)
    if scales.dtype != "U8" or info.shape[:-1] != scales.shape or info.shape[-1:] != (16,):
        raise EncodingError(info, scales, "which are not one for 32 numbers of a row")
    *leading, rows, groups, _ = info.shape
    turned = bool(leading)
    matrix = (groups * 32, rows) if turned else (rows, groups * 32)
    encoding = BlockEncoding(codes=info, companions=(scales,), layout=MXFP4, turned=turned)
    return encoded_tensor(encoding, name=plain, shape=(*leading, *matrix))


def _packed_fp4(
    info: TensorInfo, tensors: Mapping[str, TensorInfo], *, stem: str, scale: str = "weight_scale"
) -> TensorInfo | None:
    scales = tensors.get(f"{stem}.{scale}")
    if scales is None or len(info.shape) != 2:
        return None
    _check_dtype(info, scales)
    rows, n_bytes = info.shape
    is_nvfp4 = scales.dtype == "F8_E4M3"
    layout = NVFP4 if is_nvfp4 else PACKED_MXFP4
    if not is_nvfp4 and scales.dtype not in {"U8", "F8_E8M0"}:
        raise EncodingError(info, scales, "of a dtype that FP4 does not have")
    if scales.shape != (rows, 2 * n_bytes // layout.block[1]) or 2 * n_bytes % layout.block[1]:
        raise EncodingError(info, scales, f"which are not one for {layout.block[1]} numbers of a row")
    name, shape = f"{stem}.weight", (rows, 2 * n_bytes)
    unused = (f"{stem}.input_scale", f"{stem}.input_global_scale")
    if not is_nvfp4:
        encoding = BlockEncoding(codes=info, companions=(scales,), layout=layout, unused=unused)
        return encoded_tensor(encoding, name=name, shape=shape)
    divides = info.name.endswith("_packed")
    whole = tensors.get(f"{stem}.{'weight_global_scale' if divides else 'weight_scale_2'}")
    if whole is None:
        raise EncodingError(info, scales, "but the scale of the whole matrix is not there")
    if whole.dtype != "F32" or whole.shape not in {(), (1,)}:
        raise EncodingError(info, whole, "which is not one number of dtype F32")
    two = TwoLevelEncoding(codes=info, companions=(scales, whole), layout=layout, unused=unused, divides=divides)
    return encoded_tensor(two, name=name, shape=shape)


def _check_dtype(info: TensorInfo, scales: TensorInfo) -> None:
    if scales.dtype not in {"F32", "BF16", "F16", "U8", "F8_E8M0", "F8_E4M3"}:
        raise EncodingError(info, scales, "of a dtype that is not known")


FORMATS: tuple[QuantizedFormat, ...] = (_Fp8(), _Fp4())


def _named_block(content: Mapping[str, Any]) -> Sequence[Any]:
    named = content.get("weight_block_size")
    return named if isinstance(named, list) and named else (None, None)


def _block_of(codes: tuple[int, ...], scales: tuple[int, ...], named: Sequence[Any]) -> tuple[int, int] | None:
    """Return how many rows and columns share a scale; None where neither the shapes nor what is named tell it."""
    if len(codes) not in {2, 3}:
        return None
    *leading, rows, columns = codes
    found = list(scales)
    if found[: len(leading)] != leading:
        return (rows, columns) if not leading and found in ([], [1]) else None
    found = found[len(leading) :]
    found += [1] * (2 - len(found))
    block = []
    for size, n_scales, wanted in zip((rows, columns), found, named, strict=False):
        if n_scales == 1:
            block.append(size)
        elif n_scales == size:
            block.append(1)
        elif isinstance(wanted, int) and wanted > 0 and -(-size // wanted) == n_scales:
            block.append(wanted)
        else:
            return None
    return (block[0], block[1]) if len(block) == len(found) == 2 else None
