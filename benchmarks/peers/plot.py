"""The frontier as one SVG file: how much is still refused against what the edit costs, a point for each edited model.

Two panels share the horizontal axis, harmful prompts refused with their Wilson intervals: KL over the base's answers,
and the change of cross-entropy. The lower and the further left the better. A line joins what no other result of the
same tool beats in both. The file follows the reader's light or dark mode and needs no font and no script.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from abliterate.pages.charts import tick_values

_WIDTH, _PANEL, _TOP, _LEFT, _GAP = 920, 330, 66, 62, 92
_HEIGHT = 300
_STYLE = """
svg { --ink: #1c1f23; --quiet: #565c64; --paper: #ffffff; --rule: #d3d7dc; --c0: #b3430f; --c1: #1f5fa8; --c2: #5b7a1e;
  --c3: #7b4ba0; --c4: #8a6100; --c5: #00757a; --c6: #a11b1b; --c7: #565c64; }
@media (prefers-color-scheme: dark) { svg { --ink: #e8eaed; --quiet: #a9b0b9; --paper: #16181b; --rule: #3b4047;
  --c0: #f08a52; --c1: #74aef0; --c2: #a3c95f; --c3: #c69be8; --c4: #dcb04a; --c5: #55c5ca; --c6: #f28b8b;
  --c7: #a9b0b9; } }
text { font: 12px system-ui, sans-serif; fill: var(--ink); } .quiet { fill: var(--quiet); }
"""
_N_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One edited model: the tool it comes from, what it is, harmful refusals with their interval, and its costs."""

    tool: str
    label: str
    refused: float
    low: float
    high: float
    kl: float
    entropy_change: float


def frontier_svg(points: Sequence[Point], *, title: str) -> str:
    """Return the figure."""
    tools = list(dict.fromkeys(point.tool for point in points))
    colours = {tool: f"var(--c{i % _N_COLOURS})" for i, tool in enumerate(tools)}
    shown = (
        ("KL(base || model) over the base's answers, nats a token", [point.kl for point in points], 1.0),
        ("cross-entropy of the base's answers, change in %", [point.entropy_change for point in points], 100.0),
    )
    panels = [
        _panel(list(zip(points, costs, strict=True)), colours, left=_LEFT + i * (_PANEL + _GAP), name=name, scale=scale)
        for i, (name, costs, scale) in enumerate(shown)
    ]
    legend, x = [], _LEFT
    for tool in tools:
        legend.append(
            f'<circle cx="{x}" cy="{_TOP - 30}" r="5" fill="{colours[tool]}"/>'
            f'<text x="{x + 10}" y="{_TOP - 26}">{escape(tool)}</text>'
        )
        x += 34 + 7 * len(tool)
    height = _TOP + _HEIGHT + 50
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f'<rect width="{_WIDTH}" height="{height}" fill="var(--paper)"/>'
        f'<text x="{_LEFT}" y="18">{escape(title)}</text>{"".join(legend)}{"".join(panels)}</svg>\n'
    )


def undominated(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that no other beats in both coordinates, from left to right; smaller is better."""
    front: list[tuple[float, float]] = []
    for point in sorted(set(points)):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _panel(costs: Sequence[tuple[Point, float]], colours: dict[str, str], *, left: int, name: str, scale: float) -> str:
    low, high = min(0.0, *(cost for _, cost in costs)), max(0.0, *(cost for _, cost in costs))
    high = high + 0.08 * (high - low) or 1.0

    def x(share: float) -> float:
        return left + _PANEL * share

    def y(cost: float) -> float:
        return _TOP + _HEIGHT * (1 - (cost - low) / (high - low))

    shapes = [
        f'<rect x="{left}" y="{_TOP}" width="{_PANEL}" height="{_HEIGHT}" fill="none" stroke="var(--rule)"/>',
        f'<text class="quiet" x="{left}" y="{_TOP - 6}">{escape(name)}</text>',
        f'<text class="quiet" x="{x(0.5)}" y="{_TOP + _HEIGHT + 38}" text-anchor="middle">harmful refused</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        shapes.append(
            f'<text class="quiet" x="{x(share):.1f}" y="{_TOP + _HEIGHT + 18}" text-anchor="middle">{share:.0%}</text>'
        )
    for tick in tick_values(scale * low, scale * high):
        at = y(tick / scale)
        shapes.append(
            f'<line x1="{left}" x2="{left + _PANEL}" y1="{at:.1f}" y2="{at:.1f}" stroke="var(--rule)"/>'
            f'<text class="quiet" x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>'
        )
    for tool, colour in colours.items():
        front = undominated([(point.refused, cost) for point, cost in costs if point.tool == tool])
        line = " ".join(f"{x(refused):.1f},{y(cost):.1f}" for refused, cost in front)
        shapes.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-opacity="0.5"/>')
    for point, cost in costs:
        colour = colours[point.tool]
        shapes.append(
            f'<line x1="{x(point.low):.1f}" x2="{x(point.high):.1f}" y1="{y(cost):.1f}" y2="{y(cost):.1f}" '
            f'stroke="{colour}" stroke-opacity="0.4"/>'
            f'<circle cx="{x(point.refused):.1f}" cy="{y(cost):.1f}" r="4.5" fill="{colour}">'
            f"<title>{escape(f'{point.tool}, {point.label}: {point.refused:.1%} refused, {scale * cost:.3g}')}</title>"
            "</circle>"
        )
    return "".join(shapes)
