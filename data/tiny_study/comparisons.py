"""What the study of distillation says: scores of its arms, differences between them, and targets.

Every score here is a share of two counts of an image, so all have the same intervals.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from minialign.evaluation.intervals import difference_interval
from tiny_study.tables import ABSENT_MENTIONS, MENTIONS, Result

# Columns of stored counts, which are in the order of CaptionCounts.
RECALLED = 3
ANNOTATED = 4
WORDS = 7
REPEATS = 8

SETS = ("balanced", "shifted", "typical")
# The scores of which differences are computed, and those that only describe the captions.
COMPARED_SCORES = ("chair_i", "recall", "pope", "repeats")
SCORES = (*COMPARED_SCORES, "words", "well_formed", "text_logp")
# Which arm is compared with which.
COMPARISONS = (
    ("distill", "bdhs"),
    ("distill", "control"),
    ("distill", "base"),
    ("distill", "a = 1.0"),
    ("distill, half the steps", "bdhs"),
    ("distill, half the steps", "distill"),
    ("bdhs", "control"),
)


def image_counts(scores: dict, score: str) -> np.ndarray:
    """Return the counts (images, 2) that a score is the share of: what counts, and of how much.

    pope is the accuracy, words are of a caption, and text_logp is that of a token in nats.
    """
    counts = np.array(scores["counts"], dtype=np.float64)  # (images, fields of CaptionCounts)
    ones = np.ones(len(counts))
    if score == "pope":
        return np.array(scores["pope_of_images"], dtype=np.float64)
    if score == "text_logp":
        return np.array(scores["text_logps"], dtype=np.float64)
    if score == "well_formed":
        return np.stack([scores["well_formed"], ones], axis=1)
    if score == "words":
        return np.stack([counts[:, WORDS], ones], axis=1)
    columns = {
        "chair_i": [ABSENT_MENTIONS, MENTIONS],
        "recall": [RECALLED, ANNOTATED],
        "repeats": [REPEATS, MENTIONS],
    }
    return counts[:, columns[score]]


def share_of(counts: np.ndarray) -> float | None:
    """Return the share that counts (images, 2) make together, or None if it is one of nothing."""
    part, whole = counts.sum(axis=0)
    return float(part / whole) if whole else None


# --- scores of arms


def list_values(results: list[Result]) -> list[dict]:
    """Return the scores of each run on each set."""
    rows = []
    for result in results:
        row = {"base": result.base, "q": result.q, "set": result.set_name}
        row |= {"arm": result.arm, "seed": result.seed}
        for score in SCORES:
            row[score] = share_of(image_counts(result.scores, score))
        rows.append(row)
    return rows


def summarize_values(values: list[dict]) -> list[dict]:
    """Return for each q, set and arm the mean over its runs and the spreads of each score.

    over_bases: standard deviation over bases of the mean over seeds. None with one base.
    over_seeds: standard deviation over the seeds of a base, averaged. None if a base has one seed.
    """
    groups = {}
    for row in values:
        groups.setdefault((row["q"], row["set"], row["arm"]), []).append(row)
    summaries = []
    for (q, set_name, arm), rows in sorted_groups(groups):
        summary = {"q": q, "set": set_name, "arm": arm, "runs": len(rows)}
        summary["bases"] = len({row["base"] for row in rows})
        for score in SCORES:
            summary[score] = spread_of(rows, score)
        summaries.append(summary)
    return summaries


def sorted_groups(groups: dict) -> list:
    """Return {(q, set, arm): rows} as a list by q and set. The arms keep their order."""
    return sorted(groups.items(), key=lambda group: (group[0][0], SETS.index(group[0][1])))


def spread_of(rows: list[dict], score: str) -> dict | None:
    """Return {"mean", "over_bases", "over_seeds"} of a score, or None if no run has it."""
    by_base = {}
    for row in rows:
        if row[score] is not None:
            by_base.setdefault(row["base"], []).append(row[score])
    if not by_base:
        return None
    means = [np.mean(seeds) for seeds in by_base.values()]
    over_bases = None
    if len(means) > 1:
        over_bases = float(np.std(means, ddof=1))
    over_seeds = None
    if min(len(seeds) for seeds in by_base.values()) > 1:
        over_seeds = float(np.mean([np.std(seeds, ddof=1) for seeds in by_base.values()]))
    return {"mean": float(np.mean(means)), "over_bases": over_bases, "over_seeds": over_seeds}


# --- differences


def list_differences(results: list[Result]) -> list[dict]:
    """Return the differences of COMPARISONS on each set, for each base and for all of each q.

    A row holds {"difference", "interval", "seeds"} of each of COMPARED_SCORES. Seeds are how many
    runs were compared. The base of a row for all bases of a q is "all".
    """
    # 1. The results of each base, and those of each q.
    groups = {}
    for result in results:
        groups.setdefault((result.q, result.base, result.set_name), []).append(result)
        groups.setdefault((result.q, "all", result.set_name), []).append(result)

    # 2. The differences in each group.
    rows = []
    for (q, base, set_name), group in groups.items():
        for arm, against in COMPARISONS:
            matched, others = match_runs(group, arm, against)
            if not matched:
                continue
            row = {"q": q, "base": base, "set": set_name, "arm": arm, "against": against}
            row["runs"] = len(matched)
            for score in COMPARED_SCORES:
                row[score] = compare(matched, others, score)
            rows.append(row)
    return rows


def match_runs(results: list[Result], arm: str, against: str) -> tuple[list[Result], list[Result]]:
    """Return the runs of an arm, and for each the run of another arm that it is compared with.

    It is the one of the same base and seed. The base model itself and contrastive decoding have one
    run, which all seeds are compared with. A run without a counterpart is left out.
    """
    others = {}
    for result in results:
        if result.arm == against:
            others[result.base, result.seed] = result
    is_untrained = all(seed == 0 for _, seed in others) and against in ("base", "a = 1.0")
    matched = []
    matched_others = []
    for result in results:
        seed = 0 if is_untrained else result.seed
        if result.arm == arm and (result.base, seed) in others:
            matched.append(result)
            matched_others.append(others[result.base, seed])
    return matched, matched_others


def compare(results: list[Result], others: list[Result], score: str) -> dict | None:
    """Return the difference of a score with its interval over images, or None if one has none.

    Runs are pooled, so the interval says how sure the difference is over images.
    """
    counts = sum(image_counts(result.scores, score) for result in results)
    other_counts = sum(image_counts(result.scores, score) for result in others)
    value = share_of(counts)
    other_value = share_of(other_counts)
    if value is None or other_value is None:
        return None
    interval = difference_interval(counts, other_counts)
    return {"difference": value - other_value, "interval": interval}


# --- targets

# Two shares that differ by half a point, such as 184/200 and 185/200, differ by a little more in
# floating point.
ROUNDING = 1e-9


def difference_text(comparison: dict | None) -> str:
    """Return a difference with its interval in points, or an empty text where none is known."""
    if comparison is None or "interval" not in comparison:
        return ""
    low, high = comparison["interval"]
    return f"{100 * comparison['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def is_surely_lower(comparison: dict) -> bool:
    """Return whether a score is lower by more than the interval."""
    return comparison["interval"][1] < 0


def is_no_lower(comparison: dict) -> bool:
    """Return whether a score is as high or higher."""
    return comparison["difference"] >= 0


def is_no_higher(comparison: dict) -> bool:
    """Return whether a score is as low or lower."""
    return comparison["difference"] <= 0


def is_half_a_point_lower_at_most(comparison: dict) -> bool:
    """Return whether a share is lower by half a point at most."""
    return comparison["difference"] >= -0.005 - ROUNDING


def is_one_point_higher_at_most(comparison: dict) -> bool:
    """Return whether a share is higher by one point at most."""
    return comparison["difference"] <= 0.01 + ROUNDING


@dataclass(frozen=True)
class Target:
    """What distillation shall reach on every base with a q, on all of some sets."""

    text: str
    q: float
    score: str
    against: str
    holds: Callable[[dict], bool]
    sets: tuple[str, ...] = SETS


# Fixed before anything was measured. "No lower" and "no higher" are of the measured scores, however
# wide the interval is.
TARGETS = (
    Target("CHAIR_i is below that of bdhs", 0.35, "chair_i", "bdhs", is_surely_lower),
    Target("recall is no lower than that of bdhs", 0.35, "recall", "bdhs", is_no_lower),
    Target(
        "POPE accuracy is 0.5 points below the control's at most",
        0.35,
        "pope",
        "control",
        is_half_a_point_lower_at_most,
    ),
    Target(
        "repeats are 1 point above the control's at most",
        0.35,
        "repeats",
        "control",
        is_one_point_higher_at_most,
    ),
    Target(
        "CHAIR_i is below the base's", 0, "chair_i", "base", is_surely_lower, sets=("balanced",)
    ),
    Target(
        "CHAIR_i is below the control's",
        0,
        "chair_i",
        "control",
        is_surely_lower,
        sets=("balanced",),
    ),
    Target(
        "CHAIR_i is no higher than the base's", 0, "chair_i", "base", is_no_higher, ("typical",)
    ),
    Target(
        "CHAIR_i is no higher than the control's",
        0,
        "chair_i",
        "control",
        is_no_higher,
        ("typical",),
    ),
)


def judge_targets(differences: list[dict]) -> list[dict]:
    """Return for each target and base whether it holds, from the rows of `list_differences`.

    It holds if it holds on all of its sets. A target whose sets are not all measured is left out.
    """
    # 1. The rows of each base, by what they compare.
    rows_of = {}
    for row in differences:
        if row["arm"] == "distill" and row["base"] != "all":
            rows_of[row["base"], row["against"], row["set"]] = row
    bases = dict.fromkeys((row["base"], row["q"]) for row in differences if row["base"] != "all")

    # 2. The targets of each base.
    judged = []
    for base, q in bases:
        for target in TARGETS:
            rows = [rows_of.get((base, target.against, name)) for name in target.sets]
            if target.q == q and None not in rows:
                judged.append({"base": base, "q": q} | judge_target(target, rows))
    return judged


def judge_target(target: Target, rows: list[dict]) -> dict:
    """Return whether a target holds on its sets, from the rows that compare them."""
    comparisons = {row["set"]: row[target.score] for row in rows}
    holds = True
    for comparison in comparisons.values():
        if comparison is None or not target.holds(comparison):
            holds = False
    return {
        "target": target.text,
        "holds": holds,
        "score": target.score,
        "against": target.against,
        "runs": rows[0]["runs"],
        "sets": comparisons,
    }
