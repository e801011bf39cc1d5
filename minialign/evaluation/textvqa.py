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
    find_question_file,
    match_answers,
    question_text,
    read_question_file,
)
from minialign.evaluation.shares import share
from minialign.utils.files import check, read_json, read_json_records

MAX_NEW_TOKENS = 128  # the published limit of an answer
NUM_HUMAN_ANSWERS = 10

TEXTVQA_FILE = "TextVQA_0.5.1_val.json"
LLAVA_FILE = "llava_textvqa_val_v051_ocr.jsonl"

# How prompts of LLaVA's scripts show the words that an OCR system has read in the image. OCR_LINE
# begins a line of them before or behind the question. OCR_BEGINNING begins a prompt of another
# version, in which QUESTION_AFTER_OCR finds the question.
OCR_LINE = "Reference OCR token:"
OCR_BEGINNING = "OCR tokens: "
QUESTION_AFTER_OCR = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def read_textvqa(path, image_folder) -> list[Question]:
    """Read the questions of TextVQA.

    LLaVA-1.6 is asked the question alone. LLaVA-1.5 is also shown the words that an OCR system has
    read in the image, so the numbers of the two prompts cannot be compared.

    Args:
        path: TextVQA_0.5.1_val.json or its folder, to ask the question alone. Or LLaVA's
            llava_textvqa_val_v051_ocr.jsonl, to ask with the prompts in it. LLaVA's file has no
            right answers. They are taken from TextVQA's file, if that is beside it. Without them
            the questions can be asked, but not scored.
        image_folder: the folder of the images, train_images of the published archive.
    """
    path = Path(path)
    if path.is_dir():
        path = find_question_file(path, TEXTVQA_FILE, LLAVA_FILE)
    if path.suffix != ".jsonl":
        return _read_textvqa_file(path, image_folder)

    questions = _read_llava_file(path, image_folder)
    answers_path = find_published_file(path.parent, TEXTVQA_FILE)
    if answers_path is None:
        return questions
    return _add_answers(questions, path, _read_textvqa_file(answers_path, None), answers_path)


def _read_textvqa_file(path, image_folder):
    """Return the questions of TextVQA's own file, as LLaVA-1.6 is asked them.

    The id of each is its image, as in LLaVA's file. Its own id stays in its record.
    """
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
            id=image_id,  # as in LLaVA's answer files, so that its scorer reads the answers
            image=image,
            # Odd and kept: the published prompts have a capital at the beginning and nowhere else,
            # so "Is this the NASA logo?" is asked as "Is this the nasa logo?"
            text=text.capitalize() + SHORT_ANSWER_SUFFIX,
            record=record,
        )
        questions.append(question)
    check_unique_ids(_with_published_ids(questions), path)
    return questions


def _with_published_ids(questions):
    """Return the questions of TextVQA's file with the ids that they have there."""
    return [replace(question, id=question.record["question_id"]) for question in questions]


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
        fields = {"image_id": question.id, "question": asked}  # as in TextVQA's file
        questions.append(replace(question, record=question.record | fields))
    check_unique_ids(_with_joint_ids(questions), path)
    return questions


