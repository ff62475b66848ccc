"""Figures for report pages: inline SVG drawn from numbers, in the page's own colours.

Text keeps its size whatever the width: positions are percentages, and what must stretch (lines through points) lies
in an inner drawing whose strokes do not scale. Each figure has a text that says what it shows; the numbers themselves
stand in a table on the page.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("--base", "--model", "--third", "--fourth", "--fifth", "--sixth")


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
    """One line of a line chart: a name and its points, a None leaving a gap."""

    name: str
    values: Sequence[float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Threshold:
    """A level that is drawn across a line chart, in a colour given as a custom property of the page."""

    name: str
    value: float
    colour: str = "--limit"


def interval_chart(rows: Sequence[tuple[str, Sequence[Interval]]], *, series: Sequence[str], caption: str) -> str:
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
    return _figure("".join(shapes), height=top + len(rows) * height, caption=caption, legend=names)


def share_chart(rows: Sequence[tuple[str, Sequence[Part]]], *, legend: Sequence[tuple[str, str]], caption: str) -> str:
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
    return _figure("".join(shapes), height=top + len(rows) * height, caption=caption, legend=legend)


def line_chart(
    lines: Sequence[Line],
    *,
    caption: str,
    x_name: str,
    thresholds: Sequence[Threshold] = (),
    mark: tuple[int, float] | None = None,
    symlog: bool = False,
) -> str:
    """Return a figure with one line a series over whole numbers 0, 1, 2, ...

    Args:
        lines: the series; all have the same length.
        caption: what the figure shows.
        x_name: what the whole numbers are.
        thresholds: levels drawn across.
        mark: the point that was chosen.
        symlog: linear up to 0.1 and logarithmic beyond, for values of very different size.
    """
    scale: Callable[[float], float] = _symlog if symlog else float
    values = [scale(v) for line in lines for v in line.values if v is not None and math.isfinite(v)]
    values += [scale(threshold.value) for threshold in thresholds]
    if not values:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    n = max(len(line.values) for line in lines)

    def place(index: int, value: float) -> tuple[float, float]:
        return 100 * index / max(1, n - 1), 100 * (1 - (scale(value) - low) / span)

    inner = [_path(line, place, COLOURS[i % len(COLOURS)]) for i, line in enumerate(lines)]
    legend = [(line.name, COLOURS[i % len(COLOURS)]) for i, line in enumerate(lines)]
    for threshold in thresholds:
        _, y = place(0, threshold.value)
        inner.append(
            f'<path d="M0 {y:.2f}H100" stroke="var({threshold.colour})" stroke-dasharray="5 4" fill="none" '
            'vector-effect="non-scaling-stroke"/>'
        )
        legend.append((f"{threshold.name} ({threshold.value:.4g})", threshold.colour))
    if mark is not None:
        x, y = place(*mark)
        # A line of no length with round ends is a dot that does not stretch.
        inner.append(
            f'<path d="M{x:.2f} {y:.2f}h0" stroke="var(--ink)" stroke-width="12" stroke-linecap="round" '
            'vector-effect="non-scaling-stroke"/>'
        )
        legend.append(("selected", "--ink"))
    ticks = "".join(
        f'<text class="quiet" x="11%" y="{12 + 1.8 * place(0, tick)[1]:.0f}" text-anchor="end" dy="4">{tick:g}</text>'
        for tick in tick_values(low, high, symlog=symlog)
    )
    labels = "".join(
        f'<text class="quiet" x="{13 + 85 * i / max(1, n - 1):.2f}%" y="212" text-anchor="middle">{i}</text>'
        for i in range(0, n, max(1, round(n / 6)))
    )
    drawing = (
        '<rect x="13%" y="12" width="85%" height="180" fill="none" stroke="var(--rule)"/>'
        '<svg x="13%" y="12" width="85%" height="180" viewBox="0 0 100 100" preserveAspectRatio="none" '
        f'overflow="visible">{"".join(inner)}</svg>{ticks}{labels}'
        f'<text class="quiet" x="55%" y="232" text-anchor="middle">{escape(x_name)}</text>'
    )
    return _figure(drawing, height=236, caption=caption, legend=legend)


def heat_map(rows: Sequence[tuple[str, Sequence[float | None]]], *, caption: str, x_name: str, legend: str) -> str:
    """Return a figure of cells, a row a label and a column a whole number 0, 1, 2, ...; the darker the greater.

    Args:
        rows: label and values from 0 to 1, all of the same number; None leaves a cell empty.
        caption: what the figure shows.
        x_name: what the whole numbers are.
        legend: what the darkest cells are.
    """
    n, height, top = max((len(values) for _, values in rows), default=0), 18, 8
    if not n:
        return ""
    shapes = []
    for i, (label, values) in enumerate(rows):
        y = top + i * height
        shapes.append(f'<text x="0" y="{y + height // 2 + 4}">{escape(label)}</text>')
        for j, value in enumerate(values):
            if value is None:
                continue
            colour = f'fill="var({COLOURS[1]})" fill-opacity="{0.08 + 0.92 * min(1.0, max(0.0, value)):.3f}"'
            place = (
                f'x="{_LEFT + _SPAN * j / n:.3f}%" y="{y + 1}" width="{0.94 * _SPAN / n:.3f}%" height="{height - 2}"'
            )
            shapes.append(f"<rect {place} {colour}><title>{escape(label)}, {j}: {value:.3f}</title></rect>")
    bottom = top + len(rows) * height + 14
    shapes += [
        f'<text class="quiet" x="{_LEFT + _SPAN * (j + 0.47) / n:.3f}%" y="{bottom}" text-anchor="middle">{j}</text>'
        for j in range(0, n, max(1, round(n / 8)))
    ]
    shapes.append(
        f'<text class="quiet" x="{_LEFT + _SPAN / 2}%" y="{bottom + 18}" text-anchor="middle">{escape(x_name)}</text>'
    )
    return _figure("".join(shapes), height=bottom + 22, caption=caption, legend=[(legend, COLOURS[1])])


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


def _path(line: Line, place: Callable[[int, float], tuple[float, float]], colour: str) -> str:
    steps, pen_down = [], False
    for index, value in enumerate(line.values):
        if value is None or not math.isfinite(value):
            pen_down = False
            continue
        x, y = place(index, value)
        # A point between two gaps still shows: round ends make a dot of it.
        steps.append(f"{'L' if pen_down else 'M'}{x:.2f} {y:.2f}" + ("" if pen_down else "h0"))
        pen_down = True
    return (
        f'<path d="{"".join(steps)}" stroke="var({colour})" stroke-width="2" stroke-linecap="round" fill="none" '
        'vector-effect="non-scaling-stroke"/>'
    )


def _symlog(value: float) -> float:
    return value / 0.1 if abs(value) <= 0.1 else math.copysign(1 + math.log10(abs(value) / 0.1), value)


def tick_values(low: float, high: float, *, symlog: bool) -> list[float]:
    """Return round values between two ends of a scale, at most seven or so."""
    if symlog:
        round_values = (0.0, 0.05, *(sign * 10.0**k for k in range(-1, 6) for sign in (1, -1)))
        return [value for value in sorted(round_values) if low <= _symlog(value) <= high]
    span = (high - low) or 1.0
    magnitude = 10.0 ** math.floor(math.log10(span))
    step = next(m * magnitude for m in (0.2, 0.5, 1, 2) if span / (m * magnitude) <= 6)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _figure(shapes: str, *, height: int, caption: str, legend: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<li><i style="background: var({colour})"></i>{escape(name)}</li>' for name, colour in legend)
    return (
        f'<figure><figcaption>{escape(caption)}</figcaption><ul class="legend">{items}</ul>'
        f'<svg class="figure" height="{height}" role="img" aria-label="{escape(caption)}">{shapes}</svg></figure>'
    )
