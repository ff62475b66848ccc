"""Two measures of refusal, which are not the same thing, and how a model starts its refusals.

The *refusal metric* is the log-odds that the first answer token is a refusal token; it needs one forward pass and
drives the selection (Arditi et al. 2024, section 2.4). The *refusal rate* counts completions that contain a
refusal substring (section 2.3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abliterate.errors import InputError, RefusalBehaviourError
from abliterate.extraction.refusal_substrings import is_refusal
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording
from abliterate.prompt_sets import ExtractionPrompts

EPSILON = 1e-8
"""Added inside both logarithms, so the metric is clamped to +-18.4207 (the published code's value)."""

MIN_PROBABILITY_GAP = 0.05
MIN_PROBABILITY_RATIO = 3.0
MAX_REFUSAL_TOKENS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalToken:
    """A token that starts refusals: its mean first-token probability on harmful and on harmless prompts."""

    token_id: int
    text: str
    harmful_probability: float
    harmless_probability: float


def refusal_metric(logits: Tensor, *, token_ids: Sequence[int]) -> Tensor:
    """Return log P - log(1 - P) with P the probability of all refusal tokens together.

    Args:
        logits: [..., vocab], the logits at the last prompt position.
        token_ids: the refusal tokens.

    Returns:
        float64 tensor [...], in nats, within +-18.4207.
    """
    probabilities = torch.softmax(logits.to(torch.float64), dim=-1)
    refusal = probabilities[..., list(token_ids)].sum(dim=-1)
    return torch.log(refusal + EPSILON) - torch.log(1 - refusal + EPSILON)


def find_refusal_tokens(*, harmful_logits: Tensor, harmless_logits: Tensor) -> list[tuple[int, float, float]]:
    """Find the tokens that start an answer to harmful prompts and not to harmless ones.

    A token counts when its mean first-token probability on harmful prompts exceeds the one on harmless prompts by
    0.05 and by a factor of 3; at most ten are kept, the largest difference first.

    Args:
        harmful_logits: [n_harmful, vocab] at the last prompt position.
        harmless_logits: [n_harmless, vocab].

    Returns:
        (token id, harmful probability, harmless probability), possibly empty.
    """
    harmful = _mean_probabilities(harmful_logits)
    harmless = _mean_probabilities(harmless_logits)
    gap = harmful - harmless
    found = []
    for token_id in torch.argsort(gap, descending=True)[:MAX_REFUSAL_TOKENS].tolist():
        p, q = float(harmful[token_id]), float(harmless[token_id])
        if p - q >= MIN_PROBABILITY_GAP and p >= MIN_PROBABILITY_RATIO * q:
            found.append((token_id, p, q))
    return found


def _mean_probabilities(logits: Tensor) -> Tensor:
    total = torch.zeros(logits.shape[-1], dtype=torch.float64)
    for row in logits:
        total += torch.softmax(row.to(torch.float64), dim=-1).cpu()
    return total / max(1, len(logits))


def require_both_behaviours(
    *, n_harmful: int, n_harmless: int, total_harmful: int, total_harmless: int, minimum: int, part: str
) -> None:
    """Check that enough prompts are left after filtering by the refusal metric.

    Raises:
        RefusalBehaviourError: fewer than `minimum` are left on either side; the message says what the model does.
    """
    counts = (
        f"{n_harmful} of {total_harmful} harmful {part} prompts are refused and "
        f"{n_harmless} of {total_harmless} harmless ones are not (at least {minimum} of each are needed)"
    )
    if n_harmful < minimum and n_harmless < minimum:
        does = "its first tokens do not tell refusals from answers; name them with --refusal-token"
    elif n_harmful < minimum:
        does = "the model does not refuse enough harmful prompts; there is nothing to extract"
    elif n_harmless < minimum:
        does = "the model refuses nearly everything"
    else:
        return
    raise RefusalBehaviourError(f"{does}: {counts}; --no-filter keeps all prompts")


N_BEHAVIOUR_PROMPTS = 16


def refusal_tokens_of(
    *,
    chat: ChatModel,
    prompts: ExtractionPrompts,
    harmful: Recording,
    harmless: Recording,
    named: Sequence[str] = (),
    describe: bool = True,
) -> list[RefusalToken]:
    """Return the tokens that start refusals: those named, or those that tell harmful from harmless prompts.

    Args:
        chat: the model.
        prompts: the prompts, to say by completions what the model does when there are no such tokens.
        harmful: recording of the harmful training prompts.
        harmless: recording of the harmless training prompts.
        named: token texts given by the user.
        describe: say by completions what the model does when there are no such tokens.

    Raises:
        InputError: a named text is not one token.
        RefusalBehaviourError: no first token tells refusals.
    """
    if named:
        found = [_probabilities(chat, text, harmful, harmless) for text in named]
    else:
        found = find_refusal_tokens(harmful_logits=harmful.logits, harmless_logits=harmless.logits)
    if not found:
        does = f": {describe_behaviour(chat, prompts)}" if describe else ""
        raise RefusalBehaviourError(
            f"no first token tells harmful from harmless prompts{does}; if it refuses in words of its own, name the "
            "first token with --refusal-token"
        )
    return [
        RefusalToken(
            token_id=token_id,
            text=chat.decode([token_id], skip_special_tokens=False),
            harmful_probability=p,
            harmless_probability=q,
        )
        for token_id, p, q in found
    ]


def describe_behaviour(chat: ChatModel, prompts: ExtractionPrompts) -> str:
    """Say in words what the model does, by completions."""
    forced = chat.chat_format.response_prefix
    refused = []
    for part in (prompts.harmful_train, prompts.harmless_train):
        rows = chat.encode(part.texts[:N_BEHAVIOUR_PROMPTS])
        answers = chat.generate(rows, max_new_tokens=32)
        refused.append((sum(is_refusal(forced + chat.decode(answer)) for answer in answers), len(rows)))
    (bad, n_bad), (good, n_good) = refused
    if bad <= n_bad // 4:
        does = "the model does not refuse"
    elif good > n_good // 2:
        does = "the model refuses everything"
    else:
        does = "its refusals and answers start alike"
    return f"{does} (refused {bad} of {n_bad} harmful and {good} of {n_good} harmless prompts)"


def _probabilities(chat: ChatModel, text: str, harmful: Recording, harmless: Recording) -> tuple[int, float, float]:
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(f"--refusal-token {text!r} is {len(ids)} tokens in this model's vocabulary; it must be one")
    p, q = (float(torch.softmax(r.logits.double(), -1)[:, ids[0]].mean()) for r in (harmful, harmless))
    return ids[0], p, q
