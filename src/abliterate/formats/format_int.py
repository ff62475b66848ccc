"""Codes that are whole numbers of a few bits, with a scale, and often a zero point, for a group of a row's entries.

An entry is scale * (code - zero). Scales and zero points keep their bytes through an edit: what changes by it is far
below a step. An entry at the end of its range stays within it, and its neighbours make up for that.

compressed-tensors, pack-quantized   `x.weight_packed`, I32 [out, words of the row]; `x.weight_scale` [out, groups];
                                     `x.weight_zero_point`, I32 [words of out, groups]; codes less half their range
compressed-tensors, int-quantized    `x.weight`, I8 [out, in]; `x.weight_scale`, `x.weight_zero_point`, I8
GPTQ                                 `x.qweight`, I32 [words of in, out]; `x.scales` [groups, out]; `x.qzeros`, I32
                                     [groups, words of out], of which one is missing
AWQ                                  `x.qweight`, I32 [in, words of out]; `x.scales`; `x.qzeros`, in AWQ's order

A word holds 32 / bits codes, the first in its lowest bits; AWQ has an order of its own.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from abliterate.checkpoints.encoding import (
    EditableEncoding,
    EncodingError,
    QuantizedFormat,
    compressed_formats,
    encoded_tensor,
)
from abliterate.checkpoints.safetensors_file import TensorInfo
from abliterate.formats.block_scaled import BlockLayout, Grid, round_levels

_SCALE_DTYPES = {"F32", "BF16", "F16"}
_BITS = (4, 8)
# Where the codes of a word of AWQ lie.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True)
class _Whole(Grid):
    """Differences of codes and zero points."""

    magnitudes: ClassVar[Tensor] = torch.arange(512, dtype=torch.float32)
    most_left: ClassVar[float] = 0.05

    def levels(self, codes: Tensor) -> Tensor:
        return codes

    def codes(self, levels: Tensor) -> Tensor:
        return levels

    def replaced(self, codes: Tensor, levels: Tensor) -> Tensor:  # noqa: ARG002
        return levels

    def nearest(self, values: Tensor) -> Tensor:
        return values.round().clamp(-511, 511).short()


WHOLE: Grid = _Whole()


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How codes without a sign lie in the words of a tensor.

    Attributes:
        bits: Of a code.
        axis: Along which the codes of a word follow each other; None: each code is an entry of dtype int8, less half
            of the range.
        order: Which code of a word lies in its lowest bits, in the next, and so on; None: as they come.
    """

    bits: int
    axis: int | None
    order: tuple[int, ...] | None = None

    @property
    def per_word(self) -> int:
        """How many codes a word holds."""
        return 32 // self.bits

    def unpacked(self, words: Tensor) -> Tensor:
        """Return the codes, int16, from 0 to 2^bits - 1."""
        if self.axis is None:
            return words.short() + (1 << (self.bits - 1))
        shifts = self.bits * torch.arange(self.per_word, dtype=torch.int32)
        last = words.movedim(self.axis, -1)
        parts = ((last.unsqueeze(-1) >> shifts) & ((1 << self.bits) - 1)).short()
        if self.order is not None:
            parts = parts[..., torch.tensor(self.order).argsort()]
        return parts.flatten(-2).movedim(-1, self.axis)

    def packed(self, codes: Tensor) -> Tensor:
        """Return codes as they are stored."""
        if self.axis is None:
            return (codes - (1 << (self.bits - 1))).to(torch.int8)
        parts = codes.movedim(self.axis, -1).long()
        parts = parts.reshape(*parts.shape[:-1], -1, self.per_word)
        if self.order is not None:
            parts = parts[..., torch.tensor(self.order)]
        words = (parts << (self.bits * torch.arange(self.per_word))).sum(dim=-1)
        return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, self.axis)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeEncoding(EditableEncoding):
    """See `Encoding`: codes, and as companions the scales and, where there are any, the zero points.

    Attributes:
        packing: Of the codes.
        zero_packing: Of the zero points; None: there are none, and codes are symmetric about half their range.
        group: Entries of a row that share a scale.
        input_first: Codes, scales and zero points are stored [in, out]; as decoded they are [out, in] all the same.
        zero_offset: What is added to stored zero points.
    """

    packing: Packing
    zero_packing: Packing | None
    group: int
    input_first: bool = False
    zero_offset: int = 0

    def decode(self, codes: Tensor, companions: Sequence[Tensor]) -> Tensor:
        """See `Encoding.decode`; [out, in]."""
        levels, scales, _ = self._read(codes, companions)
        return WHOLE.numbers(levels) * scales.repeat_interleave(self.group, dim=1)[:, : levels.shape[1]]

    def refit(
        self,
        codes: Tensor,  # noqa: ARG002
        companions: Sequence[Tensor],
        *,
        directions: Tensor,  # noqa: ARG002
        strength: float,  # noqa: ARG002
    ) -> tuple[Tensor, ...]:
        """See `EditableEncoding.refit`; they stay what they are."""
        return tuple(companions)

    @property
    def rewritten(self) -> tuple[TensorInfo, ...]:
        """See `EditableEncoding.rewritten`."""
        return (self.codes,)

    def requantize(self, codes: Tensor, companions: Sequence[Tensor], *, directions: Tensor, strength: float) -> Tensor:
        """See `EditableEncoding.requantize`."""
        levels, scales, zeros = self._read(codes, companions)
        top = (1 << self.packing.bits) - 1
        rounded = round_levels(
            levels,
            scales,
            scales,
            layout=BlockLayout(grid=WHOLE, block=(1, self.group)),
            directions=directions,
            strength=strength,
            bounds=(-zeros, top - zeros),
        )
        new = rounded.levels + zeros.repeat_interleave(self.group, dim=1)[:, : levels.shape[1]]
        return self.packing.packed(new.T.contiguous() if self.input_first else new)

    def largest_residue(self, *, d_model: int, k: int, along: float, norm: float) -> float:
        """See `EditableEncoding.largest_residue`."""
        share = 0.005 if self.packing.bits == 8 else WHOLE.most_left
        return share * max(along, math.sqrt(k / d_model) * norm)

    def _read(self, codes: Tensor, companions: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes less zero points, [out, in], scales and zero points, [out, groups]."""
        plain, scales = self.packing.unpacked(codes), companions[0].float()
        if self.zero_packing is None:
            zeros = torch.full(scales.shape, 1 << (self.packing.bits - 1), dtype=torch.int16)
        else:
            # What is packed along the rows may end in a word that is not full.
            zeros = self.zero_packing.unpacked(companions[1])[: len(scales)] + self.zero_offset
        if self.input_first:
            plain, scales, zeros = plain.T, scales.T, zeros.T
        levels = plain - zeros.repeat_interleave(self.group, dim=1)[:, : plain.shape[1]]
        return levels.contiguous(), scales.contiguous(), zeros.short().contiguous()


class _CompressedIntegers:
    names = ("pack-quantized and int-quantized of compressed-tensors",)

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:
        return method == "compressed-tensors" and bool(
            compressed_formats(content) & {"pack-quantized", "int-quantized"}
        )

    def find(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], content: Mapping[str, Any]
    ) -> TensorInfo | None:
        stem, _, kind = info.name.rpartition(".")
        packed = info.dtype == "I32" and kind == "weight_packed"
        if content.get("quant_method") != "compressed-tensors" or not (
            packed or (info.dtype, kind) == ("I8", "weight")
        ):
            return None
        scales = tensors.get(f"{stem}.weight_scale")
        if scales is None or len(info.shape) != 2:
            return None
        order = tensors.get(f"{stem}.weight_g_idx")
        if order is not None:
            raise EncodingError(info, order, "an order of columns by activation, which is not handled")
        zeros = tensors.get(f"{stem}.weight_zero_point")
        fitting = list(_fitting(info, scales, zeros, content, packed=packed))
        if len(set(fitting)) != 1:
            raise EncodingError(info, scales, "whose groups are not those that config.json names")
        bits, group = fitting[0]
        columns = info.shape[1] * (32 // bits if packed else 1)
        encoding = WholeEncoding(
            codes=info,
            companions=(scales,) if zeros is None else (scales, zeros),
            packing=Packing(bits=bits, axis=1 if packed else None),
            zero_packing=None if zeros is None else Packing(bits=bits, axis=0 if packed else None),
            group=group,
            unused=(f"{stem}.weight_shape", f"{stem}.input_scale", f"{stem}.input_zero_point"),
        )
        return encoded_tensor(encoding, name=f"{stem}.weight", shape=(info.shape[0], columns))


def _fitting(
    info: TensorInfo, scales: TensorInfo, zeros: TensorInfo | None, content: Mapping[str, Any], *, packed: bool
) -> Iterator[tuple[int, int]]:
    """Yield bits and group of each scheme in config.json that the shapes agree with."""
    groups = content.get("config_groups")
    for scheme in groups.values() if isinstance(groups, dict) else ():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        if not isinstance(weights, dict) or weights.get("type") != "int" or weights.get("num_bits") not in _BITS:
            continue
        bits, strategy, size = weights["num_bits"], weights.get("strategy"), weights.get("group_size")
        rows, columns = info.shape[0], info.shape[1] * (32 // bits if packed else 1)
        if not packed and bits != 8:
            continue
        group = {"group": size, "channel": columns}.get(str(strategy))
        if not isinstance(group, int) or group < 1 or columns % group or scales.dtype not in _SCALE_DTYPES:
            continue
        shape = (rows, columns // group)
        wanted = (-(-rows * bits // 32), shape[1]) if packed else shape
        fits_zeros = zeros is None or (zeros.shape == wanted and zeros.dtype == ("I32" if packed else "I8"))
        if scales.shape == shape and fits_zeros and (zeros is None) == bool(weights.get("symmetric", True)):
            yield bits, group


class _InputFirst:
    """GPTQ and AWQ: matrices stored [in, out], with a zero point for each group."""

    names = ("gptq of 4 or 8 bits, without desc_act", "awq of 4 bits")

    def is_named_by(self, method: str, content: Mapping[str, Any]) -> bool:
        if method == "gptq":
            known = content.get("checkpoint_format", "gptq") in ("gptq", "gptq_v2")
            return known and content.get("bits") in _BITS and not content.get("desc_act")
        return method == "awq" and content.get("bits") == 4 and str(content.get("version", "gemm")).lower() == "gemm"

    def find(
        self, info: TensorInfo, tensors: Mapping[str, TensorInfo], content: Mapping[str, Any]
    ) -> TensorInfo | None:
        stem = info.name.removesuffix(".qweight")
        if stem == info.name or info.dtype != "I32" or len(info.shape) != 2:
            return None
        scales, zeros = tensors.get(f"{stem}.scales"), tensors.get(f"{stem}.qzeros")
        if scales is None or zeros is None:
            return None
        bits, is_awq = int(content["bits"]), content.get("quant_method") == "awq"
        packing = Packing(bits=bits, axis=1 if is_awq else 0, order=_AWQ_ORDER if is_awq else None)
        rows, columns = info.shape
        inputs, outputs = (rows, columns * packing.per_word) if is_awq else (rows * packing.per_word, columns)
        size = content.get("group_size", -1)
        group = inputs if size in (-1, None) else size
        if not isinstance(group, int) or group < 1 or inputs % group or outputs % packing.per_word:
            raise EncodingError(info, scales, "whose groups are not those that config.json names")
        n_groups = inputs // group
        if scales.shape != (n_groups, outputs) or scales.dtype not in _SCALE_DTYPES:
            raise EncodingError(info, scales, "whose groups are not those that config.json names")
        if zeros.shape != (n_groups, outputs // packing.per_word) or zeros.dtype != "I32":
            raise EncodingError(info, zeros, "zero points that do not fit the scales")
        encoding = WholeEncoding(
            codes=info,
            companions=(scales, zeros),
            packing=packing,
            zero_packing=replace(packing, axis=1),
            group=group,
            input_first=True,
            zero_offset=0 if is_awq or content.get("checkpoint_format") == "gptq_v2" else 1,
            unused=(f"{stem}.g_idx",),
        )
        return encoded_tensor(encoding, name=f"{stem}.weight", shape=(outputs, inputs))


FORMATS: tuple[QuantizedFormat, ...] = (_CompressedIntegers(), _InputFirst())
