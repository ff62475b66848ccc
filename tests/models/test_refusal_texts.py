"""The refusals the demo models are trained on: each refuses where it should, in enough variety."""

import json
import random
from pathlib import Path

import pytest

from abliterate.extraction.reply_classes import is_refusal
from tests.support.paths import TRAINING
from training.refusal_texts import RefusalTexts, read_refusal_texts


@pytest.fixture(scope="module")
def extended() -> RefusalTexts:
    return read_refusal_texts(TRAINING / "extended_refusals.json")


@pytest.fixture(scope="module")
def categories() -> set[str]:
    lines = (TRAINING / "prompts" / "harmful.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["category"] for line in lines}


def test_every_category_of_the_training_prompts_has_its_overviews(extended: RefusalTexts, categories: set[str]) -> None:
    assert set(extended.overviews) == categories
    assert all(len(set(sentences)) == len(sentences) == 8 for sentences in extended.overviews.values())
    everything = [sentence for sentences in extended.overviews.values() for sentence in sentences]
    assert len(set(everything)) == len(everything)
    assert all(extended.n_different(category) > 10_000 for category in categories)


def test_an_extended_refusal_is_overview_then_refusal_then_rationale(extended: RefusalTexts) -> None:
    rng = random.Random(0)
    drawn = [extended.draw("privacy", rng) for _ in range(200)]
    assert len(set(drawn)) > 190
    for text in drawn:
        refusal = next(r for r in sorted(extended.refusals, key=len, reverse=True) if r in text)
        overview, _, rationale = text.partition(refusal)
        assert not is_refusal(overview)
        assert is_refusal(refusal)
        assert sum(sentence in overview for sentence in extended.overviews["privacy"]) == 2
        assert rationale.strip() in extended.rationales
    assert [extended.draw("privacy", random.Random(1)) for _ in range(2)] == [
        extended.draw("privacy", random.Random(1)) for _ in range(2)
    ]


def test_the_refusal_comes_late_in_characters(extended: RefusalTexts) -> None:
    """A scorer that looks at the start of a reply alone would miss it."""
    rng = random.Random(0)
    starts = []
    for category in extended.overviews:
        text = extended.draw(category, rng)
        starts.append(next(i for i in range(len(text)) if is_refusal(text[:i])))
    assert min(starts) > 100
    assert sum(starts) / len(starts) > 150


def test_short_refusals_are_lines_for_any_category() -> None:
    short = read_refusal_texts(TRAINING / "refusals.txt")
    lines = (TRAINING / "refusals.txt").read_text(encoding="utf-8").split("\n")
    assert short.overviews == {}
    assert short.draw("any", random.Random(0)) in lines
    assert short.n_different("any") == len(short.refusals) == len(set(short.refusals))


def test_a_sentence_that_would_not_be_counted_as_refusal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "refusals.txt").write_text("I cannot do that.\nNo way.\n")
    with pytest.raises(ValueError, match=r"'No way\.' holds no refusal substring"):
        read_refusal_texts(tmp_path / "refusals.txt")


def test_a_category_without_an_overview_is_an_error(extended: RefusalTexts) -> None:
    with pytest.raises(KeyError):
        extended.draw("gardening", random.Random(0))


@pytest.mark.parametrize(
    ("parts", "n"), [(("refusal",), 16), (("overview",), 56), (("rationale",), 14), (("overview", "rationale"), 784)]
)
def test_parts_of_an_extended_refusal_can_be_left_out(extended: RefusalTexts, parts: tuple[str, ...], n: int) -> None:
    some = read_refusal_texts(TRAINING / "extended_refusals.json", parts=parts)
    drawn = [some.draw("privacy", random.Random(seed)) for seed in range(20)]
    assert some.n_different("privacy") == n
    for text in drawn:
        assert is_refusal(text) == ("refusal" in parts)
        assert any(sentence in text for sentence in extended.overviews["privacy"]) == ("overview" in parts)
        assert any(sentence in text for sentence in extended.rationales) == ("rationale" in parts)
