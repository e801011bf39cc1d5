"""TextVQA: questions whose answers are written in the image (Singh et al., arXiv 1904.08920)."""

import re
from dataclasses import replace
from pathlib import Path

from minialign.evaluation.answer_normalizer import normalize_answer
from minialign.evaluation.questions import (
    SHORT_ANSWER_SUFFIX,
    Question,
    check_characters,
    check_id,
    check_unique_ids,
    find_image,
    find_published_file,
    match_answers,
    question_text,
    read_question_file,
)
from minialign.evaluation.shares import share
from minialign.utils.files import check, read_json, read_json_records

MAX_NEW_TOKENS = 128  # the published length of an answer
NUM_HUMAN_ANSWERS = 10

TEXTVQA_FILE = "TextVQA_0.5.1_val.json"
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"

# How LLaVA's scripts have put what an OCR system read beside the question.
OCR_LINE = "Reference OCR token:"
OCR_BEGINNING = "OCR tokens: "
QUESTION_AFTER_OCR = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def read_textvqa(path, image_folder) -> list[Question]:
    """Read the questions of TextVQA.

    LLaVA-1.6 is asked the question alone. LLaVA-1.5 is shown the tokens of an OCR system too, so
    the numbers of the two prompts cannot be compared.

    Args:
        path: TextVQA_0.5.1_val.json or its folder, for the question alone. Or LLaVA's
            llava_textvqa_val_v051_ocr.jsonl, for the prompts that stand there. It has no answers:
            they are taken from TextVQA's file, if that is beside it. Without it the questions can
            be asked, but not scored.
        image_folder: the folder of the images, train_images of the published archive.
    """
    path = Path(path)
    if path.is_dir():
        path = find_published_file(path, TEXTVQA_FILE) or path / LLAVA_FILE
    if path.suffix != ".jsonl":
        return _read_textvqa_file(path, image_folder)

    questions = _read_llava_file(path, image_folder)
    answers_path = find_published_file(path.parent, TEXTVQA_FILE)
    if answers_path is None:
        return questions
    return _add_answers(questions, path, _read_textvqa_file(answers_path, None), answers_path)


def _read_textvqa_file(path, image_folder):
    """Return the questions of TextVQA's own file, as LLaVA-1.6 is asked them."""
    records = read_json(path, dict).get("data")
    check(isinstance(records, list) and records, f'{path}: no list "data"; restore the original')
    questions = []
    for i, record in enumerate(records, start=1):
        where = f"{path}, record {i}"
        text = question_text(record, "question", where)
        check_id(record.get("question_id"), where)
        image_id = record.get("image_id")
        check(isinstance(image_id, str), f"{where}: 'image_id' is not a text; restore it")
        if "answers" in record:
            _check_human_answers(record["answers"], where)
        image = find_image(image_folder, f"{image_id}.jpg", where)
        question = Question(
            id=record["question_id"],
            image=image,
            # The published prompts have a capital at the beginning and nowhere else.
            text=text.capitalize() + SHORT_ANSWER_SUFFIX,
            record=record,
        )
        questions.append(question)
    check_unique_ids(questions, path)
    return questions


def _check_human_answers(answers, where):
    """Raise InputError unless there are ten answers, as the published scorer demands."""
    is_list = isinstance(answers, list) and all(isinstance(answer, str) for answer in answers)
    check(
        is_list and len(answers) == NUM_HUMAN_ANSWERS,
        f"{where}: 'answers' are not a list of {NUM_HUMAN_ANSWERS} texts; restore them",
    )


def _read_llava_file(path, image_folder):
    """Return the questions of LLaVA's file. The id of each is its image, which several share."""
    questions = []
    for i, question in enumerate(read_question_file(path, image_folder), start=1):
        asked = _question_in_prompt(question.text, f"{path}, record {i}")
        names = {"image_id": question.id, "question": asked}
        questions.append(replace(question, record=question.record | names))
    check_unique_ids(_named_by_image(questions), path)
    return questions


def _question_in_prompt(prompt, where):
    """Return the question in a prompt, by the rules of LLaVA's scorer.

    Raises InputError that begins with `where` if it is none of the published prompts.
    """
    lines = prompt.split("\n")
    question = None
    if prompt.startswith(OCR_BEGINNING):
        match = QUESTION_AFTER_OCR.search(prompt)
        if match:
            question = match[1]
    elif len(lines) == 3 and f"{OCR_LINE} " in prompt:
        question = lines[1] if prompt.startswith(OCR_LINE) else lines[0]
    elif len(lines) == 2:
        question = lines[0]
    check(
        question is not None,
        f"{where}: no question is found in the prompt {prompt[:60]!r}; write the question, a line "
        f"break and {SHORT_ANSWER_SUFFIX.strip()!r}",
    )
    return question


