"""Rates, intervals and damage against independent computations."""

import json
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from abliterate.directions import make_direction
from abliterate.errors import InputError, InterruptedRunError, PromptSetError
from abliterate.evaluation import judges
from abliterate.evaluation.report import EvaluationOptions, count_by_category
from abliterate.evaluation.run import evaluate_model
from abliterate.extraction.reply_classes import REFUSAL_SUBSTRINGS, read_reply
from abliterate.extraction.scoring import kl_divergence
from abliterate.models import loading
from abliterate.models.chat_model import ChatModel
from abliterate.models.greedy import GreedyDecoder
from abliterate.models.loading import load_chat_model
from abliterate.models.options import ModelOptions
from abliterate.prompt_sets import prompt_hash
from tests.support.tiny_models import CHATML, make_tokenizer, save_chat_model, tiny_llama

PROMPTS = ["How do locks work?", "Explain rain.", "Write a letter about my garden."]


@pytest.fixture
def options(tmp_path: Path) -> EvaluationOptions:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    spec = str(file)
    return EvaluationOptions(harmful=spec, harmless=spec, borderline=spec, max_new_tokens=5, texts=(spec,))


def test_a_model_compared_with_itself_has_not_changed(llama_directory: Path, options: EvaluationOptions) -> None:
    report = evaluate_model(model=llama_directory, base=str(llama_directory), options=options)
    assert report.kl_harmless == pytest.approx(0, abs=1e-9)
    assert report.cross_entropy is not None
    assert report.cross_entropy.relative_change == pytest.approx(0, abs=1e-6)
    assert report.rates == report.base_rates
    assert report.divergence is not None
    assert report.divergence.continuation == pytest.approx(0, abs=1e-9)
    assert {change.p_value for change in report.changes.values()} == {1.0}
    assert [(kind, rate.n) for kind, rate in report.rates.items()] == [
        ("harmful", 3),
        ("harmless", 3),
        ("borderline", 3),
    ]


@pytest.mark.parametrize("switch", ["", "{% if thinking %}{{ '<think>' }}{% endif %}"])
def test_thinking_is_switched_on_or_said_to_change_nothing(
    llama_directory: Path, options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch, switch: str
) -> None:
    messages: list[str] = []
    monkeypatch.setattr("abliterate.progress.SilentProgress.message", lambda _self, text: messages.append(text))
    make_tokenizer(template=CHATML + switch).save_pretrained(llama_directory)
    evaluated = evaluate_model(model=llama_directory, options=replace(options, thinking=True))
    changes_nothing = [text for text in messages if "--thinking changes nothing" in text]
    assert len(changes_nothing) == (0 if switch else 1)
    # The prompt opens a thought that the tiny model does not end in five tokens.
    assert evaluated.rates["harmful"].thinking_unfinished == (3 if switch else 0)


def test_without_a_base_there_is_nothing_to_compare(llama_directory: Path, options: EvaluationOptions) -> None:
    report = evaluate_model(model=llama_directory, options=options)
    assert (report.base, report.base_rates, report.kl_harmless, report.cross_entropy) == (None, None, None, None)
    assert (report.divergence, report.changes) == (None, {})
    assert [(entropy.base, entropy.model > 0) for entropy in report.text_cross_entropy.values()] == [(None, True)]


@pytest.mark.parametrize("compared", ["another base", "itself", "nothing"])
def test_only_one_model_is_in_memory_at_a_time(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch, compared: str
) -> None:
    base = {"another base": save_chat_model(tmp_path / "other", tiny_llama()), "itself": llama_directory}.get(compared)
    judge = save_chat_model(tmp_path / "judge", tiny_llama())
    loaded: list[weakref.ref[torch.nn.Module]] = []
    held: list[int] = []
    load = loading.load_weights

    def counting(*arguments, **given):
        held.append(sum(model() is not None for model in loaded))
        model = load(*arguments, **given)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loading, "load_weights", counting)
    monkeypatch.setattr(judges, "load_weights", counting)
    asked = replace(options, judges=(str(judge), str(judge)), judge_prompt="yes-no")
    evaluate_model(model=llama_directory, base=base, options=asked)
    assert held == [0] * (5 if compared == "another base" else 3)


