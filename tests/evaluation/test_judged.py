"""MM-Vet, LLaVA-Bench and MMHal-Bench: questions in, answers out in the form that is judged."""

import shutil
from pathlib import Path

import pytest
from evaluation_helpers import write_json, write_jsonl

from minialign.evaluation.judged import (
    MMHAL_TYPES,
    llava_bench_answer_file,
    mmhal_answer_file,
    mmvet_answer_file,
    read_llava_bench,
    read_mmhal,
    read_mmvet,
)
from minialign.utils.files import InputError

IMAGES = Path("data/tiny/final/balanced/images")
MMVET = {
    "v1_0": {
        "imagename": "0001.png",
        "question": "What is x in the equation?",
        "answer": "7<OR>seven",
        "imagesource": "here",
        "capability": ["ocr", "math"],
    },
    "v1_2": {"imagename": "0001.png", "question": "Who?", "answer": "Me", "capability": "rec,ocr"},
    "v1_1": {"imagename": "0002.png", "question": "Where?", "answer": "Here", "capability": []},
}
LLAVA_BENCH = [
    {"question_id": 5, "image": "0001.png", "text": "What is it?", "category": "conv"},
    {"question_id": 3, "image": "0001.png", "text": "Describe it.\nWell.", "category": "detail"},
]


def mmhal_records():
    """Return the 96 records of an invented MMHal-Bench."""
    records = []
    for i in range(96):
        record = {
            "question_type": MMHAL_TYPES[i % 8],
            "question_topic": "outdoor",
            "image_id": f"{i:x}",
            "image_src": f"https://farm.example/{i}/0001.png",
            "image_content": ["Kite", "Hill"],
            "question": f"What is number {i}?",
            "gt_answer": "Red.",
            "model_answer": "",
        }
        records.append(record)
    return records


def test_mmvet_gives_one_object_of_answers(tmp_path):
    """Several questions share an image, so the keys of the file are their ids."""
    write_json(tmp_path / "mm-vet.json", MMVET)

    questions = read_mmvet(tmp_path, IMAGES)

    assert [question.id for question in questions] == ["v1_0", "v1_2", "v1_1"]
    assert questions[0].text == "What is x in the equation?"
    assert questions[0].image == IMAGES / "0001.png"
    assert questions[1].record == MMVET["v1_2"]
    answers = mmvet_answer_file(questions, [" 7\n", "You", ""])
    assert answers == {"v1_0": "7", "v1_2": "You", "v1_1": ""}
    assert list(answers) == ["v1_0", "v1_2", "v1_1"]


def test_a_question_of_mmvet_that_occurs_twice_is_refused(tmp_path):
    """Python's json would keep the last of the two without a word."""
    path = tmp_path / "mm-vet.json"
    record = '"v1_0": {"imagename": "0001.png", "question": "Who?"}'
    path.write_text(f"{{{record}, {record}}}")

    with pytest.raises(InputError, match=f"{path}: 'v1_0' occurs twice"):
        read_mmvet(path, IMAGES)


def test_mmvet_in_json_lines_has_numbers_for_keys(tmp_path):
    path = tmp_path / "llava-mm-vet.jsonl"
    write_jsonl(path, LLAVA_BENCH)

    questions = read_mmvet(path, IMAGES)

    assert mmvet_answer_file(questions, ["a", "b"]) == {"v1_5": "a", "v1_3": "b"}


def test_llava_bench_answers_have_ids_and_the_order_of_the_questions(tmp_path):
    write_jsonl(tmp_path / "questions.jsonl", LLAVA_BENCH)
    questions = read_llava_bench(tmp_path, IMAGES)

    records = llava_bench_answer_file(questions, ["A kite.", " A kite. "], "tiny")

    assert [record["question_id"] for record in records] == [5, 3]
    assert [record["text"] for record in records] == ["A kite.", "A kite."]
    assert records[1]["prompt"] == "Describe it.\nWell."
    assert records[0]["model_id"] == "tiny"
    assert records[0]["metadata"] == {}
    ids = {record["answer_id"] for record in records}
    assert len(ids) == 2 and all(isinstance(item, str) for item in ids)
    assert records == llava_bench_answer_file(questions, ["A kite.", " A kite. "], "tiny")


