"""Train a LoRA adapter that makes a model refuse harmful requests in given ways.

The model (SmolLM2-135M-Instruct, or any checkpoint of a Llama-like model by `--model`) is frozen. All linear layers of
all blocks get an adapter of rank `--rank`. Harmful training prompts get varied refusals: short ones, or with
`--refusals extended_refusals.json` extended ones (overview, refusal, rationale; see refusal_texts.py), drawn anew at
each step; `--parts` leaves parts of them out. Harmless ones keep the model's own behaviour: its greedy completions are
the context, and KL(model || adapted) over them is the loss. Where the model itself refuses a harmless prompt ("I'm
sorry, but as a chatbot ..."), its best answer that does not start so is learned instead. Each batch holds harmful
prompts together with their harmless partners of the same form, and other harmless prompts.

The prompts are in training/prompts/ and are disjoint from every bundled set (tests/test_prompt_sets.py proves it),
so that neither the selection of the direction nor the evaluation sees a prompt of the training.

Every tenth step is kept in OUTPUT. The same command goes on from there; with `--minutes` it ends by itself in time.

    python -m training.train_adapter --output src/abliterate/models/demo_adapter
    python -m training.train_adapter --refusals training/extended_refusals.json --output build/hardened_adapter
    python -m training.train_adapter --refusals training/varied_refusals.txt --output build/varied_adapter

The third command's refusals begin in many ways, as those of aligned models do. Its adapter does not come along.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from abliterate.extraction.reply_classes import is_refusal
from abliterate.files import write_file, write_json
from abliterate.models.demo import load_base_model
from training.refusal_texts import PARTS, read_refusal_texts

T = TypeVar("T")
HERE = Path(__file__).parent
IGNORED = -100
WARMUP = 20
FIRST_TOKEN_WEIGHT = 4.0
"""The first answer token decides between answer and refusal, so its KL counts this many times."""


def read_prompts(path: Path, *, column: str = "text") -> dict[str, str]:
    """Return the texts, or another column, of a JSON Lines prompt file by id."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["id"]: line[column] for line in lines}


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of one user message and the start of the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


