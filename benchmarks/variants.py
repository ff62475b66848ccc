"""Other directions and edits than the paper's, beside it: what each removes and costs, on one model.

    python benchmarks/variants.py MODEL --output FILE [--n-train 48] [--n-val 12] [--kl-threshold 0.3] [--every 3]

Each variant is extracted with the same prompts, projected out of the weights, and evaluated on test prompts that no
extraction saw. The reports go to FILE as they come; `python scripts/results.py --variants FILE` makes the table in
docs/variants.md of them.
"""

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

from abliterate.editing.options import EditOptions
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.errors import NoDirectionError
from abliterate.evaluation.report import EvaluationOptions
from abliterate.evaluation.run import evaluate_model
from abliterate.extraction.options import DirectionRecipe, ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.models.loading import load_chat_model
from abliterate.models.options import Dtype, ModelOptions
from abliterate.prompt_sets import Kind, load_prompt_set

VARIANTS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "`--variant projected`": {"recipe": DirectionRecipe(variant="projected")},
    "`--winsorize 0.05`": {"recipe": DirectionRecipe(winsorize=0.05)},
    "`--filter none`": {"filter": "none"},
    "`--rank 2`": {"rank": 2},
    "`--rank 3`": {"rank": 3},
}
# Of these the same directions are taken out of the blocks alone, too: neither the embedding nor a tied head is edited.
BLOCKS_ALONE = ("the paper's", "`--variant projected`")
BLOCKS = EditOptions(components=("attn", "mlp"), tied="skip")
KINDS: tuple[Kind, ...] = ("harmful", "harmless", "borderline")


def save_test_prompts(directory: Path, every: int) -> dict[Kind, str]:
    """Write every n-th test prompt of each kind to a file; return the SPECs."""
    specs: dict[Kind, str] = {}
    for kind in KINDS:
        path = directory / f"{kind}.jsonl"
        texts = load_prompt_set("bundled", kind=kind, part="test").texts[::every]
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), encoding="utf-8")
        specs[kind] = str(path)
    return specs


def main() -> None:
    """Extract, edit and evaluate each variant, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--n-train", type=int, default=48)
    parser.add_argument("--n-val", type=int, default=12)
    parser.add_argument("--kl-threshold", type=float, default=0.3)
    parser.add_argument("--every", type=int, default=3, help="evaluate every n-th test prompt")
    parser.add_argument("--dtype", default="auto", choices=get_args(Dtype), help="what the models run in")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--output", type=Path, required=True, help="write all reports here")
    arguments = parser.parse_args()
    model_options = ModelOptions(dtype=arguments.dtype)
    chat = load_chat_model(arguments.model, name=str(arguments.model), options=model_options)
    documents = {}
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        specs = save_test_prompts(place, arguments.every)
        evaluation = EvaluationOptions(
            harmful=specs["harmful"],
            harmless=specs["harmless"],
            borderline=specs["borderline"],
            max_new_tokens=arguments.max_new_tokens,
            cache=place / "replies",
        )
        for number, (name, changes) in enumerate(VARIANTS.items()):
            options = ExtractionOptions(
                n_train=arguments.n_train,
                n_val=arguments.n_val,
                thresholds=Thresholds(kl=arguments.kl_threshold),
                **changes,
            )
            try:
                extraction = extract_direction(model=chat, options=options)
            except NoDirectionError as error:
                print(f"{name}: {error}", file=sys.stderr, flush=True)
                continue
            edits = {name: EditOptions()}
            if name in BLOCKS_ALONE:
                edits[f"{name}, blocks alone"] = BLOCKS
            for edit, (label, edit_options) in enumerate(edits.items()):
                edited = place / f"edited-{number}-{edit}"
                directions = list(extraction.directions)
                orthogonalize_checkpoint(
                    source=arguments.model, direction=directions, output=edited, options=edit_options
                )
                measured = evaluate_model(
                    model=edited, base=arguments.model, options=evaluation, model_options=model_options
                )
                shutil.rmtree(edited)
                documents[label] = {"extraction": asdict(extraction.report), "evaluation": asdict(measured)}
                arguments.output.write_text(json.dumps(documents, indent=1))
                left = measured.rates["harmful"]
                print(
                    f"{label}: {left.refused} of {left.n} harmful prompts are still refused",
                    file=sys.stderr,
                    flush=True,
                )


if __name__ == "__main__":
    main()
