"""Answer files of POPE: those of LLaVA's scripts, and those of POPE's own scorer."""

from pathlib import Path

from minialign.evaluation.pope import find_pope_files, paths_by_split
from minialign.evaluation.questions import (
    SHORT_ANSWER_SUFFIX,
    Question,
    match_answers,
    read_answers,
)
from minialign.utils.files import check, read_json_records


def pope_answer_file(questions: list[Question], answers: list[str]) -> dict[str, list[dict]]:
    """Return the records that POPE's own scorer reads, as {split: records of its file}."""
    records_of = {}
    for question, answer in zip(questions, answers, strict=True):
        record = {"question": _bare_question(question), "answer": answer}
        records_of.setdefault(question.record["category"], []).append(record)
    return records_of


def _bare_question(question):
    """Return the question of the published file without LLaVA's prompt, however it was asked."""
    return question.record["text"].removesuffix(SHORT_ANSWER_SUFFIX)


def read_pope_answers(questions: list[Question], path) -> list[str]:
    """Return the answers in a file, or a folder with one file per split, in the questions' order.

    A file has LLaVA's form, or that of POPE's own scorer: {"question", "answer"} in the order of
    the questions. A file of one split ends with pope_SPLIT.jsonl or .json, as that of its
    questions does.
    """
    # 1. One file.
    path = Path(path)
    if not path.is_dir():
        return _read_answer_file(questions, path)

    # 2. One file per split. The questions of a split need not follow each other.
    path_of = paths_by_split(find_pope_files(path))
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
    # 1. Read either form. In LLaVA's, ids that differ tell which question each answer belongs to.
    first = read_json_records(path)[0]
    if isinstance(first, dict) and "question_id" in first:
        answers = read_answers(path)
        expected = [question.id for question in questions]
        has_unique_ids = len(set(expected)) == len(expected)
        if has_unique_ids:
            return match_answers(questions, answers, path)
    else:
        answers = read_answers(path, "question", "answer")
        expected = [_bare_question(question) for question in questions]

    # 2. Otherwise only the order tells, so check it. Files of POPE's own scorer have no ids, and
    #    LLaVA's have the published ids, which are the same in each split.
    check(
        len(answers) == len(questions),
        f"{path}: {len(answers)} answers to {len(questions)} questions; give one to each",
    )
    for i, (answered, _) in enumerate(answers):
        check(
            str(answered).casefold() == str(expected[i]).casefold(),
            f"{path}, record {i + 1}: answers {answered!r}, but the question there is "
            f"{expected[i]!r}; give the answers in the order of the questions",
        )
    return [text for _, text in answers]
