"""Words of a text: how it is cut, and the singular of a word."""

import pytest

from minialign.evaluation.words import BORDER, any_phrase, singular, split_words


@pytest.mark.parametrize(
    "text, words",
    [
        ("A Dog.", ["a", "dog"]),
        # The apostrophe of a possessive, straight or typographic. A quote is no apostrophe.
        ("The dog's bowl", ["the", "dog", "'s", "bowl"]),
        ("The dog\u2019s bowl", ["the", "dog", "'s", "bowl"]),
        ("\u2018hot dog\u2019 'cat'", ["hot", "dog", BORDER, "cat"]),
        ("It isn't", ["it", "isn't"]),
        # Hyphens inside a word belong to it. List marks and dashes do not.
        ("a hot-dog \u2010 hot\u2011dog", ["a", "hot-dog", BORDER, "hot-dog"]),
        ("-dog\n-cat", ["dog", BORDER, "cat"]),
        ("* dog\n* cat\n\u2022 cup", ["dog", BORDER, "cat", BORDER, "cup"]),
        ("1. dog\n2) cat", ["1", BORDER, "dog", "2", BORDER, "cat"]),
        ("dog\u2014cat", ["dog", BORDER, "cat"]),
        # Emphasis.
        ("a **hot** dog, _cat_", ["a", "hot", "dog", BORDER, "cat"]),
        ("hot_dog", ["hot", "dog"]),
        # Abbreviations.
        ("A T.V. is on, U.S.A", ["a", "tv", "is", "on", BORDER, "usa"]),
        ("T.V.s T. V. tv's", ["tvs", "tv", "tv", "'s"]),
        # Borders of sentences and clauses.
        ("It is hot. Dog food", ["it", "is", "hot", BORDER, "dog", "food"]),
        ("hot, dog; (cat)", ["hot", BORDER, "dog", BORDER, "cat"]),
        # A line may be wrapped. A blank line or a capital begins something new.
        ("a hot\ndog\n\nhot\nDog", ["a", "hot", "dog", BORDER, "hot", BORDER, "dog"]),
        ("a hot\r\ndog", ["a", "hot", "dog"]),
        # Invisible marks, and one letter written in two ways.
        ("hot\u00a0d\u00adog\u200b", ["hot", "dog"]),
        ("cafe\u0301", ["caf\u00e9"]),
        ("?!", []),
    ],
)
def test_texts_are_cut_into_words_and_borders(text, words):
    assert split_words(text) == words


@pytest.mark.parametrize(
    "plurals, singulars",
    [
        # By the endings.
        ("dogs cups keys photos sofas eyes", "dog cup key photo sofa eye"),
        ("dishes benches boxes glasses", "dish bench box glass"),
        ("puppies cherries potatoes", "puppy cherry potato"),
        ("buses cactuses houses horses vases", "bus cactus house horse vase"),
        ("knives wolves leaves halves shelves", "knife wolf leaf half shelf"),
        ("gloves stoves sleeves olives", "glove stove sleeve olive"),
        # Irregular ones, as parts of longer words too.
        ("men women people children", "man woman person child"),
        ("firemen snowmen grandchildren bookshelves", "fireman snowman grandchild bookshelf"),
        ("geese mice feet teeth oxen", "goose mouse foot tooth ox"),
        # Exceptions of the endings.
        ("ties cookies movies shoes toes canoes", "tie cookie movie shoe toe canoe"),
        ("skis taxis kiwis menus emus", "ski taxi kiwi menu emu"),
        ("axes aches mustaches fuses", "axe ache mustache fuse"),
        ("gases lenses irises quizzes", "gas lens iris quiz"),
    ],
)
def test_the_singular_of_plurals(plurals, singulars):
    assert [singular(word) for word in plurals.split()] == singulars.split()


@pytest.mark.parametrize(
    "words",
    [
        "bus glass gas lens tennis iris grass chess canvas octopus",  # end in s
        "scissors pants jeans shorts news series clothes",  # look like plurals, or are ones
        "sheep fish deer aircraft",  # have no other plural
        "specimen ramen slice police cheese human",  # end like the plurals of other words
        "is has was this a as",  # no nouns
    ],
)
def test_singulars_stay_as_they_are(words):
    assert " ".join(singular(word) for word in words.split()) == words


def test_a_singular_is_its_own_singular():
    """Otherwise a vocabulary of singulars and a caption of plurals could disagree."""
    plurals = "knives buses glasses lenses ties skis men people puppies potatoes leaves axes geese"

    for plural in plurals.split():
        assert singular(singular(plural)) == singular(plural)


def test_any_phrase_finds_the_longest_as_whole_words():
    pattern = any_phrase(["left", "top left", "left (back)"])

    assert pattern.findall("top left, left (back) and leftmost") == ["top left", "left (back)"]
    assert any_phrase([]).findall("left, or nothing") == []
