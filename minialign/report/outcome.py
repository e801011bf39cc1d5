"""Weigh what became better and what became worse, against the base and against the control."""

from collections import defaultdict

from minialign.report.markup import Markup, element, join
from minialign.report.measures import (
    CHAIR_I,
    RECALL,
    find_change,
    has_intervals,
    measures_of,
    verdict_of,
)
from minialign.report.number_texts import counted, percent, signed
from minialign.report.run_files import RunFiles

# What each verdict means for the wrong mentions.
CHAIR_VERDICTS = {
    "better": "fewer wrong mentions.",
    "worse": "more wrong mentions.",
    "not clear": "no clear change.",
    "the same": "no change.",
    "": "",
}
# What each verdict is called before the sets that it holds for.
PLACE_VERDICTS = {
    "better": "clearly better on",
    "worse": "clearly worse on",
    "not clear": "not clear on",
    "the same": "the same on",
    "": "no verdict on",
}


def describe_outcome(run: RunFiles) -> list[Markup]:
    """Return what became of the scores: overall, on each set, and what is clearly worse."""
    if run.method == "reward":
        return describe_ranking(run)
    # 1. What the aligned model can be weighed against. Verdicts need intervals.
    baselines = []
    if has_intervals(run):
        baselines = [name for name in ("base", "control") if {name, "aligned"} <= run.scores.keys()]

    # 2. From the whole to the details.
    items = [describe_overall(run, baseline) for baseline in baselines]
    for set_name in run.set_names():
        if has_captions(run, "base", set_name) and has_captions(run, "aligned", set_name):
            items.append(describe_set(run, set_name))
    yes = describe_yes(run)
    if yes:
        items.append(join(element("strong", "More “yes”: "), yes))
    items += [describe_worse(run, baseline) for baseline in baselines]
    return items


# --- overall


def describe_overall(run, baseline) -> Markup:
    """Return on which sets captions and the answers to POPE are clearly better, and worse."""
    # 1. For each verdict the sets that it holds for.
    caption_places = defaultdict(list)
    pope_places = defaultdict(list)
    for set_name in run.set_names():
        if has_captions(run, "aligned", set_name):
            caption_places[verdict_of(run, CHAIR_I, set_name, baseline=baseline)].append(set_name)
        for verdict, splits in verdicts_of_splits(run, set_name, baseline).items():
            pope_places[verdict].append(f"{set_name} ({', '.join(splits)})")

    # 2. In words.
    sentences = []
    for title, places in (
        ("Captions (wrong mentions)", caption_places),
        ("POPE (right answers)", pope_places),
    ):
        outcome = describe_places(places)
        if outcome:
            sentences.append(f"{title}: {outcome}.")
    heading = f"Overall, aligned against {baseline}: "
    text = " ".join(sentences) or "nothing was measured for both."
    return join(element("strong", heading), text)


def verdicts_of_splits(run, set_name, baseline) -> dict[str, list[str]]:
    """Return {verdict: the splits of POPE with this verdict on their right answers}."""
    splits = defaultdict(list)
    for measure in measures_of(run, set_name):
        if measure.split and measure.better:
            splits[verdict_of(run, measure, set_name, baseline=baseline)].append(measure.split)
    return splits


def describe_places(places: dict[str, list[str]]) -> str:
    """Return where a score is better, worse, not clear or the same, and where it has no verdict."""
    parts = []
    for verdict, words in PLACE_VERDICTS.items():
        if verdict in places:
            parts.append(f"{words} {', '.join(places[verdict])}")
    return "; ".join(parts)


# --- details


def has_captions(run, variant, set_name) -> bool:
    """Return whether captions were scored, even if none of them mentions an object."""
    return CHAIR_I.name in run.scores_of(variant, set_name)


def describe_set(run, set_name) -> Markup:
    """Return what became of the captions of a set: the verdict, wrong mentions, and recall."""
    outcome = CHAIR_VERDICTS[verdict_of(run, CHAIR_I, set_name, baseline="base")]
    sentences = f" {describe_chair(run, set_name)} {describe_recall(run, set_name)}"
    return join(element("strong", f"{set_name}: {outcome}"), sentences)


