"""TextVQA: its files, the prompts that answers are matched by, and scores by hand."""

from dataclasses import replace

import pytest
from evaluation_helpers import write_images, write_json, write_jsonl

from minialign.evaluation.benchmarks import change_prompts
from minialign.evaluation.textvqa import (
    answer_accuracy,
    read_textvqa,
    read_textvqa_answers,
    score_textvqa,
    textvqa_answer_file,
)
from minialign.utils.files import InputError

SUFFIX = "\nAnswer the question using a single word or phrase."
OCR = "\nReference OCR token: GO, UP"
TEXTVQA_FILE = "TextVQA_0.5.1_val.json"
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"


def record(question_id, image_id, question, answers):
    """Return a question in the published form."""
    return {
        "question_id": question_id,
        "question": question,
        "image_id": image_id,
        "image_classes": ["Kite"],
        "set_name": "val",
        "answers": answers,
    }


def records():
    """Return three questions, two of them about the same image."""
    return [
        record(34602, "00aa", "what is on the sign?", 10 * ["go up"]),
        record(34603, "00aa", "is this the NASA logo?", 3 * ["yes"] + 7 * ["no"]),
        record(34604, "00bb", "what number?", 4 * ["2"] + 6 * ["two two"]),
    ]


def write_textvqa(folder, questions):
    """Write the published file, and return its path."""
    content = {"dataset_type": "val", "dataset_name": "textvqa", "data": questions}
    write_json(folder / TEXTVQA_FILE, content)
    return folder / TEXTVQA_FILE


def llava_rows():
    """Return LLaVA's form of the questions, with the tokens of an OCR system."""
    rows = []
    for row in records():
        text = row["question"].capitalize() + OCR + SUFFIX
        image_id = row["image_id"]
        rows.append({"question_id": image_id, "image": f"{image_id}.jpg", "text": text})
    return rows


@pytest.fixture()
def images(tmp_path):
    """Return a folder with the images that the questions are about."""
    return write_images(tmp_path / "train_images", "00aa.jpg", "00bb.jpg")


@pytest.fixture()
def questions(tmp_path, images):
    """Return the questions of the published file."""
    return read_textvqa(write_textvqa(tmp_path, records()), images)


# --- reading


def test_the_published_file_is_asked_without_ocr_tokens(tmp_path, images):
    """As LLaVA-1.6 is, also where the file with the tokens is beside it."""
    path = write_textvqa(tmp_path, records())
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())

    for given in (path, tmp_path):
        questions = read_textvqa(given, images)

        assert [question.id for question in questions] == ["00aa", "00aa", "00bb"]
        assert [question.record["question_id"] for question in questions] == [34602, 34603, 34604]
        assert questions[1].text == "Is this the nasa logo?" + SUFFIX
        assert questions[1].image == images / "00aa.jpg"


def test_llavas_file_takes_its_answers_from_the_published_file(tmp_path, images):
    write_textvqa(tmp_path, records())
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())

    questions = read_textvqa(tmp_path / LLAVA_FILE, images)

    assert [question.id for question in questions] == ["00aa", "00aa", "00bb"]
    assert questions[0].text == "What is on the sign?" + OCR + SUFFIX
    assert [question.record["question_id"] for question in questions] == [34602, 34603, 34604]
    assert score_textvqa(questions, ["Go up.", "yes", "2"]) == {
        "accuracy": pytest.approx((1 + 0.9 + 1) / 3),
        "n": 3,
    }


def test_llavas_file_alone_can_be_asked_but_not_scored(tmp_path, images):
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())

    questions = read_textvqa(tmp_path, images)

    with pytest.raises(InputError, match=r"question '00aa': its right answers are not known"):
        score_textvqa(questions, list("abc"))
    with pytest.raises(InputError, match=r"question '00aa': its id on the server is not known"):
        textvqa_answer_file(questions, list("abc"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question_id": 34602}, "1 ids are given to several questions"),
        ({"question_id": None}, "record 2: 'question_id' is not a number"),
        ({"question": ""}, "record 2: no question in 'question'"),
        ({"image_id": 7}, "record 2: 'image_id' is not a text"),
        ({"image_id": "00cc"}, "record 2: .*00cc.jpg: no such image"),
        ({"answers": 9 * ["a"]}, "record 2: 'answers' are not a list of 10 texts"),
        ({"answers": 11 * ["a"]}, "record 2: 'answers' are not a list of 10 texts"),
        ({"answers": 10 * [1]}, "record 2: 'answers' are not a list of 10 texts"),
        ({"answers": "aaaaaaaaaa"}, "record 2: 'answers' are not a list of 10 texts"),
    ],
)
def test_a_bad_record_is_named(tmp_path, images, change, message):
    rows = records()
    rows[1].update(change)

    with pytest.raises(InputError, match=f"{TEXTVQA_FILE}.*{message}"):
        read_textvqa(write_textvqa(tmp_path, rows), images)


