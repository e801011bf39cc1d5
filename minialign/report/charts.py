"""Draw charts as SVG: curves over the steps of a run, bars, and intervals around zero."""

import math
from dataclasses import dataclass

from minialign.report.markup import Markup, element, join
from minialign.report.number_texts import is_number, number_text, with_minus

# Lengths in the units of the SVG, about a pixel each on a telephone.
WIDTH = 360
CURVE_HEIGHT = 170
LEFT = 54  # for the numbers of the vertical axis
RIGHT = 12
TOP = 20  # for the unit
BOTTOM = 32  # for the numbers and the name of the horizontal axis
ROW_HEIGHT = 20
MAX_POINTS = 60  # of a curve. More steps than that are averaged.
MAX_NAME = 22  # characters of a name beside a bar
# Share of the larger value. The means of equal values differ by less, as numbers are rounded.
SMALLEST_DIFFERENCE = 1e-9


@dataclass(frozen=True)
class Curve:
    """A curve of a chart: a value for each step, None where there is none."""

    name: str
    values: list[float | None]
    style: str  # CSS classes: a color and perhaps dashes


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart."""

    name: str
    value: float | None
    style: str = ""


@dataclass(frozen=True)
class Interval:
    """A row of an interval chart: a difference, and the ends of its interval."""

    name: str
    value: float
    low: float
    high: float
    style: str = ""


# --- axes


def axis_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Return about `count` round numbers that span low to high."""
    if high - low <= SMALLEST_DIFFERENCE * max(abs(low), abs(high)):
        margin = abs(low) / 2 or 1
        low -= margin
        high += margin
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    round_steps = [factor * power for factor in (1, 2, 5, 10)]
    step = min(round_steps, key=lambda step: abs(step - rough))
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def short_name(name: str, max_characters: int = MAX_NAME) -> str:
    """Return a name that fits beside a bar, or into `max_characters`."""
    return name if len(name) <= max_characters else f"{name[: max_characters - 1]}…"


def short_heading(heading: str) -> str:
    """Return a heading that fits the width of a chart."""
    return short_name(heading, max_characters=2 * MAX_NAME)


@dataclass(frozen=True)
class Axis:
    """An axis with its numbers, and where it begins and ends in the chart."""

    ticks: list[float]
    start: float
    end: float

    def place(self, value) -> float:
        """Return where a value lies."""
        low = self.ticks[0]
        high = self.ticks[-1]
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def figure(title, words, *content) -> Markup:
    """Return a figure: its title, words below the title, such as a key, and its content."""
    caption = element("figcaption", element("strong", title), words)
    return element("figure", caption, *content)


def svg(height, description, *children) -> Markup:
    """Return an SVG of the common width, with a description for those who cannot see it."""
    return element(
        "svg",
        *children,
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=description,
    )


