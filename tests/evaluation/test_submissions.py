"""The files for judges, servers and scorers, and what the questions lack if one is impossible."""

import json

from minialign.evaluation.submissions import missing_in_questions, write_submission
from minialign.utils.files import check, read_jsonl

QUESTIONS = ["q0", "q1"]


def submission(questions, answers):
    """Return a record for each answer, as a benchmark does. The question "unknown" has no id."""
    check("unknown" not in questions, "question 'unknown': its id is not known")
    return [{"id": key, "answer": text} for key, text in zip(questions, answers, strict=True)]


def test_the_ending_says_the_form(tmp_path):
    records = [{"id": "q0", "answer": "a"}, {"id": "q1", "answer": "b"}]

    for name in ("x.submission.json", "x.submission.jsonl"):
        write_submission(tmp_path / name, records)
    write_submission(tmp_path / "x.submission", {"odd": records})

    assert json.loads((tmp_path / "x.submission.json").read_text()) == records
    assert read_jsonl(tmp_path / "x.submission.jsonl") == records
    assert read_jsonl(tmp_path / "x.submission" / "pope_odd.jsonl") == records


def test_what_the_questions_lack_is_found_without_answers():
    missing = missing_in_questions(submission, ["q0", "unknown"])

    assert missing == "question 'unknown': its id is not known"


def test_other_questions_lack_nothing():
    assert missing_in_questions(submission, QUESTIONS) is None
    assert missing_in_questions(None, QUESTIONS) is None
