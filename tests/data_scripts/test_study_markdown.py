"""The study's tables as Markdown, worked by hand."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
from tiny_study.markdown import brief_table, full_table, markdown_lines  # noqa: E402


@pytest.fixture()
def tables_by_q():
    """Return the tables of a part with two q and two sets."""
    base = {
        "arm": "base",
        "runs": 1,
        "bases": 1,
        "chair_i": 0.1234,
        "chair_s": 0.5,
        "recall": 1.0,
        "colour": 0.987,
        "words": 12.34,
        "repeats": 0.005,
        "pope": 0.8768,
        "over_bases": None,
        "over_seeds": None,
    }
    bdhs = base | {
        "arm": "bdhs",
        "runs": 6,
        "bases": 2,
        "over_bases": 0.011,
        "over_seeds": 0.0249,
        "difference": -0.0312,
        "interval": [-0.07, 0.004],
    }
    worse = bdhs | {
        "arm": "worse",
        "chair_i": 0.2,
        "recall": 0.5,
        "repeats": 0.25,
        "difference": 0.05,
        "interval": [0.0149, 0.0951],
    }
    return {
        "0.35": {"near": [base, bdhs], "far": [base, worse]},
        "0": {"near": [worse], "far": [bdhs]},
    }


def test_each_part_has_a_title_a_brief_and_a_full_table(tables_by_q):
    title, *lines = markdown_lines({"A question": tables_by_q})

    assert title.strip() == "**A question**"
    assert lines == [*brief_table(tables_by_q), "", *full_table(tables_by_q)]


def test_the_brief_table(tables_by_q):
    """Shares are in percent, and differences have a sign. The line under the head is left out."""
    lines = brief_table(tables_by_q)

    assert {line.count("|") for line in lines} == {9}
    assert [lines[0], *lines[2:]] == [
        "| q | arm | bases | runs | CHAIR_i near | CHAIR_i far | recall near, far | repeats |",
        "| 0.35 | base | 1 | 1 | 12.3 | 12.3 | 100.0, 100.0 | 0.5, 0.5 |",
        "| 0.35 | bdhs | 2 | 6 | 12.3 (-3.1 [-7.0, +0.4]) | 20.0 (+5.0 [+1.5, +9.5]) "
        "| 100.0, 50.0 | 0.5, 25.0 |",
        "| 0 | worse | 2 | 6 | 20.0 (+5.0 [+1.5, +9.5]) | 12.3 (-3.1 [-7.0, +0.4]) "
        "| 50.0, 100.0 | 25.0, 0.5 |",
    ]


def test_the_full_table(tables_by_q):
    """Shares are in percent, words are not. What is not known is empty."""
    lines = full_table(tables_by_q)

    assert {line.count("|") for line in lines} == {15}
    assert lines[0] == (
        "| q | set | arm | runs | CHAIR_i | ± bases | ± seeds | against control [95 %] "
        "| CHAIR_s | recall | colour | words | repeats | POPE |"
    )
    assert lines[2] == (
        "| 0.35 | near | base | 1 | 12.3 |  |  |  | 50.0 | 100.0 | 98.7 | 12.3 | 0.5 | 87.7 |"
    )
    assert lines[3] == (
        "| 0.35 | near | bdhs | 6 | 12.3 | 1.1 | 2.5 | -3.1 [-7.0, +0.4] "
        "| 50.0 | 100.0 | 98.7 | 12.3 | 0.5 | 87.7 |"
    )
    assert lines[6] == (
        "| 0 | near | worse | 6 | 20.0 | 1.1 | 2.5 | +5.0 [+1.5, +9.5] "
        "| 50.0 | 50.0 | 98.7 | 12.3 | 25.0 | 87.7 |"
    )