def _name_by_image(image_id, question):
    """Return a name for a question: its image, and its text without regard to case."""
    return f"{image_id}: {question.lower()}"


def _named_by_image(questions):
    """Return the questions with their `_name_by_image` as ids."""
    renamed = []
    for question in questions:
        name = _name_by_image(question.record["image_id"], question.record["question"])
        renamed.append(replace(question, id=name))
    return renamed


def _add_answers(questions, path, answered_questions, answers_path):
    """Return the questions of LLaVA's file with the records of TextVQA's file.

    Raises InputError for a question that is not there, or is there twice.
    """
    answered_questions = _named_by_image(answered_questions)
    check_unique_ids(answered_questions, answers_path)
    record_of = {answered.id: answered.record for answered in answered_questions}
    complete = []
    for question, named in zip(questions, _named_by_image(questions), strict=True):
        check(
            named.id in record_of,
            f"{path}: the question {named.id!r} is not in {answers_path}; "
            "give the files of one version",
        )
        complete.append(replace(question, record=question.record | record_of[named.id]))
    return complete


def answer_accuracy(answer: str, human_answers: list[str]) -> float:
    """Return the accuracy of an answer, given the answers of ten people.

    Each person's answer is left out in turn. Three of the other nine must then agree for the full
    score. So the mean of the ten is 0, 0.3, 0.6 or 0.9 if 0, 1, 2 or 3 people agree. It is 1 if
    four or more do.
    """
    normal_form = normalize_answer(answer)
    agrees = [normalize_answer(human_answer) == normal_form for human_answer in human_answers]
    accuracies = []
    for left_out in agrees:
        num_agreeing = sum(agrees) - left_out
        accuracies.append(min(1, num_agreeing / 3))
    return sum(accuracies) / len(accuracies)


def score_textvqa(questions: list[Question], answers: list[str]) -> dict:
    """Return the mean accuracy of the answers, from 0 to 1, and their number."""
    accuracies = []
    for question, answer in zip(questions, answers, strict=True):
        check(
            "answers" in question.record,
            f"question {question.id!r}: its right answers are not known; put {TEXTVQA_FILE} beside "
            "the file of the questions, or send the answers to the server of TextVQA",
        )
        accuracies.append(answer_accuracy(answer, question.record["answers"]))
    return {"accuracy": share(sum(accuracies), len(accuracies)), "n": len(accuracies)}


def textvqa_answer_file(questions: list[Question], answers: list[str]) -> list[dict]:
    """Return the JSON list that the server of TextVQA (EvalAI) reads.

    Raises InputError if the ids of TextVQA's own file are not known.
    """
    records = []
    for question, answer in zip(questions, answers, strict=True):
        check(
            _has_published_id(question),
            f"question {question.id!r}: its id on the server is not known; put {TEXTVQA_FILE} "
            "beside the file of the questions",
        )
        records.append({"question_id": question.record["question_id"], "answer": answer})
    return records


def _has_published_id(question):
    """Return whether the record of a question has the id of TextVQA's file, not only the image."""
    return question.record["question_id"] != question.record["image_id"]


def read_textvqa_answers(questions: list[Question], path) -> list[str]:
    """Return the answers of a file in the order of the questions.

    The file has LLaVA's form, in which "question_id" is the image and "prompt" has the question, or
    the form of `textvqa_answer_file`.
    """
    # 1. The ids of TextVQA's file, where they are known.
    named_questions = _named_by_image(questions)
    name_of_id = {}
    for named in named_questions:
        if _has_published_id(named):
            name_of_id[str(named.record["question_id"])] = named.id

    # 2. The question that each record answers.
    answers = []
    for i, record in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        check(isinstance(record, dict), f"{where}: not a JSON object; restore the original file")
        question_id = record.get("question_id")
        check_id(question_id, where)
        name = name_of_id.get(str(question_id))
        if name is None:
            prompt = question_text(record, "prompt", where)
            name = _name_by_image(question_id, _question_in_prompt(prompt, where))
        text = record.get("text", record.get("answer"))
        check(isinstance(text, str), f"{where}: 'text' is not a text; ask this one again")
        check_characters(text, where)
        answers.append((name, text))
    return match_answers(named_questions, answers, path)
