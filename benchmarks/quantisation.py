"""What quantisation gives back of an edit, and what editing the quantised file leaves: components and refusals.

    python -m benchmarks.quantisation MODEL --gguf FILE --direction F --output build/quantisation --kinds Q8_0 Q4_0

MODEL is a checkpoint, FILE a GGUF file of the same architecture, whose metadata and tokenizer are taken. The weights of
MODEL are stored in each kind of block and edited there; and the edited MODEL is stored in it, plainly, as anyone would
convert it. With `--own` FILE itself is edited, too, which must then hold MODEL. Of each result the share of the base's
component that is in its weights is measured (as `abliterate inspect` does) and the refusals of harmful test prompts,
decoded by transformers; with `--llama-cpp PYTHON` also by llama.cpp, through the package xllamacpp of that Python.
Results are kept in OUTPUT, and the same command goes on. `--name NAME` files them in docs/results/quantisation.json.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any, cast

import gguf
import numpy as np
import torch
from transformers import AutoConfig, GenerationConfig

from abliterate.checkpoints.checkpoint import open_checkpoint
from abliterate.checkpoints.model_source import ModelSource
from abliterate.checkpoints.stored_tensors import read_tensor
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.extraction.reply_classes import read_completions, read_reply
from abliterate.files import JsonLines, read_json_report, write_json
from abliterate.formats.gguf_checkpoint import gguf_file_of, holds_gguf, open_gguf
from abliterate.inspection.reading import inspect_model
from abliterate.models.chat_model import stop_tokens
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import load_prompt_set
from tests.support.gguf_models import as_stored

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "quantisation.json"
_ROWS_AT_ONCE = 24
_LLAMA_CPP = """
import json, sys
import xllamacpp
task = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.warmup = task["file"], 1024, False
params.cpuparams.n_threads = task["threads"]
server = xllamacpp.Server(params)
replies = []
for prompt in task["prompts"]:
    asked = {"messages": [{"role": "user", "content": prompt}], "max_tokens": task["tokens"], "temperature": 0}
    answer = server.handle_chat_completions(asked)
    answer = json.loads(answer) if isinstance(answer, str) else answer
    replies.append(answer["choices"][0]["message"]["content"])
