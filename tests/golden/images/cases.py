"""The pictures and sizes that make_images.py (with transformers) and test_images.py (without) both work from.

Everything is whole-number arithmetic, so that it is the same on every machine and with every version of numpy.
"""

import numpy as np
from PIL import Image

PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
# The largest first: only then does it show that waste decides between grids that show as much.
SMALL_PINPOINTS = [
    [48 * rows, 48 * columns] for rows, columns in ((2, 2), (1, 3), (3, 1), (2, 1), (1, 2))
]
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


def picture(mode, width, height, seed=0):
    """A picture of ripples that beat against each other, in any mode; alpha ripples too."""
    x, y = np.arange(width)[None, :, None], np.arange(height)[:, None, None]
    channel = np.arange(4) + seed
    ripples = ((x * x * 3 + y * y * (5 + channel) + x * y * 7) // 64 + 11 * x + 83 * channel) % 256
    if mode == "I;16":
        return Image.frombytes(
            "I;16", (width, height), (ripples[:, :, 0] * 2).astype("<u2").tobytes()
        )
    first = mode.split()[0]
    bands = {"1": 1, "L": 1, "LA": 2, "P": 1, "RGB": 3, "RGBA": 4, "CMYK": 4}[first]
    pixels = ripples[:, :, :bands].astype(np.uint8)  # (height, width, bands)
    made = Image.frombytes("L" if first == "1" else first, (width, height), pixels.tobytes())
    if first == "1":
        made = made.point([0] * 100 + [255] * 156).convert("1", dither=Image.Dither.NONE)
    if first == "P":
        made.putpalette(
            [
                (index * (3, 5, 7)[band] + 19 * band) % 256
                for index in range(256)
                for band in range(3)
            ]
        )
    transparent = {
        "P transparent": int(pixels[0, 0, 0]),
        "P alphas": bytes(range(256)),
        "RGB transparent": tuple(pixels[0, 0].tolist()),
    }
    if mode in transparent:
        made.info["transparency"] = transparent[mode]
    return made


def cases():
    """(preparation, mode, width, height) of every picture prepared; sizes and modes take turns to keep it quick."""
    everything = [
        (name, "RGB", *size)
        for name in ("clip48", "edge64", "squash48", "siglip48", "square48", "uncut48", "anyres48")
        for size in SIZES
    ]
    large = [
        (name, "RGB", *size)
        for name in ("clip336", "siglip384")
        for size in SIZES
        if max(size) <= 1300
    ]
    anyres = [
        ("anyres336", "RGB", *size) for size in SIZES[::4] + [(640, 480), (336, 336), (4000, 30)]
    ]
    modes = [
        (name, mode, *size)
        for name in ("clip48", "siglip48", "square48", "anyres48")
        for mode in MODES
        for size in ((61, 40), (9, 30))
    ]
    return (
        everything
        + large
        + anyres
        + [("square336", "RGB", *size) for size in SIZES[::5]]
        + [("clip336", "RGB", 4000, 30)]
        + modes
    )


def sample_positions(count):
    """256 places in a tensor of `count` numbers, spread by a stride that shares no factor with its rows and columns."""
    return np.arange(256) * 1_000_003 % count


def digest(tiles):
    """(sums of each tile's channels, NaN where there is no tile; 256 sampled values) of (n, 3, S, S)."""
    sums = np.full((5, 3), np.nan)
    sums[: len(tiles)] = tiles.astype(np.float64).sum((2, 3))
    return sums, tiles.reshape(-1)[sample_positions(tiles.size)]


def random_sizes(count=20_000):
    """(height, width) pairs of 1 to 4,096 pixels: small and large alike, a third of them near or on a pinpoint's own aspect."""
    state, sizes = 12345, []

    def draw(limit):
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        return (state >> 33) % limit

    for index in range(count):
        height, width = 1 + draw(2 ** (3 + draw(10))), 1 + draw(2 ** (3 + draw(10)))
        if index % 3 == 0:
            rows, columns = PINPOINTS[draw(5)]
            height, width = max(1, rows * width // columns + draw(3) - 1), width
        sizes.append((height, width))
    return sizes
