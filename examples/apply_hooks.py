"""Run a model with the hooks that `abliterate orthogonalize --format hooks` has written: MODEL HOOKS PROMPT."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def apply_hooks(model: torch.nn.Module, folder: Path) -> None:
    """Attach a hook at each place that hooks.json lists."""
    hooks = json.loads((folder / "hooks.json").read_text())
    vectors = load_file(folder / hooks["vectors"])
    for place in hooks["places"]:
        tensor, strength, index = vectors[place["tensor"]], place["strength"], place["output"]

        def change(x, tensor=tensor, strength=strength, removes=place["operation"] == "remove"):
            v = tensor.to(x.device, x.dtype)
            return x - strength * (x @ v.T) @ v if removes else x + v

        def on_output(_module, _args, out, change=change, index=index):
            return (*out[:index], change(out[index]), *out[index + 1 :]) if isinstance(out, tuple) else change(out)

        module = model.get_submodule(place["module"])
        if place["at"] == "output":
            module.register_forward_hook(on_output)
        else:
            module.register_forward_pre_hook(lambda _module, args, change=change: (change(args[0]), *args[1:]))


if __name__ == "__main__":
    model, tokenizer = (c.from_pretrained(sys.argv[1]) for c in (AutoModelForCausalLM, AutoTokenizer))
    apply_hooks(model, Path(sys.argv[2]))
    chat = [{"role": "user", "content": sys.argv[3]}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0, inputs["input_ids"].shape[1] :]))
