"""The normal form of short answers: pairs that the published scorer of TextVQA gave."""

import pytest

from minialign.evaluation.answer_normalizer import CONTRACTIONS, normalize_answer

PLAIN = [
    ("The Blue Kite", "blue kite"),
    ("A an the", ""),
    ("", ""),
    ("  spaced   out ", "spaced out"),
    ("line\nbreak\tand tab", "line break and tab"),
    ("C#", "c#"),
    ("A&B", "a&b"),
    ("12:30", "12:30"),
    ("$5.00", "$5.00"),
    ("50%", "50%"),
    ("O'Neil", "o'neil"),
    ("kites'", "kites'"),
]

NUMBERS_AND_COMMAS = [
    ("Ten.", "10"),
    ("none", "0"),
    ("zero", "0"),
    ("eleven", "eleven"),
    ("two-two", "2 2"),
    ("no-one", "no 1"),
    ("1,000 km", "1000 km"),
    ("one,two", "onetwo"),
    ("what ?", "what"),
    ("what?now", "whatnow"),
]

MARKS = [
    ("(blue)", "blue"),
    ("hey!", "hey"),
    ("and/or", "and or"),
    ("A/C", "c"),  # the a is an article then
    ("a_b", "b"),
    ("rock - roll", "rock roll"),
    ("Rock-n-Roll", "rock n roll"),
    ("semi;colon", "semi colon"),
    ("semi; colon", "semi colon"),
    ("a@b.com", "bcom"),
    ("-5", "5"),
    ("5 - 3", "5 3"),
    # One hyphen beside a blank deletes all of them, but no other mark.
    ("ab-cd - ef", "abcd ef"),
    ("ab-cd - ef/gh", "abcd ef gh"),
    # What counts is the text before any mark was replaced: the slash leaves no blank for the "-".
    ("ab/-cd-ef", "ab cd ef"),
    # A blank at the end is gone before the marks are looked at, a line break within is a blank.
    ("ab-cd- ", "ab cd"),
    ("ab-cd-\nef", "abcd ef"),
]

FULL_STOPS = [
    ("3.5", "3.5"),
    ("3.50.", "3.50"),
    ("1.2.3", "1.2.3"),
    ("No. 7", "no 7"),
    ("U.S.A.", "usa"),
    ("www.kite.org", "wwwkiteorg"),
    ("7.a", "7a"),
    ("a.7", "a.7"),
    ("..7", ".7"),
    ("...", ""),
    (40 * ".", 8 * "."),  # 32 are deleted
]

CONTRACTED = [
    ("dont stop", "don't stop"),
    ("Im here", "im here"),
    ("it's", "it 's"),
    ("its", "its"),
    ("let's go", "let 's go"),
    ("kite's", "kite 's"),
    ("hed've", "he'd've"),
    ("he'dve", "he'd've"),
    ("couldntve", "couldntve"),
    ("YALL'LL", "y'all'll"),
    ("yalld've", "yalld've"),
    ("somebody'd", "somebodyd"),
    ("somebodyd", "somebodyd"),
    ("twas ma'am", "'twas ma'am"),
    ("don-t", "don t"),
    # A hyphen that is deleted may join a contraction again.
    ("don-t - wont", "don't won't"),
]


@pytest.mark.parametrize(
    ("answer", "normal_form"),
    [*PLAIN, *NUMBERS_AND_COMMAS, *MARKS, *FULL_STOPS, *CONTRACTED],
)
def test_normal_form(answer, normal_form):
    assert normalize_answer(answer) == normal_form


@pytest.mark.parametrize(
    "contraction",
    """
    ain't wouldn't not've whereve what've there'd who'd somebody's why's how'll someone'll
    something'll you're couldn't've should've mightn't've it'd've somebody'd've y'all'd've o'clock
    """.split(),
)
def test_a_contraction_without_one_of_its_apostrophes_is_completed(contraction):
    for position, character in enumerate(contraction):
        if character == "'":
            spelling = contraction[:position] + contraction[position + 1 :]
            assert normalize_answer(spelling) == contraction


@pytest.mark.parametrize("word", "its ill shell wed id well whore ive im shes its let's".split())
def test_these_are_not_in_the_table(word):
    assert word not in CONTRACTIONS


def test_the_table_has_the_size_of_the_published_one():
    """114 spellings in lower case that differ from their contraction."""
    assert len(CONTRACTIONS) == 114
