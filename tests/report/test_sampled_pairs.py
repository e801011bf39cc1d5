"""The pairs of BDHS: where sentences were cut, and what the model wrote."""

import pytest
from report_runs import PageReader, write_run

from minialign.report.markup import join
from minialign.report.run_files import read_run
from minialign.report.sampled_pairs import chosen_pieces, pairs_section, rejected_pieces

PAIR = {
    "id": "tiny-0001",
    "image": "0001.png",
    "prompt": "<image>\nWhat is there?",
    "chosen": "There is a red cup. There is a blue pen.",
    "rejected": "There is a dog. There is a cup. ",
    "rounds": 1,
    "similarity": 0.5,
    "visible": [3],
    "cuts": [11, 31],
    "completed": [" dog.", " cup."],
    "seed": 0,
}


def written(pieces) -> list[str]:
    """Return the texts that are marked as written by the model."""
    return [piece.split(">")[1].split("<")[0] for piece in pieces if "written" in piece]


def test_scissors_stand_where_a_sentence_was_cut():
    page = PageReader(join(*chosen_pieces(PAIR)))

    assert page.text == "There is a ✂red cup. There is a ✂blue pen."


def test_completions_are_marked_in_the_rejected_answer():
    pieces = rejected_pieces(PAIR)

    assert written(pieces) == ["dog.", "cup."]
    assert PageReader(join(*pieces)).text == PAIR["rejected"]


def test_a_completion_is_not_mistaken_for_what_was_kept():
    """The word "a" stands in the kept part too."""
    pair = PAIR | {"rejected": "There is a a. There is a cup.", "completed": [" a.", " cup."]}

    pieces = rejected_pieces(pair)

    assert written(pieces) == ["a.", "cup."]
    assert pieces[0] == "There is a "


def test_a_free_answer_is_marked_as_a_whole():
    assert written(rejected_pieces(PAIR | {"cuts": [], "completed": ["x"]})) == [PAIR["rejected"]]


@pytest.mark.parametrize(
    "image, settings, expected",
    [
        ("0001.png", {}, "record tiny-0001, round 1, similarity 0.50, visible image tokens: 1"),
        ("gone.png", {}, "No picture: gone.png is not there any more."),
        ("0001.png", {"model": "gone"}, "No picture: gone"),
    ],
)
def test_a_picture_that_cannot_be_drawn_has_a_word(tmp_path, image, settings, expected):
    run = read_run(write_run(tmp_path / "run", settings, pairs=[PAIR | {"image": image}]))

    page = PageReader(pairs_section(run))

    assert expected in page.text
    assert "1 in round 1." in page.text
