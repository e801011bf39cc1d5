"""The pairs of BDHS: where sentences were cut, and what the model wrote."""

import pytest
from conftest import TINY
from report_runs import PageReader, write_run

from minialign.report.markup import join
from minialign.report.run_files import read_run
from minialign.report.sampled_pairs import (
    chosen_pieces,
    pairs_section,
    rejected_pieces,
    rounds_figure,
    system_text,
)

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


def test_a_pair_shows_its_system_text():
    (paragraph,) = system_text(PAIR | {"system": "Answer <briefly>."})

    assert PageReader(paragraph).text == "system text: Answer <briefly>."
    assert system_text(PAIR) == []


def test_a_free_answer_is_marked_as_a_whole():
    assert written(rejected_pieces(PAIR | {"cuts": [], "completed": ["x"]})) == [PAIR["rejected"]]


def test_every_record_is_in_a_round_or_left_out(tmp_path):
    """Of three records the last round of one gave nothing, and that of another the same answer."""
    empty = PAIR | {"id": "tiny-0002", "rejected": "", "rounds": 5, "cuts": [], "completed": []}
    equal = PAIR | {"id": "tiny-0003", "rejected": PAIR["chosen"], "rounds": 5}
    run = read_run(write_run(tmp_path / "run", pairs=[PAIR, empty, equal]))

    page = PageReader(rounds_figure(run))

    assert "Training uses 1 of 3 records: 1 from round 1. It leaves out 2" in page.text
    assert "left out: 66.67 %" in page.text
    assert "round 5" not in page.text


@pytest.mark.parametrize(
    "settings, free_round, is_drawn_again",
    [({}, 5, True), ({"rounds": 1}, None, False), ({"unguided": True}, None, True)],
)
def test_only_the_last_of_several_rounds_is_free(tmp_path, settings, free_round, is_drawn_again):
    """With a single round nothing is drawn again. Unguided rounds all write a whole answer."""
    last = PAIR | {"rounds": settings.get("rounds", 5)}
    run = read_run(write_run(tmp_path / "run", settings, pairs=[last]))

    page = PageReader(pairs_section(run))

    assert ("round 5 (free)" in page.text) == (free_round == 5)
    assert ("(free)" in page.text) == (free_round is not None)
    assert ("writes a whole answer freely" in page.text) == (free_round is not None)
    assert ("drawn again" in page.text) == is_drawn_again


def test_as_much_is_hidden_as_the_run_hid(tmp_path):
    run = read_run(write_run(tmp_path / "run", {"rho": 0.1}, pairs=[PAIR]))

    page = PageReader(pairs_section(run))

    assert "its own bad answers, with 10.0\u00a0% of the image masked." in page.text


@pytest.mark.parametrize(
    "data, is_tiny", [(TINY / "train" / "instruct.json", True), ("mine.json", False)]
)
def test_the_captions_of_the_tiny_world_are_not_called_true(tmp_path, data, is_tiny):
    run = read_run(write_run(tmp_path / "run", {"data": [str(data)]}, pairs=[PAIR]))

    page = PageReader(pairs_section(run))

    assert ("wrong on purpose" in page.text) == is_tiny
    assert "chosen (from the data): There" in page.text
    assert "true" not in page.text.replace("is not always true", "")


@pytest.mark.parametrize(
    "image, settings, expected",
    [
        ("0001.png", {}, "record tiny-0001, round 1, similarity 0.500, visible image tokens: 1"),
        ("gone.png", {}, "No picture: gone.png is not there any more."),
        ("0001.png", {"model": "gone"}, "No picture: gone"),
    ],
)
def test_a_picture_that_cannot_be_drawn_has_a_word(tmp_path, image, settings, expected):
    run = read_run(write_run(tmp_path / "run", settings, pairs=[PAIR | {"image": image}]))

    page = PageReader(pairs_section(run))

    assert expected in page.text
    assert "1 from round 1." in page.text