def _question_in_prompt(prompt, where):
    """Return the question in a prompt, by the rules of LLaVA's scorer.

    The published prompts are, line by line:
    - "OCR tokens: WORDS. Question: QUESTION Short answer:", in any number of lines
    - "Reference OCR token: WORDS", then QUESTION, then the instruction
    - QUESTION, then "Reference OCR token: WORDS", then the instruction
    - QUESTION, then the instruction

    Raises InputError that begins with `where` if it is none of them.
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


def _joint_id(image_id, question):
    """Return an id that either published file tells: the image and the question in lower case."""
    return f"{image_id}: {question.lower()}"


def _with_joint_ids(questions):
    """Return the questions with the `_joint_id` of each as its id."""
    changed = []
    for question in questions:
        joint_id = _joint_id(question.record["image_id"], question.record["question"])
        changed.append(replace(question, id=joint_id))
    return changed


def _add_answers(questions, path, answered_questions, answers_path):
    """Return the questions of LLaVA's file with the records of TextVQA's file.

    Raises InputError for a question that TextVQA's file lacks or has twice.
    """
    answered_questions = _with_joint_ids(answered_questions)
    check_unique_ids(answered_questions, answers_path)
    record_of = {answered.id: answered.record for answered in answered_questions}
    complete = []
    for question, joint in zip(questions, _with_joint_ids(questions), strict=True):
        check(
            joint.id in record_of,
            f"{path}: the question {joint.id!r} is not in {answers_path}; "
            "give the files of one version",
        )
        complete.append(replace(question, record=question.record | record_of[joint.id]))
    return complete


def answer_accuracy(answer: str, human_answers: list[str]) -> float:
    """Return the accuracy of an answer, given the answers of ten people.

    Each person's answer is left out in turn. The answer then scores a third for each of the other
    nine that agrees with it, and 1 at most. So the mean of the ten scores is 0, 0.3, 0.6 or 0.9 if
    0, 1, 2 or 3 people agree. It is 1 if four or more do.
    """
    normal_form = normalize_answer(answer)
    agrees = [normalize_answer(human_answer) == normal_form for human_answer in human_answers]
    accuracies = []
    for left_out_agrees in agrees:
        num_agreeing = sum(agrees) - left_out_agrees
        accuracies.append(min(1, num_agreeing / 3))
    return sum(accuracies) / len(accuracies)


def score_textvqa(questions: list[Question], answers: list[str]) -> dict:
    """Return the mean accuracy of the answers, from 0 to 1, and their number `n`."""
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

    Raises InputError for questions of LLaVA's file that have no ids of TextVQA's own file.
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
    """Return whether a question has the id of TextVQA's file. In LLaVA's its id is the image."""
    return question.record["question_id"] != question.record["image_id"]


def read_textvqa_answers(questions: list[Question], path) -> list[str]:
    """Return the answers of a file in the order of the questions.

    The file has LLaVA's form, in which "question_id" is the image and "prompt" has the question on
    a line by itself, whatever --prompt added. Or it has the form of `textvqa_answer_file`, in which
    "question_id" is that of TextVQA's file.
    """
    # 1. The joint ids of the questions, by the ids of TextVQA's file where these are known.
    joint_questions = _with_joint_ids(questions)
    joint_ids = {question.id for question in joint_questions}
    joint_id_of_published = {}
    for question in joint_questions:
        if _has_published_id(question):
            joint_id_of_published[str(question.record["question_id"])] = question.id

    # 2. The joint id of the question that each record answers.
    answers = []
    for i, record in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        check(isinstance(record, dict), f"{where}: not a JSON object; restore the original file")
        question_id = record.get("question_id")
        check_id(question_id, where)
        joint_id = joint_id_of_published.get(str(question_id))
        if joint_id is None:
            prompt = question_text(record, "prompt", where)
            joint_id = _joint_id_in_prompt(question_id, prompt, joint_ids=joint_ids, where=where)
        text = record.get("text", record.get("answer"))
        check(isinstance(text, str), f"{where}: 'text' is not a text; ask this one again")
        check_characters(text, where)
        answers.append((joint_id, text))
    return match_answers(joint_questions, answers, path)


def _joint_id_in_prompt(image_id, prompt, *, joint_ids, where):
    """Return the joint id of the question in a prompt.

    `--prompt` can ask a question in many ways, but the question stays a line of the prompt. A
    prompt without such a line must have a published form.
    """
    for line in prompt.split("\n"):
        joint_id = _joint_id(image_id, line)
        if joint_id in joint_ids:
            return joint_id
    return _joint_id(image_id, _question_in_prompt(prompt, where))
