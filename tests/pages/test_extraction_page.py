"""What the page of an extraction says of how refusals were told."""

from pathlib import Path

from abliterate.extraction.options import ExtractionOptions, Thresholds
from abliterate.extraction.run import extract_direction
from abliterate.pages.extraction_page import write_extraction_page
from tests.support.refusing_models import refusing_model


def test_the_page_says_by_what_prompts_were_filtered_and_what_replies_confirmed(tmp_path: Path) -> None:
    model = refusing_model("late", tmp_path)
    extraction = extract_direction(
        model=model.chat,
        harmful=str(model.harmful),
        harmless=str(model.harmless),
        options=ExtractionOptions(n_train=32, n_val=16, thresholds=Thresholds(kl=1.0, induce=-1e9)),
    )
    page = write_extraction_page(
        extraction.score_table, tmp_path / "page", command="abliterate extract", report=extraction.report
    )
    text = page.read_text(encoding="utf-8")
    confirmed = extraction.report.confirmed[0]
    for words in (
        "replies: no first token tells refusals from answers",
        "openings, &#x27;I cannot help with that .&#x27;",
        "32 of 32 refuse",
        f"{confirmed.unanswered} of {confirmed.n_harmful}",
    ):
        assert words in text, words
