"""Files of llama.cpp's own converter, edited in place: is the stream of what transformers loads from them clean?

    python -m benchmarks.gguf_conformance --converter llama.cpp --output build/gguf

CONVERTER is a directory with `convert_hf_to_gguf.py` and `gguf-py`: the sources of llama.cpp, which come along in the
source distribution of the package llama-cpp-python (vendor/llama.cpp); it needs the package sentencepiece. A tiny
random model of each type is saved, converted, edited by `abliterate orthogonalize FILE.gguf`, loaded by transformers,
and run. The base must give the logits of the model that was saved, its stream must have the direction, and that of the
edited file must not. Then one kind of writer is put back, and the stream must have it again, so that none was edited
for nothing.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from abliterate.directions import Direction, make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.models.gguf_loading import load_gguf
from tests.support.conformance import read_stream, stream_component, text_inputs
from tests.support.tiny_models import make_tokenizer, randomize

# What converts, whatever the type: the tiny models have a tokenizer of bytes, which none of the known ones is.
_CONVERT = """
import runpy, sys
directory = sys.argv.pop(1)
sys.path[:0] = [directory, directory + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "default"
def of_bytes(cls):
    cls.set_vocab = lambda self: self._set_vocab_gpt2()
TextModel.__init_subclass__ = classmethod(of_bytes)
sys.argv[0] = directory + "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
_SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
# The types that most GGUF files are of, and what their tiny models need.
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "gemma3_text": {"head_dim": 16, "query_pre_attn_scalar": 16, "tie_word_embeddings": True},
    "phi3": {"pad_token_id": 2},
    "stablelm": {},
    "starcoder2": {},
    "falcon": {"multi_query": True, "num_kv_heads": 1},
    "nemotron": {},
    "qwen3_moe": {**_MOE, "head_dim": 16, "norm_topk_prob": True},
    "lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention", "conv"]},
}
KINDS = ("f32", "f16", "q8_0")
# |r . h| / |h|: what rounding of the file's types leaves, and what a stream that was not edited has at least.
_CLEAN, _DIRTY = 1e-3, 1e-2


def make(model_type: str, **settings: Any) -> Any:
    """Return a tiny random model, its norms and biases random, too."""
    config = AutoConfig.for_model(model_type, **settings)
    return randomize(AutoModelForCausalLM.from_config(config, attn_implementation="eager")).eval()


def convert(directory: Path, target: Path, *, converter: Path, kind: str) -> str | None:
    """Convert a checkpoint; return what went wrong, or None."""
    command = [sys.executable, "-c", _CONVERT, str(converter), str(directory), "--outfile", str(target)]
    environment = os.environ | {"NO_LOCAL_GGUF": "1"}
    ended = subprocess.run([*command, "--outtype", kind], check=False, capture_output=True, text=True, env=environment)
    return None if ended.returncode == 0 else ended.stderr.strip().splitlines()[-1]


def try_type(model_type: str, *, converter: Path, output: Path) -> list[dict[str, Any]]:
    """Convert and edit the tiny model of one type in each kind; return what was found, a line a kind."""
    tokenizer = make_tokenizer()
    more = {"vocab_size": len(tokenizer), "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 2}
    model = make(model_type, **{**_SIZES, **more, **TYPES[model_type]})
    checkpoint = output / model_type
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    inputs = text_inputs(model, model_type)
    vector = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    direction = make_direction(mean_difference=vector)
    found = []
    for kind in KINDS:
        line: dict[str, Any] = {"type": model_type, "kind": kind}
        found.append(line)
        file = output / f"{model_type}-{kind}.gguf"
        line["converter"] = convert(checkpoint, file, converter=converter, kind=kind)
        if line["converter"] is not None:
            continue
        try:
            line |= edit(file, output / f"{model_type}-{kind}", direction, model, inputs)
        except Exception as error:
            line["error"] = f"{type(error).__name__}: {error}"
    return found


def edit(file: Path, target: Path, direction: Direction, model: Any, inputs: Any) -> dict[str, Any]:
    """Edit a file and return what its stream has of the direction before and after."""
    base, vector = load(file), direction.vector.double()
    with torch.no_grad():
        difference = float((base(**inputs).logits - model(**inputs).logits).abs().max())
    report = orthogonalize_checkpoint(source=file, direction=direction, output=target, overwrite=True)
    edited = load(target / file.name)
    return {
        "logits_differ_by": difference,
        "before": stream_component(base, inputs, vector),
        "after": stream_component(edited, inputs, vector),
        "finite": all(bool(torch.isfinite(each).all()) for each in read_stream(edited, inputs)),
        "edited": len(report.tensors),
        "kept": kept_for_nothing(base, edited, inputs, vector),
    }


def kept_for_nothing(base: Any, edited: Any, inputs: Any, direction: torch.Tensor) -> list[str]:
    """Return kinds of changed parameters that can be put back without the stream having the direction again."""
    old, new = dict(base.named_parameters()), dict(edited.named_parameters())
    kinds: dict[str, list[str]] = {}
    for name, parameter in new.items():
        if not torch.equal(parameter, old[name]):
            kinds.setdefault(".".join("*" if part.isdigit() else part for part in name.split(".")), []).append(name)
    found = []
    for kind, names in kinds.items():
        kept = {name: new[name].detach().clone() for name in names}
        with torch.no_grad():
            for name in names:
                new[name].copy_(old[name])
            if stream_component(edited, inputs, direction) < _DIRTY / 2:
                found.append(kind)
            for name in names:
                new[name].copy_(kept[name])
    return found


def load(file: Path) -> Any:
    """Load a GGUF file in float32, attention computed the plain way."""
    model: Any = load_gguf(file, name=file.name, choose_class=lambda _: AutoModelForCausalLM)
    model.set_attn_implementation("eager")
    return model


def main() -> None:
    """Try the types and print a line for each kind of file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--types", nargs="+", choices=tuple(TYPES), default=tuple(TYPES))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = False
    for model_type in arguments.types:
        for line in try_type(model_type, converter=arguments.converter.resolve(), output=arguments.output):
            good = line.get("after", 1.0) < _CLEAN < _DIRTY < line.get("before", 0.0) and not line.get("kept")
            failed |= not good
            print(json.dumps({"good": good, **line}), flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
