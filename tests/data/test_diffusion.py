"""The noise schedule is POVID's, and noised images have the mean and variance of Eq. 9."""

import math

import numpy as np
import pytest
import torch

from minialign.data.diffusion import diffuse, noise_schedule
from minialign.utils.files import InputError


def schedule_in_plain_python(ramp):
    """Return abar of 1,000 steps. `ramp(k)` is the argument of the sigmoid at step k."""
    schedule = []
    abar = 1.0
    for k in range(1000):
        sigmoid = 1 / (1 + math.exp(-ramp(k)))
        beta = sigmoid * (0.5e-2 - 1e-5) + 1e-5
        abar *= 1 - beta
        schedule.append(abar)
    return schedule


def povid_ramp(k):
    """Return the argument of the sigmoid in POVID's code."""
    return -6 + 12 * k / 999


def paper_ramp(k):
    """Return the argument of the sigmoid as the paper prints it, for k = 1 to 1000."""
    return -6 + 12 * (k + 1) / 1000


def test_the_schedule_is_povids():
    abar = noise_schedule()
    assert abar.shape == (1000,)
    assert abar.dtype == torch.float64
    np.testing.assert_allclose(abar.numpy(), schedule_in_plain_python(povid_ramp), rtol=1e-12)
    first_beta = 0.00499 / (1 + math.exp(6)) + 1e-5
    assert abar[0].item() == pytest.approx(1 - first_beta, rel=1e-14)


def test_the_schedule_is_not_the_papers():
    """The printed form, k / 1000, is near but differs by far more than the tolerance above."""
    abar = noise_schedule()
    printed_abar = schedule_in_plain_python(paper_ramp)
    assert abs(abar[500] - printed_abar[499]) > 5e-4


@pytest.mark.parametrize("steps", [0, 500, 999])
def test_noise_has_the_mean_and_variance_of_eq_9(steps):
    """Within five standard errors of the mean and of the variance of a normal sample."""
    tiles = torch.full((4, 3, 96, 96), 2.0)

    noised = diffuse(tiles, steps, torch.Generator().manual_seed(1)).double()

    abar = noise_schedule()[steps].item()
    variance = 1 - abar
    count = tiles.numel()
    error_of_mean = math.sqrt(variance / count)
    error_of_variance = variance * math.sqrt(2 / count)
    assert abs(noised.mean() - 2 * math.sqrt(abar)) < 5 * error_of_mean
    assert abs(noised.var() - variance) < 5 * error_of_variance


def test_noise_depends_on_the_generator_alone():
    """Not on the dtype of the tiles either: bfloat16 gets the same noise, rounded."""
    tiles = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    noised = diffuse(tiles, 500, torch.Generator().manual_seed(7))
    same_seed = diffuse(tiles, 500, torch.Generator().manual_seed(7))
    other_seed = diffuse(tiles, 500, torch.Generator().manual_seed(8))
    in_bfloat16 = diffuse(tiles.bfloat16(), 500, torch.Generator().manual_seed(7))

    assert torch.equal(noised, same_seed)
    assert not torch.equal(noised, other_seed)
    assert in_bfloat16.dtype == torch.bfloat16
    assert (in_bfloat16.float() - noised).abs().max() < 0.05


@pytest.mark.parametrize("steps", [-1, 1000])
def test_steps_outside_the_schedule_are_refused(steps):
    with pytest.raises(InputError, match="give 0 to 999"):
        diffuse(torch.zeros(1, 3, 2, 2), steps, torch.Generator())
