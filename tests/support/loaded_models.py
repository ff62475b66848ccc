"""Checkpoints loaded by transformers, and what is measured on them; independent of the code under test."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

# Ids that every tiny model has.
TOKENS = torch.randint(3, 61, (4, 16), generator=torch.Generator().manual_seed(3))


def load(path: Path, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="eager").eval()


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def blocks_and_final_norm(model: PreTrainedModel) -> tuple[Any, Any]:
    stack = model.base_model
    return (stack.h, stack.ln_f) if hasattr(stack, "h") else (stack.layers, stack.norm)


@contextmanager
def ablated(model: PreTrainedModel, vector: Tensor) -> Iterator[None]:
    """Directional ablation of every write to the stream, by hooks of this test's own."""
    unit = vector.double() / vector.double().norm()

    def clean(hidden: Tensor) -> Tensor:
        r = unit.to(hidden.dtype)
        return hidden - (hidden @ r).unsqueeze(-1) * r

    def clean_output(_module, _args, output):
        return (clean(output[0]), *output[1:]) if isinstance(output, tuple) else clean(output)

    def clean_input(_module, args, kwargs):
        return (
            ((clean(args[0]), *args[1:]), kwargs)
            if args
            else (args, kwargs | {"hidden_states": clean(kwargs["hidden_states"])})
        )

    blocks, _ = blocks_and_final_norm(model)
    handles = [blocks[0].register_forward_pre_hook(clean_input, with_kwargs=True)]
    for block in blocks:
        attention = block.attn if hasattr(block, "attn") else block.self_attn
        handles += [attention.register_forward_hook(clean_output), block.mlp.register_forward_hook(clean_output)]
    assert len(handles) == 1 + 2 * len(blocks) == 1 + 2 * model.config.num_hidden_layers
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stream_component(model: PreTrainedModel, vector: Tensor) -> float:
    """Largest |r.h|/|h| over all tokens at every block's input and before the final norm."""
    streams = []

    def record(_module, args, kwargs):
        streams.append(args[0] if args else kwargs["hidden_states"])

    blocks, final_norm = blocks_and_final_norm(model)
    handles = [module.register_forward_pre_hook(record, with_kwargs=True) for module in (*blocks, final_norm)]
    logits(model)
    for handle in handles:
        handle.remove()
    stacked = torch.stack(streams).double()
    assert stacked.shape[0] == model.config.num_hidden_layers + 1
    return float(((stacked @ vector.double()).abs() / stacked.norm(dim=-1)).max())


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def content(path: Path) -> dict[str, bytes]:
    """The files of an edited checkpoint, but for the time in its record."""
    files = tree(path)
    record = json.loads(files["abliteration.json"])
    return files | {"abliteration.json": json.dumps(record | {"created": None}).encode()}


def stored(path: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}
