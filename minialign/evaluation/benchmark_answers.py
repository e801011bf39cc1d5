"""Ask a model the questions of a benchmark, and keep the answers so that a run can resume.

OUT/NAME.answers.jsonl    one answer a line, in the form of LLaVA's own scripts
OUT/NAME.settings.json    what the answers depend on; a resumed run must have the same
"""

import hashlib
import json
from pathlib import Path

from tqdm import tqdm

from minialign.evaluation.answers import answer_questions
from minialign.evaluation.questions import Question
from minialign.models.loading import VLM
from minialign.utils.digests import file_digest
from minialign.utils.files import (
    InputError,
    append_jsonl,
    check,
    friendly_errors,
    read_json,
    write_json,
    write_jsonl,
)
from minialign.utils.messages import printable

IMAGES_PER_GROUP = 50  # the answers about so many images are written together
# The settings that a message shows. The others are digests, which tell a reader nothing.
SHOWN_SETTINGS = "model adapter template system max_new_tokens contrast questions".split()


def answers_file(out, name) -> Path:
    """Return the file with the answers to a benchmark."""
    return Path(out) / f"{name}.answers.jsonl"


def question_settings(questions: list[Question]) -> dict:
    """Return what the answers depend on besides the model: the questions and their images."""
    contents = []
    for question in questions:
        contents.append((question.id, question.text, file_digest(question.image)))
    digest = hashlib.sha256(repr(contents).encode()).hexdigest()
    return {"questions": len(questions), "digest": digest[:16]}


def ask_benchmark(
    vlm: VLM, name: str, questions: list[Question], out, *, settings: dict, decoding: dict
) -> list[str]:
    """Return the answer to every question, in order. Answers that are in `out` already are kept.

    Questions about the same image are asked together, so that it is encoded once. The answers are
    written group by group. Once all are there, the file has the order of the questions, which the
    published scoring scripts rely on.

    Args:
        vlm: the model that is asked.
        name: the name of the benchmark.
        questions: its questions.
        out: the folder of the answers.
        settings: what the answers depend on. A resumed run must have the same.
        decoding: how the answers are generated: arguments of `answer_questions`.
    """
    # 1. Read what an interrupted run has finished.
    path = answers_file(out, name)
    settings_path = Path(out) / f"{name}.settings.json"
    is_new_or_resumed = settings_path.exists() or not path.exists()
    check(is_new_or_resumed, f"{path}: was not written by this command; give another --out")
    check_same_settings(settings_path, settings)
    groups = group_by_images(questions)
    records = read_finished_groups(path, groups) if path.exists() else []

    # 2. Ask group by group. The first records are those of whole groups, which are not asked again.
    write_jsonl(path, records)  # drops an unfinished group and a line that was cut short
    num_to_skip = len(records)
    with tqdm(
        total=len(questions), initial=num_to_skip, desc=printable(name), unit="question"
    ) as progress:
        for group in groups:
            if num_to_skip >= len(group):
                num_to_skip -= len(group)
                continue
            new_records = ask_group(vlm, name, group, decoding)
            append_jsonl(path, new_records)
            records += new_records
            progress.update(len(group))

    # 3. Put the answers into the order of the questions.
    record_of = {answer_key(record): record for record in records}
    in_order = [record_of[question_key(question)] for question in questions]
    write_jsonl(path, in_order)
    return [record["text"] for record in in_order]


def check_same_settings(path, settings):
    """Raise InputError if the answers were begun with other settings. A new run writes its own."""
    if not path.exists():
        write_json(path, settings)
        return
    earlier = read_json(path, dict)
    for name in {**settings, **earlier}:
        before = earlier.get(name)
        now = settings.get(name)
        if before == now:
            continue
        check(
            name in earlier,
            f"{path}: was begun without {name}, or by a version that did not note it; "
            "give another --out",
        )
        check(
            name in settings,
            f"{path}: was begun with {name}, which is missing now; restore it, or give another "
            "--out",
        )
        values = f" ({before!r}, now {now!r})" if name in SHOWN_SETTINGS else ""
        raise InputError(
            f"{path}: was begun with another {name}{values}; "
            "give the same options and files, or another --out"
        )


def group_by_images(questions) -> list[list[Question]]:
    """Return the questions in groups that share IMAGES_PER_GROUP images."""
    questions_about = {}
    for question in questions:
        questions_about.setdefault(question.image, []).append(question)
    questions_of_images = list(questions_about.values())
    groups = []
    for start in range(0, len(questions_of_images), IMAGES_PER_GROUP):
        group = []
        for questions_of_image in questions_of_images[start : start + IMAGES_PER_GROUP]:
            group += questions_of_image
        groups.append(group)
    return groups


def ask_group(vlm, name, group, decoding) -> list[dict]:
    """Return the records of the answers to a group of questions."""
    asked = [((str(question.image),), question.text) for question in group]
    answers = answer_questions(vlm, asked, name, **decoding)
    records = []
    for question, question_asked in zip(group, asked, strict=True):
        records.append(answer_record(question, answers[question_asked]))
    return records


def answer_record(question, answer) -> dict:
    """Return the record of an answer file.

    The published scripts write a random answer_id. Here a digest makes the files of a stopped and
    resumed run equal to those of a run that was never stopped.
    """
    key = question_key(question)
    return {
        "question_id": question.id,
        "image": question.image.name,
        "prompt": question.text,
        "text": answer.strip(),  # as the published scripts do
        "answer_id": hashlib.sha256(repr(key).encode()).hexdigest()[:22],
        "model_id": "minialign",
        "metadata": {},
    }


def question_key(question):
    """Return what tells a question from all others. Its id alone does not: TextVQA repeats them."""
    return (question.id, question.image.name, question.text)


def answer_key(record):
    """Return the `question_key` of the question that a record of an answer file answers.

    For a record of another form it raises an error that `friendly_errors` turns into InputError.
    """
    if not isinstance(record["text"], str):
        raise ValueError("an answer is not a text")
    return (record["question_id"], record["image"], record["prompt"])


def read_finished_groups(path, groups) -> list[dict]:
    """Return the records of the groups that an earlier run has finished.

    An unfinished file has the order of the groups. A finished one has the order of the questions.
    """
    # 1. What follows the last line break is empty, or a line that was cut short.
    lines = path.read_bytes().split(b"\n")[:-1]
    with friendly_errors(path, "remove it"):
        records = [json.loads(line) for line in lines]
        keys = [answer_key(record) for record in records]
        answered = set(keys)

    # 2. A finished file. All answers are there, so their order does not matter.
    asked_keys = []
    for group in groups:
        asked_keys += [question_key(question) for question in group]
    if len(keys) == len(asked_keys):
        check(answered == set(asked_keys), f"{path}: answers other questions; remove it")
        return records

    # 3. An unfinished file. Count the groups whose answers are all there.
    num_finished = 0
    for group in groups:
        if num_finished + len(group) <= len(keys):
            num_finished += len(group)
        else:
            break
    check(
        keys[:num_finished] == asked_keys[:num_finished],
        f"{path}: answers other questions; remove it",
    )
    return records[:num_finished]