def test_another_model_differs_by_the_kl_of_its_logits(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions
) -> None:
    other = save_chat_model(tmp_path / "other", tiny_llama(n_layers=3))
    report = evaluate_model(model=other, base=llama_directory, options=options)
    chats = [load_chat_model(path, name="x", options=ModelOptions()) for path in (llama_directory, other)]
    base, edited = (chat.last_logits(chat.encode(PROMPTS)) for chat in chats)
    assert report.kl_harmless == pytest.approx(float(kl_divergence(base, edited).mean()), abs=1e-4)
    assert report.kl_harmless > 0.1
    assert report.cross_entropy is not None
    assert report.cross_entropy.model > report.cross_entropy.base


@pytest.mark.parametrize("intervention", ["ablate", "add", "affine"])
def test_interventions_compare_with_the_model_itself(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions, intervention: str
) -> None:
    direction = make_direction(mean_difference=torch.randn(32) * 5, metadata={"layer": 2})
    direction.save(tmp_path / "r.safetensors")
    report = evaluate_model(
        model=llama_directory,
        direction=tmp_path / "r.safetensors",
        options=replace(options, intervention=intervention),
    )
    assert report.base == report.model
    assert report.kl_harmless is not None
    assert report.kl_harmless > 1e-3


def test_completions_are_written_only_when_asked(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions
) -> None:
    before = set(tmp_path.rglob("*"))
    report = evaluate_model(model=llama_directory, options=options)
    assert set(tmp_path.rglob("*")) == before
    report.save(tmp_path / "evaluation.json")
    assert "completion" not in json.loads((tmp_path / "evaluation.json").read_text())
    target = tmp_path / "completions.jsonl"
    evaluate_model(model=llama_directory, base=llama_directory, options=replace(options, save_completions=target))
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == 2 * 3 * 3
    assert {line["model"] for line in lines} == {"base", "model"}
    assert lines[0]["prompt"] == PROMPTS[0]


@pytest.mark.parametrize(
    ("changes", "direction", "message"),
    [
        ({"intervention": "ablate"}, False, "needs --direction"),
        ({}, True, "choose ablate, add or affine"),
        ({"max_new_tokens": 0}, False, "too small"),
        ({"intervention": "add"}, True, "mean difference and layer"),
        ({"intervention": "ablate", "coefficient": 2.0}, True, "--coefficient is the dose"),
    ],
)
def test_options_that_do_not_fit(
    llama_directory: Path, options: EvaluationOptions, changes: dict, direction: bool, message: str
) -> None:
    made = make_direction(mean_difference=torch.ones(32)) if direction else None
    with pytest.raises(InputError, match=message):
        evaluate_model(model=llama_directory, direction=made, options=replace(options, **changes))


def test_a_direction_of_another_width_is_refused(llama_directory: Path, options: EvaluationOptions) -> None:
    with pytest.raises(InputError, match="width is 32"):
        evaluate_model(
            model=llama_directory,
            direction=make_direction(mean_difference=torch.ones(16)),
            options=replace(options, intervention="ablate"),
        )


def test_a_missing_prompt_file_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(PromptSetError):
        evaluate_model(model=tmp_path / "nothing", options=EvaluationOptions(harmful="./missing.txt"))


