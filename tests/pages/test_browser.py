"""Report pages in Chromium, at the width of a phone and of a desk, light and dark, and under axe-core.

All are optional: `apt-get install chromium`, `pip install playwright pillow`, and `npm install axe-core` with AXE_CORE
set to its axe.min.js. With SCREENSHOTS=DIR the pictures are kept to be looked at. The browser is that of
`scripts/look.py`, which looks at the site with it.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from abliterate.directions import make_direction
from abliterate.editing.orthogonalization import orthogonalize_checkpoint
from abliterate.pages.audit_page import write_audit_page
from abliterate.pages.evaluation_page import write_evaluation_page
from abliterate.pages.extraction_page import write_extraction_page
from abliterate.pages.inspection_page import write_inspection_page
from abliterate.pages.refinement_page import write_refinement_page
from abliterate.pages.trace_page import write_trace_page
from abliterate.pages.verification_page import write_verification_page
from abliterate.release.options import VerificationOptions
from abliterate.release.verification import verify_checkpoint
from scripts.look import CHROMIUM, open_browser, open_page, violations
from tests.inspection.test_reading import inspected
from tests.pages.test_refinement_page import refinement_report
from tests.support.pages import audit_report, evaluation_report, score_table, trace_report
from tests.support.tiny_models import random_direction, save_chat_model, tiny_llama

AXE = Path(os.environ.get("AXE_CORE", ""))
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
    pytest.mark.skipif(find_spec("playwright") is None, reason="no playwright here (pip install playwright)"),
]
needs_axe = pytest.mark.skipif(not AXE.is_file(), reason="AXE_CORE does not name axe-core's axe.min.js")


MEASURE = """() => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, details')
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + '.' + e.className);
  const small = [...document.querySelectorAll('p, td, th, dd, dt, text, li')].map(e => [
    parseFloat(getComputedStyle(e).fontSize), e.tagName]).filter(([size]) => size < 12);
  return {width: root.clientWidth, scroll: root.scrollWidth, wide, small,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(params=["evaluation", "extraction", "audit", "trace", "verification", "inspection", "refinement"])
def page(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    if request.param == "evaluation":
        return write_evaluation_page(evaluation_report(), tmp_path / "evaluation", command="abliterate evaluate x")[0]
    if request.param == "audit":
        return write_audit_page(audit_report(), tmp_path / "audit", command="abliterate audit x")[0]
    if request.param == "trace":
        return write_trace_page(trace_report(), tmp_path / "trace", command="abliterate trace x")
    if request.param == "refinement":
        return write_refinement_page(refinement_report(), tmp_path / "refinement", command="abliterate refine x")
    if request.param in ("verification", "inspection"):
        base, edited = save_chat_model(tmp_path / "base", tiny_llama()), tmp_path / "edited"
        direction = make_direction(mean_difference=random_direction())
        orthogonalize_checkpoint(source=base, direction=direction, output=edited)
        if request.param == "inspection":
            report = inspected(edited, base).report
            return write_inspection_page(report, tmp_path / "inspection", command="abliterate inspect x")[0]
        checked = verify_checkpoint(checkpoint=edited, options=VerificationOptions(n_prompts=1))
        return write_verification_page(checked, tmp_path / "verification", command="abliterate verify x")
    return write_extraction_page(score_table(), tmp_path / "extraction", command="abliterate extract x")


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen(browser: Any, page: Path, width: int) -> None:
    with open_page(browser, page, width=width) as tab:
        found = tab.evaluate(MEASURE)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["small"] == []


def test_dark_and_light_follow_the_reader(browser: Any, page: Path) -> None:
    found = {}
    for dark in (False, True):
        with open_page(browser, page, width=1280, dark=dark) as tab:
            found[dark] = tab.evaluate(MEASURE)
    assert found[False]["paper"] == "rgb(255, 255, 255)"
    assert found[True]["paper"] == "rgb(22, 24, 27)"
    assert found[False]["ink"] != found[True]["ink"]


@needs_axe
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(browser: Any, page: Path, width: int, dark: bool) -> None:
    with open_page(browser, page, width=width, dark=dark) as tab:
        found = violations(tab, AXE.read_text())
    assert [(each["id"], each["nodes"][0]["html"]) for each in found] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_screenshot_is_no_blank_page(browser: Any, page: Path, width: int) -> None:
    image_module = pytest.importorskip("PIL.Image")
    with open_page(browser, page, width=width) as tab:
        picture = tab.screenshot(full_page=True)
    with image_module.open(BytesIO(picture)) as image:
        assert image.width == width
        shades = image.convert("L").getextrema()
        assert shades[0] < 64
        assert shades[1] == 255
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
    # Base and model, as the figures draw them; an inspection has no two to compare.
    assert page.parent.name == "inspection" or {(31, 95, 168), (179, 67, 15)} <= colours
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{page.parent.name}-{width}.png").write_bytes(picture)
