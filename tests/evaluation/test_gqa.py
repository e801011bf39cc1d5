"""GQA: its files, how an answer is compared, and scores by hand."""

import json

import pytest
from evaluation_helpers import write_images, write_json, write_jsonl

from minialign.evaluation.gqa import (
    gqa_answer_file,
    gqa_prediction,
    read_gqa,
    read_gqa_answers,
    score_gqa,
)
from minialign.utils.files import InputError

SUFFIX = "\nAnswer the question using a single word or phrase."
GQA_FILE = "testdev_balanced_questions.json"
LLAVA_FILE = "llava_gqa_testdev_balanced.jsonl"


def record(answer, structural, image="n7", balanced=True):
    """Return a question in the published form."""
    return {
        "question": "Is it red?",
        "imageId": image,
        "answer": answer,
        "fullAnswer": f"It is {answer}.",
        "isBalanced": balanced,
        "groups": {"global": None, "local": "x"},
        "types": {"structural": structural, "semantic": "attr", "detailed": "colorVerify"},
    }


RECORDS = {
    "201": record("no", "verify"),
    "202": record("red", "query", image="n8"),
    "203": record("tennis racket", "query"),
    "204": record("left", "choose"),
    "205": record("yes", "logical", balanced=False),
}


@pytest.fixture()
def images(tmp_path):
    """Return a folder with the images that the questions are about."""
    return write_images(tmp_path / "images", "n7.jpg", "n8.jpg")


@pytest.fixture()
def folder(tmp_path):
    """Return a folder with the published file."""
    (tmp_path / "gqa").mkdir()
    write_json(tmp_path / "gqa" / GQA_FILE, RECORDS)
    return tmp_path / "gqa"


def llava_rows():
    """Return LLaVA's form of the balanced questions, in another order."""
    rows = []
    for question_id in ("203", "201", "202", "204"):
        image = RECORDS[question_id]["imageId"] + ".jpg"
        row = {"question_id": question_id, "image": image, "text": "Is it red?" + SUFFIX}
        rows.append(row | {"category": "default"})
    return rows


# --- reading


def test_the_published_file_is_asked_with_llavas_prompt(folder, images):
    for path in (folder, folder / GQA_FILE):
        questions = read_gqa(path, images)

        assert [question.id for question in questions] == list(RECORDS)
        assert questions[1].text == "Is it red?" + SUFFIX
        assert questions[1].image == images / "n8.jpg"
        assert questions[1].record == RECORDS["202"]


@pytest.mark.parametrize("inner", [".", "data", "questions1.2", "data/questions1.2"])
def test_llavas_file_takes_its_answers_from_the_published_file(tmp_path, images, inner):
    (tmp_path / inner).mkdir(parents=True, exist_ok=True)
    write_json(tmp_path / inner / GQA_FILE, RECORDS)
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())

    questions = read_gqa(tmp_path / LLAVA_FILE, images)

    assert [question.id for question in questions] == ["203", "201", "202", "204"]
    assert questions[0].record["answer"] == "tennis racket"
    assert score_gqa(questions, ["tennis racket", "no", "red", "left"])["accuracy"] == 1.0


def test_llavas_file_alone_can_be_asked_but_not_scored(tmp_path, images):
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())

    questions = read_gqa(tmp_path, images)

    assert gqa_answer_file(questions, list("abcd"))[0] == {"questionId": "203", "prediction": "a"}
    with pytest.raises(
        InputError, match=f"question '203': its right answer is not known.*{GQA_FILE}"
    ):
        score_gqa(questions, list("abcd"))


@pytest.mark.parametrize(
    "position, change, message",
    [
        (2, {"question_id": "9"}, "question '9' is not in"),
        (2, {"image": "n7.jpg"}, "question '202' is about 'n7.jpg', but about 'n8.jpg' in"),
        (2, {"question_id": "201"}, "1 ids are given to several questions"),
        (2, {"image": "n9.jpg"}, "record 3: .*n9.jpg: no such image"),
    ],
)
def test_answers_to_other_questions_are_refused(folder, images, position, change, message):
    rows = llava_rows()
    rows[position].update(change)
    write_jsonl(folder / LLAVA_FILE, rows)

    with pytest.raises(InputError, match=f"{LLAVA_FILE}.*{message}"):
        read_gqa(folder / LLAVA_FILE, images)


def test_a_folder_without_questions_says_which_files_it_may_have(tmp_path, images):
    with pytest.raises(InputError, match=f"has neither {GQA_FILE} nor {LLAVA_FILE}"):
        read_gqa(tmp_path, images)


def test_a_missing_question_is_refused(folder, images):
    """GQA's own scorer demands a prediction for each balanced question."""
    write_jsonl(folder / LLAVA_FILE, llava_rows()[:3])

    with pytest.raises(InputError, match=f"question '204' of .*{GQA_FILE} is missing"):
        read_gqa(folder / LLAVA_FILE, images)


