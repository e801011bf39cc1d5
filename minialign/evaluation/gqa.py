"""GQA: questions about scenes that a word or two answers (Hudson and Manning, arXiv 1902.09506)."""

from dataclasses import replace
from pathlib import Path

from minialign.evaluation.questions import (
    SHORT_ANSWER_SUFFIX,
    Question,
    check_unique_ids,
    find_image,
    find_published_file,
    find_question_file,
    match_answers,
    question_text,
    read_answers,
    read_question_file,
    read_records_by_id,
)
from minialign.evaluation.shares import share
from minialign.utils.files import check, read_json_records

MAX_NEW_TOKENS = 128  # the published limit of an answer

# GQA's own file has the questions and their answers, LLaVA's the questions alone. GQA's is looked
# for in these folders, below the given folder or below that of LLaVA's file.
GQA_FILE = "testdev_balanced_questions.json"
GQA_FOLDERS = (".", "questions1.2", "data", "data/questions1.2")
LLAVA_FILE = "llava_gqa_testdev_balanced.jsonl"

GQA_FORM = (
    '{"question": text, "imageId": text, "answer": text, "isBalanced": true or false, '
    '"types": {"structural": text, ...}, ...}'
)


def read_gqa(path, image_folder) -> list[Question]:
    """Read the questions of GQA.

    Args:
        path: testdev_balanced_questions.json, LLaVA's llava_gqa_testdev_balanced.jsonl, or the
            folder of either. LLaVA's file has no answers. They are taken from GQA's file, if that
            is beside it or in data/. Without it the questions can be asked, but not scored.
        image_folder: the folder of the images.
    """
    path = Path(path)
    if path.is_dir():
        path = find_question_file(path, GQA_FILE, LLAVA_FILE, subfolders=GQA_FOLDERS)
    if path.suffix != ".jsonl":
        return _read_gqa_file(path, image_folder)

    questions = read_question_file(path, image_folder)
    check_unique_ids(questions, path)
    answers_path = find_published_file(path.parent, GQA_FILE, GQA_FOLDERS)
    if answers_path is None:
        return questions
    return _add_answers(questions, path, _read_gqa_file(answers_path, None), answers_path)


def _read_gqa_file(path, image_folder):
    """Return the questions of GQA's own file, {id: record}, with LLaVA's prompt behind each."""
    questions = []
    for question_id, record in read_records_by_id(path).items():
        where = f"{path}, question {question_id!r}"
        text = question_text(record, "question", where)
        check(_is_gqa_record(record), f"{where}: not of the form {GQA_FORM}; restore it")
        image = find_image(image_folder, f"{record['imageId']}.jpg", where)
        text += SHORT_ANSWER_SUFFIX
        questions.append(Question(id=question_id, image=image, text=text, record=record))
    return questions


def _is_gqa_record(record):
    """Return whether a record has what asking and scoring need."""
    types = record.get("types")
    has_type = isinstance(types, dict) and isinstance(types.get("structural"), str)
    has_texts = all(isinstance(record.get(name), str) for name in ("imageId", "answer"))
    return has_type and has_texts and isinstance(record.get("isBalanced"), bool)


def _add_answers(questions, path, answered_questions, answers_path):
    """Return the questions of LLaVA's file with the records of GQA's.

    Raises InputError unless the two files have the same questions, which is what GQA's own scorer
    demands.
    """
    # 1. The same ids. Only balanced questions are scored, so the others may be missing.
    answered_by_id = {question.id: question for question in answered_questions}
    remedy = f"give the version of {answers_path} that belongs to these questions"
    for question in questions:
        is_known = str(question.id) in answered_by_id
        check(is_known, f"{path}: question {question.id!r} is not in {answers_path}; {remedy}")
    ids = {str(question.id) for question in questions}
    for answered in answered_questions:
        is_asked = answered.id in ids or not answered.record["isBalanced"]
        check(is_asked, f"{path}: question {answered.id!r} of {answers_path} is missing; {remedy}")

    # 2. The same images.
    complete = []
    for question in questions:
        answered = answered_by_id[str(question.id)]
        check(
            question.image.name == answered.image.name,
            f"{path}: question {question.id!r} is about {question.image.name!r}, but about "
            f"{answered.image.name!r} in {answers_path}; {remedy}",
        )
        complete.append(replace(question, record=question.record | answered.record))
    return complete


def gqa_prediction(answer: str) -> str:
    """Return the part of a model's answer that must equal the right answer.

    The published rule of LLaVA removes full stops at the end, writes the rest in lower case, and
    does nothing else. So a blank or another mark at the end, an article or a number as a word makes
    an answer wrong. This is kept on purpose, because published numbers contain it.
    """
    return answer.rstrip(".").lower()


def score_gqa(questions: list[Question], answers: list[str]) -> dict:
    """Return the scores of GQA as shares from 0 to 1, and the number `n` of scored questions.

    Only balanced questions are scored. A question of the structural type "query" is open. Every
    other one is binary: it is answered with yes, no or one of the things that it names.
    """
    correct_of = {"open": [], "binary": []}
    for question, answer in zip(questions, answers, strict=True):
        record = question.record
        check(
            "answer" in record,
            f"question {question.id!r}: its right answer is not known; put {GQA_FILE} beside the "
            "file of the questions",
        )
        if record["isBalanced"]:
            kind = "open" if record["types"]["structural"] == "query" else "binary"
            correct_of[kind].append(gqa_prediction(answer) == record["answer"])

    correct = correct_of["open"] + correct_of["binary"]
    return {
        "accuracy": share(sum(correct), len(correct)),
        "open": share(sum(correct_of["open"]), len(correct_of["open"])),
        "binary": share(sum(correct_of["binary"]), len(correct_of["binary"])),
        "n": len(correct),
    }


def gqa_answer_file(questions: list[Question], answers: list[str]) -> list[dict]:
    """Return the JSON list that GQA's own scorer reads.

    Its scores of validity, plausibility and consistency must be switched off, because the files
    that they need do not exist for these questions.
    """
    predictions = []
    for question, answer in zip(questions, answers, strict=True):
        predictions.append(
            {"questionId": str(question.id), "prediction": gqa_prediction(answer)},
        )
    return predictions


def read_gqa_answers(questions: list[Question], path) -> list[str]:
    """Return the answers of a file in the order of the questions.

    The file has LLaVA's form, or that of `gqa_answer_file`. A question that is not balanced is not
    scored, and needs no answer.
    """
    # 1. The form of the file.
    first = read_json_records(path)[0]
    if isinstance(first, dict) and "questionId" in first:
        answers = read_answers(path, "questionId", "prediction")
        # GQA's own scorer compares predictions as they are, so "Yes" would be wrong there. Scoring
        # here would make it right, and the two numbers would differ.
        for question_id, prediction in answers:
            check(
                prediction == gqa_prediction(prediction),
                f"{path}: the prediction {prediction!r} of question {question_id!r} is not in "
                "lower case without a full stop; convert it, or give the model's answers",
            )
    else:
        answers = read_answers(path)

    # 2. The order of the questions. An empty answer stands in for one that is not needed.
    answered_ids = {str(answer_id) for answer_id, _ in answers}
    for question in questions:
        is_balanced = question.record.get("isBalanced", True)
        if not is_balanced and str(question.id) not in answered_ids:
            answers.append((question.id, ""))
    return match_answers(questions, answers, path)
