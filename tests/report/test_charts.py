"""Charts: round numbers on the axes, averaged curves, and a value for every hover."""

import pytest
from report_runs import PageReader

from minialign.report.charts import (
    MAX_POINTS,
    Bar,
    Curve,
    Interval,
    averaged,
    axis_ticks,
    bar_chart,
    curve_chart,
    interval_chart,
    place_rows,
    unbroken_runs,
)
from minialign.report.markup import join


@pytest.mark.parametrize(
    "low, high, ticks",
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-14, 3, [-15, -10, -5, 0, 5]),
        (0, 2e-4, [0, 5e-5, 1e-4, 1.5e-4, 2e-4]),
        (3, 3, [1.5, 2, 2.5, 3, 3.5, 4, 4.5]),
        (0, 0, [-1, -0.5, 0, 0.5, 1]),
        (3, 3 + 4e-16, [1.5, 2, 2.5, 3, 3.5, 4, 4.5]),
    ],
)
def test_ticks_are_round_numbers_that_span_the_values(low, high, ticks):
    assert axis_ticks(low, high) == pytest.approx(ticks)


def test_long_logs_are_averaged():
    """121 steps need points of three steps. A missing value counts for no mean."""
    values = [1.0, 3.0, None] + [5.0] * 118

    points = averaged(values)

    assert len(points) <= MAX_POINTS
    assert points[:2] == [2.0, 5.0]


def test_a_curve_breaks_where_a_value_is_missing():
    assert unbroken_runs([0, 1, 2, 3], [None, 5, None, 6]) == [[(1, 5)], [(3, 6)]]


def test_every_point_tells_its_values():
    curves = [Curve("chosen", [1.0, 2.0], "a"), Curve("rejected", [None, 4.0], "b")]

    page = PageReader(curve_chart([0, 1], curves, "nats"))

    assert "step 0\nchosen: 1 nats\nrejected: none" in page.text
    assert "step 1\nchosen: 2 nats\nrejected: 4 nats" in page.text


@pytest.mark.parametrize("value", [0.0, 2e-4, -101.3])
def test_a_long_curve_may_be_constant(value):
    """The mean of seven times 2e-4 is not 2e-4: the sum is rounded."""
    num_steps = 7 * MAX_POINTS - 3

    page = PageReader(
        curve_chart(list(range(num_steps)), [Curve("x", [value] * num_steps, "")], "")
    )

    heights = set()
    for tag, attributes in page.elements:
        if tag == "polyline":
            heights |= {point.split(",")[1] for point in attributes["points"].split()}
    assert len(heights) == 1


def test_a_bar_without_a_value_has_a_word():
    page = PageReader(
        bar_chart([("set", [Bar("base", None), Bar("aligned", 0.0)])], "%", highest=0)
    )

    assert "nothing to count" in page.text
    assert "0.0" in page.text


def test_rows_stand_below_each_other():
    """A heading and a row are 20 high, and 6 are left below a group."""
    first = Bar("base", 1.0)
    second = Bar("aligned", 2.0)

    texts, placed_rows, height = place_rows([("set", [first]), ("", [second])])

    assert PageReader(join(*texts)).text == "setbasealigned"
    assert placed_rows == [(first, 40), (second, 66)]
    assert height == 72


def test_zero_is_always_on_the_axis_of_changes():
    page = PageReader(interval_chart([("set", [Interval("from base", -8, -9, -7)])], "points"))

    zero_lines = [
        attributes for _, attributes in page.elements if attributes.get("class") == "zero"
    ]
    assert len(zero_lines) == 1
    assert "from base: -8.0 points, 95 % interval -9.0 to -7.0" in page.text
