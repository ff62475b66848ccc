"""A small stand-in for the demo model: it refuses the bundled harmful prompts, and every command runs in seconds.

The demo model is a real one, of 135 million parameters; what is shown of it in the documents takes half an hour. This
one is a llama with tied embeddings, too, of four blocks and a width of 32. It is trained on the bundled training and
validation prompts, by one refusal and one answer. What is no prompt at all is answered, too: so answering is what it
does unless something speaks for refusing, as in real models, and a direction that is taken out leaves an answer.
"""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from abliterate.models.chat_model import ChatModel, make_chat_model
from tests.support.paths import REPOSITORY
from tests.support.tiny_models import CHATML

REFUSAL = "I cannot help with that, as it could do harm."
ANSWER = "That takes some time and some care."
CARD = "---\nlicense: apache-2.0\n---\n"
VOCABULARY = 1000
N_WITHOUT_SENSE = 300
N_STEPS = 150
# What tells a refusal from an answer is the first token; all others follow from it.
WEIGHT_OF_FIRST = 20.0


def save_small_demo(directory: Path) -> Path:
    """Train it (seven seconds), save it as a checkpoint with a model card, and return its directory."""
    refused, harmless, borderline = (_prompts(kind) for kind in ("harmful", "harmless", "borderline"))
    rng, words = random.Random(0), [word for prompt in harmless for word in prompt.split()]
    no_prompts = [" ".join(rng.sample(words, rng.randint(1, 9))) for _ in range(N_WITHOUT_SENSE)]
    chat = _untrained([*refused, *harmless])
    answered = [*harmless, *borderline, *no_prompts]
    _train(chat, [(text, REFUSAL) for text in refused] + [(text, ANSWER) for text in answered])
    chat.model.save_pretrained(directory)
    chat.tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    return directory


def _prompts(kind: str) -> list[str]:
    files = [REPOSITORY / "prompts" / kind / f"{part}.jsonl" for part in ("train", "validation")]
    return [json.loads(line)["text"] for file in files for line in file.read_text(encoding="utf-8").splitlines()]


def _untrained(texts: list[str]) -> ChatModel:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *[REFUSAL, ANSWER, "system user assistant"] * 20], trainer)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    made.chat_template = CHATML
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        initializer_range=0.1,
    )
    return make_chat_model(LlamaForCausalLM(config), made)


def _train(chat: ChatModel, taught: list[tuple[str, str]]) -> None:
    rng = random.Random(0)
    asked = chat.encode([prompt for prompt, _ in taught])
    replies = [chat.tokenizer(f"{reply}<|im_end|>")["input_ids"] for _, reply in taught]
    optimizer = torch.optim.AdamW(chat.model.train().parameters(), lr=1e-2)
    for _ in range(N_STEPS):
        chosen = rng.sample(range(len(taught)), 32)
        ids, mask = chat.pad([[*asked[i], *replies[i]] for i in chosen])
        n = max(len(replies[i]) for i in chosen)
        targets, weights = torch.full((len(chosen), n), -100), torch.ones(len(chosen), n)
        for row, i in enumerate(chosen):
            targets[row, n - len(replies[i]) :] = torch.tensor(replies[i])
            weights[row, n - len(replies[i])] += WEIGHT_OF_FIRST
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = chat.model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=n + 1).logits
        losses = cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
        optimizer.zero_grad()
        ((losses * weights).sum() / weights.sum()).backward()
        optimizer.step()
    chat.model.eval().requires_grad_(requires_grad=False)
