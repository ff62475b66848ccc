"""Tiny quantised checkpoints as they are released, made from plain ones: names, dtypes and config of each format."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from abliterate.checkpoints.block_scaled import BlockLayout, encode
from abliterate.checkpoints.format_fp8 import E4M3
from abliterate.checkpoints.format_mxfp4 import E2M1
from tests.support.chat_models import VOCABULARY, make_tokenizer
from tests.support.loaded_models import stored
from tests.support.tiny_models import save_tiny_model

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
COMPRESSED: dict[str, Any] = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"]}
# Format -> quantization_config, block for a matrix, dtype of the scales, suffix of their name.
FP8_FORMATS: dict[str, tuple[dict[str, Any], Any, torch.dtype, str]] = {
    "block": (FP8 | {"weight_block_size": [128, 128]}, lambda _r, _c: (128, 128), torch.float32, "_scale_inv"),
    "ue8m0": (
        FP8 | {"weight_block_size": [128, 128], "scale_fmt": "ue8m0"},
        lambda _r, _c: (128, 128),
        torch.float8_e8m0fnu,
        "_scale_inv",
    ),
    "per tensor": (FP8 | {"weight_block_size": None}, lambda r, c: (r, c), torch.float32, "_scale_inv"),
    "compressed": (COMPRESSED, lambda _r, c: (1, c), torch.bfloat16, "_scale"),
}


def save_fp8_llama(path: Path, kind: str, *, hidden_size: int = 256, **options: Any) -> Path:
    """Save a llama whose Linear weights are stored in FP8, in several shards."""
    content, block_of, scale_dtype, suffix = FP8_FORMATS[kind]
    save_tiny_model(
        path,
        hidden_size=hidden_size,
        head_dim=hidden_size // 4,
        intermediate_size=384,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        dtype=torch.bfloat16,
        **options,
    )
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored(path).items():
        if not name.endswith("proj.weight"):
            tensors[name] = tensor
            continue
        layout = BlockLayout(grid=E4M3, block=block_of(*tensor.shape), power_of_two=content.get("scale_fmt") == "ue8m0")
        tensors[name], scales = encode(tensor.float(), layout=layout, scale_dtype=scale_dtype)
        tensors[name + suffix] = scales.reshape(()) if kind == "per tensor" else scales
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
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        dtype=torch.bfloat16,
    )
    layout = BlockLayout(grid=E2M1, block=(1, 32), power_of_two=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in stored(path).items():
        if not name.endswith(("down_proj", "gate_up_proj")):
            tensors[name] = tensor
            continue
        pairs = [encode(matrix.T.float(), layout=layout, scale_dtype=torch.uint8) for matrix in tensor]
        tensors[f"{name}_blocks"] = torch.stack([codes for codes, _ in pairs])
        tensors[f"{name}_scales"] = torch.stack([scales for _, scales in pairs])
    _rewrite(path, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.embed_tokens", "lm_head"]})
    return path


def _rewrite(path: Path, tensors: dict[str, Tensor], content: dict[str, Any]) -> None:
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
