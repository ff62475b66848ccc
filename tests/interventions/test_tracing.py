"""Tracing a direction: what is measured, on which tokens, and what is refused."""

import csv
import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.errors import DirectionError, InputError, ModelError, PromptSetError
from abliterate.interventions.trace_report import TraceOptions, write_trace_report
from abliterate.interventions.traced_stream import (
    random_suffixes,
    suffix_tokens,
    trace_attention,
    trace_stream,
    traced_prompts,
)
from abliterate.interventions.tracing import trace_direction
from abliterate.models.chat_model import ChatModel, make_chat_model, with_response_prefix
from tests.support.tiny_models import make_tokenizer, tiny_llama

PROMPTS = ["How do locks work?", "Explain rain.", "Write a letter about my garden."]
SUFFIX = "describing + similarly now"


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return str(tmp_path / "prompts.txt")


def direction(layer: int | None = 3, **metadata: object):
    vector = torch.randn(32, generator=torch.Generator().manual_seed(4))
    return make_direction(mean_difference=vector, metadata={"layer": layer, **metadata})


def test_the_spans_hold_what_they_say(chat: ChatModel) -> None:
    suffix = suffix_tokens(chat, SUFFIX)
    prompt, plain = (traced_prompts(chat, PROMPTS[:1], suffixes=suffixes)[0] for suffixes in ([suffix], None))
    text = [chat.decode(prompt.tokens[span.start : span.stop]) for span in (prompt.instruction, prompt.suffix)]
    assert text == [PROMPTS[0], " " + SUFFIX]
    after = chat.decode(prompt.tokens[prompt.suffix.stop :], skip_special_tokens=False)
    assert after == "<|im_end|>\n<|im_start|>assistant\n"
    assert len(prompt.tokens) - prompt.suffix.stop == prompt.n_post == chat.chat_format.n_positions
    assert list(plain.tokens) == chat.encode(PROMPTS[:1])[0]
    assert not plain.suffix


def test_random_suffixes_are_fresh_printable_and_of_the_length_asked_for(chat: ChatModel) -> None:
    suffixes = random_suffixes(chat, n_tokens=20, n_prompts=3, seed=1)
    assert [len(suffix) for suffix in suffixes] == [20, 20, 20]
    assert len({tuple(suffix) for suffix in suffixes}) == 3
    assert suffixes == random_suffixes(chat, n_tokens=20, n_prompts=3, seed=1)
    assert suffixes != random_suffixes(chat, n_tokens=20, n_prompts=3, seed=2)
    texts = [chat.decode(suffix, skip_special_tokens=False) for suffix in suffixes]
    assert all(text.isascii() and text.isprintable() and "<|" not in text for text in texts)


def test_attention_goes_to_the_parts_of_the_prompt_as_output_attentions_says(chat: ChatModel) -> None:
    from abliterate.interventions.contributions import find_block_parts

    suffixes = random_suffixes(chat, n_tokens=6, n_prompts=3, seed=1)
    prompts = traced_prompts(chat, PROMPTS, suffixes=suffixes)
    heads = [(0, 1), (3, 2)]
    implementation = chat.model.config._attn_implementation
    shares = trace_attention(chat, prompts, heads, parts=find_block_parts(chat))
    assert chat.model.config._attn_implementation == implementation
    assert torch.allclose(shares.sum(dim=1), torch.ones(2, dtype=torch.float64), atol=1e-5)
    chat.model.set_attn_implementation("eager")
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for prompt in prompts:
        with torch.inference_mode():
            weights = chat.model(torch.tensor([list(prompt.tokens)]), output_attentions=True).attentions
        bounds = [0, prompt.instruction.start, prompt.suffix.start, prompt.suffix.stop, len(prompt.tokens)]
        for i, (layer, head) in enumerate(heads):
            row = weights[layer][0, head, -1].double()
            expected[i] += torch.stack([row[a:b].sum() for a, b in itertools.pairwise(bounds)]) / 3
    assert torch.allclose(shares, expected, atol=1e-5)


def test_the_report_of_a_set_is_the_mean_and_spread_of_its_prompts(llama_chat: ChatModel, spec: str) -> None:
    made = direction()
    report = trace_direction(model=llama_chat, direction=made, options=TraceOptions(prompts=(spec,), suffix=SUFFIX))
    assert [traced.suffix for traced in report.sets] == ["none", "given", "random"]
    assert report.suffix is not None
    assert report.suffix.n_tokens == len(suffix_tokens(llama_chat, SUFFIX))
    prompts = traced_prompts(llama_chat, PROMPTS)
    stream = trace_stream(llama_chat, prompts, made.vector.double(), parts=None, advance=lambda _n: None)
    cosines = torch.stack([cosine[-2] for cosine in stream.cosines])
    assert report.sets[0].cosines["-2"].mean == pytest.approx(cosines.mean(dim=0).tolist(), abs=1e-6)
    assert report.sets[0].cosines["-2"].sd == pytest.approx(cosines.std(dim=0).tolist(), abs=1e-6)
    assert report.sets[0].cosines["last"] == report.sets[0].cosines["-1"]
    inside = torch.stack(
        [c[p.instruction.start : p.instruction.stop].mean(0) for c, p in zip(stream.cosines, prompts, strict=True)]
    )
    assert report.sets[0].cosines["instruction"].mean == pytest.approx(inside.mean(dim=0).tolist(), abs=1e-6)
    assert "suffix" not in report.sets[0].cosines
    assert "suffix" in report.sets[1].cosines
    assert len(report.sets[0].cosines["last"].mean) == llama_chat.n_layers + 1


