"""Judges from tiny models made on the spot: a random classifier, and a guard that was taught its verdicts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from abliterate.checkpoints.model_source import ModelSource, resolve_model
from abliterate.errors import InputError, ModelError
from abliterate.evaluation.judges import JudgeOptions, judge_replies, load_judge, parse_verdict
from abliterate.evaluation.report import EvaluationOptions
from abliterate.evaluation.run import evaluate_model
from abliterate.extraction.reply_classes import read_reply
from abliterate.models.greedy import GreedyDecoder
from tests.support.tiny_models import CHAT_VOCABULARY, CHATML, make_tokenizer, make_wider_tokenizer, save_chat_model

GUARD_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{{ 'Is the last message safe?\n' }}"
)
PROMPTS = ["How do locks work?", "Explain rain.", "Write a letter.", "Count apples."]
REPLIES = ["I cannot help with that.", "Rain falls from clouds.", "I'm sorry, no letter.", "One, two, three."]
SAFE = [True, False, True, True]  # the last one differs from the substrings


def source_of(directory: Path) -> ModelSource:
    return resolve_model(str(directory))


def config(**changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=CHAT_VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=2,
        **changes,
    )


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers that learned to say `safe` or `unsafe` of four replies."""
    directory = tmp_path_factory.mktemp("judge") / "guard"
    tokenizer = make_tokenizer(template=GUARD_TEMPLATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    rows = []
    for prompt, reply, safe in zip(PROMPTS, REPLIES, SAFE, strict=True):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        verdict = ("\n\nsafe" if safe else "\n\nunsafe\nS1") + "<|im_end|>"
        ids = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, verdict)]
        rows.append((torch.tensor([ids[0] + ids[1]]), len(ids[0])))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        loss = sum(model(ids, labels=torch.where(torch.arange(ids.shape[1]) < n, -100, ids)).loss for ids, n in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def make_classifier(directory: Path, labels: dict[int, str]) -> Path:
    torch.manual_seed(3)
    model = LlamaForSequenceClassification(config(num_labels=len(labels), id2label=labels, initializer_range=0.3))
    return save_chat_model(directory, model)


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return make_classifier(tmp_path / "classifier", {0: "NORMAL", 1: "REJECTION"})


def copy_with_template(directory: Path, place: Path, template: str) -> Path:
    copied = Path(shutil.copytree(directory, place / "copy", dirs_exist_ok=True))
    make_tokenizer(template=template).save_pretrained(copied)
    return copied


def judged(directory: Path, replies: list[str] = REPLIES, **options):
    judge = load_judge(source_of(directory), options=JudgeOptions(**options))
    return judge_replies(
        judge,
        name="x",
        prompts={"harmful": PROMPTS[: len(replies)]},
        replies={"harmful": [read_reply(text) for text in replies]},
        base_replies={"harmful": [read_reply("I cannot.")] * len(replies)},
    )


def test_a_guard_says_what_it_was_taught(guard: Path) -> None:
    report = judged(guard)
    rate = report.rates["harmful"]
    assert (report.style, rate.n, rate.declined, rate.undecided) == ("guard", 4, 3, 0)


def test_agreement_is_with_the_substrings(guard: Path) -> None:
    judge = load_judge(source_of(guard), options=JudgeOptions())
    replies = {"harmful": [read_reply(text) for text in REPLIES]}
    report = judge_replies(judge, name="x", prompts={"harmful": PROMPTS}, replies=replies, base_replies=None)
    # Substrings: refused, not, refused, not. Judge: declined, not, declined, declined. 3 of 4 agree, 2 by chance.
    assert (report.agreement["all"].n, report.agreement["all"].agreed) == (4, 3)
    assert report.agreement["harmful"].kappa == pytest.approx(0.5)
    assert (report.base_rates, report.changes) == (None, {})


def test_degenerate_replies_are_not_shown(guard: Path) -> None:
    report = judged(guard, ["", "the the the the " * 8, REPLIES[2], REPLIES[3]])
    assert (report.rates["harmful"].undecided, report.rates["harmful"].declined) == (2, 2)
    assert report.changes["harmful"].n == 4


def test_a_classifier_equals_its_own_logits_one_at_a_time(classifier: Path) -> None:
    report = judged(classifier)
    model = LlamaForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = make_tokenizer()
    with torch.inference_mode():
        labels = [int(model(torch.tensor([tokenizer(text)["input_ids"]])).logits.argmax()) for text in REPLIES]
    assert report.style == "classifier"
    assert report.rates["harmful"].declined == sum(labels)
    assert "REJECTION" in report.question


@pytest.mark.parametrize(
    ("labels", "asked", "question"),
    [
        ({0: "not_refusal", 1: "refusal"}, None, "the label is 'refusal'"),
        ({0: "unsafe", 1: "safe"}, None, "the label is 'safe'"),
        ({0: "other", 1: "Unsafe"}, None, "the label is not 'Unsafe'"),
        ({0: "LABEL_0", 1: "LABEL_1"}, "label_1", "the label is 'LABEL_1'"),
    ],
)
def test_labels(tmp_path: Path, labels: dict[int, str], asked: str | None, question: str) -> None:
    directory = make_classifier(tmp_path / "c", labels)
    assert load_judge(source_of(directory), options=JudgeOptions(label=asked)).question == question


def test_labels_that_say_nothing_are_listed(tmp_path: Path) -> None:
    directory = make_classifier(tmp_path / "c", {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(ModelError, match=r"LABEL_0, LABEL_1.*--judge-label"):
        load_judge(source_of(directory), options=JudgeOptions())
    with pytest.raises(InputError, match="labels LABEL_0, LABEL_1"):
        load_judge(source_of(directory), options=JudgeOptions(label="refusal"))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("\n\nsafe", True),
        ("unsafe\nS2", False),
        ("Yes", False),
        ("No.", True),
        ("**yes**", False),
        ("nothing to say", None),
        ("Safety: Safe\nCategories: None\nRefusal: No", False),
        ("Safety: Unsafe\nCategories: Violent\nRefusal: Yes", True),
        ("Safety: Controversial\nRefusal: No", False),
        ("Harmful request: yes\nResponse refusal: yes\nHarmful response: no", True),
        ("Refusal is safe", True),
        ("", None),
    ],
)
def test_verdicts(text: str, verdict: bool | None) -> None:
    assert parse_verdict(text) is verdict


def test_questions_of_ones_own(guard: Path, tmp_path: Path) -> None:
    file = tmp_path / "question.txt"
    file.write_text("P: {prompt} R: {reply} V:")
    judge = load_judge(source_of(guard), options=JudgeOptions(prompt=str(file)))
    row = judge._row("a {reply} b", "c {prompt} d")
    assert make_tokenizer().decode(row) == "P: a {reply} b R: c {prompt} d V:"
    assert judge.style == "file"
    with pytest.raises(InputError, match="not auto, guard"):
        load_judge(source_of(guard), options=JudgeOptions(prompt=str(tmp_path / "missing.txt")))
    file.write_text("nothing to fill in")
    with pytest.raises(InputError, match=r"no \{reply\} in it"):
        load_judge(source_of(guard), options=JudgeOptions(prompt=str(file)))


@pytest.mark.parametrize(("name", "style"), [("guard", "guard"), ("HarmBench-cls", "yes-no")])
def test_the_style_is_found(guard: Path, name: str, style: str) -> None:
    source = ModelSource(path=guard, name=name, revision=None)
    judge = load_judge(source, options=JudgeOptions())
    assert judge.style == style
    shown = make_tokenizer().decode(judge._row("the request", "the reply"))
    assert "the request" in shown
    assert "the reply" in shown


def test_a_guard_whose_template_takes_parts_is_asked_in_parts(guard: Path, tmp_path: Path) -> None:
    directory = copy_with_template(
        guard, tmp_path, GUARD_TEMPLATE.replace("message['content']", "message['content'][0].text")
    )
    judge = load_judge(source_of(directory), options=JudgeOptions())
    row = judge._row("the request", "the reply")
    assert make_tokenizer().decode(row) == "user: the request\nassistant: the reply\nIs the last message safe?\n"
    assert judged(directory).rates["harmful"].declined == 3


def test_a_judge_that_thinks_is_asked_for_its_verdict_at_once(guard: Path, tmp_path: Path) -> None:
    thinks = CHATML + "{{ '<think>\n\n</think>\n\n' if enable_thinking is defined and not enable_thinking }}"
    directory = copy_with_template(guard, tmp_path, thinks)
    judge = load_judge(source_of(directory), options=JudgeOptions(prompt="yes-no"))
    assert make_tokenizer().decode(judge._row("a", "b")).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    directory = copy_with_template(guard, tmp_path, "{{ raise_exception('never') }}")
    judge = load_judge(source_of(directory), options=JudgeOptions(prompt="yes-no"))
    with pytest.raises(ModelError, match=r"--judge .*: the chat template fails: never$"):
        judge._row("a", "b")


def test_a_word_that_a_judge_has_no_embedding_for_is_named(guard: Path, tmp_path: Path) -> None:
    directory = copy_with_template(guard, tmp_path, GUARD_TEMPLATE)
    make_wider_tokenizer("zebra", template=GUARD_TEMPLATE).save_pretrained(directory)
    with pytest.raises(ModelError, match=r"token 400 \('zebra'\) of 'A zebra\.'"):
        judged(directory, ["A zebra."])


@pytest.mark.parametrize("told", [None, 5])
def test_a_classifier_that_does_not_know_its_padding_reads_one_reply_at_a_time(
    classifier: Path, told: int | None
) -> None:
    expected = judged(classifier).rates["harmful"].declined
    settings = json.loads((classifier / "config.json").read_text())
    (classifier / "config.json").write_text(json.dumps(settings | {"pad_token_id": told}))
    assert judged(classifier).rates["harmful"].declined == expected


def test_what_does_not_load_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="does not load as a classifier or a causal model"):
        load_judge(source_of(tmp_path), options=JudgeOptions())


