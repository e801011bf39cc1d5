"""POPE: how an answer is read, scores worked by hand, and the published files."""

import json

import pytest
from evaluation_helpers import write_images, write_json, write_jsonl

from minialign.evaluation.pope import (
    counts_as_yes,
    is_unparsed,
    pope_scores,
    read_pope,
    score_pope,
    split_of,
)
from minialign.utils.files import InputError

SUFFIX = "\nAnswer the question using a single word or phrase."
IMAGES = ("COCO_val2014_000000000001.jpg", "COCO_val2014_000000000002.jpg")


def test_pope_scores_by_hand():
    """Yes was answered to 3 of 5 questions, to 2 of them rightly. Yes is right for 4 questions.

    So precision is 2/3, recall 2/4, F1 4/7 and accuracy 2/5.
    """
    predictions = [True, True, True, False, False]
    labels = [True, True, False, True, True]

    scores = pope_scores(predictions, labels)

    expected = {
        "accuracy": 0.4,
        "precision": 2 / 3,
        "recall": 0.5,
        "f1": 4 / 7,
        "yes": 0.6,
        "n": 5,
    }
    assert scores == pytest.approx(expected)


@pytest.mark.parametrize(
    "answer, unparsed",
    [
        ("Yes.", False),
        ("yes, it is", False),
        ("I think YES", False),
        ("No.", False),
        ("There is not.", False),
        # The rule reads these as yes, although they say neither.
        ("", True),
        ("NO.", True),
        ("None", True),
        ("There isn't.", True),
        ("A dog. Yes-man", False),
        ("Yesterday", True),
    ],
)
def test_answers_with_neither_yes_nor_no(answer, unparsed):
    assert is_unparsed(answer) is unparsed


def test_pope_scores_without_a_yes():
    """A share of nothing is no value: no yes was answered, so there is no precision."""
    scores = pope_scores([False, False], [True, False])

    assert scores == {
        "accuracy": 0.5,
        "precision": None,
        "recall": 0.0,
        "f1": 0.0,
        "yes": 0.0,
        "n": 2,
    }


def test_pope_scores_where_no_is_always_right():
    wrong = pope_scores([True], [False])
    right = pope_scores([False], [False])

    assert (wrong["precision"], wrong["recall"], wrong["f1"]) == (0.0, None, 0.0)
    assert (right["precision"], right["recall"], right["f1"]) == (None, None, None)


@pytest.mark.parametrize(
    "text, is_yes",
    [
        ("Yes", True),
        ("Yes.", True),
        ("no", False),
        ("No.", False),
        # Exactly "No", "not" or "no": the published rule, also where it gives odd results.
        ("", True),
        ("None", True),
        ("Nothing.", True),
        ("NO", True),
        ("NO.", True),
        ("Nope", True),
        ("nothing", True),
        ("no.", False),
        ("  no", False),
        ("not", False),
        ("No, there is a kite.", False),
        ("There is not a kite.", False),
        ("There isn't a kite.", True),
        ("I cannot tell", True),
        # Commas are removed, and words are split at spaces.
        ("Oh,no dog", True),
        ("I say,no, to it", True),
        ("There is no, really", False),
        ("Yes, no doubt", False),
        ("Yes. There is no kite.", True),
        ("No kite. Yes kite.", False),
        ("No: a kite", True),
        ("A kite? No!", True),
        ("No\nThere is a kite", True),
        ("no,yes", True),
        ("Not here", True),
        # Answer files are scored as they are: only a blank cuts words.
        ("No\n", True),
        ("\tno", True),
        (".No", True),
    ],
)
def test_texts_of_answer_files_count_as_the_published_scorer_has_them(text, is_yes):
    assert counts_as_yes(text) is is_yes


# --- the published files


def record(question_id, image, name, label):
    """Return a question as POPE's authors published it."""
    text = f"Is there a {name} in the image?"
    return {"question_id": question_id, "image": image, "text": text, "label": label}


def records_of_a_split():
    """Return six questions about two images: three of them are to be answered with yes."""
    first, second = IMAGES
    return [
        record(1, first, "kite", "yes"),
        record(2, first, "hot dog", "yes"),
        record(3, first, "umbrella", "no"),
        record(4, second, "skis", "no"),
        record(5, second, "oven", "yes"),
        record(6, second, "bus", "no"),
    ]


ANSWERS = ["Yes", "No", "No", "Yes", "Yes", "no"]


@pytest.fixture()
def images(tmp_path):
    """Return a folder with the images that the questions are about."""
    return write_images(tmp_path / "val2014", *IMAGES)


def write_crlf(path, values):
    """Write JSON Lines that end like those of Windows, as two of the published files do."""
    path.write_bytes("".join(json.dumps(value) + "\r\n" for value in values).encode())


def write_splits(folder):
    """Write the files of the three splits."""
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "coco_pope_random.json", records_of_a_split())
    write_crlf(folder / "coco_pope_popular.json", records_of_a_split())
    write_crlf(folder / "coco_pope_adversarial.json", records_of_a_split())
    return folder


def write_llava_file(folder, changes=None):
    """Write LLaVA's file of the three splits, which has no labels."""
    changes = changes or {}
    rows = []
    for offset, split in ((0, "adversarial"), (10_000_000, "random"), (20_000_000, "popular")):
        for row in records_of_a_split():
            question_id = row["question_id"] + offset
            # LLaVA's version writes "an", with a slip after it.
            text = row["text"].replace("a umbrella in the image", "an umbrella in the imange")
            text = text.replace("a oven in the image", "an oven in the imange")
            row = {"question_id": question_id, "image": row["image"], "text": text + SUFFIX}
            row["category"] = split
            row.update(changes.get(question_id, {}))
            rows.append(row)
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "llava_pope_test.jsonl", rows)
    return folder


