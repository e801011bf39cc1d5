"""What the changes are, with their intervals, by hand."""

import pytest
from report_runs import caption_line, scores, write_run

from minialign.report.measures import CHAIR_I, RECALL, Change, find_change, measures_of
from minialign.report.run_files import read_run


def test_a_change_has_the_interval_of_its_images(tmp_path):
    """On both images one mention of two is wrong before, and none after."""
    lines = [
        caption_line("1.png", base="a cup, a dog", aligned="a cup"),
        caption_line("2.png", base="a dog, a cup", aligned="a cup"),
    ]
    evaluation = {"base": {"typical": scores(0.5)}, "aligned": {"typical": scores(0.0)}}
    run = read_run(write_run(tmp_path / "run", captions=lines, evaluation=evaluation))

    change = find_change(run, CHAIR_I, "typical", before="base", after="aligned")

    assert change == Change(-50.0, (-50.0, -50.0))
    assert change.verdict(CHAIR_I) == "better"


def test_without_captions_a_change_has_no_interval(tmp_path):
    evaluation = {"base": {"typical": scores(0.5)}, "aligned": {"typical": scores(0.4)}}
    run = read_run(write_run(tmp_path / "run", evaluation=evaluation))

    change = find_change(run, CHAIR_I, "typical", before="base", after="aligned")

    assert change.value == pytest.approx(-10)
    assert change.interval is None
    assert change.verdict(CHAIR_I) == ""


@pytest.mark.parametrize(
    "interval, measure, verdict",
    [
        ((-3, -1), CHAIR_I, "better"),
        ((1, 3), CHAIR_I, "worse"),
        ((-3, 3), CHAIR_I, "not clear"),
        ((1, 3), RECALL, "better"),
        ((-3, -1), RECALL, "worse"),
        ((0, 1), RECALL, "not clear"),
        ((0, 0), RECALL, "the same"),
    ],
)
def test_the_verdict_depends_on_the_direction(interval, measure, verdict):
    assert Change(sum(interval) / 2, interval).verdict(measure) == verdict


def test_answers_to_pope_are_counted_by_image(tmp_path):
    """Of the four answers about two images the model has two right before, and four after."""
    lines = []
    for image, truth in (("1.png", "yes"), ("1.png", "no"), ("2.png", "yes"), ("2.png", "no")):
        line = {"set": "typical", "split": "random", "image": image, "question": "?"}
        right = truth.capitalize()
        lines.append(line | {"truth": truth, "answers": {"base": "Yes.", "aligned": right}})
    evaluation = {
        "base": {"typical": {"pope": {"random": {"accuracy": 0.5, "yes": 1.0}}}},
        "aligned": {"typical": {"pope": {"random": {"accuracy": 1.0, "yes": 0.5}}}},
    }
    run = read_run(write_run(tmp_path / "run", answers=lines, evaluation=evaluation))

    accuracy, says_yes = measures_of(run, "typical")
    change = find_change(run, accuracy, "typical", before="base", after="aligned")
    change_of_yes = find_change(run, says_yes, "typical", before="base", after="aligned")

    assert change == Change(50.0, (50.0, 50.0))
    assert change_of_yes == Change(-50.0, None)
