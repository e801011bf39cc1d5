"""What the tests of the annotators share: a record, and annotations on disk."""

import json

from minialign.data.records import Record

VOCABULARY = {
    "objects": {
        "cup": ["cup", "cups"],
        "dog": ["dog", "puppy"],
        "lamp": ["lamp"],
        "ball": ["ball"],
    },
    "colours": ["red", "blue", "green"],
}
CUP = {"name": "cup", "colour": "red", "place": "top left"}
DOG = {"name": "dog", "colour": "blue", "place": "bottom right"}
OTHER_CUP = {"name": "cup", "colour": "blue", "place": "bottom right"}
ANNOTATED_OBJECTS = {"a.png": [CUP, DOG], "two.png": [CUP, OTHER_CUP]}


def write_annotations(folder, annotated_objects=ANNOTATED_OBJECTS):
    """Write a captions.json with the objects of each image, and return its path."""
    rows = []
    for image, objects in annotated_objects.items():
        rows.append({"image": image, "prompt": "What is there?", "objects": objects})
    path = folder / "captions.json"
    path.write_text(json.dumps({"vocabulary": VOCABULARY, "captions": rows}))
    return path


def make_record(chosen="good", rejected="bad", image="a.png", question="What is there?"):
    """Return a preference record about an image."""
    return Record(
        "r-7", image, (f"/pictures/{image}",), (f"<image>\n{question}",), chosen, rejected
    )