def test_the_table_of_heads_sums_to_the_measured_component(llama_chat: ChatModel, spec: str) -> None:
    report = trace_direction(model=llama_chat, direction=direction(), options=TraceOptions(prompts=(spec,)))
    found = report.sets[0].contributions
    assert found is not None
    assert found.largest_gap < 1e-5
    for layer in range(6):
        total = found.embedding + sum(sum(row) for row in found.heads[:layer])
        total += sum(found.biases[:layer]) + sum(found.mlps[:layer])
        assert total == pytest.approx(found.component.mean[layer], abs=1e-5)
    ranked = sorted((v for row in found.heads[:3] for v in row), reverse=True)
    assert [head.contribution for head in report.top_heads] == ranked[:8]
    assert all(head.layer < 3 for head in report.top_heads)
    assert report.sets[0].attention is not None
    assert [(a.layer, a.head) for a in report.sets[0].attention] == [(h.layer, h.head) for h in report.top_heads]


def test_nothing_is_changed_in_the_model(llama_chat: ChatModel, spec: str) -> None:
    rows = llama_chat.encode(PROMPTS)
    before = llama_chat.last_logits(rows)
    trace_direction(model=llama_chat, direction=direction(), options=TraceOptions(prompts=(spec,), suffix=SUFFIX))
    assert torch.equal(llama_chat.last_logits(rows), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in llama_chat.model.modules())


def test_a_prompt_that_is_repeated_counts_once(llama_chat: ChatModel, spec: str, tmp_path: Path) -> None:
    (tmp_path / "again.txt").write_text("\n".join([*PROMPTS, *PROMPTS, PROMPTS[0]]))
    reports = [
        trace_direction(model=llama_chat, direction=direction(), options=TraceOptions(prompts=(each,)))
        for each in (spec, str(tmp_path / "again.txt"))
    ]
    once, repeated = (asdict(report)["sets"][0] for report in reports)
    assert {**once, "name": ""} == {**repeated, "name": ""}


def test_one_prompt_token_by_token(llama_chat: ChatModel, spec: str) -> None:
    made = direction()
    options = TraceOptions(prompts=(spec,), prompt=PROMPTS[0])
    found = trace_direction(model=llama_chat, direction=made, options=options).prompt
    assert found is not None
    row = llama_chat.encode(PROMPTS[:1])[0]
    assert "".join(found.tokens) == llama_chat.decode(row, skip_special_tokens=False)
    with torch.inference_mode():
        states = llama_chat.model(torch.tensor([row]), output_hidden_states=True).hidden_states
    assert found.components == pytest.approx((states[3][0] @ made.vector).tolist(), abs=1e-4)
    assert (len(found.cosines), len(found.cosines[0])) == (len(row), 6)


def test_the_forced_answer_prefix_of_the_extraction_is_used(llama_chat: ChatModel, spec: str) -> None:
    options = TraceOptions(prompts=(spec,))
    forced = trace_direction(model=llama_chat, direction=direction(response_prefix="So"), options=options)
    expected = trace_direction(model=with_response_prefix(llama_chat, "So"), direction=direction(), options=options)
    plain = trace_direction(model=llama_chat, direction=direction(), options=options)
    assert forced.sets == expected.sets
    assert forced.post_instruction_tokens[-2:] != plain.post_instruction_tokens[-2:]


