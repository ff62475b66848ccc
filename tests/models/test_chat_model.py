"""Rendering, batching, the shared prefix, generation, and what a chat model must have."""

import dataclasses

import pytest
import torch

from abliterate.errors import InputError, ModelError
from abliterate.models.chat_model import (
    ChatModel,
    make_chat_model,
    shared_prefix_length,
    stop_tokens,
    with_response_prefix,
)
from abliterate.models.greedy import find_response_prefix
from abliterate.models.loading import load_chat_model, open_model
from abliterate.models.machine import is_out_of_memory
from abliterate.models.options import ModelOptions
from tests.support.tiny_models import CHATML, SYSTEM, make_tokenizer, make_wider_tokenizer, save_chat_model, tiny_llama

PROMPTS = ["How do locks work?", "Explain rain.", "Write a long letter about the garden behind my house, please."]


def test_post_instruction_tokens_come_from_the_template(llama_chat: ChatModel) -> None:
    chat_format = llama_chat.chat_format
    assert "".join(chat_format.post_instruction_tokens) == "<|im_end|>\n<|im_start|>assistant\n"
    rows = llama_chat.encode(PROMPTS)
    tails = {tuple(row[-chat_format.n_positions :]) for row in rows}
    assert len(tails) == 1
    assert len({row[-chat_format.n_positions - 1] for row in rows}) > 1


def test_encode_is_the_templates_own_rendering(llama_chat: ChatModel) -> None:
    message = [{"role": "user", "content": PROMPTS[0]}]
    expected = llama_chat.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    assert llama_chat.encode(PROMPTS[:1]) == [expected]


