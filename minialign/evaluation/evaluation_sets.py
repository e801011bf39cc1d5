"""Evaluation sets: images with annotated objects (for CHAIR) and questions (for POPE)."""

import os
from dataclasses import dataclass
from pathlib import Path

from minialign.data.chat_templates import IMAGE_PLACEHOLDER
from minialign.data.images import check_image_file, check_images
from minialign.data.tokenizer import LONE_SURROGATE
from minialign.evaluation.pope import find_pope_files, split_of
from minialign.evaluation.questions import read_unrepeated
from minialign.evaluation.vocabulary import Vocabulary
from minialign.utils.files import InputError, check, read_json_records

FOLDER_FORM = "give a folder with captions.json, pope_SPLIT.jsonl or both, and with images/"
OBJECT_FORM = '{"name": text, and perhaps "colour": text, "place": text}'
QUESTION_FORM = '{"image": text, "text": text, "label": "yes"|"no"}'


@dataclass
class EvaluationSet:
    """What a model is evaluated on. The records have the form that they have in their files.

    Objects and colors are named as the vocabulary names them, and no question has "<image>" in it.
    """

    images: Path  # the folder of the images
    captions: list[dict]  # {"image", "prompt", "objects"}; empty without a captions.json
    vocabulary: Vocabulary | None  # the names to look for; None without a captions.json
    pope: dict[str, list[dict]]  # split: its questions {"image", "text", "label"}
    pope_files: dict[str, Path]  # split: the file of its questions, which errors name


def read_folder(folder) -> EvaluationSet:
    """Read the EvaluationSet of a folder with captions.json, POPE files or both, and images/.

    Raises InputError for a folder of another form.
    """
    folder = Path(folder)
    check(folder.exists(), f"{folder}: no such folder; {FOLDER_FORM}")
    check(folder.is_dir(), f"{folder}: is a file; {FOLDER_FORM}")
    captions_file = find_captions_file(folder)
    pope_files = find_pope_files(folder)
    check(
        captions_file or pope_files,
        f"{folder}: neither captions.json nor pope_SPLIT.jsonl is in this folder; "
        f"{_folder_meant(folder)}",
    )
    images = folder / "images"
    check(images.is_dir(), f"{folder}: has no folder images/; {FOLDER_FORM}")
    return read_set(captions_file, pope_files, images)


def set_name_of(folder) -> str:
    """Return the name of an evaluation set: that of its folder, also if this is given as "."."""
    return Path(os.path.abspath(folder)).name or "set"  # the root has no name


def find_captions_file(folder) -> Path | None:
    """Return the captions.json of a folder, or None."""
    path = folder / "captions.json"
    return path if path.is_file() else None


def _folder_meant(folder):
    """Return a hint at the folder that is meant by one that holds no evaluation set."""
    inner_sets = []
    for path in sorted(folder.iterdir()):
        if find_captions_file(path) or find_pope_files(path):
            inner_sets.append(path.name)
    if inner_sets:
        return f"name the folders in it: {', '.join(inner_sets[:10])}"
    return FOLDER_FORM


def read_set(captions_file, pope_files, images) -> EvaluationSet:
    """Read an EvaluationSet from its files, and check that every image can be opened.

    Args:
        captions_file: a captions.json, or None.
        pope_files: files of POPE, each named by its split, which may be any (pope_random.jsonl).
        images: the folder of the images.

    Raises InputError for a file, a record or an image that cannot be used.
    """
    # 1. The captions.
    vocabulary = None
    captions = []
    if captions_file is not None:
        vocabulary, captions = read_captions(captions_file, images, needed=("prompt",))

    # 2. The splits of POPE.
    pope = {}
    file_of_split = {}
    for path in pope_files:
        split = split_of(path)
        check(
            split not in pope,
            f"{', '.join(map(str, pope_files))}: two files of one split "
            "(the part of the name after pope_); give one file of each split",
        )
        pope[split] = read_questions(path, images)
        file_of_split[split] = Path(path)

    # 3. A damaged image is found now, before any work is done.
    places = _places_of_images(captions, captions_file, images)
    for split, path in file_of_split.items():
        places += _places_of_images(pope[split], path, images)
    check_images(places)
    return EvaluationSet(
        images=Path(images),
        captions=captions,
        vocabulary=vocabulary,
        pope=pope,
        pope_files=file_of_split,
    )


