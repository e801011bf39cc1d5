"""Draw the log of a run as curves: what the loss did, and whether the model is still healthy."""

from dataclasses import dataclass

from minialign.report.charts import (
    Curve,
    curve_chart,
    figure,
    key_of_styles,
    steps_per_point,
)
from minialign.report.markup import Markup, element, join
from minialign.report.number_texts import counted, is_number, with_minus
from minialign.report.run_files import RunFiles

STYLES = ("color-first", "color-second dashed", "color-third dotted", "color-fourth")
NOT_METRICS = ("step", "seconds")  # how long a step took says nothing about the model


@dataclass(frozen=True)
class Chart:
    """What one chart shows: metrics of the log, and what a reader may see in them."""

    title: str
    unit: str
    metrics: dict[str, str]  # name in metrics.jsonl: name in the key of the chart
    note: str = ""


CHARTS = (
    Chart("Loss", "", {"loss": "loss"}, "What the optimizer lowers."),
    Chart(
        "Margin",
        "nats",
        {"margin": "margin"},
        "How far chosen answers are ahead of rejected ones: in log-prob, compared with the "
        "reference and times beta. It is 0 where the model equals the reference, and rises while "
        "the model learns the preference.",
    ),
    Chart(
        "Accuracy",
        "of the pairs",
        {"accuracy": "accuracy"},
        "The share of pairs whose margin is above 0. A margin of 0 counts half.",
    ),
    Chart(
        "Log-prob of chosen answers",
        "nats",
        {"logp_chosen": "model", "ref_logp_chosen": "reference"},
    ),
    Chart(
        "Log-prob of rejected answers",
        "nats",
        {"logp_rejected": "model", "ref_logp_rejected": "reference"},
        "The model should fall below its reference here.",
    ),
    Chart(
        "Scores of the reward model",
        "score",
        {"score_chosen": "chosen", "score_rejected": "rejected"},
        "The chosen answers should rise above the rejected ones.",
    ),
    Chart(
        "Reward",
        "standard deviations",
        {"reward": "reward"},
        "What the reward model gives, in its standard deviations over the data. It should rise.",
    ),
    Chart("Reward before scaling", "score", {"reward_raw": "reward"}),
    Chart(
        "KL from the reference",
        "nats an answer",
        {"kl": "KL"},
        "How far the policy has moved. A fast rise means that it exploits the reward model.",
    ),
    Chart(
        "Entropy",
        "nats a token",
        {"entropy": "entropy"},
        "Near 0 the policy always says the same, and nothing new can be learned.",
    ),
    Chart("Length of the answers", "tokens", {"length": "length"}),
    Chart("Answers that ended", "of the answers", {"ended": "ended"}, "The others were cut off."),
    Chart("Loss of the value head", "squared error", {"value_loss": "value loss"}),
    Chart("Gradient norm", "", {"grad_norm": "gradient norm"}, "Before it is clipped."),
    Chart("Learning rate", "", {"lr": "learning rate"}),
)

# Below the margin of a reward model, in place of the note above.
MARGIN_OF_SCORES = (
    "How far the scores of chosen answers are above those of rejected ones. It begins at 0 and "
    "rises while the model learns the preference."
)
NUM_LAST = 10  # steps, over which the model is compared with its reference


def curves_section(run: RunFiles) -> Markup:
    """Return the curves of a run, of its control and of the reward model that it trained first."""
    parts = [element("h2", "Curves")]
    if not run.log:
        sentence = "There is nothing to draw: metrics.jsonl is missing or empty."
        return join(*parts, element("p", sentence, class_="muted"))
    parts.append(element("p", describe_points(run.log), class_="muted small"))
    parts.append(curves_of(run.log))
    if run.control_log:
        parts.append(element("h3", "The control, which learned from the chosen answers alone"))
        parts.append(curves_of(run.control_log, with_notes=False))
    if run.reward_log:
        parts.append(element("h3", "The reward model, which was trained first"))
        parts.append(curves_of(run.reward_log))
    return join(*parts)


def describe_points(log) -> str:
    """Say what a point of the curves stands for, and how to read its value."""
    size = steps_per_point(log)
    sentence = f"{counted(len(log), 'step')}, a point each."
    if size > 1:
        sentence = f"{len(log):,} steps. A point is the mean of {size} of them."
    return f"{sentence} Log-probs are summed over the tokens of an answer. Values show on hover."


def curves_of(log: list[dict], *, with_notes=True) -> Markup:
    """Return the charts of a log: those of CHARTS that it has metrics for, then all others.

    with_notes: whether a note below a chart says what to see in it.
    """
    steps = [line.get("step", i) for i, line in enumerate(log)]
    figures = []
    for chart in CHARTS:
        if any(has_numbers(log, metric) for metric in chart.metrics):
            note = note_of(chart, log) if with_notes else ""
            figures.append(curve_figure(chart, steps, log, note=note))
    for metric in other_metrics(log):
        figures.append(curve_figure(Chart(metric, "", {metric: metric}), steps, log, note=""))
    return element("div", *figures, class_="grid")


def other_metrics(log) -> list[str]:
    """Return the metrics of a log that no chart of CHARTS names."""
    names = {}
    for line in log:
        names |= dict.fromkeys(line)
    charted = set(NOT_METRICS)
    for chart in CHARTS:
        charted.update(chart.metrics)
    return [name for name in names if name not in charted and has_numbers(log, name)]


def has_numbers(log, metric) -> bool:
    """Return whether any line of a log has a number for a metric."""
    return any(is_number(line.get(metric)) for line in log)


def note_of(chart: Chart, log) -> str:
    """Return the note of a chart, and where the model and its reference ended."""
    note = chart.note
    if "margin" in chart.metrics and has_numbers(log, "score_chosen"):
        note = MARGIN_OF_SCORES
    return f"{note} {describe_distance(chart, log)}".strip()


def describe_distance(chart: Chart, log) -> str:
    """Return how far a model was from its reference at last, for a chart of both."""
    if list(chart.metrics.values()) != ["model", "reference"]:
        return ""
    means = []
    for metric in chart.metrics:
        values = [line.get(metric) for line in log[-NUM_LAST:]]
        values = [value for value in values if is_number(value)]
        if not values:
            return ""
        means.append(sum(values) / len(values))
    model, reference = means
    direction = "below" if model < reference else "above"
    steps = counted(min(NUM_LAST, len(log)), "step")
    values = with_minus(f"{model:.1f} against {reference:.1f}")
    return (
        f"In the last {steps} the model is {abs(model - reference):.1f} nats {direction} its "
        f"reference on average: {values}."
    )


def curve_figure(chart: Chart, steps, log, *, note) -> Markup:
    """Return one chart with its title, its key and its note."""
    # 1. The curves, and the values that cannot be drawn.
    curves = []
    num_missing = 0
    for style, (metric, name) in zip(STYLES, chart.metrics.items(), strict=False):
        if has_numbers(log, metric):
            values = [line.get(metric) for line in log]
            num_missing += sum(not is_number(value) for value in values)
            curves.append(Curve(name, values, style))

    # 2. What stands above and below the chart.
    key = key_of_styles(curves) if len(curves) > 1 else ""
    parts = [curve_chart(steps, curves, chart.unit)]
    if note:
        parts.append(element("p", note, class_="muted small"))
    if num_missing > 0:
        sentence = f"What is missing or not finite is left out: {counted(num_missing, 'value')}."
        parts.append(element("p", sentence, class_="small"))
    return figure(chart.title, key, *parts)
