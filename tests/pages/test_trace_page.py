"""The page of a trace: charts, tables and files."""

from pathlib import Path

import pytest

from abliterate.pages.trace_page import write_trace_page
from tests.support.pages import Page, trace_report


@pytest.mark.parametrize("with_heads", [True, False])
def test_it_shows_where_and_who_and_writes_the_charts_beside_it(tmp_path: Path, with_heads: bool) -> None:
    path = write_trace_page(trace_report(with_heads=with_heads), tmp_path, command="abliterate trace org/model")
    page = Page(path.read_text())
    assert page.balanced
    words = " ".join(page.text)
    assert "It shows most on harmful prompts at layer 2: cosine +0.50, -0.50 on harmless." in words
    assert ("Which heads write it" in words) == with_heads
    assert ("no table of its heads" in words) != with_heads
    assert "abliterate trace org/model" in words
    files = {each.name for each in tmp_path.glob("*.svg")}
    assert files == ({"cosines.svg", "heads.svg", "top_heads.svg"} if with_heads else {"cosines.svg"})


def test_names_and_prompts_are_text(tmp_path: Path) -> None:
    nasty = "<script>x</script>"
    page = Page(write_trace_page(trace_report(model=nasty), tmp_path, command=nasty).read_text())
    assert page.balanced
    assert not page.of("script")
