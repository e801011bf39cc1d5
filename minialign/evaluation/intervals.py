"""Intervals of scores over images, by the paired bootstrap."""

import numpy as np

NUM_RESAMPLES = 2000
QUANTILES = (0.025, 0.975)


def difference_interval(
    counts: np.ndarray, other_counts: np.ndarray, num_resamples: int = NUM_RESAMPLES
) -> list[float]:
    """Return the 95 % interval of the difference between a share of two models.

    It is a paired bootstrap: both models are measured on the same resampled images. So it says how
    sure the difference is over images, not over seeds.

    Args:
        counts: counts (images, 2) of the model: what counts on an image, and what it is a share of.
            For CHAIR_i these are mentions of absent objects, and all mentions.
        other_counts: those of the other model on the same images.
        num_resamples: how often the images are drawn anew.
    """
    num_images = len(counts)
    generator = np.random.default_rng(0)
    resamples = generator.integers(0, num_images, (num_resamples, num_images))
    differences = []
    for images in resamples:
        # How often each image was drawn. A product with it adds up the counts of the resample.
        times_drawn = np.bincount(images, minlength=num_images)
        difference = _share(times_drawn @ counts) - _share(times_drawn @ other_counts)
        differences.append(difference)
    low, high = np.quantile(differences, QUANTILES)
    return [float(low), float(high)]


def _share(totals):
    """Return the share that two totals make. It is 0 where there is nothing to count."""
    return totals[0] / max(1, totals[1])
