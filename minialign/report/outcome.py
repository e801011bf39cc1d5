"""Weigh what became better and what became worse, against the base and against the control."""

from minialign.report.markup import Markup, element, join
from minialign.report.measures import (
    CAPTION_MEASURES,
    find_change,
    has_intervals,
    measures_of,
    signed,
)
from minialign.report.run_files import RunFiles

CHAIR_I, _, RECALL, *_ = CAPTION_MEASURES
# What a verdict on the wrong mentions is called.
VERDICTS = {
    "better": "fewer wrong mentions.",
    "worse": "more wrong mentions.",
    "not clear": "no clear change.",
    "the same": "no change.",
    "": "",
}


def describe_outcome(run: RunFiles) -> list[Markup]:
    """Return what became of the scores: overall, on each set, and what is clearly worse."""
    if run.method == "reward":
        return describe_ranking(run)
    items = []
    compared = [name for name in ("base", "control") if {name, "aligned"} <= run.scores.keys()]
    if has_intervals(run):
        items += [describe_overall(run, before) for before in compared]
    for set_name in run.set_names():
        change = find_change(run, CHAIR_I, set_name, before="base", after="aligned")
        if change is not None:
            outcome = VERDICTS[change.verdict(CHAIR_I)]
            sentence = f" {describe_chair(run, set_name)} {describe_recall(run, set_name)}"
            items.append(join(element("strong", f"{set_name}: {outcome}"), sentence))
    yes = describe_yes(run)
    if yes:
        items.append(join(element("strong", "More “yes”: "), yes))
    if has_intervals(run):
        items += [describe_worse(run, before) for before in compared]
    return items


# --- overall


def describe_overall(run, before) -> Markup:
    """Return on which sets captions and the answers to POPE are clearly better, and worse."""
    places = {"Captions": {}, "POPE": {}}  # what is measured: {verdict: where}
    for set_name in run.set_names():
        splits = {}  # verdict: splits of POPE
        for measure in measures_of(run, set_name):
            if measure != CHAIR_I and not (measure.split and measure.better):
                continue
            change = find_change(run, measure, set_name, before=before, after="aligned")
            verdict = change.verdict(measure) if change is not None else ""
            if measure.split:
                splits.setdefault(verdict, []).append(measure.split)
            else:
                places["Captions"].setdefault(verdict, []).append(set_name)
        for verdict, names in splits.items():
            places["POPE"].setdefault(verdict, []).append(f"{set_name} ({', '.join(names)})")
    captions = weigh(places["Captions"])
    pope = weigh(places["POPE"])
    sentence = ""
    if captions:
        sentence += f"Captions (wrong mentions): {captions}. "
    if pope:
        sentence += f"POPE (right answers): {pope}."
    heading = f"Overall, aligned against {before}: "
    return join(element("strong", heading), sentence or "nothing was measured for both.")


def weigh(places: dict[str, list[str]]) -> str:
    """Return where a score is better, where it is worse, and where that is not clear."""
    words = {
        "better": "clearly better on",
        "worse": "clearly worse on",
        "not clear": "not clear on",
        "the same": "the same on",
    }
    return "; ".join(
        f"{word} {', '.join(places[verdict])}"
        for verdict, word in words.items()
        if verdict in places
    )


# --- details


def describe_chair(run, set_name) -> str:
    """Return how the wrong mentions changed on a set, and how the control did."""
    before = CHAIR_I.value(run.scores["base"][set_name])
    after = CHAIR_I.value(run.scores["aligned"][set_name])
    sentence = (
        f"Of the objects that the model mentions, {percent(after)} are not in the picture, against "
        f"{percent(before)} before"
    )
    scores = run.scores.get("control", {}).get(set_name)
    value = CHAIR_I.value(scores) if scores else None
    if value is not None:
        sentence += f" and {percent(value)} for the control"
    return f"{sentence}."


def describe_recall(run, set_name) -> str:
    """Return what became of recall: a model that says less is wrong less often."""
    if find_change(run, RECALL, set_name, before="base", after="aligned") is None:
        return ""
    before = RECALL.value(run.scores["base"][set_name])
    after = RECALL.value(run.scores["aligned"][set_name])
    return f"It names {percent(after)} of the objects that are there, against {percent(before)}."


def describe_yes(run) -> str:
    """Return where the aligned model answers yes to POPE more often than the base, if anywhere."""
    # 1. The mean share over the splits of each set, where all splits were measured twice.
    rises = []
    for set_name in run.set_names():
        measures = [measure for measure in measures_of(run, set_name) if measure.name == "yes"]
        before = mean_value(run, "base", set_name, measures=measures)
        after = mean_value(run, "aligned", set_name, measures=measures)
        if before is not None and after is not None and after > before:
            rises.append(f"{percent(after)} on {set_name} against {percent(before)}")
    if not rises:
        return ""

    # 2. Answers without a word of either kind count as yes by the rule of POPE.
    sentence = "The aligned model says yes to more questions of POPE than the base: "
    sentence += f"{', '.join(rises)}."
    num_unparsed = 0
    for scores in run.scores["aligned"].values():
        num_unparsed += sum(split.get("unparsed", 0) for split in scores.get("pope", {}).values())
    if num_unparsed > 0:
        sentence += f" {num_unparsed:,} of its answers hold no clear yes or no, and count as yes."
    return sentence


def mean_value(run, variant, set_name, *, measures) -> float | None:
    """Return the mean of several measures, or None if one was not measured."""
    scores = run.scores.get(variant, {}).get(set_name, {})
    values = [measure.value(scores) for measure in measures]
    if not values or None in values:
        return None
    return sum(values) / len(values)


def describe_worse(run, before) -> Markup:
    """Return a list of the scores that are clearly worse than before, for each set."""
    items = []
    for set_name in run.set_names():
        names = []
        for measure in measures_of(run, set_name):
            change = find_change(run, measure, set_name, before=before, after="aligned")
            if change is not None and change.verdict(measure) == "worse":
                name = f"POPE {measure.split}" if measure.split else measure.title
                names.append(f"{name} {signed(change.value)}")
        if names:
            items.append(element("li", f"{set_name}: {', '.join(names)}"))
    if not items:
        return join(f"No score is clearly worse than that of the {before}.")
    heading = element("strong", f"Clearly worse than the {before}, in percentage points:")
    return join(heading, element("ul", *items))


def percent(value) -> str:
    """Return a share in percent. The space before the sign breaks no line."""
    return f"{value:.1f}\u00a0%"


def describe_ranking(run) -> list[str]:
    """Return how a reward model ranks the pairs that it was not trained on."""
    scores = run.scores.get("aligned", {}).get("held-out")
    if not scores:
        return []
    return [
        f"The reward model scores the chosen answer higher in {100 * scores['accuracy']:.1f} % of "
        f"{scores['n']} pairs that it was not trained on. Chance is 50 %."
    ]
