"""Intervals of scores over images, by the paired bootstrap."""

from collections.abc import Iterator

import numpy as np

NUM_RESAMPLES = 2000
DRAWS_PER_PIECE = 1 << 22  # images drawn at once, eight bytes each
QUANTILES = (0.025, 0.975)  # between them are 95 % of the resamples


def difference_interval(
    counts: np.ndarray, other_counts: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> list[float]:
    """Return the 95 % interval of the difference between the shares of two models.

    It is a paired bootstrap: both models are measured on the same resampled images. So it says how
    sure the difference is over images, not over seeds.

    Args:
        counts: counts (images, 2) of the model: what counts on an image, and what it is a share of.
            For CHAIR_i these are mentions of absent objects, and all mentions.
        other_counts: those of the other model on the same images.
        num_resamples: how often the images are drawn anew.
    """
    both_counts = np.concatenate([counts, other_counts], axis=1)  # (images, 4)
    differences = []
    for times_drawn in draw_resamples(len(counts), num_resamples):
        totals = times_drawn @ both_counts  # (resamples, 4)
        shares = _shares(totals[:, :2])
        other_shares = _shares(totals[:, 2:])
        differences.append(shares - other_shares)
    low, high = np.quantile(np.concatenate(differences), QUANTILES)
    return [float(low), float(high)]


def draw_resamples(num_images: int, num_resamples: int) -> Iterator[np.ndarray]:
    """Yield how often each resample draws each image: arrays (resamples, images), piece by piece.

    A resample has as many images as there are. Its counts are a product with its row. Pieces keep
    the memory small: the draws of all resamples at once would fill it for many images.
    """
    generator = np.random.default_rng(0)
    resamples_per_piece = max(1, DRAWS_PER_PIECE // num_images)
    for first in range(0, num_resamples, resamples_per_piece):
        num_rows = min(resamples_per_piece, num_resamples - first)
        drawn_images = generator.integers(0, num_images, (num_rows, num_images))
        # Row r counts its images as r * num_images + image, so that one call counts all rows.
        drawn_images += num_images * np.arange(num_rows)[:, None]
        times_drawn = np.bincount(drawn_images.ravel(), minlength=num_rows * num_images)
        yield times_drawn.reshape(num_rows, num_images)


def _shares(totals):
    """Return the shares that pairs of totals make. It is 0 where there is nothing to count."""
    return totals[:, 0] / np.maximum(1, totals[:, 1])