def svg_text(content, x, y, *, anchor="start", class_=None) -> Markup:
    """Return a text in an SVG."""
    return element("text", content, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def svg_line(x1, y1, x2, y2, *, class_) -> Markup:
    """Return a straight line in an SVG."""
    return element(
        "line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_
    )


def key_of_styles(curves: list[Curve]) -> Markup:
    """Return the key of a chart: a short line in the style of each curve, beside its name."""
    keys = []
    for curve in curves:
        line = element("line", x1=0, y1=5, x2=26, y2=5, class_=f"curve {curve.style}")
        sample = element("svg", line, viewBox="0 0 26 10", aria_hidden="true")
        keys.append(element("span", sample, curve.name, class_="key"))
    return element("span", *keys)


# --- curves


def averaged(values: list[float | None]) -> list[float | None]:
    """Return at most MAX_POINTS values: means of as many neighbors as that takes."""
    size = steps_per_point(values)
    means = []
    for first in range(0, len(values), size):
        known = [value for value in values[first : first + size] if is_number(value)]
        means.append(sum(known) / len(known) if known else None)
    return means


def steps_per_point(values) -> int:
    """Return how many steps a point of a curve stands for."""
    return max(1, math.ceil(len(values) / MAX_POINTS))


def curve_chart(steps: list[int], curves: list[Curve], unit: str) -> Markup:
    """Draw curves over the steps of a run. A strip over each point tells its values on hover.

    unit: that of the vertical axis. Without one, the axis has the name of the first curve.
    """
    # 1. A point for one or several steps.
    size = steps_per_point(steps)
    first_steps = steps[::size]
    points = [averaged(curve.values) for curve in curves]

    # 2. The axes.
    known = []
    for values in points:
        known += [value for value in values if value is not None]
    last_step = max(steps[-1], steps[0] + 1)
    x_axis = Axis(axis_ticks(steps[0], last_step), start=LEFT, end=WIDTH - RIGHT)
    y_axis = Axis(axis_ticks(min(known), max(known)), start=CURVE_HEIGHT - BOTTOM, end=TOP)
    shapes = draw_axes(x_axis, y_axis, unit or curves[0].name)

    # 3. The curves, and over them the strips that tell the values.
    for curve, values in zip(curves, points, strict=True):
        shapes += draw_curve(curve, first_steps, values, x_axis=x_axis, y_axis=y_axis)
    for i, step in enumerate(first_steps):
        title = describe_steps(steps[i * size : (i + 1) * size])
        for curve, values in zip(curves, points, strict=True):
            title += f"\n{curve.name}: {with_unit(values[i], unit)}"
        shapes.append(hover_strip(x_axis.place(step), title, num_strips=len(first_steps)))
    names = ", ".join(curve.name for curve in curves)
    return svg(CURVE_HEIGHT, f"{names} over the steps", *shapes)


def describe_steps(steps) -> str:
    """Return which steps a point stands for."""
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"steps {steps[0]} to {steps[-1]}, mean"


def with_unit(value, unit) -> str:
    """Return a value with its unit, or the word none."""
    return "none" if value is None else f"{number_text(value)} {unit}".rstrip()


def draw_axes(x_axis, y_axis, unit) -> list[Markup]:
    """Draw the axes of a curve chart: their numbers and units, and a line at each height."""
    shapes = [svg_text(short_heading(unit), 0, 10)]
    for tick in y_axis.ticks:
        y = y_axis.place(tick)
        shapes.append(svg_line(LEFT, y, WIDTH - RIGHT, y, class_="axis"))
        shapes.append(svg_text(number_text(tick), LEFT - 5, y + 4, anchor="end"))
    for tick in x_axis.ticks:
        if tick == int(tick):  # there is no half step
            x = x_axis.place(tick)
            y = CURVE_HEIGHT - BOTTOM + 14
            shapes.append(svg_text(number_text(int(tick)), x, y, anchor="middle"))
    shapes.append(svg_text("step", WIDTH - RIGHT, CURVE_HEIGHT - 4, anchor="end"))
    return shapes


def draw_curve(curve: Curve, steps, values, *, x_axis, y_axis) -> list[Markup]:
    """Draw a curve. A dot shows a point that has no neighbor to draw a line to."""
    shapes = []
    for run in unbroken_runs(steps, values):
        places = [(x_axis.place(step), y_axis.place(value)) for step, value in run]
        if len(places) == 1:
            x, y = places[0]
            dot = element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=curve.style)
            shapes.append(dot)
        else:
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            shapes.append(element("polyline", points=points, class_=f"curve {curve.style}"))
    return shapes


def unbroken_runs(steps, values) -> list[list[tuple]]:
    """Cut (step, value) pairs where a value is missing."""
    runs = [[]]
    for step, value in zip(steps, values, strict=True):
        if value is not None:
            runs[-1].append((step, value))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def hover_strip(x, title, num_strips) -> Markup:
    """Return an invisible strip that shows `title` when the pointer is on it."""
    width = (WIDTH - LEFT - RIGHT) / num_strips
    return element(
        "rect",
        element("title", title),
        x=f"{x - width / 2:.1f}",
        y=TOP,
        width=f"{width:.1f}",
        height=CURVE_HEIGHT - BOTTOM - TOP,
        class_="hover",
    )


# --- bars and intervals

NAME_WIDTH = 120
VALUE_WIDTH = 48
GROUP_GAP = 6  # below the rows of a group


