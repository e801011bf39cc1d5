"""Sentences are split, cut and joined as in Algorithm 1."""

from collections import Counter
from dataclasses import replace

import pytest
from bdhs_helpers import ONE_ROUND, sample_pairs, script_completions

from minialign.pairs.sentences import choose_cut, split_sentences
from minialign.utils.seeding import seeded_generator


@pytest.mark.parametrize(
    "text, sentences",
    [
        ("One dog. Two cats.", ["One dog.", "Two cats."]),
        # No stop at the end.
        ("One dog", ["One dog"]),
        # Several stops in a row, and several spaces.
        ("Really?!  Yes... Good", ["Really?!", "Yes...", "Good"]),
        # A point inside a number ends no sentence.
        ("It costs 3.5 euros. Fine.", ["It costs 3.5 euros.", "Fine."]),
        # A line break alone ends no sentence.
        ("First.\n\n- a\n- b\nLast one.", ["First.", "- a\n- b\nLast one."]),
        # Known weakness: an abbreviation ends a sentence.
        ("Mr. Smith waits.", ["Mr.", "Smith waits."]),
        # Known weakness: a quotation mark behind the stop hides it.
        ('He said "Hi." Then left.', ['He said "Hi." Then left.']),
        (" \n ", []),
    ],
)
def test_split_sentences(text, sentences):
    assert [text[start:end] for start, end in split_sentences(text)] == sentences


def cut(text, *key):
    """Cut a text that is a single sentence."""
    return choose_cut(text, 0, len(text), generator=seeded_generator(*key))


def test_cuts_fall_on_every_inner_word_and_keep_the_text_before():
    """400 cuts of the second sentence: each of three within 5 standard deviations of a third.

    False alarm: 3 * 5.7e-7.
    """
    text = "One dog. There is a cup."

    cuts = [choose_cut(text, 9, 24, generator=seeded_generator(0, n)) for n in range(400)]

    counts = Counter(sentence.cut for sentence in cuts)
    assert set(counts) == {15, 18, 20}
    for count in counts.values():
        assert abs(count - 400 / 3) <= 5 * (400 * 2 / 9) ** 0.5
    kept_parts = {(sentence.cut, sentence.kept) for sentence in cuts}
    assert kept_parts == {(15, "There"), (18, "There is"), (20, "There is a")}


def test_a_single_word_is_cut_before_it_unless_it_answers():
    sentence = cut("Cup.", 0)
    answers = {cut("Yes.", n).kept for n in range(20)}

    assert sentence.cut == 0
    assert sentence.kept == ""
    assert answers == {"Yes", "No"}


@pytest.mark.parametrize(
    "text, answer, opposite",
    [
        ("Yes, a cup is here.", "Yes", "No"),
        ("no, there is a cup.", "no", "yes"),
        ("No.", "No", "Yes"),
    ],
)
def test_yes_and_no_are_swapped_half_of_the_time(text, answer, opposite):
    """4,000 cuts: swaps within 5 standard deviations of 2,000 (false alarm: 5.7e-7)."""
    kept_parts = [cut(text, 1, n).kept for n in range(4000)]

    swapped = [kept for kept in kept_parts if not kept.startswith(answer)]
    assert abs(len(swapped) - 2000) <= 5 * 1000**0.5
    # What follows the swapped word is the text as it was.
    for kept in swapped:
        assert kept.startswith(opposite)
        assert text.startswith(answer + kept.removeprefix(opposite))


@pytest.mark.parametrize(
    "text",
    ["Nothing is here.", "North of it lies a park.", "Yesterday it rained.", "I say yes to it."],
)
def test_words_that_only_begin_like_an_answer_are_not_swapped(text):
    for n in range(50):
        assert text.startswith(cut(text, n).kept)


def test_sentences_are_joined_as_in_algorithm_1(vlm, records, monkeypatch):
    """Each kept part, then its completion up to the first full stop; the gaps stay as they were."""
    text = "There is a cup.\n\nA red dog is here!  It sleeps on the floor"
    script_completions(monkeypatch, vlm, " blue lamp. And more. Still more.", " and a cat", " now.")

    (pair,) = sample_pairs(vlm, [replace(records[0], chosen=text)], ONE_ROUND)

    kept_parts = []
    for (start, _), cut_position in zip(split_sentences(text), pair["cuts"], strict=True):
        kept_parts.append(text[start:cut_position].rstrip())
    first, second, third = kept_parts
    assert pair["rejected"] == f"{first} blue lamp.\n\n{second} and a cat  {third} now."


def test_text_behind_the_first_full_stop_is_dropped(vlm, records, monkeypatch):
    """A token may hold more than its full stop: " (a cup.) Then" ends behind the stop."""
    script_completions(monkeypatch, vlm, " (a cup.) Then")

    (pair,) = sample_pairs(vlm, [replace(records[0], chosen="There is.")], ONE_ROUND)

    assert pair["rejected"] == "There (a cup."


def test_a_single_word_in_the_middle_leaves_single_spaces(vlm, records, monkeypatch):
    """Nothing of "Really?" is kept: the gap before it and its completion both have a space."""
    script_completions(monkeypatch, vlm, " lamp.")
    text = "There is a cup. Really? It is red."

    (pair,) = sample_pairs(vlm, [replace(records[0], chosen=text)], ONE_ROUND)

    assert "  " not in pair["rejected"]