@pytest.mark.parametrize("in_template", [True, False])
def test_there_is_exactly_one_bos(in_template: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    template = ("{{ bos_token }}" if in_template else "") + CHATML
    tokenizer = make_tokenizer(template=template, bos_token="<s>")
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    row = make_chat_model(tiny_llama(), tokenizer).encode(["Hello"])[0]
    assert row[0] == bos
    assert row.count(bos) == 1


def test_a_system_prompt_is_rendered() -> None:
    options = ModelOptions(system_prompt="Speak plainly.")
    chat = make_chat_model(tiny_llama(), make_tokenizer(template=CHATML), options=options)
    assert "Speak plainly." in chat.decode(chat.encode(["Hello"])[0], skip_special_tokens=False)


def test_the_non_thinking_form_of_a_template_is_used() -> None:
    tail = "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    chat = make_chat_model(tiny_llama(), make_tokenizer(template=CHATML + tail))
    assert chat.chat_format.thinking_disabled
    assert chat.decode(chat.encode(["Hi"])[0]).endswith("</think>\n\n")
    assert "think" in "".join(chat.chat_format.post_instruction_tokens)


def test_a_thinking_part_that_the_template_opens_is_closed() -> None:
    chat = make_chat_model(tiny_llama(), make_tokenizer(template=CHATML + "{{ '<think>\n' }}"))
    assert chat.decode(chat.encode(["Hi"])[0]).endswith("assistant\n<think>\n\n\n</think>\n\n")
    assert chat.chat_format.response_prefix == "\n\n</think>\n\n"
    assert "".join(chat.chat_format.post_instruction_tokens).endswith("</think>\n\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ 'fixed' }}", "instruction exactly once"),
        ("{{ messages[0]['content'] }}", "no token after the instruction"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        make_chat_model(tiny_llama(), make_tokenizer(template=template))


def test_batched_logits_with_a_shared_prefix_equal_single_uncached_ones(chat: ChatModel) -> None:
    rows = chat.encode(PROMPTS)
    assert shared_prefix_length(rows) > 8
    cache, n_cached = chat.share_prefix(rows)
    assert cache is not None
    assert n_cached == shared_prefix_length(rows)
    expected = torch.stack([chat.model(torch.tensor([row])).logits[0, -1] for row in rows]).detach()
    assert torch.allclose(chat.last_logits(rows), expected, atol=1e-4)


def test_without_a_shared_prefix_nothing_is_cached() -> None:
    chat = make_chat_model(tiny_llama(), make_tokenizer(template=CHATML.replace("'<|im_start|>' +", "")))
    rows = [[7, 8, 9], [10, 11]]
    assert chat.share_prefix(rows) == (None, 0)
    expected = torch.stack([chat.model(torch.tensor([row])).logits[0, -1] for row in rows]).detach()
    assert torch.allclose(chat.last_logits(rows), expected, atol=1e-4)


def test_shared_prefix_leaves_a_token_to_each_row() -> None:
    assert shared_prefix_length([[1, 2, 3], [1, 2, 3]]) == 2
    assert shared_prefix_length([[1, 2, 3], [1, 2]]) == 1
    assert shared_prefix_length([[1], [2]]) == 0


def test_generation_is_greedy_whatever_the_model_ships(llama_chat: ChatModel) -> None:
    settings = llama_chat.model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 5.0, 3.0
    rows = llama_chat.encode(PROMPTS)
    completions = llama_chat.generate(rows, max_new_tokens=6)
    for row, completion in zip(rows, completions, strict=True):
        tokens = list(row)
        for _ in range(6):
            tokens.append(int(llama_chat.model(torch.tensor([tokens])).logits[0, -1].argmax()))
        expected = tokens[len(row) :]
        stop = llama_chat.tokenizer.eos_token_id
        assert completion == (expected[: expected.index(stop)] if stop in expected else expected)


def test_batches_are_halved_when_memory_runs_out(llama_chat: ChatModel) -> None:
    lengths = [4, 9, 2, 7, 5, 1, 3, 8, 6]
    padded: list[int] = []
    done: list[int] = []

    def run(indices: list[int]) -> None:
        padded.append(len(indices) * max(lengths[i] for i in indices))
        if padded[-1] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.extend(indices)

    chat = dataclasses.replace(llama_chat, batch_size=8, _limit={})
    chat.for_batches(lengths, run)
    assert sorted(done) == list(range(9))
    assert done[0] == 1  # the longest row first
    failed = [size for size in padded if size > 20]
    assert 1 <= len(failed) <= 2
    assert len(padded) == len(failed) + len(padded[len(failed) :])
    done.clear()
    padded.clear()
    chat.for_batches(lengths, run)
    assert max(padded) <= 20  # what was learned is kept


def test_memory_that_a_cpu_does_not_have_is_told_from_other_errors() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.int8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_one_prompt_that_does_not_fit_is_an_error(llama_chat: ChatModel) -> None:
    def run(_indices: list[int]) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ModelError, match="does not fit"):
        llama_chat.for_batches([3, 4], run)


def test_other_errors_are_not_taken_for_memory(llama_chat: ChatModel) -> None:
    def run(_indices: list[int]) -> None:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        llama_chat.for_batches([3, 4], run)


class _Scripted(ChatModel):
    """A model whose answers are given."""

    answers: tuple[str, ...] = ()

    def generate(self, rows, *, max_new_tokens, advance=None):
        # This tokenizer spells words out, so more than a first token comes whole.
        end = 1 if max_new_tokens == 1 else None
        answers = self.answers[: len(rows)]
        return [self.tokenizer(text, add_special_tokens=False)["input_ids"][:end] for text in answers]


@pytest.mark.parametrize(
    ("answers", "prefix"),
    [
        (("Sure, yes", "Here we go"), ""),
        (("<think>\nhm", "<think>\nwell"), "<think>\n\n</think>\n\n"),
        (("[THINK]a", "[THINK]b"), "[THINK][/THINK]"),
        (("<|channel>thought\nhm", "<|channel>thought\nwell"), "<|channel>thought\n<channel|>"),
        (("◁think▷hm", "◁think▷well"), "◁think▷◁/think▷"),
        (
            ("<|channel|>analysis<|message|>hm", "<|channel|>analysis<|message|>well"),
            "<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>",
        ),
        (("Q: locks", "Q: rain"), "Q: "),
    ],
)
def test_response_prefix(llama_chat: ChatModel, answers: tuple[str, ...], prefix: str) -> None:
    fields = {f.name: getattr(llama_chat, f.name) for f in dataclasses.fields(llama_chat)}
    scripted = _Scripted(**fields)
    type(scripted).answers = answers
    found = find_response_prefix(scripted, PROMPTS[:2])
    assert found.rstrip() == prefix.rstrip()
    forced = with_response_prefix(llama_chat, found)
    assert forced.chat_format.n_positions >= llama_chat.chat_format.n_positions
    assert forced.decode(forced.encode(["Hi"])[0]).endswith("assistant\n" + found)
    # Of a letter of several tokens none shows it.
    assert found.isascii() is "".join(forced.chat_format.post_instruction_tokens).endswith("assistant\n" + found)


def test_half_formats_are_computed_in_float32_on_a_cpu(tmp_path) -> None:
    save_chat_model(tmp_path, tiny_llama().to(torch.bfloat16))
    assert load_chat_model(tmp_path, name="x", options=ModelOptions(device="cpu")).model.dtype == torch.float32
    options = ModelOptions(device="cpu", dtype="bfloat16")
    assert load_chat_model(tmp_path, name="x", options=options).model.dtype == torch.bfloat16


def test_what_does_not_load_is_one_clear_error(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="my-model has no tokenizer that loads"):
        load_chat_model(tmp_path, name="my-model", options=ModelOptions())
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="my-model does not load"):
        load_chat_model(tmp_path, name="my-model", options=ModelOptions())
    with pytest.raises(InputError, match="--device warp"):
        load_chat_model(tmp_path, name="x", options=ModelOptions(device="warp"))


