"""How counts, changes and durations read."""

import pytest

from minialign.report.number_texts import counted, duration_text, is_number, number_text, signed


def test_one_thing_has_the_singular():
    assert counted(1, "image") == "1 image"
    assert counted(0, "image") == "0 images"
    assert counted(1200, "image") == "1,200 images"


@pytest.mark.parametrize("value, text", [(1.25, "+1.2"), (-3.0, "−3.0"), (-0.04, "0.0")])
def test_a_change_has_a_sign_unless_it_rounds_to_zero(value, text):
    assert signed(value) == text


@pytest.mark.parametrize("value, text", [(0.0002, "0.0002"), (-5e-05, "−5e−5"), (-15, "−15")])
def test_numbers_of_an_axis_are_short(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize("value", [0, -3, 0.5, 1e308])
def test_a_finite_number_can_be_shown(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [None, True, "1", [1], float("nan"), float("inf"), 10**400])
def test_nothing_else_can_be_shown(value):
    assert not is_number(value)


def test_durations_are_in_words():
    assert duration_text(5.4) == "5 s"
    assert duration_text(125) == "2 min 5 s"
    assert duration_text(3720) == "1 h 2 min"