@pytest.mark.parametrize("value", [{}, {"data": []}, {"data": {}}, []])
def test_a_file_of_another_form_is_refused(tmp_path, images, value):
    write_json(tmp_path / TEXTVQA_FILE, value)

    with pytest.raises(InputError, match=TEXTVQA_FILE):
        read_textvqa(tmp_path, images)


def test_a_question_that_is_not_in_the_published_file_is_refused(tmp_path, images):
    write_textvqa(tmp_path, records()[:2])
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())

    with pytest.raises(InputError, match=f"{LLAVA_FILE}: the question '00bb: what number.' is not"):
        read_textvqa(tmp_path / LLAVA_FILE, images)


def test_a_question_that_occurs_twice_in_llavas_file_is_refused(tmp_path, images):
    write_jsonl(tmp_path / LLAVA_FILE, [*llava_rows(), llava_rows()[0]])

    with pytest.raises(InputError, match=f"{LLAVA_FILE}: 1 ids .*'00aa: what is on the sign"):
        read_textvqa(tmp_path, images)


def test_the_questions_of_the_test_split_are_asked_for_the_server(tmp_path, images):
    rows = records()
    for row in rows:
        del row["answers"]

    questions = read_textvqa(write_textvqa(tmp_path, rows), images)

    records_of_server = textvqa_answer_file(questions, list("abc"))
    assert records_of_server[2] == {"question_id": 34604, "answer": "c"}
    with pytest.raises(InputError, match=r"question '00aa': .* server of TextVQA"):
        score_textvqa(questions, list("abc"))


# --- scoring


@pytest.mark.parametrize(
    "num_agreeing, accuracy", [(10, 1), (4, 1), (3, 0.9), (2, 0.6), (1, 0.3), (0, 0)]
)
def test_the_accuracy_is_the_mean_with_each_person_left_out(num_agreeing, accuracy):
    people = num_agreeing * ["kite"] + (10 - num_agreeing) * ["sun"]

    assert answer_accuracy("kite", people) == pytest.approx(accuracy)


@pytest.mark.parametrize(
    "answer, people, accuracy",
    [
        ("The Kite!", 3 * ["kite"] + ["a kite"] + 6 * ["x"], 1),
        ("kite", ["Kite ", "kite.", "the kite"] + 7 * ["sun"], 0.9),
        ("two", 3 * ["2"] + 2 * ["two"] + 5 * ["x"], 1),
        # The scorer of VQAv2 would not normalize answers that all people agree on.
        ("The kite", 10 * ["kite"], 1),
        ("kite", 10 * ["The kite"], 1),
        # Nothing is left of either.
        ("...", 3 * ["the"] + 7 * ["sun"], 0.9),
    ],
)
def test_answers_of_people_are_normalized_too(answer, people, accuracy):
    assert answer_accuracy(answer, people) == pytest.approx(accuracy)


def test_scores_by_hand(questions):
    scores = score_textvqa(questions, ["GO UP!", "no", "kite"])

    assert scores == {"accuracy": pytest.approx(2 / 3), "n": 3}


# --- answer files


