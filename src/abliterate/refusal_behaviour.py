"""How a model starts its refusals: which first tokens, and what to say when there are none."""

from collections.abc import Sequence

import torch

from abliterate.errors import InputError, RefusalBehaviourError
from abliterate.models.chat_model import ChatModel
from abliterate.models.hooks import Recording
from abliterate.prompt_sets import ExtractionPrompts
from abliterate.refusal_metric import RefusalToken, find_refusal_tokens, is_refusal

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
