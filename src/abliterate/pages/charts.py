"""Figures drawn from numbers: inline SVG in a page's own colours, and the same as a file of its own.

Text keeps its size whatever the width: positions are percentages, and what must stretch (lines through points) lies
in an inner drawing whose strokes do not scale. Each figure has a text that says what it shows; the numbers themselves
stand in a table on the page.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Literal

# What the custom properties of a page are in light mode; a file has no other.
LIGHT = {
    "--ink": "#1c1f23", "--quiet": "#565c64", "--paper": "#ffffff", "--raised": "#f4f5f7", "--rule": "#d3d7dc",
    "--model": "#b3430f", "--base": "#1f5fa8", "--third": "#5b7a1e", "--fourth": "#7b4ba0", "--fifth": "#8a6100",
    "--sixth": "#00757a", "--answer": "#c9cfd6", "--limit": "#a11b1b",
}  # fmt: skip
FILE_WIDTH = 760
Scale = Literal["linear", "symlog", "log"]
COLOURS = ("--base", "--model", "--third", "--fourth", "--fifth", "--sixth")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A drawing, with what it shows.

    Attributes:
        caption: what it shows.
        legend: names and colours, each a custom property of the page.
        shapes: SVG; empty where there was nothing to draw.
        height: in pixels; the width is whatever there is.
        fixed: the shapes for a file, where what stretches on a page does not; empty where they are the same.
    """

    caption: str
    legend: Sequence[tuple[str, str]]
    shapes: str
    height: int
    fixed: str = ""

    @property
    def html(self) -> str:
        """The figure as a block of a page; nothing where nothing was drawn."""
        if not self.shapes:
            return ""
        items = "".join(
            f'<li><i style="background: var({colour})"></i>{escape(name)}</li>' for name, colour in self.legend
        )
        caption = escape(self.caption)
        return (
            f'<figure><figcaption>{caption}</figcaption><ul class="legend">{items}</ul><svg class="figure" '
            f'height="{self.height}" role="img" aria-label="{caption}">{self.shapes}</svg></figure>'
        )

    @property
    def svg(self) -> str:
        """The figure as an SVG file that needs no style of a page."""
        per_row, row = 3, 18
        legend = "".join(
            f'<rect x="{8 + 248 * (i % per_row)}" y="{32 + row * (i // per_row)}" width="10" height="10" '
            f'fill="var({colour})"/><text x="{23 + 248 * (i % per_row)}" y="{41 + row * (i // per_row)}">'
            f"{escape(name)}</text>"
            for i, (name, colour) in enumerate(self.legend)
        )
        top = 40 + row * -(-len(self.legend) // per_row)
        text = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{FILE_WIDTH}" height="{top + self.height + 8}" role="img">'
            f"<title>{escape(self.caption)}</title>"
            "<style>text { font: 12px system-ui, sans-serif; fill: var(--ink); } "
            'text.quiet { fill: var(--quiet); }</style><rect width="100%" height="100%" fill="var(--paper)"/>'
            f'<text x="8" y="20">{escape(self.caption)}</text>{legend}'
            f'<svg y="{top}" width="100%" height="{self.height}">{self.fixed or self.shapes}</svg></svg>\n'
        )
        return re.sub(r"var\((--[a-z]+)\)", lambda match: LIGHT[match[1]], text)

    def _repr_svg_(self) -> str:
        """Show it in a notebook, where it is the last value of a cell."""
        return self.svg


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A share with its interval, all in 0..1, of one series."""

    series: int
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a bar: its share of the whole, and its colour as a custom property of the page."""

    share: float
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One line of a line chart: a name and its points, a None leaving a gap; and how far around them is shaded."""

    name: str
    values: Sequence[float | None]
    spread: Sequence[float] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A level that is drawn across a line chart, in a colour given as a custom property of the page."""

    name: str
    value: float
    colour: str = "--limit"


