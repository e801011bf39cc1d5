"""Forward diffusion of images: the noise of POVID's distortion and of BDHS-noise (Sec. 3.3)."""

import math

import torch

from minialign.utils.files import check

NOISE_STEPS = 1000
MIN_BETA = 1e-5
MAX_BETA = 0.5e-2


def noise_schedule():
    """Return abar, (1000,) float64: the share of the image's variance left after each step.

    beta_k = 0.00001 + (0.005 - 0.00001) * sigmoid(-6 + 12 k / 999)
    abar_N = product over k = 0..N of (1 - beta_k)                       (Eq. 8 and 9, App. E.1)

    This is the form of POVID's public code, which made the published data: k counts from 0 and is
    divided by 999. The paper prints k / 1000.
    """
    ramp = torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)
    beta = torch.sigmoid(ramp) * (MAX_BETA - MIN_BETA) + MIN_BETA
    return torch.cumprod(1 - beta, dim=0)


def diffuse(tiles, steps, generator):
    """Return normalized tiles after `steps` (0 to 999) of forward diffusion, all at once.

    x_N = sqrt(abar_N) * x + sqrt(1 - abar_N) * eps,   eps ~ N(0, 1)     (Eq. 9)

    The noise is drawn in float32 on the generator's device, so that it depends neither on the
    model's device nor on its dtype.
    """
    check(0 <= steps < NOISE_STEPS, f"{steps} noise steps; give 0 to {NOISE_STEPS - 1}")
    abar = noise_schedule()[steps].item()
    eps = torch.randn(tiles.shape, generator=generator, device=generator.device)
    eps = eps.to(tiles)  # device and dtype of the tiles
    signal = math.sqrt(abar) * tiles
    noise = math.sqrt(1 - abar) * eps
    return signal + noise
