"""The paired bootstrap. tests/data_scripts/test_study_tables.py holds it against a loop."""

import numpy as np
import pytest

from minialign.evaluation import intervals
from minialign.evaluation.intervals import difference_interval


def test_a_difference_that_every_image_has_is_certain():
    counts = np.array([[1, 4], [2, 4], [3, 4]])
    better_counts = counts - [1, 0]

    assert difference_interval(better_counts, counts) == pytest.approx([-0.25, -0.25])


def test_a_model_without_mentions_differs_by_the_other_share():
    """A share of nothing counts as 0, so a resample without mentions ends no study."""
    silent_counts = np.zeros((3, 2), dtype=int)

    assert difference_interval(silent_counts, np.array([[1, 2]] * 3)) == [-0.5, -0.5]


def test_one_image_decides_whether_the_interval_reaches_zero():
    """Of two images only the first differs: the resamples have it 0, 1 or 2 times."""
    interval = difference_interval(np.array([[0, 2], [1, 2]]), np.array([[2, 2], [1, 2]]))

    assert interval == pytest.approx([-1.0, 0.0])


def test_pieces_draw_the_same_images(monkeypatch):
    counts = np.array([[0, 2], [1, 2], [2, 3], [0, 4]])
    whole = difference_interval(counts, counts[::-1], num_resamples=50)
    monkeypatch.setattr(intervals, "DRAWS_PER_PIECE", 12)  # three resamples

    assert difference_interval(counts, counts[::-1], num_resamples=50) == whole
