"""Captions of COCO's images to score, in their published forms, and lists of images."""

import re
from collections import Counter

from minialign.evaluation.questions import read_records_by_id
from minialign.utils.files import check, read_json_records, read_text
from minialign.utils.messages import print_message

# The name of an image contains its id. All of these are image 9: 9, 000000000009.jpg and
# COCO_val2014_000000000009.jpg.
IMAGE_NAME = re.compile(r"(?:COCO_(?:train|val|test)[0-9]{4}_)?([0-9]{1,18})(?:\.jpg)?")
# The fields that may hold the image and the caption. The first one that a record has counts.
IMAGE_FIELDS = ("image_id", "image", "question_id")
CAPTION_FIELDS = ("caption", "text", "answer")
CAPTION_FORM = '{"image_id": 9 or "COCO_val2014_000000000009.jpg", "caption": text}'


def read_coco_captions(path) -> list[tuple[int, str]]:
    """Return the (image id, caption) of each record of a file of captions to score.

    The file is a JSON list or JSON Lines, or the output of COCO's caption evaluation, whose
    "imgToEval" holds the records. An image may have several captions. Each one counts, as in the
    published scorers, and the number of such images is printed.
    """
    captions = []
    for i, record in enumerate(_caption_records(path), start=1):
        where = f"{path}, record {i}"
        check(isinstance(record, dict), f"{where}: not of the form {CAPTION_FORM}; fix it")
        image_id = _image_id(_first_of(record, IMAGE_FIELDS), where)
        caption = _first_of(record, CAPTION_FIELDS)
        check(isinstance(caption, str), f"{where}: has no caption; the form is {CAPTION_FORM}")
        captions.append((image_id, caption))

    counts = Counter(image_id for image_id, _ in captions)
    num_repeated = sum(count > 1 for count in counts.values())
    if num_repeated:
        print_message(f"{path}: {num_repeated} images have several captions; each one counts")
    return captions


def read_image_ids(path) -> list[int]:
    """Return the image ids of a list of images, in its order.

    It is a text with an id or a file name on each line, a JSON list of them, or any file that
    `read_coco_captions` reads, with or without captions. Raises InputError for an image that is
    listed twice.
    """
    # 1. Read the list.
    text = read_text(path).strip()
    if text[:1] in ("[", "{"):
        records = _caption_records(path)
    else:
        records = text.split()
    check(records, f"{path}: lists no image; write an id or a file name on each line")

    # 2. Take the ids.
    image_ids = []
    for i, record in enumerate(records, start=1):
        name = _first_of(record, IMAGE_FIELDS) if isinstance(record, dict) else record
        image_ids.append(_image_id(name, f"{path}, record {i}"))
    repeated = [image_id for image_id, count in Counter(image_ids).items() if count > 1]
    check(
        not repeated,
        f"{path}: {len(repeated)} images are listed several times, the first is {repeated[:1]}; "
        "list each once",
    )
    return image_ids


def _caption_records(path):
    """Return the records of a file of captions in any of its forms."""
    records = read_json_records(path)
    first = records[0]
    if len(records) == 1 and isinstance(first, dict) and "imgToEval" in first:
        records_of = read_records_by_id(path)["imgToEval"]
        check(
            isinstance(records_of, dict) and records_of,
            f"{path}: 'imgToEval' holds no captions; it is {{image id: {CAPTION_FORM}}}",
        )
        return list(records_of.values())
    return records


def _first_of(record, fields):
    """Return the value of the first of the `fields` that a record has, or None."""
    for field in fields:
        if field in record:
            return record[field]
    return None


def _image_id(name, where):
    """Return the id of an image from its id or its name. Raise InputError for anything else."""
    if isinstance(name, int) and not isinstance(name, bool):
        return name
    match = None
    if isinstance(name, str):
        match = IMAGE_NAME.fullmatch(name.rpartition("/")[2])
    check(match, f"{where}: {name!r} names no image of COCO; the form is {CAPTION_FORM}")
    return int(match[1])