def interval_chart(rows: Sequence[tuple[str, Sequence[Interval]]], *, series: Sequence[str], caption: str) -> Figure:
    """Return a figure with one row a label and one point with its interval a series, from 0 to 100 %.

    Args:
        rows: label and intervals.
        series: names of the series, as the legend shows them.
        caption: what the figure shows.
    """
    height, shapes, top = 26, [_percent_axis(len(rows), 26)], 24
    for i, (label, intervals) in enumerate(rows):
        y = top + i * height + height // 2
        shapes.append(f'<text x="0" y="{y + 4}">{escape(label)}</text>')
        for interval in intervals:
            # Series lie side by side in their row, so that equal values stay visible.
            at = y + (4 if interval.series else -4) * (len(series) > 1)
            colour = f"var({COLOURS[interval.series % len(COLOURS)]})"
            low, value, high = (_x(share) for share in (interval.low, interval.value, interval.high))
            shapes.append(
                f'<line x1="{low}" x2="{high}" y1="{at}" y2="{at}" stroke="{colour}" stroke-width="2"/>'
                f'<circle cx="{value}" cy="{at}" r="4" fill="{colour}"/>'
            )
    names = [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(series)]
    return Figure(caption=caption, legend=names, shapes="".join(shapes), height=top + len(rows) * height)


def share_chart(
    rows: Sequence[tuple[str, Sequence[Part]]], *, legend: Sequence[tuple[str, str]], caption: str
) -> Figure:
    """Return a figure with one bar a row, made of parts that sum to the whole.

    Args:
        rows: label and parts.
        legend: name and colour of each kind of part.
        caption: what the figure shows.
    """
    height, top = 26, 24
    shapes = [_percent_axis(len(rows), height)]
    for i, (label, parts) in enumerate(rows):
        y, start = top + i * height, 0.0
        shapes.append(f'<text x="0" y="{y + height // 2 + 4}">{escape(label)}</text>')
        for part in parts:
            width = f"{part.share * _SPAN:.3f}%"
            shapes.append(
                f'<rect x="{_x(start)}" y="{y + 5}" width="{width}" height="{height - 10}" fill="var({part.colour})"/>'
            )
            start += part.share
    return Figure(caption=caption, legend=legend, shapes="".join(shapes), height=top + len(rows) * height)


def line_chart(
    lines: Sequence[Line],
    *,
    caption: str,
    x_name: str,
    thresholds: Sequence[Threshold] = (),
    mark: tuple[int, float] | None = None,
    at: tuple[str, float] | None = None,
    scale: Scale = "linear",
) -> Figure:
    """Return a figure with one line a series over whole numbers 0, 1, 2, ...

    Args:
        lines: the series; all have the same length.
        caption: what the figure shows.
        x_name: what the whole numbers are.
        thresholds: levels drawn across.
        mark: the point that was chosen.
        at: name and place of a line from top to bottom.
        scale: `symlog` is linear up to 0.1 and logarithmic beyond; what is not above 0 leaves a gap on `log`.
    """
    scaled = _SCALES[scale]
    if scale == "log":
        lines = [replace(line, values=[v if v and v > 0 else None for v in line.values]) for line in lines]
    values = [scaled(v) for line in lines for v in line.values if v is not None and math.isfinite(v)]
    values += [scaled(threshold.value) for threshold in thresholds]
    values += [scaled(each) for line in lines for pair in _band(line) for each in pair]
    if not values:
        return Figure(caption=caption, legend=(), shapes="", height=0)
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    n = max(len(line.values) for line in lines)

    def height_of(value: float) -> float:
        return 1 - (scaled(value) - low) / span

    def inner(width: float, height: float) -> str:
        def place(index: float, value: float) -> tuple[float, float]:
            return width * index / max(1, n - 1), height * height_of(value)

        drawn = [_shade(line, place, COLOURS[i % len(COLOURS)]) for i, line in enumerate(lines) if line.spread]
        drawn += [_path(line, place, COLOURS[i % len(COLOURS)]) for i, line in enumerate(lines)]
        for threshold in thresholds:
            _, y = place(0, threshold.value)
            drawn.append(_stroke(f"M0 {y:.2f}H{width:g}", threshold.colour, dashes="5 4"))
        if at is not None:
            x = width * at[1] / max(1, n - 1)
            drawn.append(_stroke(f"M{x:.2f} 0V{height:g}", "--quiet", dashes="2 4"))
        if mark is not None:
            x, y = place(*mark)
            # A line of no length with round ends is a dot that does not stretch.
            drawn.append(_stroke(f"M{x:.2f} {y:.2f}h0", "--ink", width=12))
        return "".join(drawn)

    legend = [(line.name, COLOURS[i % len(COLOURS)]) for i, line in enumerate(lines)]
    legend += [(f"{each.name} ({each.value:.4g})", each.colour) for each in thresholds]
    legend += [(at[0], "--quiet")] if at is not None else []
    legend += [("selected", "--ink")] if mark is not None else []
    ticks = "".join(
        f'<text class="quiet" x="11%" y="{12 + 180 * height_of(tick):.0f}" text-anchor="end" dy="4">{tick:g}</text>'
        for tick in tick_values(low, high, scale=scale)
    )
    labels = "".join(
        f'<text class="quiet" x="{13 + 85 * i / max(1, n - 1):.2f}%" y="212" text-anchor="middle">{i}</text>'
        for i in range(0, n, max(1, round(n / 6)))
    )
    frame = '<rect x="13%" y="12" width="85%" height="180" fill="none" stroke="var(--rule)"/>'
    place = '<svg x="13%" y="12" width="85%" height="180" overflow="visible"'
    around = f'{ticks}{labels}<text class="quiet" x="55%" y="232" text-anchor="middle">{escape(x_name)}</text>'
    stretched = f'{place} viewBox="0 0 100 100" preserveAspectRatio="none">{inner(100, 100)}</svg>'
    return Figure(
        caption=caption,
        legend=legend,
        shapes=f"{frame}{stretched}{around}",
        fixed=f"{frame}{place}>{inner(0.85 * FILE_WIDTH, 180)}</svg>{around}",
        height=236,
    )