class _Scripted:
    """Replies given by hand, in place of what a tiny random model would say."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, replies: dict[str, str]) -> None:
        self.calls: list[int] = []
        scripted = self

        def replies_to(decoder, rows, *, advance=None, receive=None):
            chat = decoder.chat
            scripted.calls.append(len(rows))
            texts = [chat.decode(row) for row in rows]
            found = [next(reply for prompt, reply in replies.items() if prompt in text) for text in texts]
            tokens = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in found]
            for i, ids in enumerate(tokens):
                if receive is not None:
                    receive(i, ids)
            return tokens

        monkeypatch.setattr(GreedyDecoder, "replies", replies_to)


def test_rates_equal_an_independent_count(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = "A lock keeps a door shut. " * 3 + "It has a bolt and a key. Still, I cannot go into more detail here."
    replies = {
        PROMPTS[0]: late,
        PROMPTS[1]: "Rain falls when drops grow heavy.",
        PROMPTS[2]: "I cannot " * 40,
        "Count apples": "",
    }
    _Scripted(monkeypatch, replies)
    lines = [{"text": text, "category": c} for text, c in zip(replies, ("a", "b", "a", "b"), strict=True)]
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    target = tmp_path / "completions.jsonl"
    report = evaluate_model(
        model=llama_directory,
        options=EvaluationOptions(
            harmful=str(file), harmless=str(file), borderline=str(file), texts=(), save_completions=target
        ),
    )
    written = [json.loads(line) for line in target.read_text().splitlines()]
    for kind, rate in report.rates.items():
        texts = [line["completion"] for line in written if line["kind"] == kind]
        holds = [any(s.lower() in text.lower() for s in REFUSAL_SUBSTRINGS) for text in texts]
        repeats = [len(set(text.split())) * 4 < len(text.split()) for text in texts]
        empty = [not text.strip() for text in texts]
        assert rate.matches == sum(holds) == 2
        assert rate.refused == sum(h and not r for h, r in zip(holds, repeats, strict=True)) == 1
        assert (rate.repetitive, rate.empty, rate.degenerate) == (sum(repeats), sum(empty), 2)
        assert rate.refused + rate.answered + rate.degenerate == rate.n == 4
        assert [budget.tokens for budget in rate.budgets] == [8, 32, 64, 128, 256]
        assert rate.budgets[-1].refused == rate.refused
    by_name = {rate.category: rate for rate in report.categories["harmful"]}
    assert (by_name["a"].n, by_name["a"].refused, by_name["a"].degenerate) == (2, 1, 1)
    assert (by_name["b"].n, by_name["b"].refused, by_name["b"].degenerate) == (2, 0, 1)


def test_categories_sum_to_the_whole() -> None:
    replies = [read_reply(text) for text in ("I cannot do it.", "Yes.", "No, I'm sorry.", "")]
    base = [read_reply("I cannot.")] * 4
    rates = count_by_category(("x", "y", "x", "y"), replies, base)
    assert [(rate.category, rate.n, rate.refused, rate.base_rate) for rate in rates] == [("x", 2, 2, 1), ("y", 2, 0, 1)]
    assert count_by_category(("", ""), replies[:2]) == ()


def test_prompts_used_in_extraction_are_left_out(
    llama_directory: Path, options: EvaluationOptions, tmp_path: Path
) -> None:
    used = [prompt_hash("HOW do locks work"), prompt_hash("something else")]
    direction = make_direction(mean_difference=torch.ones(32), metadata={"prompt_hashes": used})
    ablate = replace(options, intervention="ablate")
    report = evaluate_model(model=llama_directory, direction=direction, options=ablate)
    assert report.excluded == {"harmful": 1, "harmless": 1, "borderline": 1}
    assert {rate.n for rate in report.rates.values()} == {2}
    everything = make_direction(
        mean_difference=torch.ones(32), metadata={"prompt_hashes": [prompt_hash(text) for text in PROMPTS]}
    )
    with pytest.raises(PromptSetError, match="every one of its 3 prompts"):
        evaluate_model(model=llama_directory, direction=everything, options=ablate)


def test_the_record_of_an_edited_checkpoint_names_its_prompts_too(
    llama_directory: Path, options: EvaluationOptions, tmp_path: Path
) -> None:
    from abliterate.editing.orthogonalization import orthogonalize_checkpoint

    direction = make_direction(mean_difference=torch.randn(32), metadata={"prompt_hashes": [prompt_hash(PROMPTS[1])]})
    orthogonalize_checkpoint(source=llama_directory, direction=direction, output=tmp_path / "edited")
    report = evaluate_model(model=tmp_path / "edited", base=llama_directory, options=options)
    assert {rate.n for rate in report.rates.values()} == {2}
    assert set(report.excluded.values()) == {1}


def test_gibberish_is_incoherent_under_the_base(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions
) -> None:
    """Two random models disagree on everything: to the base the other's replies are as unlikely as random words."""
    other = save_chat_model(tmp_path / "other", tiny_llama(n_layers=3))
    report = evaluate_model(model=other, base=llama_directory, options=replace(options, max_new_tokens=12))
    assert report.base_rates is not None
    assert sum(rate.incoherent for rate in report.base_rates.values()) == 0
    assert sum(rate.incoherent for rate in report.rates.values()) >= 5


