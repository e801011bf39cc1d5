"""The questions of a benchmark, and the answers of a file in their order."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from minialign.data.chat_templates import IMAGE_PLACEHOLDER
from minialign.data.images import check_image_file
from minialign.data.tokenizer import LONE_SURROGATE
from minialign.utils.files import InputError, check, read_json, read_json_records, read_text

ANSWER_FORM = '{"question_id": number or text, "text": the answer}'

# What LLaVA's prompts add to a question whose answer is compared word by word.
SHORT_ANSWER_SUFFIX = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Question:
    """A question of a benchmark, as it is put to a model."""

    id: int | str  # as the published file has it
    image: Path  # the file of the image, or its name alone if only answers are scored
    text: str  # the whole prompt: the question and what the benchmark adds to it, without <image>
    record: dict  # the record of the file, for scoring


def find_image(folder, name, where) -> Path:
    """Return the path of the image called `name` in a folder.

    Without a folder (None) the name is the path and need not exist, because answers are scored
    without the images.

    Raises InputError that begins with `where`, the file and the record, if the image is not there.
    """
    check(isinstance(name, str) and name, f"{where}: names no image; give its file name")
    if folder is None:
        return Path(name)
    path = Path(folder, name)
    try:
        check_image_file(path)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return path


def find_published_file(folder, name, subfolders=(".",)) -> Path | None:
    """Return the path of the first file called `name` in the subfolders of a folder, or None."""
    for subfolder in subfolders:
        path = Path(folder, subfolder, name)
        if path.is_file():
            return path
    return None


def find_question_file(folder, published_name, llava_name, *, subfolders=(".",)) -> Path:
    """Return the published file of questions in a folder, or else LLaVA's.

    Raises InputError if the folder holds neither.
    """
    path = find_published_file(folder, published_name, subfolders)
    if path is None:
        path = Path(folder, llava_name)
    check(path.is_file(), f"{folder}: has neither {published_name} nor {llava_name}; give one")
    return path


def read_records_by_id(path) -> dict[str, dict]:
    """Return the records of a JSON file {id: record}. Raise InputError if it has an id twice."""
    records = read_unrepeated(path)
    check(isinstance(records, dict), f"{path}: not a JSON object; restore the original file")
    check(records, f"{path}: holds no questions; restore the original file")
    return records


def read_unrepeated(path):
    """Return the value in a JSON file. Raise InputError if an object in it has a name twice."""
    # 1. Find what else is wrong with the file.
    read_json(path)

    # 2. Read it again with a check of each object, since a dict no longer shows what was repeated.
    def refuse_repeated(fields):
        """Return the fields of an object as a dict. Python's json would keep the last of two."""
        repeated = _repeated(name for name, _ in fields)
        check(not repeated, f"{path}: {_first(repeated)} occurs twice in an object; keep one")
        return dict(fields)

    return json.loads(read_text(path), object_pairs_hook=refuse_repeated)


def read_question_file(path, image_folder) -> list[Question]:
    """Return the questions of one of LLaVA's files, {"question_id", "image", "text", "category"}.

    The file is JSON Lines or a JSON list. An id may occur again: in TextVQA it is the image.
    """
    questions = []
    for i, record in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        text = question_text(record, "text", where)
        check_id(record.get("question_id"), where)
        image = find_image(image_folder, record.get("image"), where)
        question = Question(id=record["question_id"], image=image, text=text, record=record)
        questions.append(question)
    return questions


def question_text(record, field, where) -> str:
    """Return the question that a record has in a field.

    Raises InputError that begins with `where` if this is no text that a model can be asked.
    """
    check(isinstance(record, dict), f"{where}: not a JSON object; restore the original file")
    text = record.get(field)
    is_text = isinstance(text, str) and text.strip()
    check(is_text, f"{where}: no question in {field!r}; restore the original file")
    check_characters(text, where)
    check(
        IMAGE_PLACEHOLDER not in text,
        f"{where}: a question has {IMAGE_PLACEHOLDER} in it; remove it, the image comes first",
    )
    return text


def check_characters(text, where):
    """Raise InputError that begins with `where` for a text that UTF-8 cannot encode."""
    check(
        not LONE_SURROGATE.search(text),
        f"{where}: a text has a lone surrogate, half of a character; fix or remove it",
    )


def check_id(question_id, where):
    """Raise InputError that begins with `where` unless a question's id is a number or a text."""
    check(
        _is_id(question_id), f"{where}: 'question_id' is not a number or a text; give each its own"
    )


def _is_id(value):
    """Return whether a JSON value is a number or a text. A bool is an int of Python, and no id."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def check_unique_ids(questions: list[Question], path):
    """Raise InputError if two questions of a file have the same id."""
    repeated = _repeated(question.id for question in questions)
    check(
        not repeated,
        f"{path}: {len(repeated)} ids are given to several questions, "
        f"the first is {_first(repeated)}; keep one question of each id",
    )


def read_answers(path, id_field="question_id", text_field="text") -> list[tuple[int | str, str]]:
    """Return the (id, text) of each record of an answer file: a JSON list or JSON Lines.

    Raises InputError for a record without an id or a text.
    """
    answers = []
    for i, record in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        check(isinstance(record, dict), f"{where}: not of the form {ANSWER_FORM}; fix it")
        question_id = record.get(id_field)
        check(
            _is_id(question_id),
            f"{where}: {id_field!r} is not a number or a text; give the question's id",
        )
        text = record.get(text_field)
        check(isinstance(text, str), f"{where}: {text_field!r} is not a text; ask this one again")
        check_characters(text, where)
        answers.append((question_id, text))
    return answers


def match_answers(
    questions: list[Question], answers: list[tuple[int | str, str]], path
) -> list[str]:
    """Return the text of the answer to each question, in the order of the questions.

    The ids decide, not the order of the lines as in the published scorers. The number 7 and the
    text "7" are the same id, because some programs write one and some the other.

    Raises InputError that names the answer file `path` unless each question has one answer.
    """
    # 1. Each answer belongs to a question, and to no other answer.
    remedy = "give the answers to exactly these questions"
    question_ids = {str(question.id) for question in questions}
    repeated = _repeated(answer_id for answer_id, _ in answers)
    check(
        not repeated,
        f"{path}: {len(repeated)} questions are answered several times, the first is "
        f"{_first(repeated)}; keep one answer to each",
    )
    unknown = [answer_id for answer_id, _ in answers if str(answer_id) not in question_ids]
    check(
        not unknown,
        f"{path}: {len(unknown)} answers belong to no question, the first is {_first(unknown)}; "
        f"{remedy}",
    )

    # 2. Each question has an answer.
    text_of = {str(answer_id): text for answer_id, text in answers}
    missing = [question.id for question in questions if str(question.id) not in text_of]
    check(
        not missing,
        f"{path}: {len(missing)} of {len(questions)} questions have no answer, the first is "
        f"{_first(missing)}; {remedy}",
    )
    return [text_of[str(question.id)] for question in questions]


def _repeated(ids):
    """Return the ids that occur more than once, in the order in which they first occur."""
    counts = Counter(str(item) for item in ids)
    return [item for item, count in counts.items() if count > 1]


def _first(ids):
    """Return the first id as an error shows it.

    Without any it is empty: `check` is handed its message even if nothing is wrong.
    """
    return repr(ids[0]) if ids else ""
