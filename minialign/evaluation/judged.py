"""MM-Vet, LLaVA-Bench and MMHal-Bench, whose answers a larger model judges afterwards.

The published scripts send the answers to a judge. This module reads the published questions, and
gives the answers the form that those scripts read.
"""

import uuid
from pathlib import Path

from minialign.evaluation.questions import (
    Question,
    check_unique_ids,
    find_image,
    question_text,
    read_question_file,
    read_records_by_id,
)
from minialign.utils.files import check, read_json

# The published limit of an answer, for all three. Nothing is added to their questions.
MAX_NEW_TOKENS = 1024

MMVET_FILE = "mm-vet.json"
LLAVA_BENCH_FILE = "questions.jsonl"
MMHAL_FILE = "response_template.json"

# The published script of MMHal-Bench takes the type of a question from its position in the file:
# the questions have these types in turn.
MMHAL_TYPES = (
    "attribute",
    "adversarial",
    "comparison",
    "counting",
    "relation",
    "environment",
    "holistic",
    "other",
)
NUM_MMHAL_QUESTIONS = 96


def read_mmvet(path, image_folder) -> list[Question]:
    """Read the questions of MM-Vet (arXiv 2308.02490).

    Args:
        path: mm-vet.json, its folder, or the same questions as JSON Lines, as LLaVA asks them.
        image_folder: the folder of the images, or None to look for no image.
    """
    # 1. In JSON Lines the ids are numbers. `mmvet_answer_file` turns 7 into the key "v1_7".
    path = _published_file(path, MMVET_FILE)
    if path.suffix == ".jsonl":
        return _read_unique_questions(path, image_folder)

    # 2. In mm-vet.json each question has a key. Several questions share an image.
    questions = []
    for key, record in read_records_by_id(path).items():
        where = f"{path}, {key}"
        text = question_text(record, "question", where)
        image = find_image(image_folder, record.get("imagename"), where)
        questions.append(Question(id=key, image=image, text=text, record=record))
    return questions


def mmvet_answer_file(questions: list[Question], answers: list[str]) -> dict[str, str]:
    """Return the JSON object that MM-Vet's script reads, {"v1_0": answer, ...}."""
    answer_of = {}
    for question, answer in zip(questions, answers, strict=True):
        key = question.id
        if isinstance(key, int):
            key = f"v1_{key}"
        answer_of[key] = answer.strip()
    return answer_of


def read_llava_bench(path, image_folder) -> list[Question]:
    """Read the questions of LLaVA-Bench in the wild (arXiv 2304.08485).

    Args:
        path: questions.jsonl, or its folder.
        image_folder: the folder of the images, or None to look for no image.
    """
    return _read_unique_questions(_published_file(path, LLAVA_BENCH_FILE), image_folder)


def llava_bench_answer_file(
    questions: list[Question], answers: list[str], model_id: str = "minialign"
) -> list[dict]:
    """Return the records that LLaVA-Bench's script reads. They are written as JSON Lines.

    The script pairs them with the reference answers line by line, so they keep the order of the
    questions. It stops at a record without an "answer_id". This one is a digest, so that equal
    answers have equal ids in every run.
    """
    records = []
    for question, answer in zip(questions, answers, strict=True):
        answer = answer.strip()
        source = f"{model_id}\n{question.id}\n{question.text}\n{answer}"
        record = {
            "question_id": question.id,
            "prompt": question.text,
            "text": answer,
            "answer_id": uuid.uuid5(uuid.NAMESPACE_OID, source).hex,
            "model_id": model_id,
            "metadata": {},
        }
        records.append(record)
    return records


def read_mmhal(path, image_folder) -> list[Question]:
    """Read the questions of MMHal-Bench (arXiv 2309.14525). Their ids are positions, from 0.

    Args:
        path: response_template.json, or its folder.
        image_folder: the folder of the images. The name of each file is the end of its web
            address.

    Raises InputError unless the file has the 96 questions in their order. The judge's script relies
    on it.
    """
    # 1. The number of questions.
    path = _published_file(path, MMHAL_FILE)
    records = read_json(path, list)
    check(
        len(records) == NUM_MMHAL_QUESTIONS,
        f"{path}: {len(records)} questions, but the published script takes "
        f"{NUM_MMHAL_QUESTIONS}; restore the original file",
    )

    # 2. The questions.
    questions = []
    for i, record in enumerate(records):
        where = f"{path}, record {i + 1}"
        text = question_text(record, "question", where)
        address = record.get("image_src")
        check(isinstance(address, str), f"{where}: no text in 'image_src'; restore it")
        image = find_image(image_folder, address.rpartition("/")[2], where)
        expected_type = MMHAL_TYPES[i % len(MMHAL_TYPES)]
        check(
            record.get("question_type") == expected_type,
            f"{where}: the question at this position is of the type {expected_type!r}, "
            f"not {record.get('question_type')!r}; restore the original order",
        )
        questions.append(Question(id=i, image=image, text=text, record=record))
    return questions


def mmhal_answer_file(questions: list[Question], answers: list[str]) -> list[dict]:
    """Return the JSON list that MMHal-Bench's script reads: the records with "model_answer"."""
    records = []
    for question, answer in zip(questions, answers, strict=True):
        records.append(question.record | {"model_answer": answer.strip()})
    return records


def _published_file(path, name):
    """Return the path of a file. A folder stands for the file in it that has the published name."""
    path = Path(path)
    if path.is_dir():
        return path / name
    return path


def _read_unique_questions(path, image_folder):
    """Return the questions of a file in LLaVA's form, in its order. Each id may occur once."""
    questions = read_question_file(path, image_folder)
    check_unique_ids(questions, path)
    return questions