def test_template_with_default_system_message(llama_chat: ChatModel) -> None:
    assert SYSTEM.split("\\n")[0]
    assert "no use to anyone" in llama_chat.decode(llama_chat.encode(["Hi"])[0])


CHANNELS = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{{ '<a><|channel|>final<|message|>' + m.content + '<|im_end|>' }}{% else %}"
    "{{ '<u>' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<a>' }}{% endif %}"
)


def test_the_token_that_is_scored_is_the_first_of_the_final_channel() -> None:
    chat = make_chat_model(tiny_llama(), make_tokenizer(template=CHANNELS))
    assert chat.decode(chat.encode(["Hi"])[0]) == "<u>Hi<a><|channel|>final<|message|>"
    assert find_response_prefix(chat, PROMPTS) == ""


@pytest.mark.parametrize("streams", [False, True])
def test_generation_ends_where_the_template_ends_a_turn(llama_chat: ChatModel, tmp_path, streams: bool) -> None:
    tokenizer = make_tokenizer(template=CHATML.replace("<|im_end|>", "<s>"))
    save_chat_model(tmp_path, tiny_llama())
    tokenizer.save_pretrained(tmp_path)
    options = ModelOptions(device="cpu", stream_layers=streams)
    chat = open_model(tmp_path, options=options, can_stream=True).chat
    assert tokenizer.eos_token == "<|im_end|>"
    assert stop_tokens(chat) == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<s>")}
    rows = chat.encode(PROMPTS)
    (whole, *_) = chat.generate(rows, max_new_tokens=4)
    # Whatever it says second ends its turn, if the template ends turns with that.
    ends = dataclasses.replace(chat, chat_format=dataclasses.replace(chat.chat_format, turn_ends=(whole[1],)))
    assert ends.generate(rows, max_new_tokens=4)[0] == whole[:1]


def test_padding_that_the_model_has_no_embedding_for_is_replaced(llama_chat: ChatModel) -> None:
    tokenizer = make_wider_tokenizer("<pad>")
    tokenizer.pad_token = "<pad>"
    assert tokenizer.pad_token_id == llama_chat.n_embeddings
    chat = dataclasses.replace(llama_chat, tokenizer=tokenizer)
    assert chat.pad_token_id == tokenizer.eos_token_id
    rows = chat.encode(PROMPTS)
    assert torch.allclose(chat.last_logits(rows), llama_chat.last_logits(rows))
    tokenizer.eos_token = "<pad>"
    assert chat.pad_token_id == 0


def test_a_token_that_the_model_has_no_embedding_for_is_named_with_its_prompt(llama_chat: ChatModel) -> None:
    chat = dataclasses.replace(llama_chat, tokenizer=make_wider_tokenizer("zebra"))
    with pytest.raises(
        ModelError, match=r"token 400 \('zebra'\) of 'Draw a zebra\.', and the model's embedding has 400"
    ):
        chat.encode(["Hi", "Draw a zebra."])
    bare = dataclasses.replace(chat, tokenizer=make_wider_tokenizer("zebra", template=None))
    with pytest.raises(ModelError, match="'zebra'"):
        bare.encode(["zebra"])
    assert chat.encode(["Draw a horse."])


def test_a_prompt_of_no_tokens_is_named(llama_chat: ChatModel) -> None:
    with pytest.raises(ModelError, match=r"makes no token of 'Explain rain\.'; it is another model's"):
        llama_chat.check_tokens([[5, 6], []], ["How do locks work?", "Explain rain."])
