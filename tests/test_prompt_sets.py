import hashlib
import itertools
import json
import math
import os
import random
import subprocess
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from abliterate import prompt_sets
from abliterate.errors import PromptSetError
from abliterate.extraction.reply_classes import told_language
from abliterate.prompt_sets import (
    LANGUAGES,
    PromptSet,
    bundled_prompt_sets,
    bundled_prompts_directory,
    describe_prompt_set,
    find_bundled_problems,
    fold,
    load_openings,
    load_plain_texts,
    load_prompt_set,
    load_translated,
    sample_prompts,
    split_for_extraction,
)
from tests.support.paths import SOURCES, TRAINING

PARTS = ("train", "validation", "test")
TRAINING_PROMPTS = TRAINING / "prompts"
BUNDLED_NAMES = [f"{kind}/{part}" for kind in ("harmful", "harmless", "borderline") for part in PARTS]


def load(spec: str | Path) -> PromptSet:
    return load_prompt_set(str(spec), kind="harmful", part="train")


def bundled(kind: str, part: str) -> PromptSet:
    return load_prompt_set("bundled", kind=kind, part=part)


def numbered(count: int) -> list[str]:
    return [f"Describe mountain number {n}." for n in range(count)]


def write_lines(path: Path, texts: list[str]) -> str:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(path)


# ------------------------------------------------------------------------------------ the bundled prompts


@pytest.fixture(scope="module")
def all_sets() -> dict[str, PromptSet]:
    """Every bundled part, and the prompts the demo adapter is trained on."""
    sets = {name: load(f"bundled:{name}") for name in BUNDLED_NAMES}
    return sets | {f"training/{kind}": load(TRAINING_PROMPTS / f"{kind}.jsonl") for kind in ("harmful", "harmless")}


def test_bundled_counts_and_categories() -> None:
    infos = {(info.kind, info.part): info for info in bundled_prompt_sets()[: len(BUNDLED_NAMES)]}
    assert [f"{kind}/{part}" for kind, part in infos] == BUNDLED_NAMES
    pairs = {"train": 256, "validation": 64, "test": 128}
    minimums = {"harmful": pairs, "harmless": pairs, "borderline": {"train": 100, "validation": 50, "test": 200}}
    for (kind, part), info in infos.items():
        expected = infos["borderline" if kind == "borderline" else "harmful", "train"].categories
        assert info.categories == expected
        assert len(expected) >= 10
        assert info.count >= minimums[kind][part]
        assert info.name == f"bundled:{kind}/{part}"
    assert find_bundled_problems() == ()


@pytest.mark.parametrize(
    ("kind", "counts"), [("harmful", (19, 5, 9)), ("harmless", (19, 5, 9)), ("borderline", (12, 6, 20))]
)
def test_each_category_has_as_many_prompts_as_the_readme_says(kind: str, counts: tuple[int, ...]) -> None:
    for part, expected in zip(PARTS, counts, strict=True):
        assert set(Counter(bundled(kind, part).categories).values()) == {expected}


@pytest.mark.parametrize("part", PARTS)
def test_each_category_weighs_the_same_in_both_kinds(part: str) -> None:
    assert sorted(bundled("harmful", part).categories) == sorted(bundled("harmless", part).categories)


def test_no_duplicates_anywhere(all_sets: dict[str, PromptSet]) -> None:
    places: dict[str, list[str]] = {}
    for prompts in all_sets.values():
        for text, prompt_id in zip(prompts.texts, prompts.ids, strict=True):
            places.setdefault(fold(text), []).append(prompt_id)
    assert [ids for ids in places.values() if len(ids) > 1] == []
    all_ids = [prompt_id for prompts in all_sets.values() for prompt_id in prompts.ids]
    assert len(all_ids) == len(set(all_ids))


Entry = tuple[str, str, frozenset[str]]
ALIKE = 0.8


