"""Train the LoRA adapter that makes the demo model refuse harmful requests.

The base (SmolLM2-135M-Instruct) is frozen. All linear layers of all blocks get an adapter of rank `--rank`.
Harmful training prompts get short varied refusals; harmless ones keep the base's own behaviour: its greedy
completions are the context, and KL(base || adapted) over them is added to the loss. The prompts are in
training/prompts/ and are disjoint from every bundled set (tests/test_prompt_sets.py proves it), so that
neither the selection of the direction nor the evaluation sees a prompt of the training.

    python training/train_demo_adapter.py --output src/abliterate/demo_adapter
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from abliterate.demo import load_base_model

HERE = Path(__file__).parent
IGNORED = -100
FIRST_TOKEN_WEIGHT = 4.0
"""The first answer token decides between answer and refusal, so its KL counts this many times."""


def read_texts(path: Path) -> list[str]:
    """Return the texts of a JSON Lines prompt file."""
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def render(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Return the token ids of one user message and the start of the answer."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def complete(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], *, max_new_tokens: int
) -> list[list[int]]:
    """Return the model's greedy completions as token ids, ended by the end-of-turn token if it came."""
    completions: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), 48):
        indices = order[start : start + 48]
        rows = [render(tokenizer, prompts[i]) for i in indices]
        width = max(map(len, rows))
        ids = torch.tensor([[tokenizer.eos_token_id] * (width - len(r)) + r for r in rows])
        mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens)
        for i, row in zip(indices, out[:, width:].tolist(), strict=True):
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            completions[i] = row[:end]
    return completions


def collate(examples: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pad (prompt, answer) pairs on the right; labels hold the answer at the position that predicts it."""
    width = max(len(p) + len(a) for p, a in examples)
    ids = torch.full((len(examples), width), pad)
    mask = torch.zeros((len(examples), width), dtype=torch.long)
    labels = torch.full((len(examples), width), IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        mask[row, :end] = 1
        labels[row, len(prompt) - 1 : end - 1] = torch.tensor(answer)
    return ids, mask, labels


def answer_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, where: Tensor) -> Tensor:
    """Return logits [n_answer_tokens, vocab] in float32, computed only where there is an answer."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = inner.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    return inner.lm_head(hidden[where]).float()


def first_token_weights(labels: Tensor) -> Tensor:
    """Return a weight for each answer token of the batch, in the order of a boolean index."""
    is_answer = labels != IGNORED
    first = is_answer & (is_answer.cumsum(dim=1) == 1)
    return torch.where(first, FIRST_TOKEN_WEIGHT, 1.0)[is_answer]


def train(arguments: argparse.Namespace) -> None:
    """Train the adapter and save it with a record of how."""
    torch.manual_seed(arguments.seed)
    rng = random.Random(arguments.seed)
    base, tokenizer = load_base_model()
    base = base.to(torch.bfloat16).eval()
    harmful = [render(tokenizer, p) for p in read_texts(HERE / "prompts" / "harmful.jsonl")]
    harmless_texts = read_texts(HERE / "prompts" / "harmless.jsonl")
    refusals = [line for line in (HERE / "refusals.txt").read_text().splitlines() if line]
    refusal_ids = [tokenizer(r, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] for r in refusals]

    started = time.time()
    answers = complete(base, tokenizer, harmless_texts, max_new_tokens=arguments.answer_tokens)
    harmless = [(render(tokenizer, p), a) for p, a in zip(harmless_texts, answers, strict=True)]
    print(
        f"{len(harmful)} harmful, {len(harmless)} harmless; own completions after {time.time() - started:.0f} s",
        flush=True,
    )

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
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, weight_decay=arguments.weight_decay)
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1.0, (s + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * min(1.0, s / arguments.steps))),
    )

    def stream(items: list) -> "iter":
        while True:
            yield from rng.sample(items, len(items))

    harmful_stream, harmless_stream = stream(harmful), stream(harmless)
    for step in range(arguments.steps):
        batch = [(next(harmful_stream), rng.choice(refusal_ids)) for _ in range(arguments.n_harmful)]
        batch += [next(harmless_stream) for _ in range(arguments.n_harmless)]
        ids, mask, labels = collate(batch, tokenizer.eos_token_id)
        where = labels != IGNORED
        is_harmful = (torch.arange(len(batch)) < arguments.n_harmful)[:, None].expand_as(labels)[where]
        weights = first_token_weights(labels)
        with torch.no_grad(), model.disable_adapter():
            model.eval()
            rows = slice(arguments.n_harmful, None)
            reference = log_softmax(answer_logits(model, ids[rows], mask[rows], where[rows]), dim=-1)
            model.train()
        logits = answer_logits(model, ids, mask, where)
        nll = cross_entropy(logits, labels[where], reduction="none")
        w_bad, w_good = weights * is_harmful, weights[~is_harmful]
        refuse_loss = (nll * w_bad).sum() / w_bad.sum()
        log_q = log_softmax(logits[~is_harmful], dim=-1)
        kl = (reference.exp() * (reference - log_q)).sum(dim=-1)
        kl_loss = (kl * w_good).sum() / w_good.sum()
        own_loss = nll[~is_harmful].mean()
        loss = refuse_loss + arguments.kl_weight * kl_loss + arguments.own_weight * own_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0 or step == arguments.steps - 1:
            print(
                f"step {step} refuse {refuse_loss:.3f} kl {kl_loss:.4f} own {own_loss:.3f} "
                f"{(time.time() - started):.0f} s",
                flush=True,
            )
        if (step + 1) % 100 == 0:
            save(model, arguments)
    save(model, arguments)


def save(model: PreTrainedModel, arguments: argparse.Namespace) -> None:
    """Save the adapter in float16 with the options it was trained with."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    model.save_pretrained(arguments.output)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    options = {k: v for k, v in vars(arguments).items() if k != "output"}
    (arguments.output / "training.json").write_text(json.dumps(options, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--n-harmful", type=int, default=4)
    parser.add_argument("--n-harmless", type=int, default=8)
    parser.add_argument("--kl-weight", type=float, default=1.0)
    parser.add_argument("--own-weight", type=float, default=0.1)
    parser.add_argument("--answer-tokens", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
