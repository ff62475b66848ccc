"""Look at pages as a reader does: pictures of them at two widths, light and dark, in print, and what axe-core finds.

    python scripts/look.py build/site/index.html page/index.html --axe node_modules/axe-core/axe.min.js -o looks

Needs `pip install playwright` and `npm install axe-core`, which the project itself does not, and a Chromium. Prints one
line for each fault, and ends with exit code 1 where axe-core calls one serious or critical, or a page is wider than the
screen.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = (390, 1280)
SERIOUS = ("serious", "critical")


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a browser without a window."""
    from playwright.sync_api import sync_playwright  # type: ignore[import-not-found,unused-ignore]

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def open_page(browser: Any, page: Path, *, width: int, dark: bool = False) -> Iterator[Any]:
    """Yield a page as it is on a screen of so many CSS pixels, with no network; `tab.problems` are its scripts' errors.

    A page of ours forbids all scripts; those of the look itself are let in.
    """
    context = browser.new_context(
        viewport={"width": width, "height": 900},
        color_scheme="dark" if dark else "light",
        bypass_csp=True,
        offline=True,
    )
    try:
        tab = context.new_page()
        tab.problems = []
        tab.on("pageerror", lambda error: tab.problems.append(str(error)))
        tab.goto(page.resolve().as_uri())
        yield tab
    finally:
        context.close()


def violations(tab: Any, axe: str) -> list[dict[str, Any]]:
    """Return what axe-core finds in an open page, as axe-core says it.

    Args:
        tab: the page.
        axe: the text of axe-core's script.
    """
    tab.evaluate(axe)
    return list(tab.evaluate("axe.run()")["violations"])


def look(browser: Any, page: Path, *, axe: str, name: str, output: Path) -> Iterator[tuple[bool, str]]:
    """Draw a page in all ways into `output`; yield each fault, and whether it is a serious one."""
    for width in WIDTHS:
        for dark in (False, True):
            scheme = "dark" if dark else "light"
            where = f"{name} at {width} px, {scheme}"
            with open_page(browser, page, width=width, dark=dark) as tab:
                tab.screenshot(path=output / f"{name}.{width}.{scheme}.png", full_page=True)
                yield from ((True, f"{where}: {problem}") for problem in tab.problems)
                excess = tab.evaluate("document.documentElement.scrollWidth - window.innerWidth")
                if excess > 0:
                    yield True, f"{where}: {excess} px wider than the screen"
                for violation in violations(tab, axe):
                    impact, nodes = violation["impact"], violation["nodes"]
                    first = " ".join(nodes[0]["html"].split())[:120]
                    yield impact in SERIOUS, f"{where}: {impact}: {violation['help']} ({len(nodes)}), first {first}"
                if (width, dark) == (WIDTHS[-1], False):
                    tab.pdf(path=output / f"{name}.pdf", format="A4")


def main(arguments: Sequence[str] | None = None) -> int:
    """Look at all pages; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", metavar="PAGE")
    parser.add_argument("--axe", type=Path, required=True, help="axe.min.js of axe-core")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR", help="where the pictures go")
    given = parser.parse_args(arguments)
    given.output.mkdir(parents=True, exist_ok=True)
    axe, n_serious = given.axe.read_text(encoding="utf-8"), 0
    with open_browser() as browser:
        for page in given.pages:
            name = page.stem if page.stem != "index" else f"{page.resolve().parent.name}-index"
            for is_serious, text in look(browser, page, axe=axe, name=name, output=given.output):
                n_serious += is_serious
                print(text, flush=True)
    print(f"{len(given.pages)} pages in {len(WIDTHS) * 2} ways, {n_serious} serious faults", file=sys.stderr)
    return 1 if n_serious else 0


if __name__ == "__main__":
    sys.exit(main())
