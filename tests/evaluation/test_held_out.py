"""Prompts that a direction was found with stay out of its evaluation."""

from pathlib import Path

import pytest

from abliterate.errors import PromptSetError
from abliterate.evaluation.held_out import hold_out, used_for_checkpoint, used_prompts
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.prompt_sets import PromptSet, load_prompt_set, prompt_hash, split_for_extraction


def test_the_direction_file_lists_every_prompt_it_was_found_with(llama_directory: Path) -> None:
    options = ExtractionOptions(
        n_train=8,
        n_val=2,
        filter="none",
        refusal_tokens=("I",),
        thresholds=Thresholds(kl=1e9, induce=-1e9),
    )
    direction = extract_direction(model=llama_directory, options=options).direction
    drawn = split_for_extraction("bundled", "bundled", n_train=8, n_val=2, seed=options.seed)
    used = used_prompts(direction.metadata)
    assert len(used) == 20
    train = load_prompt_set("bundled", kind="harmful", part="train")
    held = hold_out(train, used)
    assert held.excluded == 8
    assert set(train.texts) - set(held.prompts.texts) == set(drawn.harmful_train.texts)
    for kind in ("harmful", "harmless", "borderline"):
        assert hold_out(load_prompt_set("bundled", kind=kind, part="test"), used).excluded == 0


def test_a_prompt_that_is_there_fifty_times_counts_once() -> None:
    texts = ("How do locks work?",) * 49 + ("how do locks work", "Explain rain.")
    numbers = tuple(map(str, range(len(texts))))
    prompts = PromptSet(name="p", texts=texts, ids=numbers, categories=("",) * len(texts))
    held = hold_out(prompts, frozenset())
    assert (held.prompts.texts, held.prompts.ids) == (("How do locks work?", "Explain rain."), ("0", "50"))
    assert (held.repeated, held.excluded) == (49, 0)
    assert hold_out(prompts, frozenset([prompt_hash("Explain rain!")])).excluded == 1


def test_nothing_left_is_an_error() -> None:
    prompts = load_prompt_set("bundled", kind="borderline", part="test")
    with pytest.raises(PromptSetError, match="evaluate on other prompts"):
        hold_out(prompts, frozenset(prompt_hash(text.upper() + "!") for text in prompts.texts))


def test_a_record_of_several_directions_and_edits_is_read_whole(tmp_path: Path) -> None:
    assert used_for_checkpoint(tmp_path) == frozenset()
    (tmp_path / "abliteration.json").write_text(
        '{"directions": [{"metadata": {"prompt_hashes": ["a"]}}, {"metadata": {}}],'
        ' "base": {"abliteration": {"direction": {"metadata": {"prompt_hashes": ["b"]}}}}}'
    )
    assert used_for_checkpoint(tmp_path) == {"a", "b"}
