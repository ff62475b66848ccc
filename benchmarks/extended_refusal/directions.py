"""Compare the differences in means of the two demo models that `run.py` built.

python benchmarks/extended_refusal/directions.py build/extended_refusal
"""

import sys
from pathlib import Path

from torch import Tensor
from torch.nn.functional import cosine_similarity

from abliterate.models.hooks import difference_in_means, record
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import load_prompt_set

N_PROMPTS = 48
PLACES = ((-5, 15), (-1, 16), (-1, 21))


def differences(path: Path) -> Tensor:
    """Return a model's candidate directions [n_pos, n_layers, d_model] from the first training prompts."""
    chat = load_chat_model(path, name=str(path), options=ModelOptions(dtype="float32"))
    harmful, harmless = (
        record(chat, chat.encode(load_prompt_set("bundled", kind=kind, part="train").texts[:N_PROMPTS])).activations
        for kind in ("harmful", "harmless")
    )
    return difference_in_means(harmful=harmful, harmless=harmless)


if __name__ == "__main__":
    plain, hardened = (differences(Path(sys.argv[1]) / name) for name in ("plain", "hardened"))
    for position, layer in PLACES:
        cosine = cosine_similarity(plain[position, layer], hardened[position, layer], dim=0)
        print(f"position {position}, layer {layer}: cosine {cosine:.3f}")
