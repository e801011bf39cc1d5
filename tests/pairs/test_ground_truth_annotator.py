"""GroundTruthAnnotator: verdicts worked by hand, and annotations that cannot be used."""

import json
from dataclasses import replace

import pytest
from annotator_helpers import CUP, DOG, VOCABULARY, make_record, write_annotations

from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.utils.files import InputError


@pytest.fixture()
def annotator(tmp_path):
    """Return an annotator that knows two images.

    a.png shows a red cup at the top left and a blue dog at the bottom right. two.png shows that cup
    and a blue cup at the bottom right. There is no lamp and no ball.
    """
    return GroundTruthAnnotator(write_annotations(tmp_path))


@pytest.mark.parametrize("option", ["--annotator", "--corrupter"])
def test_without_annotations_the_option_that_asks_for_them_is_named(tmp_path, option):
    """Both of them default to truth, and data of one's own has no such file."""
    with pytest.raises(InputError) as error:
        GroundTruthAnnotator(tmp_path / "captions.json", option)

    assert str(error.value) == (
        f"{tmp_path / 'captions.json'}: no such file; truth reads in it which objects an image "
        f"shows, so write it (data/README.md says how), or give {option} the folder of a "
        "multimodal LLM"
    )


def verdict_in_both_orders(annotator, record, first, second):
    """Return the verdict on (first, second), which must turn round with the responses."""
    (verdict,) = annotator.compare([record], [first], [second])
    (swapped_verdict,) = annotator.compare([record], [second], [first])
    assert swapped_verdict == (None if verdict is None else 1 - verdict)
    return verdict


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        # False statements: an object that is not there, a wrong color, a wrong place.
        ("There is a cup.", "There is a lamp.", 0),
        ("A red cup.", "A blue cup.", 0),
        ("A cup is at the top left.", "A cup is at the bottom right.", 0),
        # The color of a single object may stand anywhere in the sentence.
        ("The cup is red.", "The cup is blue.", 0),
        # Of two objects, each has the color before its name, and their places are not read.
        ("A red cup and a blue dog.", "A blue cup and a red dog.", 0),
        ("A cup and a dog at the bottom right.", "A cup and a dog.", None),
        # Fewer false statements come first: 0 wrong and 1 right against 1 wrong and 6 right.
        ("A cup.", "A red cup at the top left. A blue dog at the bottom right. A lamp.", 0),
        # 1 wrong against 2 wrong, the color and the place.
        ("A lamp.", "A blue cup at the bottom right.", 0),
        # 2 wrong each. 0 right against 2 right.
        ("A lamp. A ball.", "A blue cup at the bottom right. A dog.", 1),
        # 1 wrong each. 0 right against 1 right: the cup is there.
        ("A lamp.", "A blue cup.", 1),
        # More true statements are better.
        ("A cup.", "A cup. A dog.", 1),
        ("A red cup.", "A cup.", 0),
        ("A cup at the top left.", "A cup.", 0),
        ("A cup and a puppy.", "A cup.", 0),
        # A true statement counts once, however often it is repeated.
        ("A cup. A cup. One more cup, and cups.", "A cup.", None),
        ("A red cup. The cup is red.", "A cup. It is a red cup.", None),
        # A false statement counts each time.
        ("A lamp. A lamp.", "A lamp.", 1),
        # Ties.
        ("There is a cup.", "One sees the cup!", None),
        ("A blue cup.", "A red dog.", None),  # 1 wrong and 1 right each
        ("Nothing.", "A lovely day.", None),
        # What is negated is not said to be there, up to the end of the clause.
        ("No, there is no lamp.", "There is a lamp.", 0),
        ("There is no lamp, nor anything else.", "Nothing.", None),
        ("A cup without a ball.", "A cup.", None),
        ("A cup, not a lamp.", "A cup.", None),
        ("There isn't a red\nlamp.", "Nothing.", None),
        ("There is no dog and a cup is here.", "A cup.", None),
        ("- no dog\n- a cup", "A cup.", None),
        ("Without a doubt a cup.", "A cup.", None),
        ("No dog (a cup is there).", "A cup.", None),
        ("I cannot see a dog.", "Nothing.", None),
        ("Neither a dog nor a lamp.", "Nothing.", None),
        ("None of it is a dog.", "Nothing.", None),
        ("There is no dog.", "A dog.", 1),
        ("The cup is not blue.", "The cup is blue.", 0),
        ("Not only a cup.", "A cup.", None),
        ("No lamp but a cup.", "A cup.", None),
        ("No, a lamp.", "No, a cup.", 1),
        ("There is no lamp: a ball.", "A ball.", None),
    ],
)
def test_fewer_false_statements_come_first_then_more_true_ones(annotator, first, second, verdict):
    assert verdict_in_both_orders(annotator, make_record(), first, second) == verdict


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        ("A red cup. A blue cup.", "A red cup. A green cup.", 0),
        # The second cup's color is a statement of its own.
        ("A red cup. A blue cup.", "A red cup.", 0),
        ("A cup at the bottom right.", "A cup.", 0),
    ],
)
def test_what_is_true_of_one_of_two_cups_is_true(annotator, first, second, verdict):
    record = make_record(image="two.png")

    assert verdict_in_both_orders(annotator, record, first, second) == verdict


