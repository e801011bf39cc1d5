"""What was measured before and after: the scores by name, and the intervals of their changes.

Intervals need the counts of every image. Those of captions come from captions.jsonl, those of POPE
from answers.jsonl.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minialign.evaluation.intervals import difference_interval
from minialign.evaluation.pope import counts_as_yes
from minialign.options import TINY_WORLD
from minialign.report.run_files import RunFiles


@dataclass(frozen=True)
class Measure:
    """A score of evaluation.json, and how it is shown."""

    name: str  # in the scores of captions, or of a split of POPE
    title: str
    unit: str = "%"
    better: str = ""  # "lower" or "higher", empty if neither is better
    split: str = ""  # of POPE
    # What counts on an image, and what it is a share of, from a caption's line and a variant. None
    # where there are no such counts.
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


def signed(value) -> str:
    """Return a number with its sign, and 0 without one. A minus is as wide as a plus."""
    rounded = round(value, 1)
    return "0.0" if rounded == 0 else f"{rounded:+.1f}".replace("-", "−")


CAPTION_MEASURES = (
    Measure("chair_i", "wrong mentions (CHAIR_i)", better="lower", count=count_absent),
    Measure(
        "chair_s",
        "captions with a wrong mention (CHAIR_s)",
        better="lower",
        count=count_captions_with_absent,
    ),
    Measure("recall", "objects found (recall)", better="higher", count=count_recalled),
    Measure("colour", "right colors", better="higher"),
    Measure("words", "words a caption", unit="words"),
    Measure("repeats", "repeated mentions", better="lower"),
)
REWARD_MEASURES = (
    Measure("accuracy", "pairs ranked rightly", better="higher"),
    Measure("ties", "pairs with equal scores"),
)


def measures_of(run: RunFiles, set_name: str) -> list[Measure]:
    """Return the measures that any variant of a run has on a set."""
    splits = {}
    for scores_of_sets in run.scores.values():
        splits |= dict.fromkeys(scores_of_sets.get(set_name, {}).get("pope", {}))
    measures = list(REWARD_MEASURES if run.method == "reward" else CAPTION_MEASURES)
    for split in splits:
        title = f"POPE {split}: right answers"
        measures.append(Measure("accuracy", title, better="higher", split=split))
        measures.append(Measure("yes", f"POPE {split}: says yes", split=split))
    all_scores = [scores_of_sets.get(set_name, {}) for scores_of_sets in run.scores.values()]
    return [
        measure
        for measure in measures
        if any(measure.value(scores) is not None for scores in all_scores)
    ]


@dataclass(frozen=True)
class Change:
    """The difference of a measure between two variants, in its unit."""

    value: float
    interval: tuple[float, float] | None  # None where the counts of images are not known

    def is_clear(self) -> bool:
        """Return whether the interval leaves out 0."""
        return self.interval is not None and (self.interval[0] > 0 or self.interval[1] < 0)

    def verdict(self, measure: Measure) -> str:
        """Return "better", "worse", "the same", or "not clear" if it may be chance.

        It is empty where neither is better, or where the interval is not known.
        """
        if not measure.better or self.interval is None:
            return ""
        if self.interval == (0, 0):
            return "the same"
        if not self.is_clear():
            return "not clear"
        is_lower = self.value < 0
        return "better" if is_lower == (measure.better == "lower") else "worse"


@functools.cache  # tables, charts and sentences ask for the same changes
def find_change(run: RunFiles, measure, set_name, *, before, after) -> Change | None:
    """Return how a measure differs between two variants on a set, or None without a value."""
    values = []
    for variant in (before, after):
        scores = run.scores.get(variant, {}).get(set_name, {})
        values.append(measure.value(scores))
    if None in values:
        return None
    counts = counts_of_images(run, measure, set_name, variants=(before, after))
    interval = None
    if counts is not None:
        low, high = difference_interval(counts[1], counts[0])
        interval = (100 * low, 100 * high)
    return Change(values[1] - values[0], interval)


def is_tiny_file(path) -> bool:
    """Return whether a file or folder belongs to the shipped tiny world."""
    return Path(path).is_relative_to(TINY_WORLD)


def has_intervals(run: RunFiles) -> bool:
    """Return whether the answers to the images were kept, on which intervals rest."""
    return bool(run.captions or run.answers)


def counts_of_images(run, measure, set_name, *, variants) -> list[np.ndarray] | None:
    """Return the counts (images, 2) of each variant on the same images, or None if unknown."""
    # 1. How one line of captions.jsonl or answers.jsonl counts.
    count = count_right if measure.split and measure.name == "accuracy" else measure.count
    if count is None:
        return None

    # 2. The counts of each image. POPE asks several questions about one.
    counts_of_image = {}  # image: (variants, 2)
    for line in run.answers if measure.split else run.captions:
        is_of_measure = line["set"] == set_name and line.get("split", "") == measure.split
        if is_of_measure and all(variant in line["answers"] for variant in variants):
            counts = np.array([count(line, variant) for variant in variants])
            counts_of_image[line["image"]] = counts_of_image.get(line["image"], 0) + counts
    if not counts_of_image:
        return None
    return list(np.stack(list(counts_of_image.values()), axis=1))


def count_right(line, variant):
    """Count an answer to a question of POPE if it is right."""
    says_yes = counts_as_yes(line["answers"][variant])
    return int(says_yes == (line["truth"] == "yes")), 1
