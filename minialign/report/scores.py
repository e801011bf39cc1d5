"""Show the scores before and after: tables, bars, and how sure each change is."""

from minialign.evaluation.shares import NO_VALUE, scaled_text
from minialign.report.charts import Bar, Interval, bar_chart, figure, interval_chart
from minialign.report.markup import Markup, element, join, table
from minialign.report.measures import (
    Change,
    Measure,
    find_change,
    has_intervals,
    measures_of,
    measures_of_run,
)
from minialign.report.number_texts import counted, signed
from minialign.report.run_files import RunFiles

CHARTED = ("chair_i", "recall", "accuracy")  # the others are in the tables alone


def scores_section(run: RunFiles) -> Markup:
    """Return the scores of a run: what they mean, a table for each set, and the charts."""
    parts = [element("h2", "Before and after")]
    set_names = run.set_names()
    if not set_names:
        sentence = "Nothing was measured: the run had no evaluation set (--eval)."
        if not run.summary:
            sentence = "Nothing is measured yet: the run is not finished."
        return join(*parts, element("p", sentence, class_="muted"))
    parts += explanations(run)
    tables = [scores_table(run, set_name) for set_name in set_names]
    parts.append(element("div", *tables, class_="grid wide"))
    parts.append(element("h3", "The main scores as charts"))
    parts.append(element("div", *charts_of(run), class_="grid"))
    return join(*parts)


def explanations(run) -> list[Markup]:
    """Return what the changes mean."""
    if run.method == "reward":
        sentence = (
            "A reward model ranks the two answers of a pair. It is measured on the pairs that it "
            "was trained on, and on those that were held out. Before training all scores are 0."
        )
        return [element("p", sentence)]
    meanings = []
    if has_intervals(run):
        meanings.append(
            "Below a change stands its 95 % interval (paired bootstrap), if it has one. It says "
            "how the change would vary over other images of this kind. If 0 is inside, the change "
            "may be chance, and is called not clear. The interval says nothing about other seeds."
        )
    else:
        meanings.append(
            "Changes have no intervals here, because this run kept no answers (captions.jsonl)."
        )
    meanings.append("Changes are computed before rounding, in percentage points for a share.")
    items = [element("li", meaning) for meaning in meanings]
    return [element("ul", *items, class_="small")]


def scores_table(run: RunFiles, set_name) -> Markup:
    """Return the table of one evaluation set: a row for each measure, a column for each variant."""
    variants = run.variants()
    baseline = variants[0]
    last_variant = variants[-1]
    headings = ["", *variants]
    has_change = baseline != last_variant
    if has_change:
        headings.append(f"{last_variant} minus {baseline}")
    rows = []
    for measure in measures_of(run, set_name):
        values = [measure.value(run.scores_of(variant, set_name)) for variant in variants]
        cells = [[scaled_text(value, factor=1)] for value in values]
        if has_change:
            change = find_change(run, measure, set_name, baseline=baseline, variant=last_variant)
            cells.append(describe_change(change, measure))
        rows.append((measure_title(measure), cells))
    caption = f"Set “{set_name}”{describe_size(run, set_name)}"
    return table(caption, headings, rows)


def describe_size(run: RunFiles, set_name) -> str:
    """Return how many images and questions a set has, as far as it is known."""
    sizes = []
    num_images = len({line["image"] for line in run.captions if line["set"] == set_name})
    if num_images > 0:
        sizes.append(f"{counted(num_images, 'image')} to describe")
    questions = {}  # split of POPE: its name, and how many questions it has
    for variant in run.scores:
        for split, scores in run.scores_of(variant, set_name).get("pope", {}).items():
            if scores.get("n"):
                questions[split] = f"{split} {scores['n']:,}"
    if questions:
        sizes.append(f"questions of POPE: {', '.join(questions.values())}")
    return f": {'; '.join(sizes)}" if sizes else ""


def measure_title(measure: Measure) -> str:
    """Return the title of a row, with its unit and which direction is better."""
    title = measure.title if measure.unit in measure.title else f"{measure.title}, {measure.unit}"
    if measure.better:
        arrow = "↓" if measure.better == "lower" else "↑"
        title += f" {arrow}"
    return title


def describe_change(change: Change | None, measure: Measure) -> list:
    """Return the content of a cell: the change, its interval, and whether it is better."""
    if change is None:
        return [NO_VALUE]
    parts = [signed(change.value)]
    if change.interval is not None:
        low, high = change.interval
        parts.append(element("span", f"{signed(low)} to {signed(high)}", class_="small"))
    verdict = change.verdict(measure)
    if verdict:
        style = {"better": "right", "worse": "wrong"}.get(verdict, "muted")
        parts.append(element("span", verdict, class_=style))
    return parts


# --- charts


def charts_of(run: RunFiles) -> list[Markup]:
    """Return the charts of the main measures: bars, and how sure the changes are.

    The splits of POPE differ little, so they have bars only where no interval is known.
    """
    figures = []
    for measure in measures_of_run(run):
        if measure.name not in CHARTED:
            continue
        intervals = change_intervals(run, measure)
        if not measure.split or not intervals:
            figures.append(bars_figure(run, measure))
        if intervals:
            figures.append(changes_figure(measure, intervals))
    return figures


def bars_figure(run, measure) -> Markup:
    """Return the bars of one measure, of every variant on every set."""
    groups = []
    highest = 0
    for set_name in run.set_names():
        bars = []
        for variant in run.variants():
            value = measure.value(run.scores_of(variant, set_name))
            bars.append(Bar(variant, value, f"color-{variant}"))
            highest = max(highest, value or 0)
        groups.append((set_name, bars))
    chart = bar_chart(groups, "%", highest=highest)
    return figure(capitalized(measure.title), f"percent, {measure.better} is better", chart)


def change_intervals(run, measure) -> list[tuple[str, list[Interval]]]:
    """Return the changes of one measure on each set: from base, and from the control."""
    groups = []
    for set_name in run.set_names():
        intervals = []
        for baseline in ("base", "control"):
            change = find_change(run, measure, set_name, baseline=baseline, variant="aligned")
            if change is not None and change.interval is not None:
                name = f"from {baseline}"
                color = f"color-{baseline}"
                intervals.append(Interval(name, change.value, *change.interval, color))
        if intervals:
            groups.append((set_name, intervals))
    return groups


def changes_figure(measure, groups) -> Markup:
    """Return the chart of the changes of one measure."""
    words = f"to the aligned model, with 95 % intervals; {measure.better} is better"
    return figure(f"Change: {measure.title}", words, interval_chart(groups, "percentage points"))


def capitalized(title: str) -> str:
    """Return a title with a capital first letter, the others as they are."""
    return title[:1].upper() + title[1:]