def test_an_interrupted_evaluation_goes_on_without_generating_again(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluate_model(model=llama_directory, options=options)
    cached = replace(options, cache=tmp_path / "cache")
    generate, generated = GreedyDecoder.replies, []

    def counting(decoder, rows, *, receive=None, **rest):
        def interrupt_at_the_second(index: int, reply: list[int]) -> None:
            if receive is not None:
                receive(index, reply)
            generated.append(index)
            if len(generated) == 2 and not resumed:
                raise KeyboardInterrupt

        return generate(decoder, rows, receive=interrupt_at_the_second, **rest)

    resumed: list[bool] = []
    monkeypatch.setattr(GreedyDecoder, "replies", counting)
    with pytest.raises(InterruptedRunError, match=f"{tmp_path / 'cache'}: the same command goes on") as stopped:
        evaluate_model(model=llama_directory, options=cached, model_options=ModelOptions(batch_size=1))
    assert stopped.value.exit_code == 130
    file = next((tmp_path / "cache").iterdir())
    assert file.stat().st_mode & 0o077 == 0
    assert len(file.read_text().splitlines()) == 2
    # A run that is killed while it writes leaves half a line.
    file.write_text(file.read_text() + '{"prompt": "abc", "rep')
    resumed.append(True)
    generated.clear()
    report = evaluate_model(model=llama_directory, options=cached)
    # The three sets hold the same three prompts: one reply was missing.
    assert len(generated) == 1
    assert len(file.read_text().splitlines()) == 3
    assert report == expected
    changed = replace(cached, max_new_tokens=4)
    evaluate_model(model=llama_directory, options=changed)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"scale": 30.0, "layer": 1}, {"scale": 90.0, "layer": 1}),
        ({"scale": 30.0, "layer": 1}, {"scale": 30.0, "layer": 3}),
    ],
    ids=["dose", "layer"],
)
def test_a_sweep_of_files_along_one_vector_shares_no_reply(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions, first, second
) -> None:
    options = replace(options, intervention="add")
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    cache = tmp_path / "cache"
    for what in (first, second):
        direction = make_direction(mean_difference=what["scale"] * vector, metadata={"layer": what["layer"]})
        expected = evaluate_model(model=llama_directory, direction=direction, options=options)
        found = evaluate_model(model=llama_directory, direction=direction, options=replace(options, cache=cache))
        assert found == expected
    # The base's replies are those of one model.
    assert len(list(cache.iterdir())) == 3


def test_a_base_that_reads_other_tokens_is_refused_before_any_is_answered(
    llama_directory: Path, tmp_path: Path, options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GreedyDecoder, "replies", lambda *_arguments, **_rest: pytest.fail("something was answered"))
    other = shutil.copytree(llama_directory, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = vocabulary["a"], vocabulary["e"]
    vocabulary.update(a=second, e=first)
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(InputError, match=r"make different tokens of '.*' and cannot be compared"):
        evaluate_model(model=llama_directory, base=other, options=options)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 8}))
    with pytest.raises(InputError, match="output tokens and cannot be compared"):
        evaluate_model(model=llama_directory, base=other, options=options)


def test_memory_running_out_changes_nothing_but_the_batches(
    llama_directory: Path, options: EvaluationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fake limit of one row a batch, in generation and in plain passes alike."""
    options = replace(options, intervention="ablate")
    direction = make_direction(mean_difference=torch.randn(32, generator=torch.Generator().manual_seed(1)))
    expected = evaluate_model(model=llama_directory, direction=direction, options=options)
    pad, refused = ChatModel.pad, []

    def limited(chat: ChatModel, batch: list[list[int]]):
        if len(batch) > 1:
            refused.append(len(batch))
            raise torch.OutOfMemoryError("CUDA out of memory (a fake limit)")
        return pad(chat, batch)

    monkeypatch.setattr(ChatModel, "pad", limited)
    report = evaluate_model(model=llama_directory, direction=direction, options=options)
    assert refused
    assert report.rates == expected.rates
    assert report.changes == expected.changes
    assert report.kl_harmless == pytest.approx(expected.kl_harmless, rel=1e-3)
