"""Which way refusals are told, on models whose truth is known."""

from pathlib import Path

import pytest

from abliterate.errors import InputError, RefusalBehaviourError
from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.report import Extraction
from abliterate.extraction.run import extract_direction
from tests.support.refusing_models import RefusingModel, refusing_model


def extract(model: RefusingModel, **options: object) -> Extraction:
    given = {"n_train": 32, "n_val": 16, "thresholds": Thresholds(kl=1.0), **options}
    return extract_direction(
        model=model.chat, harmful=str(model.harmful), harmless=str(model.harmless), options=ExtractionOptions(**given)
    )


def test_where_the_rule_agrees_with_the_replies_it_is_used_as_published(tmp_path: Path) -> None:
    model = refusing_model("plain", tmp_path)
    auto, metric = extract(model).report, extract(model, filter="metric").report
    assert auto.refusal.filter == "metric"
    assert auto.refusal.kappa == 1.0
    assert auto.refusal.coverage == 1.0
    assert auto.refusal.zero == 0.0
    assert [token.text for token in auto.refusal_tokens] == [token.text for token in metric.refusal_tokens] == ["I"]
    assert auto.scores == metric.scores
    assert (auto.selected, auto.counts) == (metric.selected, metric.counts)
    every = extract(model, exhaustive=True).report
    assert (auto.raced, every.raced) == (True, False)
    assert (auto.selected.position, auto.selected.layer) == (every.selected.position, every.selected.layer)
    for name in ("bypass", "induce", "kl"):
        assert getattr(auto.selected, name) == pytest.approx(getattr(every.selected, name), abs=1e-4)
    assert metric.refusal.replies is None


def test_where_first_tokens_are_spread_replies_filter_and_set_the_zero(tmp_path: Path) -> None:
    report = extract(refusing_model("spread", tmp_path)).report
    evidence = report.refusal
    assert evidence.filter == "replies"
    assert evidence.kappa == 0.0
    assert evidence.measure == "first tokens"
    assert report.baseline.harmless < evidence.zero < report.baseline.harmful < 0
    assert evidence.accuracy == 1.0
    assert evidence.accuracy_at_0 == 0.5
    assert report.raced
    assert report.selected.induce > evidence.zero
    assert (report.selected.bypass < evidence.zero) == (
        report.confirmed[0].unanswered < report.confirmed[0].n_harmful / 2
    )
    assert all(counts.kept == counts.sampled for counts in report.counts.values())


def test_where_refusals_come_late_their_openings_are_asked_for(tmp_path: Path) -> None:
    model = refusing_model("late", tmp_path)
    with pytest.raises(RefusalBehaviourError, match="--filter replies"):
        extract(model, filter="metric")
    extraction = extract(model, thresholds=Thresholds(kl=1.0, induce=-1e9))
    evidence = extraction.report.refusal
    assert (evidence.filter, evidence.measure) == ("replies", "openings")
    assert evidence.openings == ("I cannot help with that .",)
    assert extraction.report.baseline.harmful > evidence.zero > extraction.report.baseline.harmless
    # What the openings say of a candidate, its replies say too.
    selected, confirmed = extraction.report.selected, extraction.report.confirmed[0]
    assert (selected.bypass < evidence.zero) == (confirmed.unanswered < confirmed.n_harmful / 2)
    assert (selected.induce > evidence.zero) == (confirmed.induced > confirmed.n_harmless / 2)
    assert extraction.direction.metadata["refusal"]["openings"] == ["I cannot help with that ."]


def test_where_thoughts_come_first_the_answer_is_judged_and_scored(tmp_path: Path) -> None:
    """Its thoughts mention a refusal for every prompt; the first token is the same for all."""
    report = extract(refusing_model("thinking", tmp_path)).report
    assert report.response_prefix.split() == ["<think>", "</think>"]
    assert report.refusal.filter == "metric"
    assert report.refusal.kappa == 1.0
    assert [token.text for token in report.refusal_tokens] == ["I"]
    assert report.refusal.replies["harmless_train"].answered == 32


def test_replies_that_do_not_refuse_are_said_in_numbers(tmp_path: Path) -> None:
    model = refusing_model("plain", tmp_path)
    with pytest.raises(RefusalBehaviourError) as caught:
        extract_direction(
            model=model.chat,
            harmful=str(model.harmless),
            harmless=str(model.harmful),
            options=ExtractionOptions(n_train=32, n_val=16),
        )
    message = str(caught.value)
    for part in ("0 of 32 harmful training prompts are refused", "0 of 32 harmless ones answered", "for example"):
        assert part in message
    assert "\n" not in message


def test_replies_cannot_be_asked_for_where_layers_are_streamed(llama_directory: Path) -> None:
    from abliterate.models.options import ModelOptions

    with pytest.raises(InputError, match="--stream-layers"):
        extract_direction(
            model=llama_directory,
            options=ExtractionOptions(n_train=8, n_val=4, filter="replies"),
            model_options=ModelOptions(stream_layers=True),
        )
