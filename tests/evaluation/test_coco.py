"""COCO: its annotations, its vocabulary, and CHAIR by hand."""

import json
import shutil
from pathlib import Path

import pytest
from evaluation_helpers import write_json

from minialign.evaluation.coco import (
    OBJECTS_FILE,
    coco_vocabulary,
    read_coco,
    score_coco,
)
from minialign.evaluation.coco_captions import read_image_ids
from minialign.evaluation.vocabulary import DESCRIBES
from minialign.evaluation.words import singular, singular_phrase
from minialign.utils.files import InputError

PICTURE = Path("data/tiny/final/balanced/images/0001.png")
CATEGORIES = [{"id": 18, "name": "dog"}, {"id": 62, "name": "chair"}, {"id": 6, "name": "bus"}]


def image(image_id, split="val"):
    """Return the record of an image as COCO has it."""
    return {"id": image_id, "file_name": f"COCO_{split}2014_{image_id:012d}.jpg"}


def instance(image_id, category_id, crowd=0):
    """Return the record of an instance as COCO has it."""
    return {"image_id": image_id, "category_id": category_id, "iscrowd": crowd, "area": 1.0}


def reference(image_id, caption):
    """Return the record of a reference caption as COCO has it."""
    return {"image_id": image_id, "caption": caption}


@pytest.fixture()
def annotations(tmp_path):
    """Return a folder of annotations: images 1 and 3 in val, image 2 in train.

    Image 1 has two dogs (one of them a crowd), a chair and a table, image 2 a bus and people, and
    image 3 nothing.
    """
    folder = tmp_path / "annotations"
    folder.mkdir()
    instances = {"categories": CATEGORIES}
    instances["images"] = [image(1), image(3)]
    instances["annotations"] = [instance(1, 18), instance(1, 18, crowd=1), instance(1, 62)]
    write_json(folder / "instances_val2014.json", instances)
    captions = {"images": [image(1), image(3)]}
    captions["annotations"] = [reference(1, "A dog under a table.")]
    write_json(folder / "captions_val2014.json", captions)

    instances = {"categories": CATEGORIES, "images": [image(2, "train")]}
    instances["annotations"] = [instance(2, 6)]
    write_json(folder / "instances_train2014.json", instances)
    captions = {"images": [image(2, "train")]}
    captions["annotations"] = [reference(2, "People wait for a bus.")]
    write_json(folder / "captions_train2014.json", captions)
    return folder


def test_objects_are_those_of_instances_and_of_reference_captions(annotations):
    questions = read_coco(annotations, image_ids=[1, 2, 3])

    assert [question.id for question in questions] == [1, 2, 3]
    assert questions[0].record["objects"] == ["chair", "dining table", "dog"]
    assert questions[1].record["objects"] == ["bus", "person"]
    assert questions[2].record["objects"] == []
    assert questions[0].text == "Please describe this image in detail."


def test_scores_of_four_captions_by_hand(annotations):
    """Mentions 4, 1, 1 and 0. Absent are the cat of image 1 and the kite of image 3."""
    captions = [
        (1, "A dog, a dog and a cat sit on a chair."),
        (2, "A bus."),
        (3, "A kite."),
        (1, "Nothing."),
    ]
    questions = read_coco(annotations, image_ids=[image_id for image_id, _ in captions])

    scores = score_coco(questions, [caption for _, caption in captions])

    assert scores == {
        "chair_i": 2 / 6,
        "chair_s": 2 / 4,
        "recall": 3 / 8,  # of 3, 2, 0 and 3 objects
        "words": (11 + 2 + 2 + 1) / 4,
        "repeats": 1 / 6,
        "chair_s_refine": 2 / 3,
        "n": 4,
    }


def test_captions_without_mentions_are_left_out_of_the_refined_share(annotations):
    questions = read_coco(annotations, image_ids=[1, 2, 3])

    captions = ["A dog, a dog, a puppy and a cat sit on a chair.", "A bus.", "Nothing here."]
    scores = score_coco(questions, captions)

    assert scores["chair_s"] == 1 / 3
    assert scores["chair_s_refine"] == 1 / 2
    assert scores["chair_i"] == 1 / 6
    assert scores["recall"] == 3 / 5


@pytest.mark.parametrize(
    "caption, names",
    [
        # The published scorers agree on these.
        ("A man rides a bicycle next to two dogs.", "person, bicycle, dog"),
        ("A baby elephant and an adult giraffe near a baby.", "elephant, giraffe, person"),
        ("A passenger train and a passenger.", "train, person"),
        ("Hot dogs on a plate with a dog.", "hot dog, dog"),
        ("A teddy bear on the bed.", "teddy bear, bed"),
        ("He wears a bow tie.", "tie"),
        ("The toilet seat is up.", "toilet"),
        ("A chair and a toilet; the seat is red.", "chair, toilet"),
        ("A wine glass and two wine glasses.", "wine glass, wine glass"),
        ("There is a glass of wine.", ""),
        ("A train track in the hills.", ""),
        ("Home plate and a baseball bat.", "baseball bat"),
        ("A tennis racket and a tennis ball.", "tennis racket, sports ball"),
        ("An orange shirt and an orange.", "orange, orange"),
        ("The cat's toy mouse.", "cat, mouse"),
        ("Knives, forks and spoons.", "knife, fork, spoon"),
        ("Dog, dog, dog.", "dog, dog, dog"),
        ("A coffee table with a remote control.", "dining table, remote"),
        ("A potted plant and a plant in a pot.", "potted plant"),
        # They lose some of these words, or disagree.
        ("Two men, buses, a bus, vases, ties", "person, bus, bus, vase, tie"),
        ("skis, geese, mice, oxen, calves", "skis, bird, mouse, cow, cow"),
        ("people, sheep, scissors, broccoli", "person, sheep, scissors, broccoli"),
        ("A person seated at a table is skiing, her hair is tied", "person, dining table"),
        ("a microwave oven, a computer mouse", "microwave, mouse"),
        ("a hair dryer, a motor bike, a stove top oven", "hair drier, motorcycle, oven"),
        ("a white bow, a street light, two glasses", ""),
        # Two words that mention nothing together.
        ("A train station, two bus stops, orange juice and a mouse pad.", ""),
        ("The train stations of bus-stop 7", ""),
    ],
)
def test_mentions_of_cocos_objects(caption, names):
    mentions = coco_vocabulary().mentions(caption)

    assert ", ".join(name for name, _ in mentions) == names


