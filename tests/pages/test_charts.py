"""Figures: shapes stand where the numbers are, and a file of one is whole in itself."""

import math
from xml.etree import ElementTree

import pytest

from abliterate.pages.charts import (
    LIGHT,
    Figure,
    Interval,
    Line,
    Part,
    bar_chart,
    heat_map,
    interval_chart,
    line_chart,
    share_chart,
)
from tests.support.pages import Page

NASTY = "<b>&\"'</b>"


def figures(text: str) -> list[Figure]:
    intervals = [Interval(series=0, value=0.5, low=0.2, high=0.7)]
    line = Line(name=text, values=[0.0, 1.0, 2.0], spread=[0.1, 0.2, 0.3])
    return [
        interval_chart([(text, intervals)], series=[text], caption=text),
        share_chart([(text, [Part(share=1.0, colour="--base")])], legend=[(text, "--base")], caption=text),
        line_chart([line], caption=text, x_name=text, at=(text, 1.5)),
        heat_map([(text, [0.5, -0.5, None])], caption=text, x_name=text, legend=text, negative=text),
        bar_chart([(text, [0.5, -0.25])], series=[text, text], caption=text),
    ]


@pytest.mark.parametrize("text", ["plain", NASTY])
def test_a_file_is_xml_that_needs_no_page(text: str) -> None:
    for figure in figures(text):
        root = ElementTree.fromstring(figure.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert root[0].text == text
        assert "var(" not in figure.svg
        assert any(colour in figure.svg for colour in LIGHT.values())
        # As many shapes as on the page, and a square for each name of the legend, and the paper.
        inner = root.findall("{http://www.w3.org/2000/svg}svg")[-1]
        assert len(list(inner.iter())) - 1 == figure.html.count("<") - figure.html.count("</") - extra(figure)
        assert Page(figure.html).balanced
        # A notebook asks the last value of a cell for this.
        assert figure._repr_svg_() == figure.svg


def extra(figure: Figure) -> int:
    """Tags of a block around its shapes: figure, caption, list, an item and its square a name, and the drawing."""
    return 4 + 2 * len(figure.legend)


def test_bars_grow_from_zero_to_both_sides() -> None:
    figure = bar_chart([("a", [0.5, -0.25]), ("b", [math.nan, 0.0])], series=["x", "y"], caption="c")
    bars = Page(figure.html).of("rect")
    assert len(bars) == 3
    left, width = ([float(str(bar[key]).rstrip("%")) for bar in bars] for key in ("x", "width"))
    zero = 34 + 62 * 0.25 / 0.75
    assert left[0] == pytest.approx(zero, abs=1e-3)
    assert left[0] + width[0] == pytest.approx(96, abs=1e-3)
    assert left[1] == pytest.approx(34)
    assert left[1] + width[1] == pytest.approx(zero, abs=1e-3)
    assert width[2] == 0


def test_cells_below_zero_have_a_colour_of_their_own_where_there_may_be_any() -> None:
    signed = heat_map([("a", [0.5, -0.5])], caption="c", x_name="x", legend="more", negative="less")
    above, below = Page(signed.html).of("rect")
    assert above["fill"] != below["fill"]
    assert above["fill-opacity"] == below["fill-opacity"] == "0.540"
    plain = Page(heat_map([("a", [0.5, -0.5])], caption="c", x_name="x", legend="l").html).of("rect")
    assert [cell["fill-opacity"] for cell in plain] == ["0.540", "0.080"]


def test_what_is_shaded_lies_around_the_line_and_within_the_frame() -> None:
    figure = line_chart([Line(name="a", values=[0.0, 1.0], spread=[0.5, 0.5])], caption="c", x_name="x", at=("at", 1))
    (shaded,) = Page(figure.html).of("polygon")
    assert shaded["points"] == "0.00,100.00 100.00,50.00 100.00,0.00 0.00,50.00"
    assert [path["d"] for path in Page(figure.html).of("path")] == ["M0.00 75.00h0L100.00 25.00", "M100.00 0V100"]


def test_nothing_to_draw_is_no_figure() -> None:
    for figure in (line_chart([], caption="c", x_name="x"), heat_map([], caption="c", x_name="x", legend="l")):
        assert figure.html == figure.shapes == ""