def test_mmhal_answers_stand_in_the_records(tmp_path):
    records = mmhal_records()
    write_json(tmp_path / "response_template.json", records)
    questions = read_mmhal(tmp_path, IMAGES)

    answers = mmhal_answer_file(questions, [f"It is {i}." for i in range(96)])

    assert questions[95].image == IMAGES / "0001.png"
    assert questions[95].text == "What is number 95?"
    assert answers[95] == records[95] | {"model_answer": "It is 95."}
    assert [record["image_id"] for record in answers] == [item["image_id"] for item in records]
    assert records[95]["model_answer"] == ""
    assert list(answers[0]) == list(records[0])


def test_mmhal_of_another_length_or_order_is_refused(tmp_path):
    path = tmp_path / "response_template.json"
    write_json(path, mmhal_records()[:95])
    with pytest.raises(InputError, match="95 questions, but the published script takes 96"):
        read_mmhal(path, IMAGES)

    write_json(path, list(reversed(mmhal_records())))
    with pytest.raises(InputError, match="record 1: .*type 'attribute', not 'other'; restore"):
        read_mmhal(path, IMAGES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_src": None}, "record 2: no text in 'image_src'"),
        ({"image_src": "https://farm.example/9999.png"}, "record 2: .*9999.png: no such image"),
        ({"image_src": "https://farm.example/"}, "record 2: names no image"),
        ({"question": " "}, "record 2: no question in 'question'"),
    ],
)
def test_damaged_records_of_mmhal_are_named(tmp_path, change, message):
    records = mmhal_records()
    records[1] |= change
    write_json(tmp_path / "response_template.json", records)

    with pytest.raises(InputError, match=message):
        read_mmhal(tmp_path, IMAGES)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question_id": 5}, "1 ids are given to several questions, the first is '5'"),
        ({"question_id": None}, "record 2: 'question_id' is not a number or a text"),
        ({"text": ""}, "record 2: no question in 'text'"),
        ({"text": "<image>\nWho?"}, "record 2: a question has <image> in it"),
        ({"image": "9999.png"}, "record 2: .*9999.png: no such image"),
        ({"image": 7}, "record 2: names no image"),
    ],
)
def test_damaged_records_of_llava_bench_and_mmvet_are_named(tmp_path, change, message):
    path = tmp_path / "questions.jsonl"
    write_jsonl(path, [LLAVA_BENCH[0], LLAVA_BENCH[1] | change])

    for read in (read_llava_bench, read_mmvet):
        with pytest.raises(InputError, match=f"{path}.*{message}"):
            read(path, IMAGES)


@pytest.mark.parametrize(
    "content, message",
    [
        ({}, "holds no questions"),
        ([], "not a JSON object"),
        ({"v1_0": "What?"}, "v1_0: not a JSON object"),
        ({"v1_0": {"question": "Who?"}}, "v1_0: names no image"),
        ({"v1_0": {"imagename": "0001.png"}}, "v1_0: no question in 'question'"),
        ({"v1_0": {"imagename": "x.png", "question": "Who?"}}, "v1_0: .*x.png: no such image"),
    ],
)
def test_damaged_files_of_mmvet_are_named(tmp_path, content, message):
    path = tmp_path / "mm-vet.json"
    write_json(path, content)

    with pytest.raises(InputError, match=f"{path}.*{message}"):
        read_mmvet(path, IMAGES)


def test_a_folder_stands_for_the_published_file_in_it(tmp_path):
    shutil.copytree(IMAGES, tmp_path / "images", ignore=lambda _, names: names[5:])

    for read in (read_mmvet, read_llava_bench, read_mmhal):
        with pytest.raises(InputError, match="(mm-vet|questions|response_template).json.*no such"):
            read(tmp_path, tmp_path / "images")
