"""Questions of a benchmark, and answer files put into their order."""

import json
from pathlib import Path

import pytest

from minialign.evaluation.questions import (
    Question,
    check_unique_ids,
    find_image,
    match_answers,
    read_answers,
    read_question_file,
)
from minialign.utils.files import InputError

IMAGES = Path("data/tiny/final/balanced/images")


def questions_with(*ids):
    """Return one question for each id."""
    return [Question(item, IMAGES / "0001.png", "Is it red?", {}) for item in ids]


def test_answers_come_in_the_order_of_the_questions():
    answers = [(3, "c"), (1, "a"), (2, "b")]

    assert match_answers(questions_with(1, 2, 3), answers, "a.jsonl") == ["a", "b", "c"]


def test_a_number_and_its_text_are_the_same_id():
    assert match_answers(questions_with("201", 7), [("7", "b"), (201, "a")], "f") == ["a", "b"]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([(1, "a"), (1, "b"), (2, "c")], "f: 1 questions are answered several times.*'1'"),
        ([(1, "a"), ("1", "b"), (2, "c")], "f: 1 questions are answered several times.*'1'"),
        ([(1, "a"), (2, "b"), (9, "c"), (8, "d")], "f: 2 answers belong to no question.* 9;"),
        ([(2, "b")], "f: 1 of 2 questions have no answer, the first is 1;"),
        ([], "f: 2 of 2 questions have no answer, the first is 1;"),
    ],
)
def test_answers_of_other_questions_are_refused(answers, message):
    with pytest.raises(InputError, match=message):
        match_answers(questions_with(1, 2), answers, "f")


def test_ids_that_questions_share_are_counted():
    check_unique_ids(questions_with(1, 2), "q.jsonl")
    with pytest.raises(InputError, match=r"q.jsonl: 2 ids are given to several .* 'b'"):
        check_unique_ids(questions_with("b", "a", "b", "a", "c"), "q.jsonl")


def test_an_image_that_is_not_there_is_named_with_file_and_record():
    assert find_image(IMAGES, "0001.png", "q.jsonl, record 1") == IMAGES / "0001.png"
    for name in ("none.png", "", None, 3):
        with pytest.raises(InputError, match="^q.jsonl, record 4: "):
            find_image(IMAGES, name, "q.jsonl, record 4")


def test_scoring_alone_needs_no_images():
    assert find_image(None, "none.png", "q.jsonl, record 1") == Path("none.png")


def test_answer_files_are_json_lists_or_json_lines(tmp_path):
    records = [{"question_id": 1, "text": ""}, {"question_id": "n2", "text": "no", "x": {}}]
    for name, text in (
        ("a.json", json.dumps(records)),
        ("a.jsonl", "\r\n".join(map(json.dumps, records))),
    ):
        (tmp_path / name).write_text(text)
        assert read_answers(tmp_path / name) == [(1, ""), ("n2", "no")]


@pytest.mark.parametrize(
    "record",
    [
        {"text": "a"},
        {"question_id": True, "text": "a"},
        {"question_id": None, "text": "a"},
        {"question_id": 1},
        {"question_id": 1, "text": 3},
        {"question_id": 1, "text": "\ud800"},
        [1, "a"],
    ],
)
def test_a_record_of_another_form_is_named(record, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"question_id": 0, "text": "yes"}, record]))

    with pytest.raises(InputError, match=r"a.json, record 2: "):
        read_answers(path)


def write_questions(tmp_path, *records):
    """Write a file of questions, and return its path."""
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(record) + "\r\n" for record in records))
    return path


def test_a_question_file_keeps_ids_texts_and_records(tmp_path):
    first = {"question_id": "a", "image": "0001.png", "text": "Red?\nBriefly.", "category": "x"}
    second = {"question_id": 7, "image": "0002.png", "text": "Is it?", "category": "x"}

    questions = read_question_file(write_questions(tmp_path, first, second), IMAGES)

    assert questions == [
        Question("a", IMAGES / "0001.png", "Red?\nBriefly.", first),
        Question(7, IMAGES / "0002.png", "Is it?", second),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": " "}, "no question in 'text'"),
        ({"text": None}, "no question in 'text'"),
        ({"text": "<image>\nIs it?"}, "has <image> in it"),
        ({"text": "Is it \ud800?"}, "a text has a lone surrogate"),
        ({"question_id": None}, "'question_id' is not a number or a text"),
        ({"question_id": True}, "'question_id' is not a number or a text"),
        ({"image": "none.png"}, "no such image"),
    ],
)
def test_a_record_that_cannot_be_asked_is_named(tmp_path, change, message):
    record = {"question_id": 1, "image": "0001.png", "text": "Is it?"}
    path = write_questions(tmp_path, record, record | {"question_id": 2} | change)

    with pytest.raises(InputError, match=f"q.jsonl, record 2: .*{message}"):
        read_question_file(path, IMAGES)


def test_a_record_that_is_no_object_is_named(tmp_path):
    record = {"question_id": 1, "image": "0001.png", "text": "Is it?"}
    path = write_questions(tmp_path, record, [])

    with pytest.raises(InputError, match=r"q.jsonl, record 2: not a JSON object"):
        read_question_file(path, IMAGES)