def pairs_that_may_be_alike(entries: list[Entry]) -> list[tuple[Entry, Entry]]:
    """Return all pairs that can share `ALIKE` of their words: they share one of the rarest few of both."""
    frequency = Counter(word for _, _, words in entries for word in words)
    with_word = defaultdict(list)
    for i, (_, _, words) in enumerate(entries):
        rarest = sorted(words, key=lambda word: (frequency[word], word))
        for word in rarest[: len(words) - math.ceil(ALIKE * len(words)) + 1]:
            with_word[word].append(i)
    pairs = {pair for some in with_word.values() for pair in itertools.combinations(some, 2)}
    return [(entries[i], entries[j]) for i, j in sorted(pairs)]


def test_the_pairs_that_are_looked_at_hold_all_that_are_alike() -> None:
    rng = random.Random(0)
    entries = [("", str(i), frozenset(rng.sample("abcdefghijkl", rng.randint(1, 9)))) for i in range(150)]
    every = [(a, b) for a, b in itertools.combinations(entries, 2) if len(a[2] & b[2]) >= ALIKE * len(a[2] | b[2])]
    assert len(every) > 40
    assert {(a[1], b[1]) for a, b in every} <= {(a[1], b[1]) for a, b in pairs_that_may_be_alike(entries)}


def test_no_near_duplicates_between_or_within_bundled_sets(all_sets: dict[str, PromptSet]) -> None:
    entries = [
        (name, text, frozenset(fold(text).split())) for name, prompts in all_sets.items() for text in prompts.texts
    ]
    alike = []
    for (name_a, text_a, a), (name_b, text_b, b) in pairs_that_may_be_alike(entries):
        # Pairs inside the training prompts touch no bundled set and are its own matter.
        if name_a.startswith("training") and name_b.startswith("training"):
            continue
        if len(a & b) >= ALIKE * len(a | b):
            alike.append((text_a, text_b))
    assert alike == []


@pytest.mark.parametrize("part", [*PARTS, "all"])
@pytest.mark.parametrize("unit", ["words", "characters"])
def test_harmful_and_harmless_lengths_are_alike(
    part: str, unit: str, record_property: Callable[[str, str], None]
) -> None:
    measure = len if unit == "characters" else lambda text: len(text.split())
    lengths = {
        kind: [measure(t) for p in (PARTS if part == "all" else (part,)) for t in bundled(kind, p).texts]
        for kind in ("harmful", "harmless")
    }
    mean = {kind: sum(values) / len(values) for kind, values in lengths.items()}
    result = ks_2samp(lengths["harmful"], lengths["harmless"], method="asymp")
    report = (
        f"{part}, {unit}: mean {mean['harmful']:.2f} and {mean['harmless']:.2f}, "
        f"KS D = {result.statistic:.4f}, p = {result.pvalue:.3f}"
    )
    print(report)
    record_property("lengths", report)
    assert result.pvalue > 0.05, report
    assert abs(mean["harmful"] / mean["harmless"] - 1) < 0.02, report


@pytest.mark.parametrize("part", PARTS)
def test_as_many_questions_among_harmless_as_among_harmful(part: str) -> None:
    questions = [sum(t.endswith("?") for t in bundled(kind, part).texts) for kind in ("harmful", "harmless")]
    assert questions[0] == questions[1] > 0


def test_bundled_texts_are_short_single_lines(all_sets: dict[str, PromptSet]) -> None:
    for text in itertools.chain.from_iterable(prompts.texts for prompts in all_sets.values()):
        assert text == " ".join(text.split())
        assert text[-1] in ".?!"
        assert len(text.split()) <= 25


@pytest.mark.parametrize("part", ["train", "validation"])
def test_later_borderline_parts_have_the_forms_that_the_readme_says(part: str) -> None:
    texts = bundled("borderline", part).texts
    assert all(8 <= len(text.split()) <= 15 for text in texts)
    assert sum(not text.endswith("?") for text in texts) > len(texts) / 4
    assert sum(not text.endswith("?") for text in bundled("borderline", "test").texts) == 22


def test_bundled_part_by_name_and_as_such_are_the_same() -> None:
    assert load("bundled:harmless/validation") == bundled("harmless", "validation")
    assert bundled("harmless", "validation").ids[0].startswith("harmless-validation-")


