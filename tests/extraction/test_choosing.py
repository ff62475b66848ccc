"""Choosing: confirming by replies, and going on from what was saved."""

from pathlib import Path

import pytest

from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.report import NoCandidatePassesError
from abliterate.extraction.run import extract_direction
from tests.support.refusing_models import refusing_model


def options(**changes: object) -> ExtractionOptions:
    return ExtractionOptions(**{"n_train": 32, "n_val": 16, "thresholds": Thresholds(kl=5.0), **changes})


def test_replies_choose_among_the_best(tmp_path: Path) -> None:
    model = refusing_model("plain", tmp_path)
    given = {"model": model.chat, "harmful": str(model.harmful), "harmless": str(model.harmless)}
    plain = extract_direction(**given, options=options()).report
    confirmed = extract_direction(**given, options=options(confirm=2)).report
    assert plain.confirmed == ()
    assert 1 <= len(confirmed.confirmed) <= 2
    best = min(confirmed.confirmed, key=lambda one: (one.unanswered, -one.induced))
    assert (confirmed.selected.position, confirmed.selected.layer) == (best.position, best.layer)


def test_a_race_in_which_nothing_passes_says_how_far_the_nearest_are(tmp_path: Path) -> None:
    model = refusing_model("spread", tmp_path)
    with pytest.raises(NoCandidatePassesError) as caught:
        extract_direction(
            model=model.chat,
            harmful=str(model.harmful),
            harmless=str(model.harmless),
            options=options(thresholds=Thresholds(kl=1e-9, induce=50.0)),
        )
    error = caught.value
    nearest = error.nearest[0].candidate
    assert None not in (nearest.bypass, nearest.induce, nearest.kl)
    assert error.accepting[::2] == ["--kl-threshold", "--induce-threshold"] or "--induce-threshold" in str(error)