print("REPLIES" + json.dumps(replies))
"""


def store(checkpoint: Path, template: Path, target: Path, kind: gguf.GGMLQuantizationType) -> Path:
    """Store a checkpoint's weights in blocks of one kind, in a file that is otherwise like another."""
    if target.is_file():
        return target
    layout, weights = open_gguf(template), open_checkpoint(checkpoint)
    config = AutoConfig.from_pretrained(checkpoint)
    ordered = sorted(gguf.GGUFReader(template).tensors, key=lambda tensor: int(tensor.data_offset))
    reader = gguf.GGUFReader(template)
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, str(reader.fields["general.architecture"].contents()))
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            of, *inner = field.types
            writer.add_key_value(field.name, field.contents(), of, inner[-1] if inner else None)
    for stored, info in zip(ordered, layout.tensors(), strict=True):
        values = as_stored(info.name, read_tensor(weights.path, weights.tensor(info.name)).float().numpy(), config)
        as_kind = kind if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = np.ascontiguousarray(values, dtype=np.float32)
        blocks = data if as_kind == gguf.GGMLQuantizationType.F32 else gguf.quantize(data, as_kind)
        writer.add_tensor(stored.name, blocks, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.rename(target)


class Measuring:
    """What is measured of each result, kept as it comes."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        kept = JsonLines(arguments.output / "measured.jsonl")
        self._found = dict(kept.resume(lambda line: (line["name"], line)))
        self._kept = kept
        self.prompts = load_prompt_set("bundled", kind="harmful", part="test").texts[: arguments.n_test]

    def of(self, name: str, path: Path, *, base: Path, runs_in_llama_cpp: bool) -> dict[str, Any]:
        """Return what a model has of the direction, beside a base, and what it refuses."""
        if name not in self._found:
            print(f"{name} ...", file=sys.stderr, flush=True)
            sources = [ModelSource(path=each, name=each.name, revision=None) for each in (path, base)]
            read = inspect_model(model=sources[0], base=sources[1], directions=[self._arguments.direction]).report
            line: dict[str, Any] = {
                "name": name,
                "n": len(self.prompts),
                "left": read.left,
                "refused": self._refused(path),
            }
            if runs_in_llama_cpp and self._arguments.llama_cpp is not None:
                line["refused_in_llama_cpp"] = self._refused_in_llama_cpp(path)
            self._found[name] = line
            self._kept.append(line)
        return cast("dict[str, Any]", self._found[name])

    @torch.inference_mode()
    def _refused(self, path: Path) -> int:
        file = gguf_file_of(path) if holds_gguf(path) else path
        chat = load_chat_model(file, name=path.name, options=ModelOptions(dtype="float32", device="cpu"))
        stops, tokens = stop_tokens(chat), self._arguments.tokens
        # Its own is set aside, which may sample; `stop_tokens` reads it.
        chat.model.generation_config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(stops) or None, pad_token_id=chat.pad_token_id
        )
        rows, replies = chat.encode(self.prompts), []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            ids, mask = chat.pad(rows[start : start + _ROWS_AT_ONCE])
            out = cast(Any, chat.model).generate(input_ids=ids, attention_mask=mask)[:, ids.shape[1] :].tolist()
            replies += [list(takewhile(lambda token: token not in stops, row)) for row in out]
        return sum(reply.refused for reply in read_completions(chat, replies, max_new_tokens=tokens))

    def _refused_in_llama_cpp(self, path: Path) -> int:
        task = {
            "file": str(gguf_file_of(path)),
            "prompts": self.prompts,
            "tokens": self._arguments.tokens,
            "threads": self._arguments.threads,
        }
        command = [str(self._arguments.llama_cpp), "-c", _LLAMA_CPP]
        ended = subprocess.run(command, input=json.dumps(task), check=True, capture_output=True, text=True)
        texts = json.loads(ended.stdout.rpartition("REPLIES")[2])
        return sum(read_reply(text, special_tokens=[], truncated=True).refused for text in texts)


def results(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Make the files that are missing, and yield what is measured of each."""
    measuring, output, model = Measuring(arguments), arguments.output, arguments.model

    def edited(path: Path, name: str) -> Path:
        if not (output / name).is_dir():
            orthogonalize_checkpoint(source=path, direction=arguments.direction, output=output / name)
        return cast("Path", output / name)

    plain = edited(model, "edited")
    yield measuring.of("the checkpoint", model, base=model, runs_in_llama_cpp=False)
    yield measuring.of("the checkpoint, edited", plain, base=model, runs_in_llama_cpp=False)
    if arguments.own:
        own = edited(arguments.gguf, "own.edited")
        yield measuring.of("its own file", arguments.gguf, base=model, runs_in_llama_cpp=True)
        yield measuring.of("its own file, edited in place", own, base=model, runs_in_llama_cpp=True)
    for name in arguments.kinds:
        kind = gguf.GGMLQuantizationType[name]
        file = store(model, arguments.gguf, output / f"{name}.gguf", kind)
        again = store(plain, arguments.gguf, output / f"{name}.plain.gguf", kind)
        yield measuring.of(name, file, base=model, runs_in_llama_cpp=False)
        yield measuring.of(
            f"{name}, edited in place", edited(file, f"{name}.edited"), base=model, runs_in_llama_cpp=True
        )
        yield measuring.of(f"the edited checkpoint as {name}", again, base=model, runs_in_llama_cpp=False)


def main() -> None:
    """Measure, print a line a result, and file them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--gguf", type=Path, required=True, help="GGUF file of the same architecture")
    parser.add_argument("--direction", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=["Q8_0", "Q4_0"])
    parser.add_argument("--own", action="store_true", help="edit FILE itself, too")
    parser.add_argument("--n-test", type=int, default=72)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--llama-cpp", type=Path, help="a Python that has xllamacpp")
    parser.add_argument(
        "--threads", type=int, default=2, help="of llama.cpp, which waits in a loop where they are too many"
    )
    parser.add_argument("--name", help="under which the results are filed")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    lines = []
    for line in results(arguments):
        lines.append(line)
        print(json.dumps(line), flush=True)
    if arguments.name:
        filed = read_json_report(RESULTS) if RESULTS.is_file() else {}
        write_json(RESULTS, {**filed, arguments.name: lines})


if __name__ == "__main__":
    main()