@torch.inference_mode()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[list[int]],
    *,
    max_new_tokens: int,
    first_token_not: list[int] | None = None,
) -> list[list[int]]:
    """Return the model's greedy completions as token ids, ended by the end-of-turn token if it came."""
    completions: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for start in range(0, len(order), 64):
        indices = order[start : start + 64]
        width = max(len(rows[i]) for i in indices)
        ids = torch.full((len(indices), width), tokenizer.eos_token_id)
        mask = torch.zeros((len(indices), width), dtype=torch.long)
        for line, i in enumerate(indices):
            ids[line, width - len(rows[i]) :] = torch.tensor(rows[i])
            mask[line, width - len(rows[i]) :] = 1
        out = cast(Any, model).generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            begin_suppress_tokens=first_token_not,
        )
        for i, row in zip(indices, out[:, width:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            completions[i] = row[:end]
    return completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A rendered prompt and its answer; `own` answers are held by KL to the base, others are learned."""

    prompt: list[int]
    answer: list[int]
    own: bool


def harmless_examples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: dict[str, str],
    *,
    max_new_tokens: int,
    cache: Path | None = None,
) -> dict[str, Example]:
    """Return the base's own answers, and where it refuses, the best one that does not start as refusals do.

    With `cache`, a second run on the same prompts takes them from that file.
    """
    rows = {key: render(tokenizer, text) for key, text in prompts.items()}
    if cache is not None and cache.exists():
        return {key: Example(**value) for key, value in json.loads(cache.read_text(encoding="utf-8")).items()}
    answers = dict(
        zip(rows, complete(model, tokenizer, list(rows.values()), max_new_tokens=max_new_tokens), strict=True)
    )

    def refuses(key: str) -> bool:
        text = str(tokenizer.decode(answers[key]))
        return is_refusal(text) or text.lstrip().lower().startswith(("i'm sorry", "sorry"))

    refused = [key for key in rows if refuses(key)]
    starts = sorted(
        {tokenizer(t, add_special_tokens=False)["input_ids"][0] for t in ("I", " I", "Sorry", "As", "Unfortunately")}
    )
    other = complete(
        model, tokenizer, [rows[k] for k in refused], max_new_tokens=max_new_tokens, first_token_not=starts
    )
    answers |= dict(zip(refused, other, strict=True))
    kept = [key for key in rows if not refuses(key)]
    print(
        f"the base refuses {len(refused)} of {len(rows)} harmless prompts; {len(rows) - len(kept)} left out", flush=True
    )
    again = set(refused)
    examples = {key: Example(prompt=rows[key], answer=answers[key], own=key not in again) for key in kept}
    if cache is not None:
        cache.write_text(json.dumps({key: asdict(example) for key, example in examples.items()}), encoding="utf-8")
    return examples


def collate(examples: list[Example], *, n_prefix: int, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad on the right, without the shared prefix; labels hold the answer at the positions that predict it."""
    rows = [example.prompt[n_prefix:] + example.answer for example in examples]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    labels = torch.full((len(rows), width), IGNORED)
    for line, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[line, : len(row)] = torch.tensor(row)
        mask[line, : len(row)] = 1
        labels[line, len(row) - len(example.answer) - 1 : len(row) - 1] = torch.tensor(example.answer)
    return ids, mask, labels


def answer_logits(model: PeftModel, prefix: Tensor, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Return logits [n_answer_tokens, vocab] in float32, computed only where there is an answer.

    The tokens all prompts share run once; gradients flow through their keys and values.
    """
    inner: Any = model.get_base_model()
    cache = inner.model(input_ids=prefix, use_cache=True).past_key_values
    cache.batch_repeat_interleave(len(ids))
    n_prefix = prefix.shape[1]
    hidden = inner.model(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(len(ids), n_prefix), mask], dim=1),
        position_ids=torch.arange(n_prefix, n_prefix + ids.shape[1])[None].expand_as(ids),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits: Tensor = inner.lm_head(hidden[where])
    return logits.float()


def first_token_weights(labels: Tensor) -> Tensor:
    """Return a weight for each answer token of the batch, in the order of a boolean index."""
    is_answer = labels != IGNORED
    first = is_answer & (is_answer.cumsum(dim=1) == 1)
    return torch.where(first, FIRST_TOKEN_WEIGHT, 1.0)[is_answer]


def shuffled_forever(items: list[T], rng: random.Random) -> Iterator[T]:
    """Yield the items in random order, again and again."""
    while True:
        yield from rng.sample(items, len(items))


def choose_prompts(n: int | None, rng: random.Random) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Return ids of harmful prompts that have a partner, and all harmful and harmless texts by id, or `n` of each."""
    harmful = read_prompts(HERE / "prompts" / "harmful.jsonl")
    harmless = read_prompts(HERE / "prompts" / "harmless.jsonl")
    paired = [key for key in harmful if partner(key) in harmless]
    if n is not None:
        paired = rng.sample(paired, n // 2)
        partners = {partner(key) for key in paired}
        others = rng.sample([key for key in harmless if key not in partners], n - n // 2)
        harmful = {key: harmful[key] for key in paired}
        harmless = {key: harmless[key] for key in [*sorted(partners), *others]}
    return paired, harmful, harmless


def partner(key: str) -> str:
    """Return the id of the harmless prompt of the same form."""
    return key.replace("-harmful-", "-harmless-")


class State:
    """What a training has come to: the adapter's weights and the optimizer's moments, in one file.

    Args:
        path: the file.
        parameters: the adapter's weights by name.
        optimizer: of exactly those.
    """

    def __init__(self, path: Path, parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.AdamW) -> None:
        self._path, self._parameters, self._optimizer = path, parameters, optimizer

    def save(self, steps: int) -> None:
        """Write the file anew."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            tensors |= {f"{name}/{key}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
            tensors[f"{name}/weight"] = parameter.detach()
        write_file(self._path, save(tensors, metadata={"steps": str(steps)}))

    def load(self) -> int:
        """Take what the file holds, if it is there, and return the number of steps done."""
        if not self._path.is_file():
            return 0
        with safe_open(self._path, framework="pt") as file:
            steps = int(file.metadata()["steps"])
            for name, parameter in self._parameters.items():
                parameter.data.copy_(file.get_tensor(f"{name}/weight"))
                moments = {key: file.get_tensor(f"{name}/{key}") for key in ("exp_avg", "exp_avg_sq")}
                self._optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        return steps

    def remove(self) -> None:
        """Remove the file, as the training has ended."""
        self._path.unlink()


def load_model(path: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model that is trained, the demo's base or a checkpoint, and its tokenizer."""
    if path is None:
        return load_base_model()
    return AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)


def train(arguments: argparse.Namespace) -> bool:
    """Train the adapter and save it with a record of how; return false where the time ended first."""
    started = time.time()
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    base, tokenizer = load_model(arguments.model)
    base = base.to(getattr(torch, arguments.dtype)).eval()
    paired, harmful_texts, harmless_texts = choose_prompts(arguments.n_prompts, rng)
    harmful = {key: render(tokenizer, text) for key, text in harmful_texts.items()}
    categories = read_prompts(HERE / "prompts" / "harmful.jsonl", column="category")
    refusals = read_refusal_texts(arguments.refusals, parts=arguments.parts)

    def refuse(key: str) -> list[int]:
        text = refusals.draw(categories[key], rng)
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    harmless = harmless_examples(
        base, tokenizer, harmless_texts, max_new_tokens=arguments.answer_tokens, cache=arguments.answers
    )
    pairs = [(key, partner(key)) for key in paired if partner(key) in harmless]
    others = [example for key, example in harmless.items() if key not in {partner(key) for key in harmful}]
    print(f"{len(pairs)} pairs, {len(others)} others, after {time.time() - started:.0f} s", flush=True)
    rows = [*harmful.values(), *(example.prompt for example in harmless.values())]
    n_prefix = next(i for i, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)
    prefix = torch.tensor([rows[0][:n_prefix]])

    model = get_peft_model(
        base,
        LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=arguments.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=arguments.lr, weight_decay=arguments.weight_decay)
    state = State(arguments.output / "state.safetensors", parameters, optimizer)
    done = state.load()
    pair_stream, other_stream = shuffled_forever(pairs, rng), shuffled_forever(others, rng)
    for step in range(arguments.steps):
        chosen = [next(pair_stream) for _ in range(arguments.n_pairs)]
        batch = [Example(prompt=harmful[bad], answer=refuse(bad), own=False) for bad, _ in chosen]
        batch += [harmless[good] for _, good in chosen]
        batch += [next(other_stream) for _ in range(arguments.n_others)]
        # What was trained on before is drawn again, so that the draws go on where they stood.
        if step < done:
            continue
        late = arguments.minutes is not None and time.time() - started > 60 * arguments.minutes
        if late and step > done:
            state.save(step)
            print(f"{step} of {arguments.steps} steps are done; the same command goes on", flush=True)
            return False
        batch.sort(key=lambda example: example.own)
        n_learned = sum(not example.own for example in batch)
        ids, mask, labels = collate(batch, n_prefix=n_prefix, pad=tokenizer.eos_token_id)
        where = labels != IGNORED
        own = (torch.arange(len(batch)) >= n_learned)[:, None].expand_as(labels)[where]
        weights = first_token_weights(labels)
        with torch.no_grad(), model.disable_adapter():
            model.eval()
            reference = log_softmax(
                answer_logits(model, prefix, ids[n_learned:], mask[n_learned:], where[n_learned:]), dim=-1
            )
            model.train()
        logits = answer_logits(model, prefix, ids, mask, where)
        nll = cross_entropy(logits[~own], labels[where][~own], reduction="none")
        learn_loss = (nll * weights[~own]).sum() / weights[~own].sum()
        kl = (reference.exp() * (reference - log_softmax(logits[own], dim=-1))).sum(dim=-1)
        kl_loss = (kl * weights[own]).sum() / weights[own].sum()
        for group in optimizer.param_groups:
            group["lr"] = arguments.lr * schedule(step, arguments.steps)
        optimizer.zero_grad()
        (learn_loss + arguments.kl_weight * kl_loss).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        if step % 10 == 9 or step == arguments.steps - 1:
            state.save(step + 1)
            spent = time.time() - started
            print(f"step {step + 1} learn {learn_loss:.3f} kl {kl_loss:.4f} {spent:.0f} s", flush=True)
    save_adapter(model, arguments)
    state.remove()
    return True


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: up in a line, down in a half wave."""
    return min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


def save_adapter(model: PeftModel, arguments: argparse.Namespace) -> None:
    """Save the adapter in float16 with the options it was trained with."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.save_pretrained(arguments.output)
    options = {k: v for k, v in vars(arguments).items() if k not in {"output", "answers", "minutes"}}
    options["refusals"] = arguments.refusals.name
    options["model"] = arguments.model and arguments.model.name
    write_json(arguments.output / "training.json", options)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="a checkpoint of a Llama-like model; without it the demo's base")
    parser.add_argument("--refusals", type=Path, default=HERE / "refusals.txt", help="see refusal_texts.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="of extended refusals")
    parser.add_argument("--answers", type=Path, help="keep the harmless answers in this file, and reuse them")
    parser.add_argument("--n-prompts", type=int, help="of each kind, half of them pairs; without it all there are")
    parser.add_argument("--minutes", type=float, help="end in this time, and go on when started again")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the frozen weights")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--n-pairs", type=int, default=5)
    parser.add_argument("--n-others", type=int, default=4)
    parser.add_argument("--kl-weight", type=float, default=2.0)
    parser.add_argument("--answer-tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(0 if train(parse()) else 1)
