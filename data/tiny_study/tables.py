"""The tables of the study: what the scores of its runs say, with intervals over images.

The scores of all runs become one flat list of results. Each row of a table is computed from those
results that belong to it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minialign.evaluation.chair import CaptionCounts, chair_scores
from minialign.evaluation.intervals import NUM_RESAMPLES, difference_interval
from minialign.evaluation.results import COLUMNS
from minialign.utils.files import read_json
from tiny_study.arms import MAIN_ARMS, Part, Run, runs_of

# Columns of stored counts, which are in the order of CaptionCounts.
MENTIONS = 0
ABSENT_MENTIONS = 1


@dataclass(frozen=True)
class Result:
    """What one run scored on one evaluation set."""

    q: float  # of its base
    set_name: str
    arm: str
    base: str
    seed: int
    scores: dict  # as evaluation.json has them, and "counts": those of each caption


def summarize(parts: Iterable[Part], bases: dict, set_names: Iterable[str], out) -> dict:
    """Return {part: {q: {set: rows}}} of the runs that are done.

    Args:
        parts: the questions.
        bases: {folder: about.json}.
        set_names: the evaluation sets.
        out: the study's folder.

    A part without any row has no table.
    """
    # 1. The results of all runs that are done.
    runs = []
    for part in parts:
        runs += runs_of(part, bases)
    results = load_results(dict.fromkeys(runs), bases, out)

    # 2. A table for each part, q and set.
    tables = {}
    for part in parts:
        wanted_q = {about["q"] for about in bases.values() if part.wants(about["q"])}
        for q in sorted(wanted_q):
            for set_name in set_names:
                rows = table_rows(part, select(results, q=q, set_name=set_name))
                if rows:
                    tables_of_part = tables.setdefault(part.title, {})
                    tables_of_part.setdefault(f"{q:g}", {})[set_name] = rows
    return tables


def select(results: list[Result], q: float, set_name: str) -> list[Result]:
    """Return the results of bases with this q on one set."""
    return [result for result in results if result.q == q and result.set_name == set_name]


def load_results(runs: Iterable[Run], bases: dict, out) -> list[Result]:
    """Read the scores of all runs that are done."""
    results = []
    for run in runs:
        path = run.folder(out) / "scores.json"
        if not path.exists():
            continue
        q = bases[run.base]["q"]
        for set_name, scores in read_json(path).items():
            results.append(Result(q, set_name, run.arm.name, run.base, run.seed, scores))
    return results


def table_rows(part: Part, results: list[Result]) -> list[dict]:
    """Return the rows of a part on one set: base, control and BDHS first, then its own arms.

    Without a row for one of the part's own arms there are none.
    """
    # 1. The results of each arm.
    results_of_arm = {}
    for result in results:
        results_of_arm.setdefault(result.arm, []).append(result)
    control = results_of_arm.get("control", [])

    # 2. A row for each arm. BDHS may be a main arm and one of the part's own: it has one row.
    main_names = [arm.name for arm in MAIN_ARMS]
    own_names = [arm.name for arm in part.arms]
    rows = []
    for name in dict.fromkeys(main_names + own_names):
        if not has_control(results_of_arm.get(name, []), control):
            continue
        row = summarize_arm(name, results_of_arm[name])
        if name not in ("base", "control"):
            row |= compare_with_control(results_of_arm[name], control)
        rows.append(row)

    names_of_rows = {row["arm"] for row in rows}
    return rows if names_of_rows.intersection(own_names) else []


def has_control(results: list[Result], control: list[Result]) -> bool:
    """Return whether there are results, and on each of their bases a control with seed 0."""
    bases = {result.base for result in results}
    controlled_bases = {result.base for result in control if result.seed == 0}
    return len(results) > 0 and bases <= controlled_bases


def summarize_arm(name: str, results: list[Result]) -> dict:
    """Return the means of an arm's runs on one set, and how much they spread.

    over_bases: standard deviation of CHAIR_i over bases. None with one base.
    over_seeds: its standard deviation over the seeds of a base, averaged over bases. None if a base
        has one seed.
    """
    # 1. Means over all runs.
    row = {"arm": name, "runs": len(results)}
    means = {}
    for _, score, _ in COLUMNS:
        means[score] = _mean([result.scores[score] for result in results])
    accuracies = []
    for result in results:
        for pope in result.scores["pope"].values():
            accuracies.append(pope["accuracy"])

    # 2. CHAIR_i of each base, and its spread.
    rates_by_base = chair_i_by_base(results)
    mean_by_base = np.array([rates.mean() for rates in rates_by_base])
    over_bases = None
    if len(mean_by_base) > 1:
        over_bases = float(mean_by_base.std(ddof=1))

    row |= {"bases": len({result.base for result in results}), "by_base": mean_by_base.tolist()}
    row |= means
    row |= {"pope": float(np.mean(accuracies)), "over_bases": over_bases}
    row["over_seeds"] = spread_over_seeds(rates_by_base)
    return row


def chair_i_by_base(results: list[Result]) -> list[np.ndarray]:
    """Return CHAIR_i of each base that has one: an array with a value for each seed."""
    rates_by_base = {}
    for result in results:
        rates = rates_by_base.setdefault(result.base, [])
        if result.scores["chair_i"] is not None:
            rates.append(result.scores["chair_i"])
    return [np.array(rates) for rates in rates_by_base.values() if rates]


def spread_over_seeds(rates_by_base: list[np.ndarray]) -> float | None:
    """Return the mean over bases of the deviation over seeds. None if a base has one seed."""
    fewest_seeds = min((len(rates) for rates in rates_by_base), default=0)
    if fewest_seeds < 2:
        return None
    return float(np.mean([rates.std(ddof=1) for rates in rates_by_base]))


def _mean(values):
    """Return the mean of the values that are not None, or None if there are none."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def compare_with_control(results: list[Result], control: list[Result]) -> dict:
    """Return the difference of an arm's CHAIR_i from the control's, with its interval.

    A run is compared with the control of the same base and seed, or of seed 0 if there is none.
    Where one of the two mentions no object at all there is nothing to compare, and it is empty.
    """
    control_counts = {}
    for result in control:
        control_counts[result.base, result.seed] = result.scores["counts"]
    counts = []
    matched_control_counts = []
    for result in results:
        seed = result.seed if (result.base, result.seed) in control_counts else 0
        counts.append(result.scores["counts"])
        matched_control_counts.append(control_counts[result.base, seed])
    counts = np.array(counts, dtype=np.int64)  # (runs, images, counts)
    matched_control_counts = np.array(matched_control_counts, dtype=np.int64)
    rate = pooled_chair_i(counts)
    control_rate = pooled_chair_i(matched_control_counts)
    if rate is None or control_rate is None:
        return {}
    return {
        "difference": float(rate - control_rate),
        "interval": bootstrap_interval(counts, matched_control_counts),
    }


def pooled_chair_i(counts: np.ndarray) -> float | None:
    """Return CHAIR_i of all captions together, from counts (runs, images, counts)."""
    captions = counts.reshape(-1, counts.shape[-1])
    return chair_scores([CaptionCounts(*caption) for caption in captions])["chair_i"]


def bootstrap_interval(
    counts: np.ndarray, control_counts: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> list[float]:
    """Return the 95 % interval of the difference of CHAIR_i between two models.

    Runs are pooled, so the interval says how sure the difference is over images, not over seeds.

    Args:
        counts: counts (runs, images, counts) of the model's captions.
        control_counts: those of the other model.
        num_resamples: how often the images are drawn anew.
    """
    columns = [ABSENT_MENTIONS, MENTIONS]
    counts_of_images = counts.sum(axis=0)[:, columns]  # (images, 2)
    control_counts_of_images = control_counts.sum(axis=0)[:, columns]
    return difference_interval(counts_of_images, control_counts_of_images, num_resamples)
