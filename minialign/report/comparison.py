"""Put several runs side by side: their settings that differ, their scores, and their curves."""

from minialign.evaluation.shares import NO_VALUE, scaled_text
from minialign.methods.registry import METHODS
from minialign.report.charts import Curve, curve_chart, figure, key_of_styles
from minialign.report.curves import CHARTS, STYLES, has_numbers
from minialign.report.markup import Markup, element, join, table
from minialign.report.measures import find_change, measures_of
from minialign.report.run_files import CONFIG_FILE, RunFiles
from minialign.report.scores import describe_change, measure_title
from minialign.training.option_rules import has_effect
from minialign.training.options import PAPER_DEFAULTS
from minialign.utils.files import friendly_errors


def comparison_section(runs: list[RunFiles]) -> Markup:
    """Return how runs differ: a list of them, a table of settings, one for each set, and curves."""
    links = []
    for number, run in enumerate(runs, start=1):
        link = element("a", f"run {number}", href=f"#run-{number}")
        links.append(element("li", link, f": {run.name}, method {run.method}"))
    parts = [element("ul", *links), element("h2", "The runs side by side")]
    parts.append(settings_table(runs))
    set_names = {}
    for run in runs:
        set_names |= dict.fromkeys(run.set_names())
    for set_name in set_names:
        parts.append(set_table(runs, set_name))
    parts.append(shared_curves(runs))
    return join(*parts)


def numbered(runs) -> list[str]:
    """Return the short names of runs on a page."""
    return [f"run {number}" for number in range(1, len(runs) + 1)]


def settings_table(runs) -> Markup:
    """Return the settings that are not the same in all runs."""
    names = {}
    for run in runs:
        names |= dict.fromkeys(run.settings)
    rows = []
    for name in names:
        texts = [setting_text(run, name) for run in runs]
        if len(set(texts)) > 1:
            rows.append((name, [[element("span", text, class_="setting")] for text in texts]))
    if not rows:
        return element("p", "All runs have the same settings.", class_="muted")
    return table("Settings that differ", ["", *numbered(runs)], rows)


def setting_text(run, name) -> str:
    """Return a setting as a person would write it, or a dash if it is not set or has no effect."""
    value = run.settings.get(name)
    if value is None:
        return NO_VALUE
    # A run of another version may lack options of this one, and may have another method.
    if run.method in METHODS:
        with friendly_errors(run.folder / CONFIG_FILE, "restore the original file"):
            if not has_effect(PAPER_DEFAULTS | run.settings, name):
                return NO_VALUE
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)


def set_table(runs, set_name) -> Markup:
    """Return the scores of each aligned model on a set, with their changes from the base."""
    measures = {}
    for run in runs:
        measures |= dict.fromkeys(measures_of(run, set_name))
    rows = []
    for measure in measures:
        cells = [aligned_cell(run, measure, set_name) for run in runs]
        rows.append((measure_title(measure), cells))
    caption = f"Set “{set_name}”: the aligned models, and their changes from the base"
    return table(caption, ["", *numbered(runs)], rows)


def aligned_cell(run, measure, set_name) -> list:
    """Return the content of one cell: the score, and its change."""
    scores = run.scores_of("aligned", set_name)
    if not scores:
        return ["not measured"]
    content = [scaled_text(measure.value(scores), factor=1)]
    change = find_change(run, measure, set_name, baseline="base", variant="aligned")
    if change is not None:
        content.append(element("span", *describe_change(change, measure), class_="small"))
    return content


def shared_curves(runs) -> Markup:
    """Return the curves that several runs have, a line for each run."""
    figures = []
    for chart in CHARTS:
        metric, *_ = chart.metrics
        logs = {}  # name of a run: its log, if it has the metric
        for name, run in zip(numbered(runs), runs, strict=True):
            if has_numbers(run.log, metric):
                logs[name] = run.log
        if 2 <= len(logs) <= len(STYLES):
            figures.append(shared_figure(chart, metric, logs))
    if not figures:
        return element("p", "No curve is shared by two to four of these runs.", class_="muted")
    return element("div", *figures, class_="grid")


def shared_figure(chart, metric, logs: dict[str, list]) -> Markup:
    """Return one chart with a curve for each log. A shorter one ends earlier."""
    num_steps = max(len(log) for log in logs.values())
    curves = []
    for style, (name, log) in zip(STYLES, logs.items(), strict=False):
        values = [line.get(metric) for line in log]
        values += [None] * (num_steps - len(values))
        curves.append(Curve(name, values, style))
    unit = chart.unit or chart.title.lower()
    chart_of_runs = curve_chart(list(range(num_steps)), curves, unit)
    return figure(chart.title, key_of_styles(curves), chart_of_runs)