def describe_chair(run, set_name) -> str:
    """Return how the wrong mentions changed on a set, and how the control did."""
    before = CHAIR_I.value(run.scores_of("base", set_name))
    after = CHAIR_I.value(run.scores_of("aligned", set_name))
    without_mentions = []
    if before is None:
        without_mentions.append("base")
    if after is None:
        without_mentions.append("aligned")
    if without_mentions:
        names = " and ".join(without_mentions)
        return f"The captions of {names} mention no object, so CHAIR_i cannot be compared."
    sentence = (
        f"Of the objects that the model mentions, {percent(after)} are not in the picture, against "
        f"{percent(before)} before"
    )
    of_control = CHAIR_I.value(run.scores_of("control", set_name))
    if of_control is not None:
        sentence += f" and {percent(of_control)} for the control"
    return f"{sentence}."


def describe_recall(run, set_name) -> str:
    """Return what became of recall: a model that says less is wrong less often."""
    before = RECALL.value(run.scores_of("base", set_name))
    after = RECALL.value(run.scores_of("aligned", set_name))
    if before is None or after is None:
        return ""
    return (
        f"The aligned model names {percent(after)} of the objects that are there, against "
        f"{percent(before)} before."
    )


def describe_yes(run) -> str:
    """Return where the aligned model answers yes to POPE more often than the base, if anywhere."""
    rises = []
    for set_name in run.set_names():
        before, num_questions_before = count_yes(run, "base", set_name)
        after, num_questions = count_yes(run, "aligned", set_name)
        if num_questions == num_questions_before and after > before:
            rises.append(f"{after:,} of {num_questions:,} on {set_name} against {before:,}")
    if not rises:
        return ""
    return (
        "The aligned model says yes to more questions of POPE than the base: "
        f"{', '.join(rises)}. {describe_unparsed(run)}"
    ).rstrip()


def describe_unparsed(run) -> str:
    """Return how many answers of the aligned model count as yes by the rule of POPE alone."""
    num_unparsed = 0
    for set_name in run.set_names():
        for scores in run.scores_of("aligned", set_name).get("pope", {}).values():
            num_unparsed += scores.get("unparsed") or 0
    if num_unparsed == 0:
        return ""
    return f"Answers without a clear yes or no count as yes. It gave {num_unparsed:,} of them."


def count_yes(run, variant, set_name) -> tuple[int, int]:
    """Return to how many questions of POPE a variant says yes, and how many there are.

    Both leave out a split whose numbers are not known.
    """
    num_yes = 0
    num_questions = 0
    for scores in run.scores_of(variant, set_name).get("pope", {}).values():
        share = scores.get("yes")
        num_of_split = scores.get("n")
        if share is not None and num_of_split is not None:
            num_yes += round(share * num_of_split)  # the share was computed from a whole number
            num_questions += num_of_split
    return num_yes, num_questions


def describe_worse(run, baseline) -> Markup:
    """Return the scores of each set that are clearly worse, or have no verdict."""
    # 1. Sort the scores that can be better or worse.
    worse = defaultdict(list)  # set: names of scores
    without_verdict = defaultdict(list)
    for set_name in run.set_names():
        for measure in measures_of(run, set_name):
            change = find_change(run, measure, set_name, baseline=baseline, variant="aligned")
            if change is None or not measure.better:
                continue
            name = f"POPE {measure.split}" if measure.split else measure.title
            verdict = change.verdict(measure)
            if verdict == "worse":
                worse[set_name].append(f"{name} {signed(change.value)}")
            elif verdict == "":
                without_verdict[set_name].append(name)

    # 2. In words.
    if worse:
        heading = f"Clearly worse than the {baseline}, in percentage points:"
        parts = [element("strong", heading), list_of_sets(worse)]
    else:
        parts = [f"No score is clearly worse than that of the {baseline}."]
    if without_verdict:
        parts += [" There is no verdict on:", list_of_sets(without_verdict)]
    return join(*parts)


def list_of_sets(names: dict[str, list[str]]) -> Markup:
    """Return a list with a line for each set and its names."""
    lines = [f"{set_name}: {', '.join(names[set_name])}" for set_name in names]
    return element("ul", *[element("li", line) for line in lines])


def describe_ranking(run) -> list[str]:
    """Return how a reward model ranks the pairs that it was not trained on."""
    scores = run.scores_of("aligned", "held-out")
    accuracy = scores.get("accuracy")
    num_pairs = scores.get("n")
    if accuracy is None or num_pairs is None:
        return []
    sentences = [
        f"On {counted(num_pairs, 'pair')} that it was not trained on, the reward model is right "
        f"in {percent(100 * accuracy)}.",
        "A pair counts if its chosen answer has the higher score, and half if the scores are "
        "equal.",
    ]
    if scores.get("ties") is not None:
        sentences.append(f"They are equal in {percent(100 * scores['ties'])} of the pairs.")
    sentences.append(f"Chance is {percent(50)}.")
    return [" ".join(sentences)]
