"""Pictures: a file to RGB, RGB to normalised tiles (square or AnyRes), how many vectors come of them, and diffusion noise.

The reference is transformers' Pillow-backed image processor of each kind (CLIP, SigLIP, LLaVA, LLaVA-NeXT). Its pixels
are matched to the last bit, since one pixel of difference in a crop moves every log-probability a little.
"""

import math

import torch

from minialign.utils.files import check

NOISE_STEPS = 1000


def noise_schedule():
    """abar, (1000,) float64: the share of the picture's variance left after each diffusion step (Eq. 8, 9; App. E.1).

    In the form of POVID's public code, which made the published data: sigmoid over linspace(-6, 6, 1000), so k / 999 where
    the paper prints k / 1000, and indexed from 0, so that abar[N] is the product of N + 1 factors.
    """
    beta = (
        torch.sigmoid(torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)) * (0.5e-2 - 1e-5)
        + 1e-5
    )
    return torch.cumprod(1 - beta, 0)


def diffuse(tiles, steps, generator):
    """Normalised tiles after `steps` (0 to 999) of forward diffusion at once: sqrt(abar) x + sqrt(1 - abar) eps (Eq. 9).

    The noise is drawn where the generator lives and in float32, so that it does not depend on the model's device or dtype.
    """
    check(0 <= steps < NOISE_STEPS, f"{steps} noise steps; give 0 to {NOISE_STEPS - 1}")
    abar = noise_schedule()[steps].item()
    noise = torch.randn(tiles.shape, generator=generator, device=generator.device).to(tiles)
    return math.sqrt(abar) * tiles + math.sqrt(1 - abar) * noise