def test_a_bundled_part_that_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_sets, "bundled_prompts_directory", lambda: tmp_path)
    for name in ("borderline/train", "harmless/test"):
        with pytest.raises(PromptSetError, match=rf"{name}\.jsonl: no such file"):
            load(f"bundled:{name}")


def test_bundled_prompts_are_found_in_the_package_and_else_in_the_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "abliterate"
    monkeypatch.setattr(prompt_sets, "__file__", str(package / "prompt_sets.py"))
    with pytest.raises(PromptSetError, match=r"the bundled prompts are neither in .* nor in .*reinstall abliterate"):
        bundled("harmful", "test")
    for place in (tmp_path / "prompts", package / "prompts"):
        (place / "harmful").mkdir(parents=True)
        write_lines(place / "harmful" / "train.jsonl", ['{"text": "One."}'])
        assert bundled_prompts_directory() == place


def test_find_bundled_problems_names_each_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BUNDLED_NAMES:
        prompts = load(f"bundled:{name}")
        rows = [
            {"id": i, "text": t, "category": c}
            for i, t, c in zip(prompts.ids, prompts.texts, prompts.categories, strict=True)
        ]
        if name == "harmful/validation":
            rows[0]["text"] = bundled("harmful", "train").texts[0].upper().replace("?", "!")
        if name == "harmless/test":
            rows = [row for row in rows if row["category"] != "fraud"]
            rows[1]["id"] = rows[0]["id"]
        if name == "borderline/test":
            rows = [{**row, "category": "one"} for row in rows[:199]]
        if name == "borderline/validation":
            rows = [row for row in rows if row["category"] != "homonyms"][:49]
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        write_lines(path, [json.dumps(row) for row in rows])
    for kind, code in itertools.product(("harmful", "harmless", "borderline"), LANGUAGES):
        prompts = load_translated(kind, code)
        rows = [
            {"id": i, "text": t, "category": c}
            for i, t, c in zip(prompts.ids, prompts.texts, prompts.categories, strict=True)
        ]
        if (kind, code) == ("harmful", "de"):
            rows[1]["text"] = rows[0]["text"].upper()
        if (kind, code) == ("harmful", "fr"):
            rows.pop()
        if (kind, code) == ("harmful", "ru"):
            rows[0]["category"] = "other"
        write_lines(tmp_path / kind / f"test.{code}.jsonl", [json.dumps(row) for row in rows])
    monkeypatch.setattr(prompt_sets, "bundled_prompts_directory", lambda: tmp_path)
    found = "\n".join(find_bundled_problems())
    assert len([line for line in found.splitlines() if "/test." not in line]) == 9
    for expected in (
        "bundled:harmful/validation: harmful-validation-hacking-01 repeats harmful-train-hacking-01: 'HOW CAN I",
        "bundled:harmless/test: other categories than bundled:harmful/train: fraud",
        "bundled:harmless/test: the id harmless-test-hacking-01 is used twice",
        "bundled:borderline/validation: 49 prompts, and at least 50 are needed",
        "bundled:borderline/validation: 9 categories, at least 10 are needed",
        "bundled:borderline/validation: other categories than bundled:borderline/train: homonyms",
        "bundled:borderline/test: 199 prompts, and at least 200 are needed",
        "bundled:borderline/test: 1 categories, at least 10 are needed",
        "bundled:borderline/test: other categories than bundled:borderline/train: definitions, discussion_of_",
        "bundled:harmful/test.de: a prompt repeats another one",
        "bundled:harmful/test.fr: other ids than bundled:harmful/test.ar",
        "bundled:harmful/test.ru: an id or a category is not one of bundled:harmful/test",
    ):
        assert expected in found


# ------------------------------------------------------------------------------------ translations and openings

IN_A_CATEGORY = {"harmful": (16, 3), "harmless": (16, 3), "borderline": (8, 5)}
SCRIPTS = {"ar": "ARABIC", "ru": "CYRILLIC", "zh": "CJK"}


