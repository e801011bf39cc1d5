"""The comparisons of the study of distillation: made-up scores, worked by hand."""

import functools
import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
from tiny_study import comparisons  # noqa: E402
from tiny_study.comparisons import (  # noqa: E402
    SETS,
    TARGETS,
    is_half_a_point_lower_at_most,
    is_one_point_higher_at_most,
    judge_targets,
    list_differences,
    list_values,
    match_runs,
    summarize_values,
)
from tiny_study.distillation_report import (  # noqa: E402
    distillation_lines,
    name_bases,
    show_captions,
)
from tiny_study.tables import Result  # noqa: E402


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """Draw the images of an interval anew only 20 times, because all images are alike here."""
    few = functools.partial(comparisons.difference_interval, num_resamples=20)
    monkeypatch.setattr(comparisons, "difference_interval", few)


def make_scores(absent=1, recalled=2, right=9, repeats=0):
    """Make the scores of four images with 4 mentions, 4 objects and 10 questions each."""
    counts = [[4, absent, absent > 0, recalled, 4, 3, 3, 20, repeats]] * 4
    return {
        "counts": counts,
        "pope_of_images": [[right, 10]] * 4,
        "well_formed": [True, True, True, False],
        "text_logps": [[-6.0, 12], [-6.0, 12], [-3.0, 6], [-3.0, 6]],
        "captions": ["A."] * 4,
    }


def make_results(scores_of_arms, q=0.35, base="b/one", seed=0):
    """Make a result on each set for each arm."""
    results = []
    for arm, scores in scores_of_arms.items():
        results += [Result(q, name, arm, base, seed, scores) for name in SETS]
    return results


def test_scores_of_a_run_by_hand():
    results = make_results({"distill": make_scores(absent=1, recalled=3, right=8, repeats=2)})

    row = list_values(results)[0]

    assert row["chair_i"] == 0.25
    assert row["recall"] == 0.75
    assert row["pope"] == 0.8
    assert row["repeats"] == 0.5
    assert row["words"] == 20
    assert row["well_formed"] == 0.75
    assert row["text_logp"] == -0.5  # -18 nats over 36 tokens


def test_spreads_over_bases_and_seeds():
    """Means .25 and .75 of two bases, whose seeds differ by .5 and not at all."""
    results = make_results({"distill": make_scores(absent=0)}, base="a", seed=0)
    results += make_results({"distill": make_scores(absent=2)}, base="a", seed=1)
    results += make_results({"distill": make_scores(absent=3)}, base="b", seed=0)
    results += make_results({"distill": make_scores(absent=3)}, base="b", seed=1)

    summary = summarize_values(list_values(results))

    assert [(row["set"], row["runs"], row["bases"]) for row in summary] == [
        (name, 4, 2) for name in SETS
    ]
    spread = summary[0]["chair_i"]
    assert spread["mean"] == 0.5
    assert spread["over_bases"] == pytest.approx(0.5 / 2**0.5)
    assert spread["over_seeds"] == pytest.approx(0.5 / 2**0.5 / 2)


def test_runs_are_compared_with_those_of_their_base_and_seed():
    """The base has one run, which all seeds are compared with."""
    results = make_results({"base": make_scores(), "bdhs": make_scores()})
    for seed in (0, 1):
        results += make_results({"distill": make_scores()}, seed=seed)
    balanced = [result for result in results if result.set_name == "balanced"]

    against_base = match_runs(balanced, "distill", "base")
    against_bdhs = match_runs(balanced, "distill", "bdhs")

    assert [(run.seed, other.seed) for run, other in zip(*against_base, strict=True)] == [
        (0, 0),
        (1, 0),
    ]
    assert [(run.seed, other.seed) for run, other in zip(*against_bdhs, strict=True)] == [(0, 0)]


def test_differences_by_hand():
    """On every image one of four mentions less is absent, so the interval has no width."""
    results = make_results({"bdhs": make_scores(absent=2), "distill": make_scores(absent=1)})

    rows = list_differences(results)

    assert {(row["base"], row["set"]) for row in rows} == {
        (base, name) for base in ("b/one", "all") for name in SETS
    }
    assert {(row["arm"], row["against"]) for row in rows} == {("distill", "bdhs")}
    for row in rows:
        assert row["chair_i"] == {"difference": -0.25, "interval": [-0.25, -0.25]}
        assert row["pope"] == {"difference": 0.0, "interval": [0.0, 0.0]}


