"""Shares of a whole, and how they are shown."""

import pytest

from minialign.evaluation.shares import scaled_text, share


def test_a_share_of_nothing_is_no_value():
    assert share(0, 0) is None
    assert share(0, 4) == 0
    assert share(1, 4) == 0.25


@pytest.mark.parametrize(
    "value, text",
    [
        (0.1234, "12.3"),
        (1, "100.0"),
        (-0.0249, "-2.5"),
        (-0.0004, "0.0"),
        (-0.1004, "-10.0"),
        (None, "-"),
    ],
)
def test_a_value_is_shown_in_percent_and_zero_has_no_sign(value, text):
    assert scaled_text(value) == text


def test_another_factor():
    assert scaled_text(12.34, factor=1) == "12.3"
    assert scaled_text(-0.01, factor=1) == "0.0"