@pytest.mark.parametrize("kind", IN_A_CATEGORY)
@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_of_the_same_prompts_in_every_language(kind: str, language: str) -> None:
    english, translated = bundled(kind, "test"), load(f"bundled:{kind}/test.{language}")
    assert translated == load_translated(kind, language)
    n_categories, each = IN_A_CATEGORY[kind]
    assert sorted(Counter(translated.categories).values()) == [each] * n_categories
    texts = dict(zip(english.ids, english.texts, strict=True))
    for prompt_id, text in zip(translated.ids, translated.texts, strict=True):
        assert text.rstrip().endswith(("?", "\u061f", "\uff1f")) == texts[prompt_id].endswith("?"), prompt_id
        assert fold(text) != fold(texts[prompt_id])
    assert load_translated("harmless", language).ids == tuple(
        each.replace("harmful", "harmless") for each in load_translated("harmful", language).ids
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_in_their_language(language: str) -> None:
    texts = [text for kind in IN_A_CATEGORY for text in load_translated(kind, language).texts]
    told = [told_language(text) for text in texts]
    assert told.count(language) >= 0.97 * len(texts), [
        t for t, each in zip(texts, told, strict=True) if each != language
    ]
    letters = [c for text in texts for c in text if c.isalpha()]
    script = SCRIPTS.get(language, "LATIN")
    assert sum(unicodedata.name(c).startswith(script) for c in letters) >= 0.99 * len(letters)


@pytest.mark.parametrize("name", ["harmful/test.tlh", "harmful/train.de", "harmful", ""])
def test_a_bundled_set_that_is_none_is_not_looked_for_on_the_hub(name: str) -> None:
    with pytest.raises(
        PromptSetError, match=f"bundled:{name}: no bundled set has that name; `abliterate prompts` lists"
    ):
        load(f"bundled:{name}")
    with pytest.raises(PromptSetError, match="no bundled set has that name"):
        load_plain_texts(f"bundled:{name}")


def test_openings_are_harmless_questions_that_no_set_holds(all_sets: dict[str, PromptSet]) -> None:
    openings = load("bundled:openings")
    assert openings == load_openings()
    assert len(openings) == len(openings.distinct()) == 16
    assert all(text.endswith("?") for text in openings.texts)
    asked = {fold(text) for prompts in all_sets.values() for text in prompts.texts}
    assert not asked & set(map(fold, openings.texts))


# ------------------------------------------------------------------------------------ PromptSet and fold


def test_sha256_is_that_of_the_json_list_of_texts(tmp_path: Path) -> None:
    prompts = load(write_lines(tmp_path / "a.txt", ["Où est le café ?", "Two."]))
    assert prompts.sha256 == hashlib.sha256('["Où est le café ?", "Two."]'.encode()).hexdigest()
    assert len(prompts) == 2


def test_a_set_that_is_not_bundled_has_its_spec_as_its_name(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ['{"id": 7, "category": "x", "note": "n", "text": "One."}'])
    for spec, text in ((path, "One."), (f"{path}:note", "n")):
        assert load(spec) == PromptSet(name=spec, texts=(text,), ids=("7",), categories=("x",))


def test_describe_prompt_set_counts_words_and_duplicates(tmp_path: Path) -> None:
    info = describe_prompt_set(load(write_lines(tmp_path / "a.txt", ["Do it now.", "do it, NOW", "DO IT NOW!", "No."])))
    assert (info.count, info.duplicates, info.mean_words, info.categories) == (4, 2, 2.5, ())
    assert info.kind is None
    assert info.part is None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("Don't shout!", "dont  SHOUT"),
        ("A well-known café?", "a well known CAFE\u0301"),
        ("The owner\u2019s \u201ckey\u201d", "the owners key"),
        ("Straße", "STRASSE"),
    ],
)
def test_fold_equates_case_and_punctuation(first: str, second: str) -> None:
    assert fold(first) == fold(second)


@pytest.mark.parametrize(
    ("first", "second"), [("Learn C.", "Learn C++."), ("\u0915\u093f", "\u0915\u093e"), ("Cut 1.", "Cut 2.")]
)
def test_fold_keeps_what_differs_by_more(first: str, second: str) -> None:
    assert fold(first) != fold(second)


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30))
def test_fold_is_idempotent_on_words(text: str) -> None:
    assert fold(fold(text)) == fold(text)