def test_a_phrase_is_not_taken_for_a_word_in_it(tmp_path, monkeypatch):
    """The top left is not the left, and dark blue is not blue. Places may be in capitals."""
    monkeypatch.setitem(VOCABULARY, "colours", ["blue", "dark blue"])
    cup = {"name": "cup", "colour": "dark blue", "place": "Top Left"}
    dog = {"name": "dog", "colour": "blue", "place": "left"}
    annotator = GroundTruthAnnotator(write_annotations(tmp_path, {"a.png": [cup, dog]}))
    record = make_record()

    for text in (
        "The cup is dark blue.",
        "The cup is dark-blue.",
        "The cup is at the top left.",
        "The cup stands leftmost.",
    ):
        assert annotator.judge(record, text).num_wrong == 0, text
    for text in ("The cup is blue.", "The cup is on the left.", "The dog is at the top left."):
        assert annotator.judge(record, text).num_wrong == 1, text


def test_null_means_unknown(tmp_path):
    """Nothing that is said of an unknown color or place is false, and null is no place."""
    unknown_cup = {"name": "cup", "colour": None, "place": None}
    annotator = GroundTruthAnnotator(write_annotations(tmp_path, {"a.png": [DOG, unknown_cup]}))
    record = make_record()

    assert (
        verdict_in_both_orders(annotator, record, "A red cup at the bottom right.", "A lamp.") == 0
    )
    assert verdict_in_both_orders(annotator, record, "A red cup.", "A blue cup.") is None


@pytest.mark.parametrize(
    "question, first, second, verdict",
    [
        ("Is there a dog in the picture?", "Yes.", "No.", 0),
        ("Is there a lamp in the picture?", "Yes.", "No.", 1),
        ("Is there a lamp in the picture?", "yes, I think so", "no", 1),
        ("Is there a lamp in the picture?", "No.", "There is.", 0),  # right against no answer
        # It begins like an answer and is none.
        ("Is there a lamp in the picture?", "Nothing of that kind.", "No.", 1),
        ("Is there a lamp in the picture?", "Yes, a lamp.", "Yes.", 1),  # 2 wrong, 1 wrong
        ("Is it raining?", "Yes.", "No.", None),  # about nothing that is annotated
        ("Is there a cup or a lamp?", "Yes.", "No.", None),  # about two objects
    ],
)
def test_yes_and_no_answer_a_question_about_one_object(annotator, question, first, second, verdict):
    record = make_record(question=question)

    assert verdict_in_both_orders(annotator, record, first, second) == verdict


def test_the_last_question_of_a_conversation_is_answered(annotator):
    turns = ("<image>\nIs there a lamp?", "No.", "Is there a cup?")
    record = replace(make_record(), turns=turns)

    assert verdict_in_both_orders(annotator, record, "Yes.", "No.") == 0


def test_each_record_is_judged_by_its_own_image(annotator):
    records = [make_record(), make_record(image="two.png"), make_record()]
    firsts = ["A dog.", "A dog.", "A lamp."]
    seconds = ["A lamp.", "A lamp. A red cup.", "A dog."]

    assert annotator.compare(records, firsts, seconds) == [0, 1, 1]


def test_an_image_without_annotation_is_named(annotator):
    records = [make_record(), make_record(image="gone.png")]

    with pytest.raises(InputError, match=r"captions\.json.*r-7.*gone\.png") as error:
        annotator.compare(records, ["A cup."] * 2, ["A dog."] * 2)

    assert str(annotator.path) in str(error.value)
    assert str(error.value).endswith("; add them, or give another --annotator")
    assert "\n" not in str(error.value)


def test_an_image_in_a_list_of_one_is_that_image(annotator):
    """Formats such as TRL's name images in lists."""
    record = replace(make_record(), image=["a.png"])

    assert verdict_in_both_orders(annotator, record, "A cup.", "A lamp.") == 0


# --- annotations that cannot be used ---


def assert_refused_by_name(folder, text):
    """Assert that a captions.json with this text is refused in one line. Return the line."""
    path = folder / "captions.json"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        GroundTruthAnnotator(path)
    message = str(error.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        json.dumps({"vocabulary": VOCABULARY}),
        json.dumps({"vocabulary": VOCABULARY, "captions": [3]}),
        '{"vocab',
    ],
)
def test_annotations_of_another_form_are_refused(tmp_path, text):
    assert_refused_by_name(tmp_path, text)


@pytest.mark.parametrize(
    "objects",
    [
        {},
        {"objects": ["cup"]},
        {"objects": ["its name"]},
        {"objects": [3]},
        {"objects": [CUP, {"colour": "red"}]},
        {"objects": CUP},
        {"objects": None},
        {"objects": [CUP | {"place": []}]},
        {"objects": [CUP | {"place": 3}]},
        {"objects": [CUP | {"colour": {}}]},
    ],
)
def test_a_record_whose_objects_have_another_form_is_named(tmp_path, objects):
    good_row = {"image": "a.png", "objects": [CUP]}
    bad_row = {"image": "b.png"} | objects
    raw = {"vocabulary": VOCABULARY, "captions": [good_row, bad_row]}

    message = assert_refused_by_name(tmp_path, json.dumps(raw))

    assert "record 2" in message
