"""The golden images of tests/golden/make_images.py, for the tests of images and processors."""

import json

import numpy as np
import PIL
import torch
from conftest import ROOT
from golden.images import cases

from minialign.data.image_processor import ImageProcessor

GOLDEN = ROOT / "tests" / "golden" / "images"
ABOUT = json.loads((GOLDEN / "golden.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "golden.npz"))
PROCESSORS = ABOUT["processors"]  # the JSON that transformers saves for each processor
PATCH_SIZE = 14
# The golden pixels are those of Pillow 13. Earlier ones resample noise, which some of the images
# are, differently: single pixels differ more than their mean.
if int(PIL.__version__.split(".")[0]) >= 13:
    PIXEL_TOLERANCE = 1e-6
    MEAN_TOLERANCE = 1e-6
else:
    PIXEL_TOLERANCE = 0.2
    MEAN_TOLERANCE = 1e-3


def write_settings(directory, settings, nested=False):
    """Write image settings as transformers 5 (nested) or an older version does."""
    if nested:
        file = directory / "processor_config.json"
        settings = {"image_processor": settings, "patch_size": PATCH_SIZE}
    else:
        file = directory / "preprocessor_config.json"
    file.write_text(json.dumps(settings))


def tile_size_of(name):
    """Return the tile size of a golden processor, which its name ends with (clip336: 336)."""
    if name == "edge64":  # its shorter edge is longer than its tile
        return 48
    return int(name.lstrip("abcdefghijklmnopqrstuvwxyz"))


def load_golden_processor(directory, name):
    """Return a golden processor, read as a checkpoint's would be, nested or flat by turns."""
    nested = list(PROCESSORS).index(name) % 2 == 0
    settings = PROCESSORS[name]
    write_settings(directory, settings, nested=nested)
    model_grids = settings.get("image_grid_pinpoints")  # its model's config.json has the same
    return ImageProcessor.load(directory, tile_size_of(name), PATCH_SIZE, model_grids)


def assert_same_as_golden(case_index, tiles):
    """Assert that tiles are those of transformers, by the sums and samples of the golden file."""
    assert tiles.dtype == torch.float32
    assert tiles.is_contiguous()
    assert tiles.shape == tuple(ARRAYS["shapes"][case_index])
    sums, samples = cases.digest(tiles.numpy())
    pixels_per_channel = tiles[0, 0].numel()
    np.testing.assert_allclose(samples, ARRAYS["samples"][case_index], rtol=0, atol=PIXEL_TOLERANCE)
    np.testing.assert_allclose(
        sums / pixels_per_channel,
        ARRAYS["sums"][case_index] / pixels_per_channel,
        rtol=0,
        atol=MEAN_TOLERANCE,
    )
