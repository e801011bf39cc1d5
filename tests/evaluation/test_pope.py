"""POPE: how an answer is read, and scores worked by hand."""

import pytest

from minialign.evaluation.pope import is_unparsed, pope_scores, says_yes


@pytest.mark.parametrize(
    "answer, is_yes",
    [
        ("Yes.", True),
        ("No.", False),
        ("no", False),
        ("There is not a dog.", False),
        ("No, there is none.", False),
        ("Yes. But no cat.", True),  # only what stands before the first full stop counts
        # White space around the answer is left out.
        ("No\n", False),
        ("\nNo", False),
        (" \t no \n", False),
        ("\n\nYes\n", True),
        ("No\nThere is a dog", True),  # inside, only a space cuts words
        # Exactly "No", "not" or "no": the published rule, also where it gives odd results.
        ("NO.", True),
        ("Nothing.", True),
        ("None", True),
        ("", True),
        ("There isn't.", True),
        # Commas are removed, and words are split at spaces.
        ("Oh,no dog", True),
        ("I say,no, to it", True),
        ("There is no, really", False),
    ],
)
def test_answers_are_read_by_the_published_rule(answer, is_yes):
    assert says_yes(answer) is is_yes


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
