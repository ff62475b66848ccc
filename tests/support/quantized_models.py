"""Models stored in the layouts that people download: FP8, packed integers, one- and two-level FP4.

Whole numbers are quantised and packed here in plain loops, apart from the code under test.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate.formats.block_scaled import BlockLayout, encode
from abliterate.formats.format_float import E4M3, MXFP4, NVFP4, PACKED_MXFP4
from tests.support.loaded_models import stored
from tests.support.tiny_models import CHAT_VOCABULARY, make_tokenizer, save_tiny_model

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Stored = dict[str, Tensor]


def quantize_whole(matrix: Tensor, *, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes [out, in] from 0, scales and zero points [out, groups], the way such quantisers do it."""
    wide = matrix.float().reshape(len(matrix), -1, group)
    top = 2**bits - 1
    if symmetric:
        scales = wide.abs().amax(dim=-1) * 2 / top
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = wide.amin(dim=-1).clamp(max=0), wide.amax(dim=-1).clamp(min=0)
        scales = (high - low) / top
        zeros = (-low / scales).round()
    scales = scales.bfloat16().float()
    codes = ((wide / scales[..., None]).round() + zeros[..., None]).clamp(0, top)
    return codes.reshape(matrix.shape).long(), scales, zeros.long()


def pack(codes: Tensor, *, bits: int, dim: int, order: Sequence[int] | None = None) -> Tensor:
    """Pack codes into words along an axis, one after the other or in this order."""
    per_word = 32 // bits
    lines = codes.long().movedim(dim, -1)
    lines = torch.nn.functional.pad(lines, (0, -lines.shape[-1] % per_word))
    words = torch.zeros(*lines.shape[:-1], lines.shape[-1] // per_word, dtype=torch.long)
    for place in range(per_word):
        words |= lines[..., (place if order is None else order[place]) :: per_word] << (bits * place)
    return torch.where(words >= 2**31, words - 2**32, words).int().movedim(-1, dim).contiguous()


def compressed_whole(bits: int, group: int | None, *, symmetric: bool = True, packed: bool = True) -> Any:
    """Return how compressed-tensors stores whole numbers: what config.json says, and the tensors of a weight."""
    strategy = {"strategy": "channel", "group_size": None} if group is None else {"strategy": "group"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group, "actorder": None}
    scheme = {"targets": ["Linear"], "input_activations": None, "weights": weights | strategy}
    content = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else "int-quantized",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }

    def store(stem: str, matrix: Tensor) -> Stored:
        size = matrix.shape[1] if group is None else group
        codes, scales, zeros = quantize_whole(matrix, bits=bits, group=size, symmetric=symmetric)
        found = {f"{stem}.weight_scale": scales.bfloat16()}
        if packed:
            found[f"{stem}.weight_packed"] = pack(codes, bits=bits, dim=1)
            found[f"{stem}.weight_shape"] = torch.tensor(matrix.shape)
            if not symmetric:
                found[f"{stem}.weight_zero_point"] = pack(zeros, bits=bits, dim=0)
        else:
            found[f"{stem}.weight"] = (codes - 128).to(torch.int8)
        return found

    return content, store


def input_first(method: str, bits: int, group: int, **more: Any) -> Any:
    """Return how GPTQ and AWQ store a weight."""
    content = {"quant_method": method, "bits": bits, "group_size": group, **more}

    def store(stem: str, matrix: Tensor) -> Stored:
        codes, scales, zeros = quantize_whole(matrix, bits=bits, group=group, symmetric=False)
        if method == "awq":
            return {
                f"{stem}.qweight": pack(codes.T, bits=bits, dim=1, order=AWQ_ORDER),
                f"{stem}.qzeros": pack(zeros.T, bits=bits, dim=1, order=AWQ_ORDER),
                f"{stem}.scales": scales.T.half().contiguous(),
            }
        offset = 0 if more.get("checkpoint_format") == "gptq_v2" else 1
        return {
            f"{stem}.qweight": pack(codes.T, bits=bits, dim=0),
            f"{stem}.qzeros": pack((zeros.T - offset) % 2**bits, bits=bits, dim=1),
            f"{stem}.scales": scales.T.half().contiguous(),
            f"{stem}.g_idx": torch.arange(matrix.shape[1], dtype=torch.int32) // group,
        }

    return content, store


def fp4(content: dict[str, Any], layout: BlockLayout, scale_dtype: torch.dtype, names: dict[str, str]) -> Any:
    """Return how FP4 is stored under these names of codes, scales and the scale of the whole."""

    def store(stem: str, matrix: Tensor) -> Stored:
        whole = matrix.float().abs().max() / (6 * 448) if "whole" in names else torch.tensor(1.0)
        codes, scales = encode(matrix.float() / whole, layout=layout, scale_dtype=scale_dtype)
        codes = codes.view(torch.int8) if names["codes"] == "weight" and names["scales"] == "scale" else codes
        found = {f"{stem}.{names['codes']}": codes, f"{stem}.{names['scales']}": scales}
        if "whole" in names:
            divides = names["whole"] == "weight_global_scale"
            found[f"{stem}.{names['whole']}"] = (1 / whole).reshape(1) if divides else whole.reshape(())
            found[f"{stem}.{'input_global_scale' if divides else 'input_scale'}"] = torch.ones(1)
        return found

    return content, store


