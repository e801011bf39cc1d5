"""Answer files of POPE: those of LLaVA's scripts, and those of POPE's own scorer."""

import pytest
from evaluation_helpers import TINY_IMAGE, write_jsonl

from minialign.evaluation.benchmarks import change_prompts
from minialign.evaluation.pope_answers import pope_answer_file, read_pope_answers
from minialign.evaluation.questions import SHORT_ANSWER_SUFFIX, Question
from minialign.utils.files import InputError

NAMES = ("kite", "dog")


def questions_with(*ids, split="random"):
    """Return a question for each id."""
    questions = []
    for question_id in ids:
        name = NAMES[question_id % 2]
        text = f"Is there a {name} in the image?{SHORT_ANSWER_SUFFIX}"
        record = {"category": split, "text": text}
        questions.append(Question(question_id, TINY_IMAGE, text, record))
    return questions


def test_llavas_form_is_matched_by_id(tmp_path):
    rows = [{"question_id": 2, "text": "No"}, {"question_id": 1, "text": "Yes"}]
    write_jsonl(tmp_path / "answers.jsonl", rows)

    assert read_pope_answers(questions_with(1, 2), tmp_path / "answers.jsonl") == ["Yes", "No"]


def test_llavas_form_is_in_order_where_three_splits_have_the_same_ids(tmp_path):
    questions = questions_with(1, 2) + questions_with(1, 2, split="popular")
    path = tmp_path / "answers.jsonl"
    rows = []
    for question, text in zip(questions, "abcd", strict=True):
        rows.append({"question_id": question.id, "text": text})
    write_jsonl(path, rows)

    assert read_pope_answers(questions, path) == ["a", "b", "c", "d"]

    write_jsonl(path, [rows[1], rows[0], rows[2], rows[3]])
    with pytest.raises(InputError, match=r"record 1: answers 2, but the question there is 1;"):
        read_pope_answers(questions, path)
    write_jsonl(path, rows[:3])
    with pytest.raises(InputError, match="3 answers to 4 questions"):
        read_pope_answers(questions, path)


def test_what_popes_scorer_reads_can_be_read_back(tmp_path):
    questions = questions_with(1, 2) + questions_with(1, 2, split="popular")
    answers = ["Yes", "No", "no.", "yes"]

    files = pope_answer_file(questions, answers)

    assert files["random"] == [
        {"question": "Is there a dog in the image?", "answer": "Yes"},
        {"question": "Is there a kite in the image?", "answer": "No"},
    ]
    for split, rows in files.items():
        write_jsonl(tmp_path / f"coco_pope_{split}.json", rows)
    assert read_pope_answers(questions, tmp_path) == answers


@pytest.mark.parametrize("prompt", ["Answer yes or no.", "Look.\nThen answer.", ""])
def test_what_was_asked_with_another_prompt_can_be_read_back(tmp_path, prompt):
    """POPE's own scorer knows the bare question only."""
    questions = questions_with(1, 2)
    asked = change_prompts(questions, SHORT_ANSWER_SUFFIX, prompt)

    rows = pope_answer_file(asked, ["Yes", "No"])["random"]

    assert rows[0] == {"question": "Is there a dog in the image?", "answer": "Yes"}
    write_jsonl(tmp_path / "a.jsonl", rows)
    assert read_pope_answers(questions, tmp_path / "a.jsonl") == ["Yes", "No"]


def test_another_order_is_refused(tmp_path):
    """POPE's own scorer would pair them with the wrong labels."""
    files = pope_answer_file(questions_with(2, 1), ["No", "Yes"])
    write_jsonl(tmp_path / "a.jsonl", files["random"])

    with pytest.raises(InputError, match=r"a.jsonl, record 1: answers 'Is there a kite"):
        read_pope_answers(questions_with(1, 2), tmp_path / "a.jsonl")


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question_id": 1, "text": "a"}], "1 of 2 questions have no answer, the first is 2"),
        ([{"question_id": 1, "text": "a"}, {"question_id": 1, "text": "a"}], "several times"),
        ([{"question": "Is there a dog in the image?", "answer": "a"}], "1 answers to 2 questions"),
        ([{"answer": "a"}, {"answer": "b"}], "record 1: 'question' is not"),
        ([{"question_id": 1, "text": None}], "record 1: 'text' is not a text"),
    ],
)
def test_answers_of_other_questions_are_refused(tmp_path, rows, message):
    write_jsonl(tmp_path / "a.jsonl", rows)

    with pytest.raises(InputError, match=f"a.jsonl.*{message}"):
        read_pope_answers(questions_with(1, 2), tmp_path / "a.jsonl")


def test_a_missing_split_is_named(tmp_path):
    write_jsonl(tmp_path / "pope_popular.jsonl", [{"question_id": 1, "text": "a"}])

    with pytest.raises(InputError, match=r"no file pope_random.jsonl with the answers"):
        read_pope_answers(questions_with(1), tmp_path)
