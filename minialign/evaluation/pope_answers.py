"""Answer files of POPE: those of LLaVA's scripts, and those of POPE's own scorer."""

from pathlib import Path

from minialign.evaluation.pope import check_unique_splits, find_pope_files, split_of
from minialign.evaluation.questions import (
    SHORT_ANSWER_SUFFIX,
    Question,
    match_answers,
    read_answers,
)
from minialign.utils.files import check, read_json_records


def pope_answer_file(questions: list[Question], answers: list[str]) -> dict[str, list[dict]]:
    """Return the records that POPE's own scorer reads, {split: records}. Each split is a file."""
    records_of = {}
    for question, answer in zip(questions, answers, strict=True):
        record = {"question": _asked(question), "answer": answer}
        records_of.setdefault(question.record["category"], []).append(record)
    return records_of


def _asked(question):
    """Return the text of a question without LLaVA's prompt."""
    return question.text.removesuffix(SHORT_ANSWER_SUFFIX)


def read_pope_answers(questions: list[Question], path) -> list[str]:
    """Return the answers of a file, or of a folder with a file a split, in the questions' order.

    A file has LLaVA's form, or that of POPE's own scorer, {"question", "answer"} in the order of
    the questions. A file of a split is called like the file of its questions.
    """
    # 1. One file.
    path = Path(path)
    if not path.is_dir():
        return _read_answer_file(questions, path)

    # 2. One file a split.
    answer_paths = find_pope_files(path)
    check_unique_splits(answer_paths)
    path_of = {split_of(answer_path): answer_path for answer_path in answer_paths}
    positions_of = {}
    for position, question in enumerate(questions):
        positions_of.setdefault(question.record["category"], []).append(position)
    answers = [""] * len(questions)
    for split, positions in positions_of.items():
        check(split in path_of, f"{path}: no file pope_{split}.jsonl with the answers; add it")
        questions_of_split = [questions[position] for position in positions]
        texts = _read_answer_file(questions_of_split, path_of[split])
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text
    return answers


def _read_answer_file(questions, path):
    """Return the answers of a file in the order of the questions."""
    # 1. LLaVA's form. The published files of the three splits have the same ids. Answers to all
    #    of them are in order.
    records = read_json_records(path)
    if isinstance(records[0], dict) and "question_id" in records[0]:
        answers = read_answers(path)
        num_ids = len({question.id for question in questions})
        if num_ids == len(questions):
            return match_answers(questions, answers, path)
        ids = [str(answer_id) for answer_id, _ in answers]
        texts = [text for _, text in answers]
        _check_order([str(question.id) for question in questions], ids, path)
        return texts

    # 2. The form of POPE's scorer, which is in order.
    answers = read_answers(path, "question", "answer")
    asked = [_asked(question).casefold() for question in questions]
    _check_order(asked, [str(text).casefold() for text, _ in answers], path)
    return [answer for _, answer in answers]


def _check_order(expected, found, path):
    """Raise InputError unless the records of an answer file are those expected, in their order."""
    check(
        len(found) == len(expected),
        f"{path}: {len(found)} answers to {len(expected)} questions; give one to each",
    )
    for i, (name, expected_name) in enumerate(zip(found, expected, strict=True), start=1):
        check(
            name == expected_name,
            f"{path}, record {i}: answers {name!r}, but the question there is {expected_name!r}; "
            "give the answers in the order of the questions",
        )
