"""What was measured before and after: the scores by name, and the intervals of their changes.

Intervals need the counts of every image. Those of captions come from captions.jsonl, those of POPE
from answers.jsonl. With fewer than MIN_IMAGES there is no interval: every resample of a single
image is that image again, so its interval would have no width, however little one image says.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minialign.evaluation.intervals import difference_interval
from minialign.evaluation.pope import counts_as_yes
from minialign.report.run_files import RunFiles

MIN_IMAGES = 2  # an interval needs so many images on which a model has something to count


@dataclass(frozen=True)
class Measure:
    """A score of evaluation.json, and how it is shown."""

    name: str  # in the scores of captions, or of a split of POPE
    title: str
    unit: str = "%"
    better: str = ""  # "lower" or "higher", empty if neither is better
    split: str = ""  # of POPE
    # Counts what is measured on an image, and what that is a share of, from a variant and a line of
    # captions.jsonl, or of answers.jsonl for a split of POPE. None where there are no such counts:
    # then there is neither an interval nor a verdict.
    count: Callable | None = None

    def value(self, scores: dict) -> float | None:
        """Return the score in its unit, or None if it was not measured or is a share of nothing."""
        if self.split:
            scores = scores.get("pope", {}).get(self.split, {})
        value = scores.get(self.name)
        if value is None:
            return None
        return 100 * value if self.unit == "%" else value


def count_absent(line, variant):
    """Count the mentions of objects that are not in the image, and all mentions (CHAIR_i)."""
    mentions = line["answers"][variant]["mentions"]
    return sum(not mention["present"] for mention in mentions), len(mentions)


def count_captions_with_absent(line, variant):
    """Count the caption if it has such a mention (CHAIR_s)."""
    num_absent, _ = count_absent(line, variant)
    return int(num_absent > 0), 1


def count_recalled(line, variant):
    """Count the annotated objects that are mentioned, and all annotated objects."""
    objects = set(line["objects"])
    return len(objects) - len(missed_objects(line, variant)), len(objects)


def missed_objects(line, variant) -> list[str]:
    """Return the annotated objects that the answer of a variant does not mention."""
    mentioned = {mention["object"] for mention in line["answers"][variant]["mentions"]}
    return [name for name in dict.fromkeys(line["objects"]) if name not in mentioned]


def count_right_colors(line, variant):
    """Count the right colors, and all colors that can be right or wrong."""
    mentions = line["answers"][variant]["mentions"]
    verdicts = [mention.get("right_colour") for mention in mentions]
    return verdicts.count(True), len(verdicts) - verdicts.count(None)


def count_repeats(line, variant):
    """Count the mentions of an object that was mentioned before, and all mentions."""
    names = [mention["object"] for mention in line["answers"][variant]["mentions"]]
    return len(names) - len(set(names)), len(names)


def count_right(line, variant):
    """Count an answer to a question of POPE if it is right."""
    says_yes = counts_as_yes(line["answers"][variant])
    return int(says_yes == (line["truth"] == "yes")), 1


CHAIR_I = Measure("chair_i", "wrong mentions (CHAIR_i)", better="lower", count=count_absent)
CHAIR_S = Measure(
    "chair_s",
    "captions with a wrong mention (CHAIR_s)",
    better="lower",
    count=count_captions_with_absent,
)
RECALL = Measure("recall", "objects found (recall)", better="higher", count=count_recalled)
CAPTION_MEASURES = (
    CHAIR_I,
    CHAIR_S,
    RECALL,
    Measure("colour", "right colors", better="higher", count=count_right_colors),
    Measure("words", "words a caption", unit="words"),
    Measure("repeats", "repeated mentions", better="lower", count=count_repeats),
)
REWARD_MEASURES = (
    Measure("accuracy", "pairs ranked rightly", better="higher"),
    Measure("ties", "pairs with equal scores"),
)


def measures_of(run: RunFiles, set_name: str) -> list[Measure]:
    """Return the measures that any variant of a run has on a set."""
    # 1. The measures that there may be.
    measures = list(REWARD_MEASURES if run.method == "reward" else CAPTION_MEASURES)
    all_scores = [run.scores_of(variant, set_name) for variant in run.scores]
    splits = {}
    for scores in all_scores:
        splits |= dict.fromkeys(scores.get("pope", {}))
    for split in splits:
        measures += pope_measures(split)

    # 2. Those that some variant has.
    measured = []
    for measure in measures:
        values = [measure.value(scores) for scores in all_scores]
        if values.count(None) < len(values):
            measured.append(measure)
    return measured


def measures_of_run(run: RunFiles) -> list[Measure]:
    """Return the measures that any variant of a run has on any set."""
    measures = {}  # without values, in the order in which they first occur
    for set_name in run.set_names():
        measures |= dict.fromkeys(measures_of(run, set_name))
    return list(measures)


def pope_measures(split: str) -> list[Measure]:
    """Return the measures of a split of POPE."""
    return [
        Measure(
            "accuracy",
            f"POPE {split}: right answers",
            better="higher",
            split=split,
            count=count_right,
        ),
        Measure("yes", f"POPE {split}: says yes", split=split),
    ]


@dataclass(frozen=True)
class Change:
    """The difference of a measure between two variants, in its unit."""

    value: float
    interval: tuple[float, float] | None  # None without the counts of enough images

    def verdict(self, measure: Measure) -> str:
        """Return "better", "worse", "the same", or "not clear" if it may be chance.

        It is empty where neither is better, or where the interval is not known.
        """
        if not measure.better or self.interval is None:
            return ""
        low, high = self.interval
        if low == high == 0:
            return "the same"
        if low <= 0 <= high:
            return "not clear"
        is_lower = self.value < 0
        return "better" if is_lower == (measure.better == "lower") else "worse"


@functools.cache  # tables, charts and sentences ask for the same changes
def find_change(run: RunFiles, measure, set_name, *, baseline, variant) -> Change | None:
    """Return how a variant differs from a baseline in a measure on a set. None without a value."""
    baseline_value = measure.value(run.scores_of(baseline, set_name))
    variant_value = measure.value(run.scores_of(variant, set_name))
    if baseline_value is None or variant_value is None:
        return None
    interval = None
    counts = counts_of_images(run, measure, set_name, variants=(baseline, variant))
    if counts is not None:
        baseline_counts, variant_counts = counts
        low, high = difference_interval(variant_counts, baseline_counts)
        interval = (100 * low, 100 * high)
    return Change(variant_value - baseline_value, interval)


def verdict_of(run: RunFiles, measure, set_name, *, baseline) -> str:
    """Return the verdict on a measure of the aligned model, which is empty without a value."""
    change = find_change(run, measure, set_name, baseline=baseline, variant="aligned")
    return "" if change is None else change.verdict(measure)


def has_intervals(run: RunFiles) -> bool:
    """Return whether the answers to the images were kept, on which intervals rest."""
    return bool(run.captions or run.answers)


def counts_of_images(run, measure, set_name, *, variants) -> list[np.ndarray] | None:
    """Return the counts (images, 2) of each variant on the same images.

    They are None if they are not known, or if a variant has nothing to count on enough images.
    """
    if measure.count is None:
        return None
    counts_of_image = {}  # image: (variants, 2). POPE asks several questions about one.
    for line in run.answers if measure.split else run.captions:
        is_of_measure = line["set"] == set_name and line.get("split", "") == measure.split
        if is_of_measure and set(variants) <= line["answers"].keys():
            counts = np.array([measure.count(line, variant) for variant in variants])
            counts_of_image[line["image"]] = counts_of_image.get(line["image"], 0) + counts
    if not counts_of_image:
        return None
    counts = np.stack(list(counts_of_image.values()), axis=1)  # (variants, images, 2)
    num_counted_images = (counts[:, :, 1] > 0).sum(axis=1)  # (variants,)
    return list(counts) if num_counted_images.min() >= MIN_IMAGES else None