@pytest.mark.parametrize("prompt", ["", "Briefly.", "Look.\nThen answer."])
@pytest.mark.parametrize("before, behind", [("", ""), ("", OCR), (OCR.strip() + "\n", "")])
def test_what_was_asked_with_another_prompt_can_be_read_back(
    questions, tmp_path, before, behind, prompt
):
    """`--prompt` replaces the last line of what is asked by any number of lines."""
    published = []
    for question in questions:
        bare = question.text.removesuffix(SUFFIX)
        published.append(replace(question, text=before + bare + behind + SUFFIX))
    rows = []
    for asked, text in zip(change_prompts(published, SUFFIX, prompt), "abc", strict=True):
        rows.append({"question_id": asked.id, "prompt": asked.text, "text": text})
    write_jsonl(tmp_path / "a.jsonl", rows)

    assert read_textvqa_answers(questions, tmp_path / "a.jsonl") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "prompt",
    [
        "What is on the sign?" + SUFFIX,
        "WHAT is on the Sign?\nBriefly.",
        "What is on the sign?" + OCR + SUFFIX,
        OCR.strip() + "\nWhat is on the sign?" + SUFFIX,
        "OCR tokens: GO, UP. Question: What is on the sign? Short answer:",
    ],
)
def test_the_question_is_found_in_each_published_prompt(questions, tmp_path, prompt):
    rows = [
        {"question_id": "00bb", "prompt": "What number?" + SUFFIX, "text": "c"},
        {"question_id": "00aa", "prompt": "Is this the nasa logo?" + SUFFIX, "text": "b"},
        {"question_id": "00aa", "prompt": prompt, "text": "a"},
    ]
    write_jsonl(tmp_path / "answers.jsonl", rows)

    assert read_textvqa_answers(questions, tmp_path / "answers.jsonl") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "prompt",
    [
        "What is on the wall?",
        "What is on the wall?\n\n\n",
        "What is on the wall?\nGO, UP" + SUFFIX,
        "OCR tokens: GO, UP. What is on the sign?" + SUFFIX,
    ],
)
def test_a_prompt_without_a_question_of_the_image_is_refused(questions, tmp_path, prompt):
    write_json(tmp_path / "a.json", [{"question_id": "00aa", "prompt": prompt, "text": "a"}])

    with pytest.raises(InputError, match=r"a.json, record 1: no question is found in the prompt"):
        read_textvqa_answers(questions, tmp_path / "a.json")


def test_what_the_server_reads_can_be_read_back(questions, tmp_path):
    write_json(tmp_path / "a.json", textvqa_answer_file(questions, list("abc"))[::-1])

    assert read_textvqa_answers(questions, tmp_path / "a.json") == ["a", "b", "c"]


def test_llavas_questions_take_answers_by_both_ids(tmp_path, images):
    """An answer file of LLaVA's names the image, that of the server the question."""
    write_textvqa(tmp_path, records())
    write_jsonl(tmp_path / LLAVA_FILE, llava_rows())
    questions = read_textvqa(tmp_path / LLAVA_FILE, images)
    rows = []
    for row, text in zip(llava_rows(), "abc", strict=True):
        rows.append({"question_id": row["question_id"], "prompt": row["text"], "text": text})
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_json(tmp_path / "a.json", textvqa_answer_file(questions, list("abc")))

    assert read_textvqa_answers(questions, tmp_path / "a.jsonl") == ["a", "b", "c"]
    assert read_textvqa_answers(questions, tmp_path / "a.json") == ["a", "b", "c"]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"question_id": 34602, "answer": "a"}], "2 of 3 questions have no answer.*nasa"),
        ([{"question_id": 34602, "answer": "a"}] * 2, "answered several times.*'00aa: what is"),
        ([{"question_id": 1, "answer": "a"}], "record 1: no question in 'prompt'"),
        ([{"question_id": "00cc", "prompt": "Is it?\nBriefly.", "text": "a"}], "belong to no"),
        ([{"question_id": 34602, "text": "\ud800"}], "record 1: a text has a lone surrogate"),
        ([{"question_id": 34602, "text": 7}], "record 1: 'text' is not a text"),
        ([{"question_id": None, "text": "a"}], "record 1: 'question_id' is not"),
        (["a"], "record 1: not a JSON object"),
    ],
)
def test_answers_that_do_not_fit_are_refused(questions, tmp_path, rows, message):
    write_json(tmp_path / "a.json", rows)

    with pytest.raises(InputError, match=f"a.json.*{message}"):
        read_textvqa_answers(questions, tmp_path / "a.json")
