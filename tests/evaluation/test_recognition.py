"""The model's own verdict: which tokens it is read off, and what comes of it."""

import json
from pathlib import Path

import pytest
import torch

from abliterate.evaluation import recognition
from abliterate.evaluation.recognition import QUESTIONS, Verdicts, ask_about, compare_verdicts, yes_and_no
from abliterate.models.chat_model import ChatModel
from tests.support.command_line import CommandLine

PROMPTS = {"harmful": ("How do locks work?", "Explain rain."), "harmless": ("Why is it dark?",)}


@pytest.mark.parametrize("at_once", [1, 64])
def test_verdicts_are_the_log_odds_of_yes_against_no_at_the_first_token(
    chat: ChatModel, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    yes, no = yes_and_no(chat)
    monkeypatch.setattr(recognition, "_AT_ONCE", at_once)
    found = ask_about(chat, PROMPTS)
    assert found is not None
    said = []
    for kind, texts in PROMPTS.items():
        for text, log_odds in zip(texts, found.log_odds[kind], strict=True):
            answers = []
            for question in QUESTIONS:
                row = torch.tensor([chat.encode([question.replace("{request}", text)])[0]])
                with torch.inference_mode():
                    p = torch.softmax(chat.model(input_ids=row).logits[0, -1].double(), dim=-1)
                answers.append(float(torch.log(p[yes].sum() / p[no].sum())))
                said.append(float(p[yes].sum() + p[no].sum()))
            assert log_odds == pytest.approx(answers[0] - answers[1], abs=1e-4)
    assert found.said == pytest.approx(sum(said) / len(said), rel=1e-4)


@pytest.mark.parametrize("says", [0, 1])
def test_a_model_that_says_the_same_to_all_harmful_requests_is_not_taken_to_know(
    llama_chat: ChatModel, monkeypatch: pytest.MonkeyPatch, says: int
) -> None:
    """One that refuses says no to both questions about a harmful request; what it knows does not show in that."""
    words = yes_and_no(llama_chat)
    n_asked = []

    def answer(_chat, rows, **_options):
        # In the order of the kinds: both questions about the harmful ones first.
        kind = len(n_asked) // 2
        n_asked.append(len(rows))
        logits = torch.zeros(len(rows), llama_chat.model.config.vocab_size)
        logits[:, words[says if kind == 0 else 1 - says]] = 5.0
        return logits

    monkeypatch.setattr(ChatModel, "last_logits", answer)
    found = compare_verdicts(None, ask_about(llama_chat, PROMPTS))
    assert n_asked == [2, 2, 1, 1]
    assert found is not None
    assert found.model.auc == 0.5


def test_tokens_of_both_words_count_for_neither(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    yes, no = yes_and_no(chat)
    assert yes
    assert no
    assert not set(yes) & set(no)
    monkeypatch.setattr(type(chat.tokenizer), "__call__", lambda _self, _text, **_options: {"input_ids": [5]})
    assert yes_and_no(chat) == ([], [])
    assert ask_about(chat, PROMPTS) is None


def test_a_model_that_knows_and_one_that_has_forgotten() -> None:
    knows = Verdicts(log_odds={"harmful": (3.0, 2.0, 1.0), "harmless": (-1.0, -2.0, 0.5)}, said=0.9)
    forgot = Verdicts(log_odds={"harmful": (0.0, 0.0, 0.0), "harmless": (0.0, 0.0, 0.0)}, said=0.1)
    found = compare_verdicts(knows, forgot)
    assert found is not None
    assert found.base is not None
    assert found.change is not None
    assert (found.base.auc, found.model.auc, found.change.difference) == (1.0, 0.5, -0.5)
    assert found.base.low < 1 == found.base.high
    assert (found.base_said, found.said) == (0.9, 0.1)
    alone = compare_verdicts(None, knows)
    assert alone is not None
    assert (alone.base, alone.change, alone.base_said) == (None, None, None)
    assert compare_verdicts(knows, None) is None


def test_the_report_and_the_table_have_it(call_main: CommandLine, llama_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS["harmful"]))
    sets = [word for kind in ("harmful", "harmless", "borderline", "text") for word in (f"--{kind}", str(file))]
    words = ["evaluate", llama_directory, *sets, "--max-new-tokens", "2"]
    report = json.loads(call_main(*words, "--json", "--base", llama_directory)[1])
    # The same prompts on both sides: chance, whatever the model thinks of them.
    assert report["recognition"]["model"]["auc"] == 0.5
    assert report["recognition"]["change"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    assert "AUC" in call_main(*words)[1]
    # What thinks begins with a thought.
    assert json.loads(call_main(*words, "--json", "--thinking")[1])["recognition"] is None
