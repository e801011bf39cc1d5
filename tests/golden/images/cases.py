"""The images that make_images.py processes with transformers, and the tests with minialign.

Everything is computed in whole numbers, so that it is the same on every machine.
"""

import functools
from typing import NamedTuple

import numpy as np
from PIL import Image

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# The largest grid is first. Only then do tests see that waste decides between grids of equal merit.
SMALL_PINPOINTS = [[96, 96], [48, 144], [144, 48], [96, 48], [48, 96]]
SMALL_PROCESSORS = ("clip48", "edge64", "squash48", "siglip48", "square48", "uncut48", "anyres48")
SIZES = [  # (width, height)
    (1, 1),
    (1, 2),
    (2, 1),
    (3, 3),
    (5, 7),
    (1, 48),
    (48, 1),
    (16, 9),
    (47, 48),
    (48, 48),
    (49, 48),
    (50, 49),
    (64, 64),
    (95, 97),
    (96, 96),
    (100, 75),
    (75, 100),
    (120, 90),
    (144, 48),
    (48, 144),
    (145, 48),
    (160, 120),
    (200, 199),
    (224, 224),
    (235, 337),
    (240, 320),
    (255, 256),
    (300, 200),
    (321, 481),
    (333, 500),
    (335, 336),
    (336, 335),
    (336, 336),
    (336, 672),
    (337, 336),
    (375, 500),
    (400, 30),
    (480, 640),
    (500, 333),
    (500, 375),
    (512, 512),
    (600, 400),
    (612, 612),
    (640, 360),
    (640, 480),
    (640, 481),
    (672, 336),
    (672, 672),
    (800, 600),
    (1008, 336),
    (1024, 683),
    (1280, 720),
    (336, 1008),
    (30, 1200),
    (4000, 30),
]
MODES = [
    "1",
    "L",
    "LA",
    "P",
    "P transparent",
    "P alphas",
    "RGB transparent",
    "RGBA",
    "CMYK",
    "I;16",
]
FILES = ["rotated.jpg", "palette.png", "grey16.png"]
BANDS = {"1": 1, "L": 1, "LA": 2, "P": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}


class Case(NamedTuple):
    """One image, and the name of the processor that it goes through."""

    processor: str
    mode: str
    width: int
    height: int


def all_cases():
    """Return the cases in the order of the golden file. Sizes and modes take turns, to be quick."""
    cases = []
    # 1. Small tiles, with all sizes.
    for processor in SMALL_PROCESSORS:
        for width, height in SIZES:
            cases.append(Case(processor, "RGB", width, height))
    # 2. Large tiles, without the largest images.
    for processor in ("clip336", "siglip384"):
        for width, height in SIZES:
            if max(width, height) <= 1300:
                cases.append(Case(processor, "RGB", width, height))
    # 3. The slow processors, with some sizes.
    for width, height in SIZES[::4] + [(640, 480), (336, 336), (4000, 30)]:
        cases.append(Case("anyres336", "RGB", width, height))
    for width, height in SIZES[::5]:
        cases.append(Case("square336", "RGB", width, height))
    cases.append(Case("clip336", "RGB", 4000, 30))
    # 4. All modes, with two sizes.
    for processor in ("clip48", "siglip48", "square48", "anyres48"):
        for mode in MODES:
            for width, height in ((61, 40), (9, 30)):
                cases.append(Case(processor, mode, width, height))
    return cases


@functools.cache  # nine processors take the same images
def make_image(mode, width, height):
    """Return an image of ripples that interfere, in any of MODES. Its transparency ripples too."""
    # 1. Four channels of ripples.
    x = np.arange(width)[None, :, None]
    y = np.arange(height)[:, None, None]
    channel = np.arange(4)
    waves = (x * x * 3 + y * y * (5 + channel) + x * y * 7) // 64
    ripples = (waves + 11 * x + 83 * channel) % 256  # (height, width, 4)
    if mode == "I;16":
        gray = (ripples[:, :, 0] * 2).astype("<u2")
        return Image.frombytes("I;16", (width, height), gray.tobytes())

    # 2. As many of them as the mode has bands.
    pillow_mode = mode.split()[0]
    pixels = ripples[:, :, : BANDS[pillow_mode]].astype(np.uint8)  # (height, width, bands)
    if pillow_mode == "1":
        image = Image.frombytes("L", (width, height), pixels.tobytes())
        black_or_white = image.point([0] * 100 + [255] * 156)
        return black_or_white.convert("1", dither=Image.Dither.NONE)
    image = Image.frombytes(pillow_mode, (width, height), pixels.tobytes())

    # 3. The palette, and the ways to say that a color is transparent.
    if pillow_mode == "P":
        image.putpalette(_palette())
    if mode == "P transparent":
        image.info["transparency"] = int(pixels[0, 0, 0])
    if mode == "P alphas":
        image.info["transparency"] = bytes(range(256))
    if mode == "RGB transparent":
        image.info["transparency"] = tuple(pixels[0, 0].tolist())
    return image


def _palette():
    """Return 256 colors as a flat list of red, green and blue."""
    palette = []
    for index in range(256):
        palette += [index * 3 % 256, (index * 5 + 19) % 256, (index * 7 + 38) % 256]
    return palette


def digest(tiles):
    """Return what the golden file keeps of tiles (n, 3, S, S).

    That is the sum of each tile's channels, (5, 3) with NaN where there is no tile, and 256 of the
    values. The values are sampled at a stride that has no factor in common with rows and columns.
    """
    sums = np.full((5, 3), np.nan)
    sums[: len(tiles)] = tiles.astype(np.float64).sum((2, 3))
    sample_positions = np.arange(256) * 1_000_003 % tiles.size
    return sums, tiles.reshape(-1)[sample_positions]


class RandomNumbers:
    """A linear congruential generator, which is the same in every version of every library."""

    def __init__(self, seed):
        self.state = seed

    def below(self, limit):
        """Draw an integer from 0 to limit - 1."""
        self.state = (self.state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (self.state >> 33) % limit


def random_sizes(count=20_000):
    """Return (height, width) pairs of 1 to 4,096 pixels, small and large ones alike.

    A third of them are near a pinpoint's own aspect or on it.
    """
    numbers = RandomNumbers(12345)
    sizes = []
    for i in range(count):
        height = 1 + numbers.below(2 ** (3 + numbers.below(10)))
        width = 1 + numbers.below(2 ** (3 + numbers.below(10)))
        if i % 3 == 0:
            rows, columns = PINPOINTS[numbers.below(5)]
            height = max(1, rows * width // columns + numbers.below(3) - 1)
        sizes.append((height, width))
    return sizes
