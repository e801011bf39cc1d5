"""What the changes are, with their intervals, by hand."""

import pytest
from report_runs import caption_line, scores, write_run

from minialign.evaluation.kept_answers import scores_of_captions, scores_of_questions
from minialign.report.measures import (
    CAPTION_MEASURES,
    CHAIR_I,
    RECALL,
    Change,
    find_change,
    measures_of,
    pope_measures,
)
from minialign.report.run_files import read_run


def test_a_change_has_the_interval_of_its_images(tmp_path):
    """On both images one mention of two is wrong before, and none after."""
    lines = [
        caption_line("1.png", base="a cup, a dog", aligned="a cup"),
        caption_line("2.png", base="a dog, a cup", aligned="a cup"),
    ]
    evaluation = {"base": {"typical": scores(0.5)}, "aligned": {"typical": scores(0.0)}}
    run = read_run(write_run(tmp_path / "run", captions=lines, evaluation=evaluation))

    change = find_change(run, CHAIR_I, "typical", baseline="base", variant="aligned")

    assert change == Change(-50.0, (-50.0, -50.0))
    assert change.verdict(CHAIR_I) == "better"


@pytest.mark.parametrize(
    "texts_of_images",
    [
        [("a cup, a dog", "a cup")],
        [("a cup, a dog", "a cup"), ("nothing", "a cup")],
        [("a cup, a dog", "a cup"), ("a dog", "nothing")],
    ],
)
def test_what_a_single_image_says_has_no_verdict(tmp_path, texts_of_images):
    """With one image, or with one on which a model mentions an object, chance is not known."""
    lines = []
    for i, (base, aligned) in enumerate(texts_of_images):
        lines.append(caption_line(f"{i}.png", base=base, aligned=aligned))
    evaluation = {"base": {"typical": scores(0.5)}, "aligned": {"typical": scores(0.0)}}
    run = read_run(write_run(tmp_path / "run", captions=lines, evaluation=evaluation))

    change = find_change(run, CHAIR_I, "typical", baseline="base", variant="aligned")

    assert change == Change(-50.0, None)
    assert change.verdict(CHAIR_I) == ""


def test_the_counts_of_images_add_up_to_the_scores():
    """Every score that can be better or worse has counts, or it would never have a verdict."""
    first = caption_line("1.png", base="a cup, a dog, a cup")
    second = caption_line("2.png", base="a cup")
    mentions = first["answers"]["base"]["mentions"]
    mentions.append(mentions[0] | {"start": 14, "end": 17, "colour": "red", "right_colour": True})
    mentions[0] |= {"colour": "blue", "right_colour": False}
    second["answers"]["base"]["mentions"][0] |= {"colour": "blue", "right_colour": None}
    question = {"set": "typical", "split": "random", "truth": "no"}
    questions = [question | {"answers": {"base": text}} for text in ("Yes.", "No.", "no", "No")]

    scores_of_set = scores_of_captions([first, second])["base"]["typical"]
    scores_of_set |= {"pope": scores_of_questions(questions)["base"]["typical"]}

    assert (scores_of_set["colour"], scores_of_set["repeats"]) == (1 / 2, 1 / 4)
    for measure in (*CAPTION_MEASURES, *pope_measures("random")):
        if measure.better:
            lines = questions if measure.split else [first, second]
            counts = [measure.count(line, "base") for line in lines]
            num_counted, num_all = map(sum, zip(*counts, strict=True))
            assert 100 * num_counted / num_all == measure.value(scores_of_set), measure.title


def test_without_captions_a_change_has_no_interval(tmp_path):
    evaluation = {"base": {"typical": scores(0.5)}, "aligned": {"typical": scores(0.4)}}
    run = read_run(write_run(tmp_path / "run", evaluation=evaluation))

    change = find_change(run, CHAIR_I, "typical", baseline="base", variant="aligned")

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
    change = find_change(run, accuracy, "typical", baseline="base", variant="aligned")
    change_of_yes = find_change(run, says_yes, "typical", baseline="base", variant="aligned")

    assert change == Change(50.0, (50.0, 50.0))
    assert change_of_yes == Change(-50.0, None)