def heat_map(
    rows: Sequence[tuple[str, Sequence[float | None]]],
    *,
    caption: str,
    x_name: str,
    legend: str,
    negative: str | None = None,
) -> Figure:
    """Return a figure of cells, a row a label and a column a whole number 0, 1, 2, ...; the darker the greater.

    Args:
        rows: label and values from -1 to 1, all of the same number; None leaves a cell empty.
        caption: what the figure shows.
        x_name: what the whole numbers are.
        legend: what the darkest cells are.
        negative: what the darkest cells below 0 are, where there are any; they have a colour of their own.
    """
    n, height, top = max((len(values) for _, values in rows), default=0), 18, 8
    if not n:
        return Figure(caption=caption, legend=(), shapes="", height=0)
    shapes = []
    for i, (label, values) in enumerate(rows):
        y = top + i * height
        shapes.append(f'<text x="0" y="{y + height // 2 + 4}">{escape(label)}</text>')
        for j, value in enumerate(values):
            if value is None:
                continue
            name = COLOURS[0 if negative is not None and value < 0 else 1]
            size = min(1.0, abs(value) if negative is not None else max(0.0, value))
            colour = f'fill="var({name})" fill-opacity="{0.08 + 0.92 * size:.3f}"'
            place = (
                f'x="{_LEFT + _SPAN * j / n:.3f}%" y="{y + 1}" width="{0.94 * _SPAN / n:.3f}%" height="{height - 2}"'
            )
            shapes.append(f"<rect {place} {colour}><title>{escape(label)}, {j}: {value:.3f}</title></rect>")
    bottom = top + len(rows) * height + 14
    names = [(legend, COLOURS[1]), *([(negative, COLOURS[0])] if negative is not None else [])]
    shapes += [
        f'<text class="quiet" x="{_LEFT + _SPAN * (j + 0.47) / n:.3f}%" y="{bottom}" text-anchor="middle">{j}</text>'
        for j in range(0, n, max(1, round(n / 8)))
    ]
    shapes.append(
        f'<text class="quiet" x="{_LEFT + _SPAN / 2}%" y="{bottom + 18}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return Figure(caption=caption, legend=names, shapes="".join(shapes), height=bottom + 22)


def bar_chart(rows: Sequence[tuple[str, Sequence[float]]], *, series: Sequence[str], caption: str) -> Figure:
    """Return a figure with bars to both sides of 0, one a series in each row.

    Args:
        rows: label and values.
        series: names of the series, as the legend shows them.
        caption: what the figure shows.
    """
    values = [value for _, each in rows for value in each if math.isfinite(value)]
    low, high = min([0.0, *values]), max([0.0, *values])
    span = (high - low) or 1.0
    thick, top = 9, 24
    height = thick * len(series) + 8
    shapes = [
        f'<line x1="{_x((tick - low) / span)}" x2="{_x((tick - low) / span)}" y1="20" y2="{top + len(rows) * height}" '
        f'stroke="var({"--quiet" if tick == 0 else "--rule"})"/>'
        f'<text class="quiet" x="{_x((tick - low) / span)}" y="14" text-anchor="middle">{tick:g}</text>'
        for tick in tick_values(low, high)
    ]
    for i, (label, each) in enumerate(rows):
        y = top + i * height + 4
        shapes.append(f'<text x="0" y="{y + thick * len(series) / 2 + 4:.0f}">{escape(label)}</text>')
        shapes += [
            f'<rect x="{_x((min(0.0, value) - low) / span)}" width="{_SPAN * abs(value) / span:.3f}%" '
            f'y="{y + j * thick}" height="{thick - 1}" fill="var({COLOURS[j % len(COLOURS)]})"/>'
            for j, value in enumerate(each)
            if math.isfinite(value)
        ]
    names = [(name, COLOURS[i % len(COLOURS)]) for i, name in enumerate(series)]
    return Figure(caption=caption, legend=names, shapes="".join(shapes), height=top + len(rows) * height)


_LEFT, _SPAN = 34.0, 62.0


def _x(share: float) -> str:
    return f"{_LEFT + _SPAN * share:.3f}%"


def _percent_axis(n_rows: int, height: int) -> str:
    lines = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        lines.append(
            f'<line x1="{_x(share)}" x2="{_x(share)}" y1="20" y2="{24 + n_rows * height}" stroke="var(--rule)"/>'
            f'<text class="quiet" x="{_x(share)}" y="14" text-anchor="middle">{share:.0%}</text>'
        )
    return "".join(lines)


def _path(line: Line, place: Callable[[float, float], tuple[float, float]], colour: str) -> str:
    steps, pen_down = [], False
    for index, value in enumerate(line.values):
        if value is None or not math.isfinite(value):
            pen_down = False
            continue
        x, y = place(index, value)
        # A point between two gaps still shows: round ends make a dot of it.
        steps.append(f"{'L' if pen_down else 'M'}{x:.2f} {y:.2f}" + ("" if pen_down else "h0"))
        pen_down = True
    return _stroke("".join(steps), colour, width=2)


def _stroke(path: str, colour: str, *, width: int = 1, dashes: str = "") -> str:
    """Return a line that is as wide however the drawing is stretched, with round ends where it is whole."""
    ends = f'stroke-dasharray="{dashes}"' if dashes else 'stroke-linecap="round"'
    return (
        f'<path d="{path}" stroke="var({colour})" stroke-width="{width}" {ends} fill="none" '
        'vector-effect="non-scaling-stroke"/>'
    )


def _band(line: Line) -> list[tuple[float, float]]:
    """Return the ends of what is shaded around each point; a line with a spread has no gaps."""
    points = [value for value in line.values if value is not None]
    return [(value - spread, value + spread) for value, spread in zip(points, line.spread, strict=False)]


def _shade(line: Line, place: Callable[[float, float], tuple[float, float]], colour: str) -> str:
    ends = _band(line)
    around = [place(i, low) for i, (low, _) in enumerate(ends)]
    around += [place(i, high) for i, (_, high) in reversed(list(enumerate(ends)))]
    points = " ".join(f"{x:.2f},{y:.2f}" for x, y in around)
    return f'<polygon points="{points}" fill="var({colour})" fill-opacity="0.15"/>'


def _symlog(value: float) -> float:
    return value / 0.1 if abs(value) <= 0.1 else math.copysign(1 + math.log10(abs(value) / 0.1), value)


_SCALES: dict[Scale, Callable[[float], float]] = {"linear": float, "symlog": _symlog, "log": math.log10}


def tick_values(low: float, high: float, *, scale: Scale = "linear") -> list[float]:
    """Return round values between two ends of a scale, at most seven or so."""
    if scale == "log":
        first, last = math.ceil(low), math.floor(high)
        return [10.0**power for power in range(first, last + 1, max(1, -(-(last - first) // 6)))]
    if scale == "symlog":
        round_values = (0.0, 0.05, *(sign * 10.0**k for k in range(-1, 6) for sign in (1, -1)))
        return [value for value in sorted(round_values) if low <= _symlog(value) <= high]
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span))
    step = next(m * magnitude for m in (0.2, 0.5, 1, 2) if span / (m * magnitude) <= 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]