@pytest.mark.parametrize("field", ["question", "imageId", "answer", "isBalanced", "types"])
def test_a_record_without_a_field_is_named(folder, images, field):
    damaged = dict(RECORDS["203"])
    del damaged[field]
    write_json(folder / GQA_FILE, RECORDS | {"203": damaged})

    with pytest.raises(InputError, match=f"{GQA_FILE}, question '203': "):
        read_gqa(folder, images)


def test_a_question_that_occurs_twice_is_refused(folder, images):
    """Python's json would keep the last of the two without a word."""
    text = json.dumps(RECORDS)
    path = folder / GQA_FILE
    path.write_text(text[:-1] + ', "202": ' + json.dumps(RECORDS["203"]) + "}")

    with pytest.raises(InputError, match=f"{GQA_FILE}: '202' occurs twice"):
        read_gqa(folder, images)


def test_an_image_that_is_not_there_is_named(folder, images):
    (images / "n8.jpg").unlink()

    with pytest.raises(InputError, match=r"question '202': .*n8.jpg: no such image"):
        read_gqa(folder, images)


# --- scoring


@pytest.mark.parametrize(
    "answer, prediction",
    [
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("Red.", "red"),
        ("T-shirt", "t-shirt"),
        ("tennis racket.", "tennis racket"),
        ("red..", "red"),
        ("U.S.", "u.s"),
        ("", ""),
        # None of these equals an answer. The published rule leaves them as they are.
        ("The car", "the car"),
        ("car,", "car,"),
        ("no!", "no!"),
        ("traffic light ", "traffic light "),
        (" car", " car"),
        ("car.\n", "car.\n"),
        ("car. ", "car. "),
        ("two", "two"),
        ("2", "2"),
    ],
)
def test_predictions_are_made_as_llava_makes_them(answer, prediction):
    assert gqa_prediction(answer) == prediction


def test_scores_by_hand(folder, images):
    """Of the open questions one of two is right, of the binary ones both. 205 does not count."""
    questions = read_gqa(folder, images)

    scores = score_gqa(questions, ["No.", "The red", "Tennis racket", "LEFT", "no"])

    assert scores == {"accuracy": 0.75, "open": 0.5, "binary": 1.0, "n": 4}


def test_a_share_of_nothing_is_no_value(folder, images):
    questions = read_gqa(folder, images)

    scores = score_gqa([questions[0]], ["yes"])

    assert scores == {"accuracy": 0.0, "open": None, "binary": 0.0, "n": 1}


# --- answer files


def test_what_gqas_scorer_reads_can_be_read_back(folder, images, tmp_path):
    questions = read_gqa(folder, images)
    answers = ["No.", "Red", "Tennis racket.", "left ", "yes"]

    predictions = gqa_answer_file(questions, answers)

    assert predictions[0] == {"questionId": "201", "prediction": "no"}
    write_json(tmp_path / "predictions.json", predictions)
    read_back = read_gqa_answers(questions, tmp_path / "predictions.json")
    assert read_back == ["no", "red", "tennis racket", "left ", "yes"]


def test_llavas_answer_file_is_matched_by_id(folder, images, tmp_path):
    """The order of the lines and the question that does not count make no difference."""
    rows = []
    for question_id, text in ((204, "d"), ("202", "B."), ("201", "a"), ("203", "c")):
        rows.append({"question_id": question_id, "prompt": "Is it red?", "text": text})
    write_jsonl(tmp_path / "merge.jsonl", rows)
    questions = read_gqa(folder, images)

    assert read_gqa_answers(questions, tmp_path / "merge.jsonl") == ["a", "B.", "c", "d", ""]


@pytest.mark.parametrize(
    "rows, message",
    [
        (
            [{"questionId": "201", "prediction": "No"}],
            "'No' of question '201' is not in lower case",
        ),
        ([{"questionId": "201", "prediction": "no."}], "'no.' of question '201' is not in lower"),
        ([{"questionId": "201", "prediction": "no"}], "3 of 5 questions have no answer.*'202'"),
        ([{"question_id": "201", "text": "no"}] * 2, "answered several times"),
        ([{"question_id": "9", "text": "no"}], "1 answers belong to no question"),
        ([{"question_id": "201", "answer": "no"}], "record 1: 'text' is not a text"),
        (["no"], "record 1: "),
    ],
)
def test_answers_that_do_not_fit_are_refused(folder, images, tmp_path, rows, message):
    write_json(tmp_path / "answers.json", rows)

    with pytest.raises(InputError, match=f"answers.json.*{message}"):
        read_gqa_answers(read_gqa(folder, images), tmp_path / "answers.json")