def test_a_folder_of_published_files_is_read_split_by_split(tmp_path, images):
    questions = read_pope(write_splits(tmp_path / "coco"), images)

    assert [question.id for question in questions] == 3 * [1, 2, 3, 4, 5, 6]
    splits = [question.record["category"] for question in questions]
    assert splits == 6 * ["random"] + 6 * ["popular"] + 6 * ["adversarial"]
    assert questions[3].text == "Is there a skis in the image?" + SUFFIX
    assert questions[3].image == images / IMAGES[1]


@pytest.mark.parametrize(
    "name, split",
    [
        ("coco_pope_random.json", "random"),
        ("gqa_pope_seem_popular.json", "popular"),
        ("aokvqa_pope_seem_adversarial.json", "adversarial"),
        ("pope_attributes.jsonl", "attributes"),
    ],
)
def test_the_split_is_read_from_the_name(tmp_path, images, name, split):
    write_json(tmp_path / name, records_of_a_split())

    questions = read_pope(tmp_path / name, images)

    assert split_of(tmp_path / name) == split
    assert {question.record["category"] for question in questions} == {split}


def test_scores_and_their_means_by_hand(tmp_path, images):
    """TP 2, FP 1, TN 2, FN 1 in two splits. All answers to the third are right."""
    questions = read_pope(write_splits(tmp_path / "coco"), images)
    right = ["yes", "yes", "no", "no", "yes", "no"]

    scores = score_pope(questions, ANSWERS + right + ANSWERS)

    random_scores = scores["splits"]["random"]
    assert random_scores == pytest.approx(
        {
            "accuracy": 2 / 3,
            "precision": 2 / 3,
            "recall": 2 / 3,
            "f1": 2 / 3,
            "yes": 0.5,
            "n": 6,
            "unparsed": 0,
        }
    )
    assert scores["splits"]["popular"]["f1"] == 1.0
    assert scores["f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    assert scores["accuracy"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_a_split_alone_has_no_mean(tmp_path, images):
    questions = read_pope(write_splits(tmp_path / "coco") / "coco_pope_random.json", images)

    scores = score_pope(questions, ANSWERS)

    assert scores["f1"] is None
    assert scores["splits"]["random"]["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("folder_of_labels", [".", "coco"])
def test_llavas_file_takes_its_labels_from_the_published_files(tmp_path, images, folder_of_labels):
    folder = write_llava_file(tmp_path / "pope")
    write_splits(folder / folder_of_labels)

    questions = read_pope(folder / "llava_pope_test.jsonl", images)

    assert questions[2].text == "Is there an umbrella in the imange?" + SUFFIX
    assert questions[6].id == 10_000_001
    assert questions[6].record["question_id"] == 10_000_001
    labels = [question.record["label"] for question in questions]
    assert labels == 3 * ["yes", "yes", "no", "no", "yes", "no"]
    scores = score_pope(questions, 3 * ANSWERS)
    assert scores["f1"] == pytest.approx(2 / 3)


def test_llavas_file_alone_can_be_asked_but_not_scored(tmp_path, images):
    questions = read_pope(write_llava_file(tmp_path / "pope"), images)

    assert len(questions) == 18
    with pytest.raises(InputError, match=r"coco_pope_adversarial.json beside llava_pope_test"):
        score_pope(questions, 3 * ANSWERS)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({10_000_003: {"image": IMAGES[1]}}, "question 10000003 is not the one in .*record 3;"),
        ({4: {"text": "Is there a ski in the image?"}}, "question 4 is not the one in .*record 4;"),
        ({4: {"question_id": 3}}, "1 ids are given to several questions"),
        ({4: {"category": None}}, "record 4: 'category' is not a split"),
        ({4: {"category": "hard"}}, "no labels of the split 'hard'"),
        ({4: {"category": "random"}}, "5 questions of this split, but 6 labels"),
    ],
)
def test_labels_of_other_questions_are_refused(tmp_path, images, changes, message):
    folder = write_llava_file(tmp_path / "pope", changes)
    write_splits(folder / "coco")

    with pytest.raises(InputError, match=f"llava_pope_test.jsonl.*{message}"):
        read_pope(folder, images)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question_id": 3}, "1 ids are given to several questions, the first is '3'"),
        ({"question_id": None}, "record 5: 'question_id' is not a number or a text"),
        ({"label": "No"}, "record 5: the label is 'No'"),
        ({"label": None}, "record 5: the label is None"),
        ({"image": "none.jpg"}, "record 5: .*none.jpg: no such image"),
        ({"text": ""}, "record 5: no question in 'text'"),
    ],
)
def test_a_bad_record_is_named(tmp_path, images, change, message):
    rows = records_of_a_split()
    rows[4].update(change)
    write_jsonl(tmp_path / "coco_pope_random.json", rows)

    with pytest.raises(InputError, match=f"coco_pope_random.json.*{message}"):
        read_pope(tmp_path / "coco_pope_random.json", images)


def test_two_files_of_one_split_are_refused(tmp_path, images):
    folder = write_splits(tmp_path / "coco")
    write_jsonl(folder / "gqa_pope_seem_random.json", records_of_a_split())

    with pytest.raises(InputError, match=r"coco_pope_random.json is of the same split"):
        read_pope(folder, images)


def test_a_folder_without_pope_files_is_refused(images):
    with pytest.raises(InputError, match=r"val2014: no POPE file is in this folder"):
        read_pope(images, images)