def bar_chart(groups: list[tuple[str, list[Bar]]], unit: str, *, highest: float) -> Markup:
    """Draw horizontal bars from 0 to `highest`, in groups with a heading. Each has its value."""
    names, placed_bars, height = place_rows(groups)
    shapes = [bar_row(bar, y, unit=unit, highest=highest) for bar, y in placed_bars]
    summary = "; ".join(heading for heading, _ in groups)
    return svg(height, f"bars: {summary}", *names, *shapes)


def place_rows(groups) -> tuple[list[Markup], list[tuple], float]:
    """Place groups of rows below each other.

    groups: pairs of a heading, which may be empty, and rows: each a Bar or each an Interval.

    Returns: the headings and names as shapes, pairs (row, lower edge of the row), and the height.
    """
    texts = []
    placed_rows = []
    y = 0
    for heading, rows in groups:
        if heading:
            y += ROW_HEIGHT
            texts.append(svg_text(short_heading(heading), 0, y - 5, class_="value"))
        for row in rows:
            y += ROW_HEIGHT
            texts.append(svg_text(short_name(row.name), NAME_WIDTH - 6, y - 6, anchor="end"))
            placed_rows.append((row, y))
        y += GROUP_GAP
    return texts, placed_rows, y


def bar_row(bar: Bar, y, *, unit, highest) -> Markup:
    """Draw one bar in the row whose lower edge is at y."""
    if bar.value is None:
        return svg_text("nothing to count", NAME_WIDTH, y - 6)
    axis = Axis([0, highest or 1], start=NAME_WIDTH, end=WIDTH - VALUE_WIDTH)
    end = axis.place(bar.value)
    shape = element(
        "rect",
        element("title", f"{bar.name}: {number_text(bar.value)} {unit}"),
        x=NAME_WIDTH,
        y=y - ROW_HEIGHT + 3,
        width=f"{max(1, end - NAME_WIDTH):.1f}",
        height=ROW_HEIGHT - 6,
        class_=bar.style,
    )
    return join(shape, svg_text(f"{bar.value:.1f}", end + 5, y - 6, class_="value"))


def interval_chart(groups: list[tuple[str, list[Interval]]], unit: str) -> Markup:
    """Draw differences as dots on their intervals, around a line at zero."""
    # 1. The axis, which always has zero on it.
    ends = [0.0]
    for _, intervals in groups:
        for interval in intervals:
            ends += [interval.low, interval.high, interval.value]
    start = NAME_WIDTH + 8  # so that a dot does not touch a name
    axis = Axis(axis_ticks(min(ends), max(ends)), start=start, end=WIDTH - RIGHT)

    # 2. A line at each number of the axis, and the number below the rows.
    names, placed_intervals, height = place_rows(groups)
    shapes = []
    for tick in axis.ticks:
        is_zero = abs(tick) < 1e-12
        x = axis.place(tick)
        shapes.append(svg_line(x, 0, x, height, class_="zero" if is_zero else "axis"))
        label = "0" if is_zero else with_minus(f"{tick:+.4g}")
        shapes.append(svg_text(label, x, height + 13, anchor="middle"))
    shapes.append(svg_text(unit, WIDTH - RIGHT, height + 27, anchor="end"))

    # 3. The intervals, over the lines.
    for interval, y in placed_intervals:
        shapes.append(interval_row(interval, axis, y, unit=unit))
    return svg(height + 32, "differences with their intervals", *names, *shapes)


def interval_row(interval: Interval, axis: Axis, y, *, unit) -> Markup:
    """Draw one difference in the row whose lower edge is at y: a line, and a dot on it."""
    middle = y - ROW_HEIGHT / 2
    title = (
        f"{interval.name}: {interval.value:+.1f} {unit}, "
        f"95 % interval {interval.low:+.1f} to {interval.high:+.1f}"
    )
    line = element(
        "line",
        x1=f"{axis.place(interval.low):.1f}",
        y1=middle,
        x2=f"{axis.place(interval.high):.1f}",
        y2=middle,
        stroke_width=3,
        class_=interval.style,
    )
    dot = element(
        "circle", cx=f"{axis.place(interval.value):.1f}", cy=middle, r=5, class_=interval.style
    )
    return element("g", element("title", title), line, dot)
