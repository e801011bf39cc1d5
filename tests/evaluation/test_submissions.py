"""The files for judges, servers and scorers, and what is said if one cannot be written."""

import json

from minialign.evaluation.submissions import note_unsubmitted, write_submission
from minialign.utils.files import check, read_jsonl

QUESTIONS = ["q0", "q1"]


def submission(questions, answers):
    """Return a record for each answer, as a benchmark does. The question "unknown" has no id."""
    check("unknown" not in questions, "question 'unknown': its id is not known")
    return [{"id": key, "answer": text} for key, text in zip(questions, answers, strict=True)]


def submission_of_splits(questions, answers):
    """Return the records of one split, as POPE does."""
    return {"odd": submission(questions, answers)}


def test_the_ending_says_the_form(tmp_path):
    records = [{"id": "q0", "answer": "a"}, {"id": "q1", "answer": "b"}]

    for name in ("x.submission.json", "x.submission.jsonl"):
        write_submission(tmp_path / name, submission, QUESTIONS, ["a", "b"])
    write_submission(tmp_path / "x.submission", submission_of_splits, QUESTIONS, ["a", "b"])

    assert json.loads((tmp_path / "x.submission.json").read_text()) == records
    assert read_jsonl(tmp_path / "x.submission.jsonl") == records
    assert read_jsonl(tmp_path / "x.submission" / "pope_odd.jsonl") == records


def test_what_cannot_be_written_is_noted_before_and_left_out(tmp_path, capfd):
    note_unsubmitted("x", submission, ["unknown"])
    write_submission(tmp_path / "x.json", submission, ["unknown"], ["a"])

    assert capfd.readouterr().err == (
        "x: no submission will be written: question 'unknown': its id is not known\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_noted_of_other_benchmarks(tmp_path, capfd):
    note_unsubmitted("x", submission, QUESTIONS)
    note_unsubmitted("x", None, QUESTIONS)
    write_submission(tmp_path / "x.json", None, QUESTIONS, ["a", "b"])

    assert capfd.readouterr().err == ""
    assert list(tmp_path.iterdir()) == []
