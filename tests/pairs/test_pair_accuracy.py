"""Pair accuracy: how annotators with known verdicts rank, worked by hand."""

import pytest
import torch
from annotator_helpers import make_record

from minialign.pairs import annotators
from minialign.pairs.annotators import RewardAnnotator, pair_accuracy


class KnownAnnotator:
    """An annotator whose verdict is a function of the two texts."""

    def __init__(self, verdict):
        self.verdict = verdict

    def compare(self, records, firsts, seconds):
        """Return a verdict for each record."""
        return [self.verdict(*texts) for texts in zip(firsts, seconds, strict=True)]


def prefer_good(first, second):
    """Prefer the response "good"."""
    return int(second == "good")


def prefer_bad(first, second):
    """Prefer the response "bad"."""
    return int(second == "bad")


def prefer_first(first, second):
    """Prefer the response that is shown first."""
    return 0


def prefer_second(first, second):
    """Prefer the response that is shown second."""
    return 1


def tie_if_good_is_first(first, second):
    """Give no verdict where "good" is shown first, else prefer it."""
    return None if first == "good" else 1


@pytest.mark.parametrize(
    "verdict, accuracy, ties, consistency, first",
    [
        (prefer_good, 1.0, 0.0, 1.0, 0.5),
        (prefer_bad, 0.0, 0.0, 1.0, 0.5),
        (prefer_first, 0.5, 0.0, 0.0, 1.0),
        (prefer_second, 0.5, 0.0, 0.0, 0.0),
        (tie_if_good_is_first, 0.75, 0.5, 0.0, 0.0),
    ],
)
def test_pair_accuracy_of_known_annotators(verdict, accuracy, ties, consistency, first):
    scores = pair_accuracy(KnownAnnotator(verdict), [make_record()] * 5, batch_size=2)

    expected = {
        "accuracy": accuracy,
        "ties": ties,
        "consistency": consistency,
        "first": first,
        "n": 5,
    }
    assert scores == pytest.approx(expected)


def test_an_annotator_without_verdicts_is_right_half_of_the_time():
    """Where all verdicts are ties, the share of the first response is not defined."""
    scores = pair_accuracy(KnownAnnotator(lambda first, second: None), [make_record()] * 3)

    assert scores == {"accuracy": 0.5, "ties": 1.0, "consistency": 1.0, "first": None, "n": 3}


def test_pair_accuracy_by_hand():
    """Three records, whose chosen responses are a, b and c, and whose rejected ones are x.

    a: right in both orders. b: the first one in both orders, so right once. c: a tie, then right.
    Right are 2 + 1 + 1.5 of 6 verdicts. Of the 5 that are no tie, 3 are for the first response.
    """
    verdicts = {
        ("a", "x"): 0,
        ("x", "a"): 1,
        ("b", "x"): 0,
        ("x", "b"): 0,
        ("c", "x"): None,
        ("x", "c"): 1,
    }
    annotator = KnownAnnotator(lambda first, second: verdicts[first, second])
    records = [make_record(chosen, "x") for chosen in ("a", "b", "c")]

    scores = pair_accuracy(annotator, records)

    expected = {"accuracy": 0.75, "ties": 1 / 6, "first": 3 / 5, "consistency": 1 / 3, "n": 3}
    assert scores == pytest.approx(expected)


class LengthReward:
    """A reward model whose score is the length of a text."""

    def score(self, records, texts):
        """Return the scores (records, 2)."""
        return torch.tensor([[float(len(first)), float(len(second))] for first, second in texts])


def test_the_higher_reward_is_better_and_equal_rewards_are_a_tie():
    annotator = RewardAnnotator(LengthReward())

    verdicts = annotator.compare([make_record()] * 3, ["long", "a", "tie"], ["a", "long", "tie"])

    assert verdicts == [0, 1, None]


def test_all_parts_of_a_reward_model_give_the_same_verdict(monkeypatch):
    """The first part, on another GPU, found the second response a little better, not the first."""
    monkeypatch.setattr(annotators, "value_of_first_part", lambda scores: [[1.0, 1.0001]])
    annotator = RewardAnnotator(LengthReward())

    assert annotator.compare([make_record()], ["long"], ["a"]) == [1]