GOOD = {
    "base": make_scores(absent=2),
    "control": make_scores(absent=2),
    "bdhs": make_scores(absent=2),
    "distill": make_scores(absent=1),
}


@pytest.mark.parametrize(
    "distill, missed",
    [
        (make_scores(absent=1), set()),
        (make_scores(absent=2), {"chair_i"}),  # equal is not below
        (make_scores(absent=1, recalled=1), {"recall"}),
        (make_scores(absent=1, right=8), {"pope"}),
        (make_scores(absent=1, repeats=1), {"repeats"}),
    ],
)
def test_each_target_of_biased_captions_can_be_missed(distill, missed):
    judged = judge_targets(list_differences(make_results(GOOD | {"distill": distill})))

    assert len(judged) == sum(target.q == 0.35 for target in TARGETS)
    assert {row["score"] for row in judged if not row["holds"]} == missed


@pytest.mark.parametrize(
    "right, total, other_right, half_a_point_lower, one_point_higher",
    [
        (184, 200, 185, True, True),  # 0.5 points below
        (183, 200, 185, False, True),
        (186, 200, 184, True, True),  # 1 point above
        (31, 100, 30, True, True),
        (187, 200, 184, True, False),
    ],
)
def test_a_difference_that_is_exactly_allowed_is_allowed(
    right, total, other_right, half_a_point_lower, one_point_higher
):
    comparison = {"difference": right / total - other_right / total}

    assert is_half_a_point_lower_at_most(comparison) == half_a_point_lower
    assert is_one_point_higher_at_most(comparison) == one_point_higher


@pytest.mark.parametrize("distill, num_missed", [(1, 0), (2, 2), (3, 4)])
def test_targets_of_truthful_captions(distill, num_missed):
    """As many as the base is no worse on typical images, but is not below on balanced ones."""
    arms = GOOD | {"distill": make_scores(absent=distill)}

    judged = judge_targets(list_differences(make_results(arms, q=0)))

    assert len(judged) == sum(target.q == 0 for target in TARGETS)
    assert sum(not row["holds"] for row in judged) == num_missed


def test_a_target_on_sets_that_are_not_measured_is_left_out():
    results = [result for result in make_results(GOOD) if result.set_name != "shifted"]

    assert judge_targets(list_differences(results)) == []


def test_tables_show_bases_by_name_and_points():
    results = name_bases(make_results(GOOD))
    values = list_values(results)
    differences = list_differences(results)
    report = {
        "targets": judge_targets(differences),
        "summary": summarize_values(values),
        "differences": differences,
    }

    text = "\n".join(distillation_lines(report))

    shown = "-25.0 [-25.0, -25.0]"
    assert (
        f"| 0.35 | one | CHAIR_i is below that of bdhs | 1 | {shown} | {shown} | {shown} | yes |"
        in text
    )
    assert "| 0.35 | balanced | distill | 1 | 1 | 25.0 | 50.0 | 90.0 | 0.0 |" in text
    assert "| 0.35 | balanced | distill | 1 | 1 | 75.0 | -0.5 | 20.0 | 0.0 |" in text


def test_captions_are_shown_beside_what_is_annotated_of_their_images(tmp_path):
    """Color and place may be missing."""
    objects = [{"name": "cup", "colour": "red", "place": "top left"}, {"name": "dog"}]
    rows = [{"image": "1.png", "prompt": "What is there?", "objects": objects}]
    vocabulary = {"objects": {"cup": ["cup"], "dog": ["dog"]}}
    captions = {"vocabulary": vocabulary, "captions": rows}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    scores = make_scores() | {"captions": ["A cup."]}

    shown = show_captions(make_results({"distill": scores}, base="one"), {"balanced": tmp_path})

    expected = {"image": "1.png", "request": "What is there?", "distill": "A cup."}
    assert shown == {"one": [expected | {"shows": ["red cup, top left", "dog"]}]}
