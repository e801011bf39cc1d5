"""The study's tables: intervals, rows and the summary of made-up scores, worked by hand."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
from tiny_study.arms import MAIN_ARMS, Arm, Part, Run  # noqa: E402
from tiny_study.tables import (  # noqa: E402
    ABSENT_MENTIONS,
    MENTIONS,
    Result,
    bootstrap_interval,
    compare_with_control,
    summarize,
    summarize_arm,
)

NUM_COUNTS = 9  # fields of CaptionCounts

# --- intervals ---


def random_counts(num_runs, num_images, seed):
    """Draw counts (runs, images, counts) of captions with 1 to 8 mentions, some of them absent."""
    generator = np.random.default_rng(seed)
    counts = generator.integers(0, 9, (num_runs, num_images, NUM_COUNTS))
    mentions = generator.integers(1, 9, (num_runs, num_images))
    counts[..., MENTIONS] = mentions
    counts[..., ABSENT_MENTIONS] = generator.integers(0, mentions + 1)
    return counts


def chair_i_of_images(counts, images):
    """Compute CHAIR_i over all runs and some images, in loops."""
    absent = 0
    mentions = 0
    for run in range(len(counts)):
        for image in images:
            absent += int(counts[run, image, ABSENT_MENTIONS])
            mentions += int(counts[run, image, MENTIONS])
    return absent / mentions


def quantile(sorted_values, share):
    """Compute a quantile by linear interpolation."""
    position = share * (len(sorted_values) - 1)
    below = int(position)
    step = sorted_values[below + 1] - sorted_values[below]
    return sorted_values[below] + (position - below) * step


def test_the_interval_equals_a_loop_over_resamples():
    """Runs are pooled, and both models are measured on the same images."""
    num_images = 11
    num_resamples = 300
    counts = random_counts(3, num_images, seed=1)
    control_counts = random_counts(3, num_images, seed=2)

    interval = bootstrap_interval(counts, control_counts, num_resamples)

    generator = np.random.default_rng(0)
    differences = []
    for _ in range(num_resamples):
        images = [int(generator.integers(0, num_images)) for _ in range(num_images)]
        rate = chair_i_of_images(counts, images)
        control_rate = chair_i_of_images(control_counts, images)
        differences.append(rate - control_rate)
    differences.sort()
    expected = [quantile(differences, 0.025), quantile(differences, 0.975)]
    assert interval == pytest.approx(expected, abs=1e-12)
    assert expected[0] < expected[1]


def test_a_model_does_not_differ_from_itself():
    counts = random_counts(2, 40, seed=3)

    assert bootstrap_interval(counts, counts) == [0.0, 0.0]


def test_the_interval_of_a_constant_difference_has_no_width():
    """Of four mentions one more is absent on every image, however much the images differ."""
    counts = random_counts(2, 40, seed=3)
    counts[..., MENTIONS] = 4
    counts[..., ABSENT_MENTIONS] = np.arange(40) % 4
    worse_counts = counts.copy()
    worse_counts[..., ABSENT_MENTIONS] += 1

    interval = bootstrap_interval(worse_counts, counts)

    assert interval == pytest.approx([0.25, 0.25], abs=1e-12)


# --- rows ---


def make_scores(chair_i, *captions, pope=0.5, **others):
    """Make up the scores of one run on one set.

    `captions` are (mentions, absent mentions) of each image. POPE's two accuracies are 0.1 below
    and above `pope`.
    """
    counts = []
    for mentions, absent in captions:
        counts.append([mentions, absent, *[0] * (NUM_COUNTS - 2)])
    scores = {
        "chair_i": chair_i,
        "chair_s": 0.4,
        "recall": 0.6,
        "colour": 0.7,
        "words": 20.0,
        "repeats": 0.1,
        "pope": {"random": {"accuracy": pope - 0.1}, "popular": {"accuracy": pope + 0.1}},
        "counts": counts,
    }
    return scores | others


def make_result(base, seed, scores):
    """Return the result of one run. The tables have been filtered by q, set and arm already."""
    return Result(q=0.35, set_name="near", arm="bdhs", base=base, seed=seed, scores=scores)


def test_a_row_by_hand():
    """Two bases have two seeds each.

    Over bases: the spread of 0.2 and 0.6. Over seeds: the mean of the spreads of (0.1, 0.3) and
    (0.4, 0.8).
    """
    results = [
        make_result("a", 0, make_scores(0.1, (5, 1), (5, 2), pope=0.8, words=20)),
        make_result("a", 1, make_scores(0.3, (5, 1), (5, 1), pope=0.6, words=22)),
        make_result("b", 0, make_scores(0.4, (5, 2), (5, 2), pope=0.5, words=24)),
        make_result("b", 1, make_scores(0.8, (5, 1), (5, 1), pope=0.7, words=26, repeats=0.5)),
    ]

    row = summarize_arm("bdhs", results)

    assert row.pop("by_base") == pytest.approx([0.2, 0.6])
    assert row == pytest.approx(
        {
            "arm": "bdhs",
            "runs": 4,
            "bases": 2,
            "chair_i": 0.4,
            "chair_s": 0.4,
            "recall": 0.6,
            "colour": 0.7,
            "words": 23.0,
            "repeats": 0.2,
            "pope": 0.65,
            "over_bases": 0.08**0.5,
            "over_seeds": (0.02**0.5 + 0.08**0.5) / 2,
        }
    )


def test_the_difference_from_the_control_by_hand():
    """Images are pooled: 11 of 40 mentions are absent, against 8 of 40.

    Of the first image 5 of 20 are absent, of the second 6 of 20, against 4 of 20 each. So on
    resamples the difference is 0.05 (the first image twice), 0.075 or 0.1.
    """
    results = [
        make_result("a", 0, make_scores(0.1, (5, 1), (5, 2))),
        make_result("a", 1, make_scores(0.3, (5, 1), (5, 1))),
        make_result("b", 0, make_scores(0.4, (5, 2), (5, 2))),
        make_result("b", 1, make_scores(0.8, (5, 1), (5, 1))),
    ]
    control = []
    for result in results:
        scores = make_scores(0.9, (5, 1), (5, 1))
        control.append(make_result(result.base, result.seed, scores))

    comparison = compare_with_control(results, control)

    assert comparison["difference"] == pytest.approx(0.275 - 0.2)
    assert comparison["interval"] == pytest.approx([0.05, 0.1])


def test_one_base_with_one_seed_has_no_spread():
    row = summarize_arm("base", [make_result("a", 0, make_scores(0.1, (5, 1)))])

    assert row["over_bases"] is None
    assert row["over_seeds"] is None
    assert "difference" not in row
    assert "interval" not in row


def test_one_base_with_two_seeds_has_a_spread_over_seeds():
    results = [
        make_result("a", 0, make_scores(0.1, (5, 1))),
        make_result("a", 1, make_scores(0.3, (5, 1))),
    ]

    row = summarize_arm("control", results)

    assert row["bases"] == 1
    assert row["over_bases"] is None
    assert row["over_seeds"] == pytest.approx(0.02**0.5)


def test_the_spread_over_seeds_needs_two_seeds_on_every_base():
    results = [
        make_result("a", 0, make_scores(0.1, (5, 1))),
        make_result("a", 1, make_scores(0.3, (5, 1))),
        make_result("b", 0, make_scores(0.6, (5, 1))),
    ]

    row = summarize_arm("control", results)

    assert row["over_bases"] == pytest.approx(0.08**0.5)
    assert row["over_seeds"] is None
    assert row["chair_i"] == pytest.approx(1 / 3)


def test_a_run_is_compared_with_the_control_of_its_base_and_seed():
    """Where the control lacks the seed, its seed 0 is taken: (2 + 3) of 20 against (1 + 1)."""
    results = [
        make_result("a", 0, make_scores(0.2, (10, 2))),
        make_result("a", 1, make_scores(0.3, (10, 3))),
    ]
    control = [
        make_result("b", 0, make_scores(0.9, (10, 9))),
        make_result("a", 0, make_scores(0.1, (10, 1))),
    ]
    same_seed = make_result("a", 1, make_scores(0.5, (10, 5)))

    without_the_seed = compare_with_control(results, control)
    with_the_seed = compare_with_control(results, [*control, same_seed])

    assert without_the_seed["difference"] == pytest.approx(0.25 - 0.1)
    assert with_the_seed["difference"] == pytest.approx(0.25 - 0.3)


# --- the summary ---

BASES = {
    "b/one": {"seed": 1, "q": 0.35},
    "b/two": {"seed": 2, "q": 0.35},
    "b/true": {"seed": 1, "q": 0},
    "b/half": {"seed": 1, "q": 0.5},
}
BASE, CONTROL, BDHS = MAIN_ARMS
RHO_1 = Arm("rho 1", "--method bdhs --rho 1")
LONGER = Arm("longer", "--method bdhs --steps 9")
NEVER_RUN = Arm("never run", "--method bdhs --rho 0")
# The main parts, and three questions. The last of them has no run.
SMALL_PARTS = (
    Part("Main", MAIN_ARMS, num_seeds=2, wants=lambda q: q == 0.35),
    Part("Strengths", MAIN_ARMS, num_seeds=1, wants=lambda q: q != 0.35),
    Part("Hidden", (RHO_1, NEVER_RUN), num_seeds=1, wants=lambda q: q == 0.35),
    Part("Half", (LONGER,), num_seeds=1, wants=lambda q: q == 0.5),
    Part("Open", (NEVER_RUN,), num_seeds=1, wants=lambda q: q == 0.35),
)


@pytest.fixture()
def tables(tmp_path):
    """Return the tables of SMALL_PARTS of the runs that are done, on the sets near and far."""

    def write_run(base, arm, seed, near, far):
        """Store a run. `near` and `far` are (CHAIR_i, absent mentions of 10)."""
        stored = {}
        for set_name, (chair_i, num_absent) in {"near": near, "far": far}.items():
            stored[set_name] = make_scores(chair_i, (10, num_absent))
        folder = Run(base, arm, seed).folder(tmp_path)
        folder.mkdir(parents=True)
        (folder / "scores.json").write_text(json.dumps(stored))

    write_run("b/one", CONTROL, 0, near=(0.1, 1), far=(0.2, 2))
    write_run("b/one", CONTROL, 1, near=(0.3, 1), far=(0.6, 2))
    write_run("b/two", CONTROL, 0, near=(0.4, 1), far=(0.8, 2))
    write_run("b/one", BASE, 0, near=(0.2, 2), far=(0.4, 4))
    write_run("b/two", RHO_1, 0, near=(0.5, 5), far=(0.6, 6))
    # The control of this base is missing.
    write_run("b/true", BASE, 0, near=(0.7, 7), far=(0.7, 7))
    write_run("b/true", BDHS, 0, near=(0.0, 0), far=(0.0, 0))
    write_run("b/half", CONTROL, 0, near=(0.6, 6), far=(0.6, 6))
    write_run("b/half", BDHS, 0, near=(0.5, 5), far=(0.5, 5))
    write_run("b/half", LONGER, 0, near=(0.4, 4), far=(0.4, 4))
    return summarize(SMALL_PARTS, BASES, ["near", "far"], tmp_path)


def shown(rows):
    """Return the arm, the number of runs and CHAIR_i of each row."""
    return [(row["arm"], row["runs"], row["chair_i"]) for row in rows]


def test_an_arm_that_is_not_done_has_no_row(tables):
    assert list(tables["Main"]) == ["0.35"]
    assert list(tables["Main"]["0.35"]) == ["near", "far"]
    near = tables["Main"]["0.35"]["near"]
    assert shown(near) == [("base", 1, 0.2), ("control", 3, pytest.approx(0.8 / 3))]
    far = tables["Main"]["0.35"]["far"]
    assert shown(far) == [("base", 1, 0.4), ("control", 3, pytest.approx(1.6 / 3))]


def test_arms_are_shown_beside_the_main_arms_of_their_bases(tables):
    hidden = tables["Hidden"]["0.35"]
    main = tables["Main"]["0.35"]
    assert shown(hidden["near"]) == [*shown(main["near"]), ("rho 1", 1, 0.5)]
    assert shown(hidden["far"]) == [*shown(main["far"]), ("rho 1", 1, 0.6)]

    half = [("control", 1, 0.6), ("bdhs", 1, 0.5)]
    assert shown(tables["Strengths"]["0.5"]["near"]) == half
    assert shown(tables["Strengths"]["0.5"]["far"]) == half
    assert shown(tables["Half"]["0.5"]["near"]) == [*half, ("longer", 1, 0.4)]
    assert shown(tables["Half"]["0.5"]["far"]) == [*half, ("longer", 1, 0.4)]


def test_a_question_without_rows_has_no_table(tables):
    """That is one whose arms are not done, and a q whose control is not done."""
    assert list(tables) == ["Main", "Strengths", "Hidden", "Half"]
    assert list(tables["Strengths"]) == ["0.5"]


def test_arms_are_compared_with_the_control_but_base_and_control_are_not(tables):
    near = tables["Hidden"]["0.35"]["near"]
    far = tables["Hidden"]["0.35"]["far"]
    assert [row.get("difference") for row in near] == [None, None, pytest.approx(0.4)]
    assert far[2]["interval"] == pytest.approx([0.4, 0.4])
