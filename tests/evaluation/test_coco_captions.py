"""Captions of COCO's images in every published form, and lists of images."""

import pytest
from evaluation_helpers import write_json, write_jsonl

from minialign.evaluation.coco_captions import read_coco_captions, read_image_ids
from minialign.utils.files import InputError


@pytest.mark.parametrize("name", [9, "9", "000000000009.jpg", "COCO_val2014_000000000009.jpg"])
def test_captions_to_score_name_images_in_every_published_form(tmp_path, name):
    """The id counts, not the number of the question."""
    list_file = tmp_path / "list.json"
    write_json(list_file, [{"question_id": 0, "image_id": name, "text": "A dog."}])
    lines_file = tmp_path / "lines.jsonl"
    write_jsonl(lines_file, [{"image_id": name, "question": "Describe it.", "answer": "A dog."}])
    evaluated_file = tmp_path / "evaluated.json"
    evaluated = {"9": {"image_id": name, "caption": "A dog.", "CIDEr": 1.0}}
    write_json(evaluated_file, {"overall": {"CIDEr": 1.0}, "imgToEval": evaluated})

    for path in (list_file, lines_file, evaluated_file):
        assert read_coco_captions(path) == [(9, "A dog.")]
        assert read_image_ids(path) == [9]


def test_several_captions_of_an_image_are_counted(tmp_path, capsys):
    path = tmp_path / "captions.jsonl"
    write_jsonl(path, [{"image_id": 9, "caption": "A dog."}, {"image_id": "9", "caption": ""}])

    assert read_coco_captions(path) == [(9, "A dog."), (9, "")]
    assert "1 images have several captions; each one counts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "record, message",
    [
        ({"image_id": 9}, "record 1: has no caption"),
        ({"image_id": 9, "text": None}, "record 1: has no caption"),
        ({"image_id": "dog.jpg", "text": ""}, "record 1: 'dog.jpg' names no image of COCO"),
        ({"image_id": True, "text": ""}, "record 1: True names no image"),
        ({"text": "A dog."}, "record 1: None names no image"),
        ("A dog.", "record 1: not of the form"),
    ],
)
def test_captions_that_cannot_be_scored_are_refused(tmp_path, record, message):
    path = tmp_path / "captions.json"
    write_json(path, [record])

    with pytest.raises(InputError, match=message):
        read_coco_captions(path)


def test_an_image_that_occurs_twice_in_evaluated_captions_is_refused(tmp_path):
    """Python's json would keep the last of the two without a word."""
    path = tmp_path / "captions.json"
    record = '"9": {"image_id": 9, "caption": "A dog."}'
    path.write_text(f'{{"imgToEval": {{{record}, {record}}}}}')

    with pytest.raises(InputError, match=f"{path}: '9' occurs twice"):
        read_coco_captions(path)


@pytest.mark.parametrize("text", ["1\n3\n000000000001.jpg\n", "[1, 3, 1]", "", "[]", "{}", "dog"])
def test_a_list_with_an_image_twice_or_without_images_is_refused(tmp_path, text):
    path = tmp_path / "images.txt"
    path.write_text(text)

    with pytest.raises(InputError, match=f"{path}.*; (list|write|give|the form)"):
        read_image_ids(path)
