"""The same requests in other languages and in a second turn: what is asked, and what is paired with what."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from abliterate.errors import InputError, ModelError, PromptSetError
from abliterate.evaluation.parts import Part, answer_part, choose_parts, report_part
from abliterate.evaluation.replies import Answers, answer_prompts
from abliterate.evaluation.report import KINDS, OPENING, REPETITION, EvaluationOptions
from abliterate.evaluation.run import evaluate_model
from abliterate.extraction.reply_classes import Reply, read_reply
from abliterate.models.chat_model import ChatModel
from abliterate.prompt_sets import LANGUAGES, PromptSet, load_openings, load_prompt_set, prompt_hash
from tests.support.command_line import CommandLine

PLAIN = {kind: load_prompt_set("bundled", kind=kind, part="test") for kind in KINDS}


def prompts(*texts: str, ids: Sequence[str] | None = None) -> PromptSet:
    numbers = tuple(ids or map(str, range(len(texts))))
    return PromptSet(name="p", texts=texts, ids=numbers, categories=("",) * len(texts))


def replies(*refused: bool) -> list[Reply]:
    return [read_reply("I'm sorry, no." if each else "Take two eggs and some flour.") for each in refused]


def test_the_parts_that_are_asked_for_are_there_once_and_in_order() -> None:
    parts = choose_parts(EvaluationOptions(languages=("de", "ar", "de"), turns=True), PLAIN, frozenset())
    assert [part.name for part in parts] == ["de", "ar", OPENING, REPETITION]
    assert parts[2].prompts == parts[3].prompts == PLAIN
    assert set(parts[0].prompts["harmful"].ids) < set(PLAIN["harmful"].ids)
    every = choose_parts(EvaluationOptions(languages=("all",)), PLAIN, frozenset())
    assert tuple(part.name for part in every) == LANGUAGES
    assert choose_parts(EvaluationOptions(), PLAIN, frozenset()) == ()


def test_a_language_without_translations_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="--languages tlh: the prompts are in ar, de, es, fr, ru, zh"):
        choose_parts(EvaluationOptions(languages=("de", "tlh")), PLAIN, frozenset())


def test_translations_that_the_direction_was_found_with_are_left_out() -> None:
    options = EvaluationOptions(languages=("de",))
    german = choose_parts(options, PLAIN, frozenset())[0].prompts["harmful"]
    used = frozenset(map(prompt_hash, german.texts[:5]))
    assert choose_parts(options, PLAIN, used)[0].prompts["harmful"].ids == german.ids[5:]
    # Found with the English ones: what is translated is the same request.
    english = dict(zip(PLAIN["harmful"].ids, PLAIN["harmful"].texts, strict=True))
    used = frozenset(prompt_hash(english[i]) for i in german.ids[:3])
    assert choose_parts(options, PLAIN, used)[0].prompts["harmful"].ids == german.ids[3:]
    with pytest.raises(PromptSetError, match=r"test\.de"):
        choose_parts(options, PLAIN, frozenset(map(prompt_hash, german.texts)))


def plain_answers(chat: ChatModel, sets: dict[str, PromptSet]) -> Answers:
    return answer_prompts(chat, {kind: chosen.texts for kind, chosen in sets.items()}, max_new_tokens=4)


def rendered(chat: ChatModel, *turns: str) -> list[int]:
    """What transformers makes of a conversation."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return chat.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_second_turn_is_the_conversation_that_the_template_writes(llama_chat: ChatModel) -> None:
    sets = {"harmful": prompts("How do locks work?", "Explain rain."), "harmless": prompts("Why is it dark?")}
    plain = plain_answers(llama_chat, sets)
    repeated = answer_part(llama_chat, Part(name=REPETITION, prompts=sets), plain, label="model")
    for kind, chosen in sets.items():
        said = [llama_chat.decode(tokens).strip() for tokens in plain.tokens[kind]]
        assert repeated.rows[kind] == [
            rendered(llama_chat, text, reply, text) for text, reply in zip(chosen.texts, said, strict=True)
        ]
    opened = answer_part(llama_chat, Part(name=OPENING, prompts=sets), plain, label="model")
    first = load_openings().texts[:2]
    said = [
        llama_chat.decode(tokens).strip() for tokens in plain_answers(llama_chat, {"x": prompts(*first)}).tokens["x"]
    ]
    assert opened.rows["harmful"] == [
        rendered(llama_chat, *turns) for turns in zip(first, said, sets["harmful"].texts, strict=True)
    ]
    assert opened.rows["harmless"] == [rendered(llama_chat, first[0], said[0], "Why is it dark?")]
    assert opened.max_new_tokens == 4
    assert all(len(tokens) <= 4 for tokens in opened.tokens["harmful"])