def test_the_table_of_objects_agrees_with_the_rules_of_words():
    table = json.loads(OBJECTS_FILE.read_text())

    assert len(table["objects"]) == 80
    for item in table["objects"]:
        for plural, word in item["irregular"].items():
            assert singular(plural) == word
        for word in [item["name"], *item["also"]]:
            assert coco_vocabulary().object_name(word, "here") == item["name"]
            assert coco_vocabulary().mentions(word) == [(item["name"], None)]
    for word in set(table["invariant"]) - {"skis"}:
        assert singular(word) == word
    for word in table["prefix"]["words"]:
        assert DESCRIBES[word] >= set(table["prefix"]["before"])
    assert DESCRIBES["passenger"] >= set(table["passenger"])
    for words in table["drop"]:
        assert coco_vocabulary().mentions(singular_phrase([words])) == []


def test_a_list_of_images_repeats_a_subset(tmp_path, annotations):
    path = tmp_path / "images.txt"
    path.write_text("COCO_train2014_000000000002.jpg\n1\n")

    questions = read_coco(annotations, image_ids=read_image_ids(path))

    assert [question.id for question in questions] == [2, 1]


@pytest.mark.parametrize(
    "name",
    [
        "COCO_val2014_000000000001.jpg",
        "000000000001.jpg",
        "val2014/COCO_val2014_000000000001.jpg",
        "train2017/000000000001.jpg",
    ],
)
def test_images_are_found_by_the_names_of_both_years(tmp_path, annotations, capsys, name):
    """Without a list, the images in the folder are asked about, and the others are counted."""
    path = tmp_path / "images" / name
    path.parent.mkdir(parents=True)
    shutil.copy(PICTURE, path)

    questions = read_coco(annotations, tmp_path / "images")

    assert [question.image for question in questions] == [path]
    assert (
        "2 of 3 images are not there, the first is 2; they are left out" in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="images: 1 of 2 images are not there, the first is 3;"):
        read_coco(annotations, tmp_path / "images", [1, 3])


def test_a_folder_without_images_of_coco_is_refused(tmp_path, annotations):
    with pytest.raises(InputError, match="3 of 3 images are not there"):
        read_coco(annotations, tmp_path)
    with pytest.raises(InputError, match="nowhere: no such folder"):
        read_coco(annotations, tmp_path / "nowhere")


def test_images_that_are_not_annotated_are_counted(annotations):
    with pytest.raises(InputError, match="2 of 3 images are not annotated in .*first is .7."):
        read_coco(annotations, image_ids=[7, 1, 8])


def test_the_names_of_2017_are_read_if_those_of_2014_are_not_there(annotations, capsys):
    for path in list(annotations.iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("2014", "2017")))
    assert len(read_coco(annotations)) == 3
    assert "annotations of two years; those of 2014 are read" in capsys.readouterr().err

    for path in annotations.glob("*2014.json"):
        path.unlink()
    assert len(read_coco(annotations)) == 3


def test_half_of_the_annotations_is_refused(annotations):
    (annotations / "captions_val2014.json").unlink()

    with pytest.raises(InputError, match="has no captions_val2014.json"):
        read_coco(annotations)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("instances", {"images": None}, "has no list 'images'"),
        ("instances", {"categories": 3}, "has no list 'categories'"),
        ("instances", {"categories": [{"id": 1}]}, 'category 1: has no "id" and "name"'),
        ("instances", {"categories": [{"id": 1, "name": "moon"}]}, 'category 1: .*"moon"'),
        ("instances", {"images": [{"id": 1}]}, "image 1: not of the form"),
        ("instances", {"images": [{"id": "1", "file_name": "1.jpg"}]}, "image 1: not of the form"),
        ("captions", {"images": [[]]}, "image 1: not of the form"),
        ("instances", {"annotations": [instance(1, 18), instance(1, 99)]}, "annotation 2: "),
        ("instances", {"annotations": [instance(4, 18)]}, "annotation 1: "),
        ("instances", {"annotations": [[]]}, "annotation 1: "),
        ("captions", {"annotations": [reference(1, None)]}, "annotation 1: "),
        ("captions", {"annotations": [{"caption": "A dog."}]}, "annotation 1: "),
        ("captions", {"annotations": [reference([], "A dog.")]}, "annotation 1: "),
    ],
)
def test_damaged_annotations_are_named(annotations, name, change, message):
    path = annotations / f"{name}_val2014.json"
    write_json(path, json.loads(path.read_text()) | change)

    with pytest.raises(InputError, match=f"{path}.*{message}"):
        read_coco(annotations)
