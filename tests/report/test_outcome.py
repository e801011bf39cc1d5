"""What became better and what became worse is weighed against the base and the control."""

import pytest
from report_runs import PageReader, caption_line, scores, write_run

from minialign.report.markup import join
from minialign.report.outcome import describe_outcome
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

    assert "100.0\u00a0% on typical against 50.0\u00a0%." in text
    assert "count as yes. It gave 1 of them." in text


def test_a_run_that_is_not_finished_has_no_outcome(tmp_path):
    evaluation = {"base": {"typical": scores(0.5)}}

    run = read_run(write_run(tmp_path / "run", evaluation=evaluation))

    assert describe_outcome(run) == []
