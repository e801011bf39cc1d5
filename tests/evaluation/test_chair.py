"""CHAIR and the scores beside it, worked by hand."""

import pytest
from evaluation_helpers import VOCABULARY

from minialign.evaluation.chair import CaptionCounts, caption_counts, chair_scores
from minialign.evaluation.vocabulary import Vocabulary
from minialign.utils.files import InputError


def scores_of_captions(captions, annotations):
    """Return the scores of captions, given the annotated objects of each image."""
    counts = []
    for caption, objects in zip(captions, annotations, strict=True):
        counts.append(caption_counts(caption, objects, VOCABULARY))
    return chair_scores(counts)


def test_scores_of_three_captions_by_hand():
    """Mentions: cup, dog, cup | bear, teddy | none. Absent: dog | bear | none."""
    captions = [
        "A red cup, a dog and a blue cup.",
        "A bear. A blue teddy bear.",
        "Nothing at all here.",
    ]
    annotations = [
        [{"name": "cup", "colour": "red"}, {"name": "teddy"}],
        [
            {"name": "teddy", "colour": "red"},
            {"name": "teddy", "colour": "blue"},
            {"name": "dog", "colour": "red"},
        ],
        [{"name": "cup", "colour": "blue"}],
    ]

    scores = scores_of_captions(captions, annotations)

    expected = {
        "chair_i": 2 / 5,
        "chair_s": 2 / 3,
        "recall": 2 / 5,  # cup and teddy, of: cup, teddy | teddy, dog | cup
        "colour": 2 / 3,  # red cup right, blue cup wrong, blue teddy right (one of the two is blue)
        "words": (9 + 6 + 4) / 3,
        "repeats": 1 / 5,  # the second cup
    }
    assert scores == pytest.approx(expected)


def test_counts_add_up_field_by_field():
    total = CaptionCounts(mentions=2, has_absent=True, words=7) + CaptionCounts(1, 1, True, words=5)

    assert total == CaptionCounts(mentions=3, absent_mentions=1, has_absent=2, words=12)


def test_colors_of_absent_objects_or_of_unknown_color_do_not_count():
    scores = scores_of_captions(["A red dog and a blue cup."], [[{"name": "cup"}]])

    assert scores["colour"] is None
    assert scores["chair_i"] == 0.5


def test_a_silent_model_has_no_chair():
    """A share of no mention is no value. CHAIR_s is 0, so read it together with recall."""
    scores = scores_of_captions([""], [[{"name": "cup"}]])

    assert scores == {
        "chair_i": None,
        "chair_s": 0.0,
        "recall": 0.0,
        "colour": None,
        "words": 0.0,
        "repeats": None,
    }


def test_without_annotated_objects_there_is_no_recall():
    """Every mention is absent then, as in the published scorer."""
    scores = scores_of_captions(["A dog."], [[]])

    assert scores["recall"] is None
    assert scores["chair_i"] == 1.0


def test_annotated_names_are_held_against_the_vocabulary():
    counts = caption_counts("A puppy.", [{"name": "Dog"}, {"name": "CUP"}], VOCABULARY)

    assert (counts.mentions, counts.absent_mentions, counts.recalled_objects) == (1, 0, 1)
    with pytest.raises(InputError, match='captions.json: the vocabulary has no object "fork"'):
        caption_counts("A dog.", [{"name": "fork"}], VOCABULARY)


def test_colors_are_compared_without_regard_to_case():
    vocabulary = Vocabulary({"objects": {"cup": ["Cup"]}, "colours": ["Brown", "red"]}, "here")

    def counts(**annotation):
        return caption_counts("A brown cup.", [{"name": "cup"} | annotation], vocabulary)

    assert chair_scores([counts(colour="BROWN")])["colour"] == 1.0
    assert chair_scores([counts(colour="red")])["colour"] == 0.0
    assert counts(colour=None) == counts()  # null is as good as no color
