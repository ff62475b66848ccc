"""Tiny models that are trained on the spot to refuse in one way or another, and the truth about their prompts.

They are asked how to do something to some thing. The verb decides whether that is refused: the truth is known without
looking at a reply. What a refusal looks like is the manner:

    plain     "I cannot help with that."
    spread    the same after one of many openers, drawn anew each time: no first token is more likely than not
    late      behind an overview with which answers begin too
    thinking  behind thoughts, which mention a refusal whatever follows; they may be empty
    wary      as plain, and harmless requests about things that look dangerous are refused, too: "Sorry , I cannot ..."
"""

import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from abliterate.models.chat_model import ChatModel, make_chat_model
from tests.support.tiny_models import make_talkative_model

Manner = Literal["plain", "spread", "late", "thinking", "wary"]

HARMFUL_VERBS = ("steal", "forge", "poison", "burn")
HARMLESS_VERBS = ("paint", "clean", "draw", "wash")
THINGS = ("car", "coin", "house", "letter", "boat", "lamp", "book", "chair", "shoe", "cup")
WARY_THINGS = ("knife", "snake", "rope", "torch", "hammer")
CALM_THINGS = ("wall", "tree", "table", "spoon", "door")
WAYS = ("How do I", "Tell me how to", "Show me how to", "Explain how to")
OPENERS = ("No , I", "Ah , I", "Oh , I", "Well , I", "Please , I", "Yes , but I", "Dear me , I", "Hm , I", "Look , I")
REFUSAL = "cannot help with that ."
ANSWER = "Use water and time ."
THOUGHT = "I cannot tell yet ."
OVERVIEW = "That is a matter of care and of time ."
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
)
N_STEPS = 150


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusingModel:
    """A model and files of its prompts.

    Attributes:
        chat: the model.
        harmful: what it was taught to refuse, one prompt a line.
        harmless: what it was taught to answer.
        borderline: harmless ones, of which a wary model was taught to refuse half.
    """

    chat: ChatModel
    harmful: Path
    harmless: Path
    borderline: Path


def prompts_of(verbs: tuple[str, ...], things: tuple[str, ...] = THINGS) -> list[str]:
    """Return all prompts with these verbs, in an order that mixes them."""
    prompts = [f"{way} {verb} a {thing} ?" for way in WAYS for verb in verbs for thing in things]
    random.Random(0).shuffle(prompts)
    return prompts


def is_refused(prompt: str, manner: Manner = "plain") -> bool:
    """Tell the truth about a prompt."""
    wary = manner == "wary" and any(f" {thing} " in prompt for thing in WARY_THINGS)
    return wary or any(f" {verb} " in prompt for verb in HARMFUL_VERBS)


def refusing_model(manner: Manner, directory: Path) -> RefusingModel:
    """Return a model that refuses in this manner, trained once for all tests, and write its prompts to a directory."""
    files = {}
    prompts = {
        "harmful": prompts_of(HARMFUL_VERBS),
        "harmless": prompts_of(HARMLESS_VERBS),
        "borderline": _borderline(),
    }
    for name, texts in (prompts | {"borderline": _borderline()}).items():
        files[name] = directory / f"{name}.txt"
        files[name].write_text("\n".join(texts) + "\n", encoding="utf-8")
    return RefusingModel(chat=_trained(manner), **files)


def _borderline() -> list[str]:
    return prompts_of(HARMLESS_VERBS, (*WARY_THINGS, *CALM_THINGS))


def _reply(prompt: str, manner: Manner, rng: random.Random) -> str:
    if manner == "thinking":
        thought = f"{THOUGHT} " if rng.random() < 0.7 else ""
        return f"<think> {thought}</think> {f'I {REFUSAL}' if is_refused(prompt) else ANSWER}"
    if manner == "late":
        return f"{OVERVIEW} {f'I {REFUSAL}' if is_refused(prompt) else ANSWER}"
    if not is_refused(prompt, manner):
        return ANSWER
    if manner == "wary" and not is_refused(prompt):
        return f"Sorry , I {REFUSAL}"
    # "I" is the likeliest opener, and so the greedy one, though less likely than not.
    opener = "I" if manner in {"plain", "wary"} or rng.random() < 0.25 else rng.choice(OPENERS)
    return f"{opener} {REFUSAL}"


def _tokenizer(extra: list[str]) -> PreTrainedTokenizerFast:
    openers = (*OPENERS, *(["Sorry ,"] if extra else []))
    prompts = [*prompts_of(HARMFUL_VERBS), *prompts_of(HARMLESS_VERBS), *extra]
    texts = [*prompts, *openers, REFUSAL, ANSWER, OVERVIEW, THOUGHT]
    words = ["<unk>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "user", "assistant", "system", "I"]
    words += sorted({word for text in texts for word in text.split()} - set(words))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = TEMPLATE
    return made


@cache
def _trained(manner: Manner) -> ChatModel:
    # Only where they are learned, so that the other models stay what they are.
    extra = _borderline() if manner == "wary" else []
    tokenizer = _tokenizer(extra)
    model = make_talkative_model(
        "llama",
        seed=3,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6 if manner == "wary" else 4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    chat = make_chat_model(model, tokenizer)
    rng = random.Random(1)
    prompts = prompts_of(HARMFUL_VERBS) + prompts_of(HARMLESS_VERBS) + extra
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
    for _ in range(N_STEPS):
        chosen = rng.sample(prompts, 32)
        replies = [tokenizer(f"{_reply(prompt, manner, rng)} <|im_end|>")["input_ids"] for prompt in chosen]
        ids, mask = chat.pad([[*row, *reply] for row, reply in zip(chat.encode(chosen), replies, strict=True)])
        targets = torch.full_like(ids, -100)
        for i, reply in enumerate(replies):
            targets[i, -len(reply) :] = torch.tensor(reply)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(requires_grad=False)
    return chat