def test_a_model_without_a_template_has_no_second_turn(llama_chat: ChatModel) -> None:
    sets = {"harmful": prompts("How do locks work?")}
    plain = plain_answers(llama_chat, sets)
    llama_chat.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="--turns: the model has no chat template"):
        answer_part(llama_chat, Part(name=OPENING, prompts=sets), plain, label="model")


def test_refusals_are_paired_with_the_base_and_with_the_plain_prompts_of_the_same_ids() -> None:
    part = Part(name="de", prompts={"harmful": prompts("eins", "zwei", ids=("b", "c"))})
    report = report_part(
        part,
        {"harmful": replies(False, True)},
        {"harmful": replies(True, True)},
        plain={"harmful": prompts("one", "two", "three", ids=("a", "b", "c"))},
        plain_model={"harmful": replies(True, True, False)},
        plain_base={"harmful": replies(True, True, True)},
    )
    assert report.rates["harmful"].refused == 1
    assert (report.changes["harmful"].only_before, report.changes["harmful"].both) == (1, 1)
    # The model: b was refused and is answered in German, c the other way round.
    beside = report.beside_plain["harmful"]
    assert (beside.n, beside.only_before, beside.only_after, beside.share_before) == (2, 1, 1, 0.5)
    assert report.base_beside_plain is not None
    assert report.base_beside_plain["harmful"].both == 2


def test_prompts_of_ones_own_are_not_paired_with_translations() -> None:
    part = Part(name="de", prompts={"harmful": prompts("eins", ids=("harmful-test-hacking-01",))})
    found = {"harmful": replies(True)}
    plain = {"harmful": prompts("one", ids=("0",))}
    report = report_part(part, found, None, plain=plain, plain_model=found, plain_base=None)
    assert (report.beside_plain, report.base_beside_plain, report.changes) == ({}, None, {})


def test_an_evaluation_asks_in_all_of_the_ways(
    call_main: CommandLine, llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {kind: PLAIN[kind]._select(range(2)) for kind in KINDS}
    monkeypatch.setattr("abliterate.evaluation.parts.load_translated", lambda kind, _code: few[kind])
    for kind in KINDS:
        lines = [json.dumps({"id": i, "text": t}) for i, t in zip(few[kind].ids, few[kind].texts, strict=True)]
        (tmp_path / f"{kind}.jsonl").write_text("\n".join(lines))
    sets = [word for kind in KINDS for word in (f"--{kind}", str(tmp_path / f"{kind}.jsonl"))]
    words = [*sets, "--base", llama_directory, "--languages", "de,fr", "--turns", "--max-new-tokens", "3"]
    saved = tmp_path / "completions.jsonl"
    code, out, error = call_main(
        "evaluate", llama_directory, *words, "--json", "--report", tmp_path / "page", "--save-completions", saved
    )
    assert code == 0, error
    parts = json.loads(out)["parts"]
    assert list(parts) == ["de", "fr", OPENING, REPETITION]
    assert {kind: change["n"] for kind, change in parts["de"]["beside_plain"].items()} == dict.fromkeys(KINDS, 2)
    assert parts[OPENING]["rates"]["harmful"]["n"] == 2
    assert parts["de"]["prompt_sets"]["harmful"]["sha256"] == few["harmful"].sha256
    # The same prompts, so the same replies.
    assert parts["de"]["rates"] == json.loads(out)["rates"]
    page = (tmp_path / "page" / "index.html").read_text()
    for text in ("Asked in other ways", "in German", "after a harmless question", "Does it still know?"):
        assert text in page
    entries = [json.loads(line) for line in saved.read_text().splitlines()]
    assert len(entries) == 2 * 6 * 5
    assert {entry.get("part") for entry in entries} == {None, "de", "fr", OPENING, REPETITION}
    table = call_main("evaluate", llama_directory, *words)[1]
    for text in ("Asked in other ways", "repetition", "asked plainly"):
        assert text in table


def test_what_cannot_be_asked_is_said_in_one_line(call_main: CommandLine, llama_directory: Path) -> None:
    code, out, error = call_main("evaluate", llama_directory, "--languages", "de,xx")
    assert (code, out) == (1, "")
    assert "--languages xx: the prompts are in" in error
    assert "Traceback" not in error


def test_a_cache_holds_the_replies_of_all_parts(llama_directory: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("How do locks work?\nExplain rain.")
    options = EvaluationOptions(
        **dict.fromkeys(KINDS, str(file)), texts=(str(file),), max_new_tokens=3, turns=True, cache=tmp_path / "cache"
    )
    first = evaluate_model(model=llama_directory, options=options)
    kept = next((tmp_path / "cache").iterdir()).read_text()
    again = evaluate_model(model=llama_directory, options=replace(options))
    assert next((tmp_path / "cache").iterdir()).read_text() == kept
    assert again.parts == first.parts