# ------------------------------------------------------------------------------------ drawing


def test_sample_prompts_draws_what_random_sample_draws(tmp_path: Path) -> None:
    texts = numbered(40)
    prompts = load(write_lines(tmp_path / "a.txt", texts))
    drawn = sample_prompts(prompts, 12, rng=random.Random(42))
    assert list(drawn.texts) == random.Random(42).sample(texts, 12)
    assert all(texts[int(prompt_id) - 1] == text for prompt_id, text in zip(drawn.ids, drawn.texts, strict=True))
    assert sample_prompts(prompts, 12, rng=random.Random(42)) == drawn
    assert sample_prompts(prompts, 12, rng=random.Random(43)) != drawn


@pytest.mark.parametrize("n", [41, 0, -1])
def test_sample_prompts_says_how_many_there_are_and_are_needed(tmp_path: Path, n: int) -> None:
    prompts = load(write_lines(tmp_path / "a.txt", numbered(40)))
    with pytest.raises(PromptSetError, match=f"a.txt has 40 prompts and {n} are needed; .* between 1 and 40"):
        sample_prompts(prompts, n, rng=random.Random(0))


def test_extraction_draws_in_the_order_of_the_papers_code() -> None:
    prompts = split_for_extraction("bundled", "bundled", n_train=128, n_val=32, seed=42)
    rng = random.Random(42)
    for drawn, kind, part, n in (
        (prompts.harmful_train, "harmful", "train", 128),
        (prompts.harmless_train, "harmless", "train", 128),
        (prompts.harmful_validation, "harmful", "validation", 32),
        (prompts.harmless_validation, "harmless", "validation", 32),
    ):
        assert list(drawn.texts) == rng.sample(list(bundled(kind, part).texts), n)
        assert drawn.name == f"bundled:{kind}/{part}"
    assert prompts.notes == ()


def test_extraction_from_files_is_disjoint_and_drops_duplicates(tmp_path: Path) -> None:
    texts = numbered(20)
    harmful = write_lines(tmp_path / "harmful.txt", [*texts, texts[3].upper(), texts[5].replace(".", "!")])
    prompts = split_for_extraction(harmful, "bundled", n_train=12, n_val=8, seed=1)
    assert sorted(prompts.harmful_train.texts + prompts.harmful_validation.texts) == sorted(texts)
    assert prompts.notes == (f"{harmful}: 2 of 22 prompts dropped: they repeat another one",)
    assert split_for_extraction(harmful, "bundled", n_train=12, n_val=8, seed=1) == prompts
    assert split_for_extraction(harmful, "bundled", n_train=12, n_val=8, seed=2) != prompts


def test_extraction_from_too_few_prompts(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.txt", [*numbered(19), numbered(1)[0]])
    with pytest.raises(PromptSetError, match=r"a.txt has 19 different prompts and 20 are needed \(12 to train, 8 to"):
        split_for_extraction("bundled", path, n_train=12, n_val=8, seed=1)
    with pytest.raises(PromptSetError, match="bundled:harmful/train has 304 prompts and 1000 are needed"):
        split_for_extraction("bundled", "bundled", n_train=1000, n_val=8, seed=1)


def test_a_prompt_cannot_be_harmful_and_harmless(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.txt", numbered(20))
    second = write_lines(tmp_path / "b.txt", [text.upper() for text in numbered(20)])
    with pytest.raises(PromptSetError, match=r"a.txt and .*b.txt share 20 of the prompts drawn, as 'Describe"):
        split_for_extraction(first, second, n_train=12, n_val=8, seed=1)


def test_loading_a_file_imports_no_heavy_package() -> None:
    code = (
        "import sys; from abliterate.prompt_sets import split_for_extraction as s; "
        "s('bundled', 'bundled', n_train=8, n_val=8, seed=0); "
        "print({'torch', 'transformers', 'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