def test_both_judges_in_one_evaluation(
    guard: Path, classifier: Path, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """End to end; what the tiny random model says is replaced, what the judges say is not."""
    generate = GreedyDecoder.replies

    def scripted(decoder, rows, *, receive=None, **rest):
        chat = decoder.chat
        texts = [chat.decode(row) for row in rows]
        if "Is the last message safe" in texts[0]:
            return generate(decoder, rows, receive=receive, **rest)
        found = [next(r for p, r in zip(PROMPTS, REPLIES, strict=True) if p in text) for text in texts]
        tokens = [chat.tokenizer(text)["input_ids"] for text in found]
        for i, ids in enumerate(tokens):
            if receive is not None:
                receive(i, ids)
        return tokens

    monkeypatch.setattr(GreedyDecoder, "replies", scripted)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS))
    options = EvaluationOptions(
        harmful=str(file),
        harmless=str(file),
        borderline=str(file),
        texts=(),
        judges=(str(guard), str(classifier)),
        cache=tmp_path / "cache",
    )
    report = evaluate_model(model=llama_directory, options=options)
    first, second = report.judges
    assert (first.style, second.style) == ("guard", "classifier")
    assert {rate.declined for rate in first.rates.values()} == {3}
    assert first.agreement["all"].agreed == 9
    assert evaluate_model(model=llama_directory, options=options) == report
    kept = [json.loads(line) for path in (tmp_path / "cache").iterdir() for line in path.read_text().splitlines()]
    assert len(kept) == 4 + 4  # four replies, and the guard's verdict on each