@pytest.mark.parametrize("broken", ["parts", "sum"])
def test_unknown_heads_leave_the_cosines_and_say_why(
    llama_chat: ChatModel, spec: str, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    whole = trace_direction(model=llama_chat, direction=direction(), options=TraceOptions(prompts=(spec,)))
    if broken == "parts":
        monkeypatch.setattr("abliterate.interventions.tracing.find_block_parts", _refuse)
    else:
        monkeypatch.setattr("abliterate.interventions.traced_stream.check_decomposition", _refuse)
    messages: list[str] = []
    report = trace_direction(
        model=llama_chat, direction=direction(), options=TraceOptions(prompts=(spec,)), progress=_Listener(messages)
    )
    assert report.heads_unavailable is not None
    assert "llama" in report.heads_unavailable
    assert messages == [f"no table of heads: {report.heads_unavailable}"]
    assert (report.top_heads, report.sets[0].contributions, report.sets[0].attention) == ((), None, None)
    assert report.sets[0].cosines == whole.sets[0].cosines


def _refuse(*_args: object, **_kwargs: object) -> None:
    from abliterate.interventions.contributions import HeadsUnknownError

    raise HeadsUnknownError("llama: something else writes to it")


class _Listener:
    def __init__(self, messages: list[str]) -> None:
        self._messages = messages

    def task(self, *_args: object, **kwargs: object):
        from contextlib import nullcontext

        return nullcontext(lambda _n: None)

    def message(self, text: str) -> None:
        self._messages.append(text)


def test_the_files_hold_the_same_numbers(llama_chat: ChatModel, spec: str, tmp_path: Path) -> None:
    options = TraceOptions(prompts=(spec,), suffix=SUFFIX, prompt=PROMPTS[0])
    report = trace_direction(model=llama_chat, direction=direction(), options=options)
    written = write_trace_report(report, tmp_path / "report")
    names = ["trace.json", "cosines.csv", "contributions.csv", "attention.csv"]
    assert [path.name for path in written] == names
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(asdict(report)))
    tables = {path.name: list(csv.DictReader(path.open())) for path in written[1:4]}
    last = [row for row in tables["cosines.csv"] if (row["suffix"], row["tokens"]) == ("random", "last")]
    assert [float(row["mean"]) for row in last] == list(report.sets[2].cosines["last"].mean)
    contributions = [row for row in tables["contributions.csv"] if row["suffix"] == "none"]
    assert len(contributions) == 1 + 5 * (4 + 2)
    assert len(tables["attention.csv"]) == 3 * 8


def test_without_heads_there_are_no_files_about_them(
    llama_chat: ChatModel, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abliterate.interventions.tracing.find_block_parts", _refuse)
    report = trace_direction(model=llama_chat, direction=direction(), options=TraceOptions(prompts=(spec,)))
    written = write_trace_report(report, tmp_path / "report")
    assert [path.name for path in written] == ["trace.json", "cosines.csv"]


@pytest.mark.parametrize(
    ("made", "options", "error", "message"),
    [
        (direction(), TraceOptions(layer=6), InputError, "layer 6 is not one of this model's"),
        (direction(None), TraceOptions(prompt="Hello"), InputError, "--prompt needs --layer"),
        (direction(), TraceOptions(n_prompts=0), InputError, "at least one"),
        (direction(), TraceOptions(suffix=" "), InputError, "--suffix is empty"),
        (direction(), TraceOptions(prompts=("./missing.txt",)), PromptSetError, "missing.txt"),
        (make_direction(mean_difference=torch.ones(8)), TraceOptions(), DirectionError, "8 entries"),
    ],
)
def test_what_does_not_fit_is_said(made: object, options: TraceOptions, error: type[Exception], message: str) -> None:
    chat = make_chat_model(tiny_llama(), make_tokenizer())
    with pytest.raises(error, match=message):
        trace_direction(model=chat, direction=made, options=options)  # type: ignore[arg-type]


def test_a_stream_in_several_parts_is_refused(
    llama_chat: ChatModel, spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(llama_chat.model.config), "model_type", "deepseek_v4")
    # What was found about the stream is kept with the model.
    chat = replace(llama_chat, _stream=[])
    direction = make_direction(mean_difference=torch.ones(llama_chat.d_model))
    with pytest.raises(ModelError, match="cannot be traced: it has four residual streams"):
        trace_direction(model=chat, direction=direction, options=TraceOptions(prompts=(spec,)))


def test_a_directory_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError):
        trace_direction(model=tmp_path, direction=direction())


@pytest.mark.demo
@pytest.mark.proof
def test_on_the_demo_model_harmful_stands_above_harmless_at_the_selected_layer(
    demo_directory: Path, tmp_path: Path
) -> None:
    from abliterate.extraction.options import ExtractionOptions, Thresholds
    from abliterate.extraction.run import extract_direction

    extraction = extract_direction(
        model=demo_directory, options=ExtractionOptions(n_train=48, n_val=12, thresholds=Thresholds(kl=0.5))
    )
    report = trace_direction(
        model=demo_directory,
        direction=extraction.direction,
        options=TraceOptions(prompts=("harmful", "harmless"), n_prompts=32),
    )
    layer = extraction.report.selected.layer
    harmful, harmless = (traced.cosines["last"] for traced in report.sets)
    assert report.layer == layer
    assert harmful.mean[layer] - harmless.mean[layer] > 2 * max(harmful.sd[layer], harmless.sd[layer])
    found = report.sets[0].contributions
    assert found is not None
    assert found.largest_gap < 1e-4 * max(map(abs, found.component.mean))