def fp8(content: dict[str, Any], block: tuple[int | None, int | None], scale_dtype: torch.dtype, scale: str) -> Any:
    """Return how FP8 is stored: blocks of so many rows and columns (None: all of them), and the name of the scales."""

    def store(stem: str, matrix: Tensor) -> Stored:
        rows, columns = (size or all_of_them for size, all_of_them in zip(block, matrix.shape, strict=True))
        power_of_two = content.get("scale_fmt") == "ue8m0" or scale_dtype == torch.uint8
        layout = BlockLayout(grid=E4M3, block=(rows, columns), power_of_two=power_of_two)
        codes, scales = encode(matrix.float(), layout=layout, scale_dtype=scale_dtype)
        found = {f"{stem}.weight": codes, f"{stem}.{scale}": scales.reshape(()) if block == (None, None) else scales}
        return found | ({f"{stem}.input_scale": torch.ones(())} if content["quant_method"] == "modelopt" else {})

    return content, store


_FP4_WEIGHTS = {"num_bits": 4, "type": "float", "symmetric": True, "strategy": "tensor_group", "group_size": 16}


def _compressed_fp4(name: str, weights: dict[str, Any]) -> dict[str, Any]:
    scheme = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
_BLOCKS = _FP8 | {"weight_block_size": [128, 128]}

LAYOUTS: dict[str, tuple[dict[str, Any], Callable[[str, Tensor], Stored]]] = {
    "block": fp8(_BLOCKS, (128, 128), torch.float32, "weight_scale_inv"),
    "ue8m0": fp8(_BLOCKS | {"scale_fmt": "ue8m0"}, (128, 128), torch.float8_e8m0fnu, "weight_scale_inv"),
    "per tensor": fp8(_FP8 | {"weight_block_size": None}, (None, None), torch.float32, "weight_scale_inv"),
    "compressed": fp8(
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {
                    "targets": ["Linear"],
                    "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                }
            },
            "ignore": ["lm_head"],
        },
        (1, None),
        torch.bfloat16,
        "weight_scale",
    ),
    "mxfp8": fp8(
        _compressed_fp4(
            "mxfp8-quantized",
            {
                "num_bits": 8,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "scale_dtype": "torch.uint8",
            },
        ),
        (1, 32),
        torch.uint8,
        "weight_scale",
    ),
    "modelopt fp8": fp8({"quant_method": "modelopt", "quant_algo": "FP8"}, (None, None), torch.float32, "weight_scale"),
    "int4 groups": compressed_whole(4, 32),
    "int4 groups with zeros": compressed_whole(4, 32, symmetric=False),
    "int4 rows": compressed_whole(4, None),
    "int8 groups": compressed_whole(8, 64),
    "int8 rows": compressed_whole(8, None, packed=False),
    "gptq": input_first("gptq", 4, 32),
    "gptq, 8 bits": input_first("gptq", 8, 64, checkpoint_format="gptq_v2"),
    "awq": input_first("awq", 4, 32, version="gemm", zero_point=True),
    "nvfp4": fp4(
        _compressed_fp4("nvfp4-pack-quantized", _FP4_WEIGHTS),
        NVFP4,
        torch.float8_e4m3fn,
        {"codes": "weight_packed", "scales": "weight_scale", "whole": "weight_global_scale"},
    ),
    "modelopt nvfp4": fp4(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16},
        NVFP4,
        torch.float8_e4m3fn,
        {"codes": "weight", "scales": "weight_scale", "whole": "weight_scale_2"},
    ),
    "packed mxfp4": fp4(
        _compressed_fp4("mxfp4-pack-quantized", _FP4_WEIGHTS | {"strategy": "group", "group_size": 32}),
        PACKED_MXFP4,
        torch.uint8,
        {"codes": "weight_packed", "scales": "weight_scale"},
    ),
    "fp4 in bytes": fp4(
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]},
        PACKED_MXFP4,
        torch.float8_e8m0fnu,
        {"codes": "weight", "scales": "scale"},
    ),
}
"""Layout -> what config.json says of it, and the tensors that a Linear weight becomes."""


def save_quantized_llama(path: Path, kind: str, *, hidden_size: int = 256, **options: Any) -> Path:
    """Save a llama whose Linear weights are stored in this layout, in several shards."""
    content, store = LAYOUTS[kind]
    save_tiny_model(
        path,
        hidden_size=hidden_size,
        head_dim=hidden_size // 4,
        intermediate_size=384,
        vocab_size=CHAT_VOCABULARY,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
        **options,
    )
    tensors: Stored = {}
    for name, tensor in stored(path).items():
        stem = name.removesuffix(".weight")
        tensors |= store(stem, tensor) if stem.endswith("proj") else {name: tensor}
    _rewrite(path, tensors, content)
    return path


def save_mxfp4_gpt_oss(path: Path) -> Path:
    """Save a gpt_oss whose experts are stored in MXFP4, as they are released: [expert, out, group, byte]."""
    save_tiny_model(
        path,
        "gpt_oss",
        hidden_size=64,
        head_dim=16,
        intermediate_size=64,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=CHAT_VOCABULARY,
        max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        dtype=torch.bfloat16,
    )
    tensors: Stored = {}
    for name, tensor in stored(path).items():
        if not name.endswith(("down_proj", "gate_up_proj")):
            tensors[name] = tensor
            continue
        pairs = [encode(matrix.T.float(), layout=MXFP4, scale_dtype=torch.uint8) for matrix in tensor]
        tensors[f"{name}_blocks"] = torch.stack([codes for codes, _ in pairs])
        tensors[f"{name}_scales"] = torch.stack([scales for _, scales in pairs])
    _rewrite(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]})
    return path


def _rewrite(path: Path, tensors: Stored, content: dict[str, Any]) -> None:
    """Write these tensors in the place of a checkpoint's, in two shards, and what config.json says of them."""
    for old in path.glob("model*.safetensors*"):
        old.unlink()
    # The second shard begins in the middle of a layer, so that codes and scales may part.
    names = sorted(tensors)
    parts = [names[0::2], names[1::2]]
    weight_map = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": content}))
    make_tokenizer().save_pretrained(path)
