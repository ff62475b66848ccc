"""A report as one HTML file that needs nothing else: no request, no script, no font, no image file.

Pages are put together from blocks of HTML that the functions here return; whatever text goes in is escaped. The page
follows the reader's light or dark mode, fits a phone and prints on paper. `charts` draws the figures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from abliterate.files import write_file
from abliterate.pages.charts import LIGHT, Figure

PAGE_NAME = "index.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One part of a page: a heading, and blocks of HTML under it."""

    heading: str
    blocks: tuple[str, ...]


def paragraph(text: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{escape(text)}</p>"


def headline(text: str) -> str:
    """Return the one sentence that says what was found."""
    return f'<p class="headline">{escape(text)}</p>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Return names and values, one pair a line."""
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in pairs)
    return f"<dl>{rows}</dl>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str, n_text: int = 1) -> str:
    """Return a table; on a narrow screen it scrolls by itself and the page does not.

    Args:
        header: column names.
        rows: cells, as many as the header has.
        caption: what the table shows; it also names the scrolling region.
        n_text: how many of the first columns hold text; the others hold numbers and stand to the right.
    """

    def cell(value: object, column: int) -> str:
        if column == 0:
            return f'<th scope="row">{escape(str(value))}</th>'
        return f'<td class="{"text" if column < n_text else "number"}">{escape(str(value))}</td>'

    def heading(name: str, column: int) -> str:
        kind = "text" if column < n_text else "number"
        # A header without words is none.
        return f'<th scope="col" class="{kind}">{escape(name)}</th>' if name else "<td></td>"

    head = "".join(heading(name, column) for column, name in enumerate(header))
    body = "".join("<tr>" + "".join(cell(value, i) for i, value in enumerate(row)) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption><span>{escape(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def commands(lines: Sequence[str]) -> str:
    """Return shell commands to copy."""
    text = escape("\n".join(lines))
    return f'<pre tabindex="0" role="region" aria-label="Commands"><code>{text}</code></pre>'


def folded(summary: str, blocks: Sequence[str]) -> str:
    """Return blocks that are shown only when asked for."""
    return f"<details><summary>{escape(summary)}</summary>{''.join(blocks)}</details>"


def share_in_words(rate: float, *, low: float, high: float) -> str:
    """Return a share and its interval in per cent; on a phone a cell breaks between the two, and nowhere else."""
    return f"{100 * rate:.1f}\N{NO-BREAK SPACE}% [{100 * low:.1f},\N{NO-BREAK SPACE}{100 * high:.1f}]"


def p_value_in_words(value: float) -> str:
    """Return a p-value with four decimals, or that it is smaller than they can show."""
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def quoted(text: str) -> str:
    """Return text as it is, line breaks and all."""
    return f'<blockquote class="reply">{escape(text)}</blockquote>'


def write_page(directory: Path, *, title: str, subtitle: str, sections: Sequence[Section]) -> Path:
    """Write `index.html` to a directory and return its path."""
    path = directory / PAGE_NAME
    write_file(path, build_page(title=title, subtitle=subtitle, sections=sections))
    return path


def write_figures(directory: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write figures as SVG files to a directory; return the files, one for each that shows anything."""
    drawn = {directory / f"{name}.svg": figure for name, figure in figures.items() if figure.shapes}
    for path, figure in drawn.items():
        write_file(path, figure.svg)
    return list(drawn)


def build_page(*, title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the whole page.

    The content security policy forbids the browser any request, so that no mistake here could cause one.
    """
    body = "".join(
        f'<section aria-labelledby="s{i}"><h2 id="s{i}">{escape(section.heading)}</h2>'
        f"{''.join(section.blocks)}</section>"
        for i, section in enumerate(sections)
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n<main>{body}</main>\n"
        "<footer><p>Written by abliterate. This file is complete in itself and loads nothing.</p></footer>"
        "</body></html>\n"
    )


_STYLE = (
    f":root {{ {' '.join(f'{name}: {colour};' for name, colour in LIGHT.items())} }}"
    + """
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --quiet: #a9b0b9; --paper: #16181b; --raised: #212429;
  --rule: #3b4047; --model: #f08a52; --base: #74aef0; --third: #a3c95f; --fourth: #c69be8; --fifth: #dcb04a;
  --sixth: #55c5ca; --answer: #565d66; --limit: #f28b8b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.25rem; max-width: 58rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
header p, footer, figcaption, caption, .note { color: var(--quiet); } header p { margin: .25rem 0 0; }
.headline { font-size: 1.125rem; border-left: 4px solid var(--model); padding-left: .75rem; }
.scroll, pre { overflow-x: auto; } .scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--base); }
table { border-collapse: collapse; width: 100%; margin: .75rem 0; font-size: .9rem; }
td { font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .25rem; }
caption span { display: block; max-width: calc(100vw - 2.5rem); }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--rule); text-align: left; overflow-wrap: normal; }
thead th, thead td { border-bottom: 2px solid var(--quiet); vertical-align: bottom; } tbody th { font-weight: 500; }
.number { text-align: right; white-space: nowrap; }
dl { margin: .5rem 0; font-size: .9rem; } dl div { display: flex; gap: 1rem; border-bottom: 1px solid var(--rule);
  padding: .25rem 0; } dt { flex: 0 0 40%; color: var(--quiet); } dd { margin: 0; }
pre { background: var(--raised); padding: .75rem; border-radius: 4px; font-size: .85rem; }
figure { margin: 1rem 0; } figcaption { font-size: .9rem; } .figure { display: block; width: 100%; overflow: visible; }
.figure text { fill: var(--ink); font: .8rem system-ui, sans-serif; } .figure .quiet { fill: var(--quiet); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .25rem 0; padding: 0; list-style: none;
  font-size: .85rem; } .legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem;
  border-radius: 2px; }
details { margin: .75rem 0; } summary { cursor: pointer; font-weight: 500; }
.reply { white-space: pre-wrap; margin: .25rem 0 1rem; padding: .5rem .75rem; background: var(--raised);
  border-left: 3px solid var(--rule); font-size: .85rem; }
footer { margin-top: 2.5rem; border-top: 1px solid var(--rule); font-size: .85rem; }
@media (max-width: 40rem) { table { font-size: .8rem; } th, td { padding: .3rem; } .number { white-space: normal; } }
@media print { :root { --ink: #000; --quiet: #444; --paper: #fff; --raised: #fff; --rule: #bbb; --model: #a33a08;
  --base: #1a5293; --third: #4d6819; --fourth: #6a3f8c; --fifth: #705000; --sixth: #005f63; --answer: #c9cfd6;
  --limit: #a11b1b; }
  body { max-width: none; padding: 0; font-size: 10pt; } section, figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; } .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; border: 1px solid var(--rule); } }
"""
)
