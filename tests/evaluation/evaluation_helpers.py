"""What the tests of the evaluation share: a vocabulary, and a small evaluation set on disk."""

import json
import shutil
from pathlib import Path

from minialign.evaluation.vocabulary import Vocabulary

TINY_IMAGE = Path(__file__).parents[2] / "data/tiny/final/balanced/images/0001.png"

RAW_VOCABULARY = {
    "objects": {
        "cup": ["cup", "cups"],
        "bear": ["bear", "bears"],
        "teddy": ["teddy bear", "teddy bears", "soft toy"],
        "dog": ["dog", "puppy"],
    },
    "colours": ["red", "blue"],
}
VOCABULARY = Vocabulary(RAW_VOCABULARY, "captions.json")


def write_evaluation_set(folder, records):
    """Write an evaluation set in the shipped layout: two images, two captions, three questions."""
    # 1. The images are those of the first two records.
    (folder / "images").mkdir()
    for record in records[:2]:
        shutil.copy(record.paths[0], folder / "images" / record.image)
    first = records[0].image
    second = records[1].image

    # 2. A red cup is annotated in each of them.
    captions = []
    for image in (first, second):
        objects = [{"name": "cup", "colour": "red"}]
        captions.append({"image": image, "prompt": "What can be seen?", "objects": objects})
    write_json(folder / "captions.json", {"vocabulary": RAW_VOCABULARY, "captions": captions})

    # 3. One split of POPE.
    questions = [
        {"image": first, "text": "Is there a cup?", "label": "yes"},
        {"image": first, "text": "Is there a dog in the picture?", "label": "no"},
        {"image": second, "text": "Is there a cup?", "label": "no"},
    ]
    write_jsonl(folder / "pope_random.jsonl", questions)
    return folder


def write_json(path, value):
    """Write a value as JSON."""
    path.write_text(json.dumps(value))


def write_jsonl(path, values):
    """Write one value a line as JSON."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def write_images(folder, *names):
    """Write an image under each of the names into a new folder, and return the folder."""
    folder.mkdir()
    for name in names:
        shutil.copy(TINY_IMAGE, folder / name)
    return folder
