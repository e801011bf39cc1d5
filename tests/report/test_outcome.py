"""What became better and what became worse is weighed against the base and the control."""

import pytest
from report_runs import PageReader, caption_line, scores, write_run

from minialign.report.markup import join
from minialign.report.outcome import describe_outcome, describe_yes
from minialign.report.run_files import read_run


def pope(accuracy, yes, unparsed=0) -> dict:
    """Return the scores of one split of POPE."""
    return {
        "pope": {"random": {"accuracy": accuracy, "yes": yes, "n": 4, "unparsed": unparsed}},
    }


@pytest.fixture
def run(tmp_path):
    """Return a run whose captions improve on both images, and whose answers become worse.

    The base answers all four questions rightly. The aligned model says yes to each, and once in
    words of its own. The control does as the aligned model.
    """
    captions = [
        caption_line(f"{i}.png", base="a cup, a dog", control="a cup, a dog", aligned="a cup")
        for i in (1, 2)
    ]
    answers = []
    for image in ("1.png", "2.png"):
        for truth in ("yes", "no"):
            texts = {"base": f"{truth.capitalize()}.", "control": "Yes.", "aligned": "Yes."}
            line = {"set": "typical", "split": "random", "image": image, "question": "?"}
            answers.append(line | {"truth": truth, "answers": texts})
    evaluation = {
        "base": {"typical": scores(0.5) | pope(1.0, yes=0.5)},
        "control": {"typical": scores(0.5) | pope(0.5, yes=1.0)},
        "aligned": {"typical": scores(0.0) | pope(0.5, yes=1.0, unparsed=1)},
    }
    folder = tmp_path / "run"
    return read_run(write_run(folder, captions=captions, answers=answers, evaluation=evaluation))


def test_the_first_line_weighs_captions_and_questions(run):
    text = PageReader(describe_outcome(run)[0]).text

    assert text == (
        "Overall, aligned against base: Captions (wrong mentions): clearly better on typical. "
        "POPE (right answers): clearly worse on typical (random)."
    )


def test_the_control_is_compared_too(run):
    text = PageReader(join(*describe_outcome(run))).text

    assert "aligned against control: Captions (wrong mentions): clearly better" in text
    assert "the same on typical (random)" in text
    assert "No score is clearly worse than that of the control." in text
    assert "Clearly worse than the base, in percentage points:typical: POPE random −50.0" in text


def test_more_answers_of_yes_are_told(run):
    text = PageReader(join(*describe_outcome(run))).text

    assert "says yes to more questions of POPE than the base: 4 of 4 on typical against 2." in text
    assert "count as yes. It gave 1 of them." in text


@pytest.mark.parametrize(
    "splits_before, splits_after, rise",
    [
        (
            [(5 / 30, 30), (1 / 30, 30), (1 / 30, 30)],
            [(1 / 30, 30), (1 / 30, 30), (5 / 30, 30)],
            "",
        ),
        ([(0.5, 10), (0.5, 1000)], [(0.6, 10), (0.45, 1000)], ""),
        ([(0.5, 10), (0.5, 1000)], [(0.4, 10), (0.502, 1000)], "506 of 1,010 on mine against 505"),
    ],
)
def test_answers_of_yes_are_counted(tmp_path, splits_before, splits_after, rise):
    """A mean of shares rounds, and weighs a small split as much as a large one."""
    evaluation = {}
    for variant, splits in (("base", splits_before), ("aligned", splits_after)):
        pope = {f"{i}": {"yes": share, "n": n} for i, (share, n) in enumerate(splits)}
        evaluation[variant] = {"mine": {"pope": pope}}
    run = read_run(write_run(tmp_path / "run", evaluation=evaluation))

    sentence = describe_yes(run)

    assert bool(sentence) == bool(rise)
    assert rise in sentence


def test_scores_that_cannot_be_judged_are_named(tmp_path):
    """The base mentions no object. Colors have verdicts only where they are said of an image."""
    captions = []
    for i in (1, 2):
        captions.append(caption_line(f"{i}.png", base="hm", aligned="a cup"))
    evaluation = {
        "base": {"typical": scores(None, recall=0.0) | {"colour": 1.0}},
        "aligned": {"typical": scores(0.0, recall=1.0) | {"colour": 0.5}},
    }
    run = read_run(write_run(tmp_path / "run", captions=captions, evaluation=evaluation))

    overall, of_set, worse = [PageReader(item).text for item in describe_outcome(run)]

    assert (
        overall
        == "Overall, aligned against base: Captions (wrong mentions): no verdict on typical."
    )
    assert "The captions of base mention no object, so CHAIR_i cannot be compared." in of_set
    assert (
        "The aligned model names 100.0\u00a0% of the objects that are there, against 0.0\u00a0%"
        in of_set
    )
    assert worse == (
        "No score is clearly worse than that of the base. There is no verdict on:"
        "typical: right colors"
    )


def test_colors_and_repeats_can_be_clearly_worse(tmp_path):
    captions = []
    for i in range(4):
        line = caption_line(f"{i}.png", base="a cup", aligned="a cup, a cup")
        mentions = line["answers"]["aligned"]["mentions"]
        mentions.append(mentions[0] | {"start": 9, "end": 12})
        for variant, is_right in (("base", True), ("aligned", False)):
            line["answers"][variant]["mentions"][0] |= {"colour": "red", "right_colour": is_right}
        captions.append(line)
    evaluation = {
        "base": {"typical": scores(0.0) | {"colour": 1.0, "repeats": 0.0}},
        "aligned": {"typical": scores(0.0) | {"colour": 0.0, "repeats": 0.5}},
    }
    run = read_run(write_run(tmp_path / "run", captions=captions, evaluation=evaluation))

    text = PageReader(describe_outcome(run)[-1]).text

    assert "typical: right colors −100.0, repeated mentions +50.0" in text


@pytest.mark.parametrize(
    "ties, sentence", [({"ties": 1.0}, "They are equal in 100.0\u00a0% of the pairs. "), ({}, "")]
)
def test_pairs_with_equal_scores_count_half(tmp_path, ties, sentence):
    scores_of_splits = {"held-out": {"accuracy": 0.5, "n": 4} | ties}
    evaluation = {"aligned": scores_of_splits}
    run = read_run(write_run(tmp_path / "run", {"method": "reward"}, evaluation=evaluation))

    (outcome,) = describe_outcome(run)

    assert outcome == (
        "On 4 pairs that it was not trained on, the reward model is right in 50.0\u00a0%. "
        "A pair counts if its chosen answer has the higher score, and half if the scores are "
        f"equal. {sentence}Chance is 50.0\u00a0%."
    )


def test_a_run_that_is_not_finished_has_no_outcome(tmp_path):
    evaluation = {"base": {"typical": scores(0.5)}}

    run = read_run(write_run(tmp_path / "run", evaluation=evaluation))

    assert describe_outcome(run) == []
