"""Report pages in headless Chromium, at the width of a phone and of a desk, light and dark, and under axe-core.

All are optional: `apt-get install chromium`, `pip install pillow`, and `npm install axe-core` with AXE_CORE set to its
axe.min.js. With SCREENSHOTS=DIR the pictures are kept to be looked at. `scripts/look.py` looks at the site.
"""

import json
import os
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

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
from tests.inspection.test_reading import inspected
from tests.pages.test_refinement_page import refinement_report
from tests.support.pages import audit_report, evaluation_report, score_table, trace_report
from tests.support.tiny_models import random_direction, save_chat_model, tiny_llama

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
AXE = os.environ.get("AXE_CORE", "")
pytestmark = [
    pytest.mark.proof,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)"),
]
needs_axe = pytest.mark.skipif(not Path(AXE).is_file(), reason="AXE_CORE does not name axe-core's axe.min.js")

PROBE = """
<script>
addEventListener('load', async () => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, pre, details')
    && e.getBoundingClientRect().right > root.clientWidth + 1).map(e => e.tagName + '.' + e.className);
  const small = [...document.querySelectorAll('p, td, th, dd, dt, text, li')].map(e => [
    parseFloat(getComputedStyle(e).fontSize), e.tagName]).filter(([size]) => size < 12);
  const found = {width: root.clientWidth, scroll: root.scrollWidth, wide, small,
    ink: getComputedStyle(document.body).color, paper: getComputedStyle(document.body).backgroundColor};
  if (window.axe) found.violations = (await axe.run()).violations.map(v => [v.id, v.impact, v.nodes.length,
    v.nodes[0].html.slice(0, 200)]);
  const out = document.createElement('pre'); out.id = 'found'; out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


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


def chromium(page: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access"]
    command += [f"--user-data-dir={page.parent / 'profile'}", "--virtual-time-budget=20000", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def probe(page: Path, *, width: int, dark: bool = False, axe: bool = False) -> dict:
    """Load the page with a script that measures it; for that copy alone the policy that forbids scripts is lifted."""
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text())
    script = f"<script>{Path(AXE).read_text()}</script>" if axe else ""
    # A frame has exactly the width it is given; a window may have a least width of its own.
    inner = page.with_name("probed.html")
    inner.write_text(text.replace("</head>", script + PROBE + "</head>"))
    outer = page.with_name("frame.html")
    outer.write_text(
        f'<iframe id="f" src="probed.html" style="width:{width}px;height:2000px;border:0"></iframe><script>'
        "const wait = () => { const found = document.getElementById('f').contentDocument.getElementById('found');"
        "if (!found) return setTimeout(wait, 50);"
        "const out = document.createElement('pre'); out.id = 'result'; out.textContent = found.textContent;"
        "document.body.append(out); }; addEventListener('load', wait);</script>"
    )
    arguments = ["--dump-dom", "--allow-file-access-from-files", "--window-size=1400,2000"]
    arguments += ["--blink-settings=preferredColorScheme=0"] if dark else []
    found = re.search(r'<pre id="result">(.*?)</pre>', chromium(outer, *arguments), flags=re.DOTALL)
    assert found is not None
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_screen(page: Path, width: int) -> None:
    found = probe(page, width=width)
    assert found["width"] == width
    assert found["scroll"] <= width
    assert found["wide"] == []
    assert found["small"] == []


def test_dark_and_light_follow_the_reader(page: Path) -> None:
    light, dark = probe(page, width=1280), probe(page, width=1280, dark=True)
    assert light["paper"] == "rgb(255, 255, 255)"
    assert dark["paper"] == "rgb(22, 24, 27)"
    assert light["ink"] != dark["ink"]


@needs_axe
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_no_violation(page: Path, width: int, dark: bool) -> None:
    assert probe(page, width=width, dark=dark, axe=True)["violations"] == []


@pytest.mark.parametrize("width", [390, 1280])
def test_a_screenshot_is_no_blank_page(page: Path, width: int) -> None:
    image_module = pytest.importorskip("PIL.Image")
    outer = page.with_name("shot.html")
    outer.write_text(
        '<body style="margin:0"><iframe src="index.html" '
        f'style="width:{width}px;height:3000px;border:0"></iframe></body>'
    )
    target = page.parent / f"{page.parent.name}-{width}.png"
    chromium(outer, f"--screenshot={target}", f"--window-size={width},3000")
    with image_module.open(target) as image:
        assert image.height == 3000
        shades = image.convert("L").getextrema()
        assert shades[0] < 64
        assert shades[1] == 255
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
        # Base and model, as the figures draw them; an inspection has no two to compare.
        assert page.parent.name == "inspection" or {(31, 95, 168), (179, 67, 15)} <= colours
    if folder := os.environ.get("SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(target, folder)
