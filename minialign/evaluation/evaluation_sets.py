"""Evaluation sets: images with annotated objects (for CHAIR) and questions (for POPE)."""

from dataclasses import dataclass
from pathlib import Path

from minialign.data.images import check_images
from minialign.evaluation.chair import Vocabulary
from minialign.evaluation.pope import POPE_SPLITS
from minialign.utils.files import check, read_json, read_jsonl

OBJECT_FORM = '{"name": text, and perhaps "colour": text, "place": text}'
QUESTION_FORM = '{"image": text, "text": text, "label": "yes"|"no"}'


@dataclass
class EvaluationSet:
    """What a model is evaluated on. The records keep the form that they have in their files."""

    images: Path  # the folder of the images
    captions: list[dict]  # {"image", "prompt", "objects"}; empty without a captions.json
    vocabulary: Vocabulary | None  # the names to look for; None without a captions.json
    pope: dict[str, list[dict]]  # split: its questions {"image", "text", "label"}


def read_folder(folder) -> EvaluationSet:
    """Read the EvaluationSet of a folder with captions.json, pope_*.jsonl or both, and images/."""
    folder = Path(folder)
    captions_file = folder / "captions.json"
    if not captions_file.exists():
        captions_file = None
    pope_files = []
    for split in POPE_SPLITS:
        path = folder / f"pope_{split}.jsonl"
        if path.exists():
            pope_files.append(path)
    check(
        captions_file or pope_files,
        f"{folder}: neither captions.json nor pope_*.jsonl is in this folder",
    )
    return read_set(captions_file, pope_files, folder / "images")


def read_set(captions_file, pope_files, images) -> EvaluationSet:
    """Read an EvaluationSet from its files, and check that every image can be opened.

    Args:
        captions_file: a captions.json, or None.
        pope_files: files of POPE, each named by its split (pope_random.jsonl).
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
    for path in pope_files:
        split = Path(path).stem.rpartition("pope_")[2]
        check(
            split not in pope,
            f"{', '.join(map(str, pope_files))}: two files of one split "
            "(the part of the name after pope_); give one file of each split",
        )
        pope[split] = read_questions(path, images)

    # 3. A damaged image is found now, before any work is done.
    rows = list(captions)
    for questions in pope.values():
        rows += questions
    check_images(Path(images, row["image"]) for row in rows)
    return EvaluationSet(
        images=Path(images),
        captions=captions,
        vocabulary=vocabulary,
        pope=pope,
    )


def read_captions(path, images=None, needed=()) -> tuple[Vocabulary, list[dict]]:
    """Read a captions.json, and return its Vocabulary and its records.

    Args:
        path: the file, {"vocabulary": ..., "captions": [records]}.
        images: the folder in which each record's image must be, or None to look for no image.
        needed: names of texts that each record must have beside "image" and "objects".

    Raises InputError for another form.
    """
    texts = [f'"{name}": text' for name in ("image", *needed)]
    form = "{" + ", ".join(texts) + f', "objects": [{OBJECT_FORM}]}}'
    raw = read_json(path)
    check(isinstance(raw, dict), f'{path}: not {{"vocabulary": ..., "captions": [{form}, ...]}}')
    vocabulary = Vocabulary(raw.get("vocabulary"), path)
    rows = raw.get("captions")
    check(isinstance(rows, list) and rows, f"{path}: no records; each is {form}")
    for i, row in enumerate(rows, start=1):
        check(
            _is_caption(row, needed),
            f"{path}, record {i}: not of the form {form}; fix or remove it",
        )
        _check_image_exists(row, images, f"{path}, record {i}")
    return vocabulary, rows


def read_questions(path, images) -> list[dict]:
    """Read the questions of one POPE file.

    Raises InputError for a record that has another form, or whose image is missing.
    """
    rows = read_jsonl(path)
    check(rows, f"{path}: no records; each is {QUESTION_FORM}")
    for i, row in enumerate(rows, start=1):
        is_question = _has_texts(row, ("image", "text")) and row.get("label") in ("yes", "no")
        check(
            is_question,
            f"{path}, record {i}: not of the form {QUESTION_FORM}; fix or remove it",
        )
        _check_image_exists(row, images, f"{path}, record {i}")
    return rows


def _is_caption(row, needed):
    """Return whether a record has an image, the `needed` texts and a list of objects."""
    if not _has_texts(row, ("image", *needed)) or not isinstance(row.get("objects"), list):
        return False
    return all(_is_object(item) for item in row["objects"])


def _is_object(item):
    """Return whether an annotated object has a name, and texts for what else is known of it."""
    if not _has_texts(item, ("name",)):
        return False
    return all(isinstance(item.get(name), str | None) for name in ("colour", "place"))


def _has_texts(row, names):
    """Return whether a JSON value is an object in which each of the `names` has a text."""
    return isinstance(row, dict) and all(isinstance(row.get(name), str) for name in names)


def _check_image_exists(row, images, where):
    """Raise InputError unless the image of a record is in the folder `images` (None: any)."""
    if images is None:
        return
    path = Path(images, row["image"])
    check(path.is_file(), f"{where}: no image {path}; give its folder with --images")
