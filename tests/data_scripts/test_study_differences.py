"""The tables of a study whose arms are compared with one of them, worked by hand."""

import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
from tiny_study.arms import Arm, Part, is_any  # noqa: E402
from tiny_study.difference_tables import difference_lines, difference_tables  # noqa: E402
from tiny_study.tables import Result  # noqa: E402

PARTS = (
    Part("How long?", (Arm("short", "--method distill --steps 1"),), num_seeds=1, wants=is_any),
    Part("Not done", (Arm("long", "--method distill --steps 9"),), num_seeds=1, wants=is_any),
)


def make_result(arm, set_name, absent, right):
    """Make the scores of four images with 4 mentions, 4 objects and 10 questions each."""
    counts = [[4, absent, absent > 0, 2, 4, 3, 3, 20, 1]] * 4
    scores = {"counts": counts, "pope_of_images": [[right, 10]] * 4}
    return Result(0.35, set_name, arm, "data/tiny", 0, scores)


def test_each_arm_is_compared_on_each_set():
    """All images are alike, so an interval has no width. A question without a run has no table."""
    results = []
    for set_name in ("typical", "balanced"):
        results.append(make_result("short", set_name, absent=2, right=9))
        results.append(make_result("distill", set_name, absent=1, right=9))

    tables = difference_tables(PARTS, results, against="distill")

    assert list(tables) == ["How long?"]
    rows = tables["How long?"]
    assert [(row["set"], row["arm"]) for row in rows] == [
        ("balanced", "distill"),
        ("balanced", "short"),
        ("typical", "distill"),
        ("typical", "short"),
    ]
    assert rows[0]["chair_i"] == {"share": 0.25}
    assert rows[1]["chair_i"] == {"share": 0.5, "difference": 0.25, "interval": [0.25, 0.25]}
    assert rows[1]["pope"] == {"share": 0.9, "difference": 0.0, "interval": [0.0, 0.0]}


def test_shares_are_in_percent_and_differences_in_points():
    results = [make_result("short", "balanced", absent=0, right=8)]
    results.append(make_result("distill", "balanced", absent=1, right=9))

    lines = difference_lines(difference_tables(PARTS, results, against="distill"))

    assert lines == [
        "",
        "**How long?**",
        "",
        "| set | arm | CHAIR_i | recall | POPE | repeats |",
        "|---|---|---|---|---|---|",
        "| balanced | distill | 25.0 | 50.0 | 90.0 | 25.0 |",
        "| balanced | short | 0.0 (-25.0 [-25.0, -25.0]) | 50.0 (+0.0 [+0.0, +0.0]) "
        "| 80.0 (-10.0 [-10.0, -10.0]) | 25.0 (+0.0 [+0.0, +0.0]) |",
    ]