def _places_of_images(rows, path, images):
    """Return (path, place) of the image of each record of a file, for `check_images`."""
    places = []
    for i, row in enumerate(rows, start=1):
        places.append((Path(images, row["image"]), f"{path}, record {i}"))
    return places


def read_captions(path, images=None, needed=()) -> tuple[Vocabulary, list[dict]]:
    """Read a captions.json, and return its Vocabulary and its records.

    Args:
        path: the file, {"vocabulary": ..., "captions": [records]}.
        images: the folder in which each record's image must be, or None to look for no image.
        needed: names of texts that each record must have beside "image" and "objects".

    Raises InputError for another form.
    """
    # 1. The vocabulary.
    texts = [f'"{name}": text' for name in ("image", *needed)]
    form = "{" + ", ".join(texts) + f', "objects": [{OBJECT_FORM}]}}'
    raw = read_unrepeated(path)
    check(isinstance(raw, dict), f'{path}: not {{"vocabulary": ..., "captions": [{form}, ...]}}')
    vocabulary = Vocabulary(raw.get("vocabulary"), path)

    # 2. The records, with the names that the vocabulary has.
    rows = raw.get("captions")
    check(isinstance(rows, list) and rows, f"{path}: no records; each is {form}")
    captions = []
    for i, row in enumerate(rows, start=1):
        where = f"{path}, record {i}"
        check(_is_caption(row, needed), f"{where}: not of the form {form}; fix or remove it")
        _check_image_exists(row, images, where)
        caption = row | {"objects": _named_by_vocabulary(row["objects"], vocabulary, where)}
        for name in needed:
            caption[name] = _read_question(row[name], where)
        captions.append(caption)
    return vocabulary, captions


def read_questions(path, images) -> list[dict]:
    """Read the questions of one POPE file: a JSON list or JSON Lines, whatever its name.

    Raises InputError for a record that has another form, or whose image is missing.
    """
    questions = []
    for i, row in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        is_question = has_texts(row, ("image", "text")) and row.get("label") in ("yes", "no")
        check(is_question, f"{where}: not of the form {QUESTION_FORM}; fix or remove it")
        _check_image_exists(row, images, where)
        questions.append(row | {"text": _read_question(row["text"], where)})
    return questions


def _named_by_vocabulary(objects, vocabulary, where):
    """Return annotated objects with their names and colors as the vocabulary spells them.

    Raises InputError that begins with `where` for one that the vocabulary lacks.
    """
    renamed = []
    for item in objects:
        item = item | {"name": vocabulary.object_name(item["name"], where)}
        if item.get("colour"):
            item["colour"] = vocabulary.color_name(item["colour"], where)
        renamed.append(item)
    return renamed


def _read_question(question, where):
    """Return a question without "<image>". The image always comes first, wherever it stands.

    Raises InputError that begins with `where` if it stands there twice, if nothing else does, and
    for a text that no tokenizer can encode.
    """
    check(
        not LONE_SURROGATE.search(question),
        f"{where}: a question has a lone surrogate, half of a character; fix or remove it",
    )
    num_placeholders = question.count(IMAGE_PLACEHOLDER)
    text = question
    if num_placeholders > 0:
        text = question.replace(IMAGE_PLACEHOLDER, "").strip()
    check(
        num_placeholders <= 1 and text.strip(),
        f"{where}: a question has a text, and {IMAGE_PLACEHOLDER} once at most; fix or remove it",
    )
    return text


def _is_caption(row, needed):
    """Return whether a record has an image, the `needed` texts and a list of objects."""
    if not has_texts(row, ("image", *needed)) or not isinstance(row.get("objects"), list):
        return False
    return all(_is_object(item) for item in row["objects"])


def _is_object(item):
    """Return whether an annotated object has a name, and texts for what else is known of it."""
    is_misspelled = has_texts(item, ("color",))  # it would be left out without a word
    if is_misspelled or not has_texts(item, ("name",)):
        return False
    return all(isinstance(item.get(name), str | None) for name in ("colour", "place"))


def has_texts(row, names):
    """Return whether a JSON value is an object in which each of the `names` has a text."""
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)


def _check_image_exists(row, images, where):
    """Raise InputError unless the image of a record is in the folder `images` (None: any)."""
    if images is None:
        return
    try:
        check_image_file(Path(images, row["image"]))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
