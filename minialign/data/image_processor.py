"""Turn an RGB image into the normalized tiles that a checkpoint's vision tower was trained on.

The reference is transformers' Pillow-backed image processor of each type (CLIP, SigLIP, LLaVA,
LLaVA-NeXT). The pixels match it to the last bit, because one pixel of difference in a crop moves
every log-prob a little. All sizes are (height, width) in pixels.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minialign.data.anyres import select_best_resolution
from minialign.data.image_settings import (
    check_crop_size,
    read_channels,
    read_grid_pinpoints,
    read_processor_type,
    read_resize,
    read_settings,
)
from minialign.data.images import MAX_PIXELS
from minialign.utils.files import check


@dataclass(frozen=True)
class ImageProcessor:
    """How a checkpoint wants its images: every setting that `preprocess` depends on.

    The keys of caches contain its repr, which shows every setting.

    tile_size: S, the height and the width of what the vision tower takes.
    shortest_edge: the length to which the shorter edge is resized, keeping the aspect, or None.
    exact_size: the size to which the image is squashed, or None. At most one of the two is set.
    center_crop: whether the middle S x S pixels are cut out.
    pad_to_square: whether the image is first padded to a square of the mean color.
    resample: Pillow's number of the resampling filter.
    rescale: the factor of the pixel values, usually 1 / 255.
    mean, std: per channel, for the normalization.
    grid_pinpoints: the sizes of the AnyRes grids, or None if there is one tile per image.
    """

    tile_size: int
    shortest_edge: int | None
    exact_size: tuple | None
    center_crop: bool
    pad_to_square: bool
    resample: int
    rescale: float
    mean: tuple
    std: tuple
    grid_pinpoints: tuple | None = None

    @classmethod
    def load(cls, directory, tile_size, patch_size, grid_pinpoints=None):
        """Read the settings from a checkpoint's directory, whose config.json gives the arguments.

        Raises InputError if a setting is not supported here or contradicts config.json.
        """
        # 1. The file, and the type of processor that it describes.
        file, settings = read_settings(Path(directory), patch_size)
        processor_type = read_processor_type(file, settings)

        # 2. Resizing.
        shortest_edge = None
        exact_size = None
        if settings.get("do_resize", True):
            shortest_edge, exact_size = read_resize(file, settings.get("size"))
        resample = settings.get("resample", Image.Resampling.BICUBIC)
        check(
            resample in list(Image.Resampling),
            f"{file}: resample is {resample}; it must be one of Pillow's filters, 0 to 5",
        )

        # 3. Cropping and padding. Of these types, only SigLIP's does not crop by default.
        center_crop = bool(settings.get("do_center_crop", processor_type != "SiglipImageProcessor"))
        if center_crop:
            check_crop_size(file, settings.get("crop_size"), tile_size)
        # In LLaVA's processor do_pad pads to a square. In LLaVA-NeXT's it pads a batch.
        pad_to_square = False
        if processor_type == "LlavaImageProcessor":
            pad_to_square = bool(settings.get("do_pad", False))

        # 4. Rescaling and normalization.
        rescale = 1.0
        if settings.get("do_rescale", True):
            rescale = settings.get("rescale_factor", 1 / 255)
        check(
            isinstance(rescale, (int, float)),
            f"{file}: rescale_factor is {rescale}; it must be a number",
        )
        mean = (0.0, 0.0, 0.0)
        std = (1.0, 1.0, 1.0)
        if settings.get("do_normalize", True):
            mean = read_channels(file, settings, "image_mean")
            std = read_channels(file, settings, "image_std")

        # 5. The grids of AnyRes.
        pinpoints = read_grid_pinpoints(file, settings, tile_size, model_grids=grid_pinpoints)

        image_processor = cls(
            tile_size=tile_size,
            shortest_edge=shortest_edge,
            exact_size=exact_size,
            center_crop=center_crop,
            pad_to_square=pad_to_square,
            resample=int(resample),
            rescale=float(rescale),
            mean=mean,
            std=std,
            grid_pinpoints=pinpoints,
        )
        image_processor._check_tile_size(file)
        return image_processor

    def _check_tile_size(self, file):
        """Raise InputError unless these settings bring images of every size to S x S pixels."""
        S = self.tile_size
        is_resized = self.exact_size == (S, S) or self.shortest_edge == S
        if self.grid_pinpoints is not None:
            fits = is_resized
        elif self.center_crop:
            fits = True
        else:
            # A shortest edge of S leaves the other edge longer, unless the image was made square.
            fits = is_resized and (self.exact_size is not None or self.pad_to_square)
        check(
            fits,
            f"{file}: size and crop do not bring an image to the {S} x {S} pixels of the vision "
            "tower; make them agree",
        )


def preprocess(image, image_processor):
    """Return the normalized tiles of an RGB image, (n, 3, S, S) float32, and the image's size.

    There is one tile without AnyRes. With AnyRes the first tile is the whole image squashed to
    S x S, and the tiles of its grid follow row by row (LLaVA-1.6). Raises InputError for an image
    that `check_shape` refuses.
    """
    # 1. Cut the image into tiles.
    size = (image.height, image.width)
    check_shape(size, image_processor, name=image.info.get("file", "an image"))
    if image_processor.grid_pinpoints is None:
        tiles = [_square_tile(image, image_processor)]
    else:
        tiles = _anyres_tiles(image, image_processor)
    pixels = np.stack([np.asarray(tile) for tile in tiles])  # (n, S, S, 3) uint8

    # 2. Normalize the pixels, and put the channels first, as convolutions expect.
    return torch.from_numpy(normalize(pixels, image_processor)), size


def normalize_plain(pixels, image_processor):
    """Return normalized pixels (..., 3) float32, from pixels of 0 to 255.

    The order of the reference decides the last bit: rescale in float64, round once to float32, and
    go on in float32.
    """
    rescaled = (pixels.astype(np.float64) * image_processor.rescale).astype(np.float32)
    mean = np.array(image_processor.mean, dtype=np.float32)
    std = np.array(image_processor.std, dtype=np.float32)
    return (rescaled - mean) / std


def normalize(pixels, image_processor):
    """Return normalized pixels (n, 3, S, S) float32, from pixels (n, S, S, 3) uint8.

    Same result as `normalize_plain`, to the bit, in a third of the time. A channel of a pixel has
    one of 256 levels. So the results of all levels are computed once, and then looked up.
    """
    levels = np.arange(256)
    table = normalize_plain(levels[:, None], image_processor)  # (256, 3)
    num_tiles, height, width, num_channels = pixels.shape
    normalized = np.empty((num_tiles, num_channels, height, width), dtype=np.float32)
    for channel in range(num_channels):
        normalized[:, channel] = table[:, channel][pixels[..., channel]]
    return normalized


def check_shape(size, image_processor, name):
    """Raise InputError for an image so thin that it would fill the memory on its way to a tile.

    A strip of pixels is small, but not when it is padded to a square, or when its shorter edge is
    made as long as a tile. AnyRes does neither. `name` is for the error.
    """
    if image_processor.grid_pinpoints is not None:
        return
    height, width = size
    if image_processor.pad_to_square and height != width:
        longer_edge = max(size)
        check(
            longer_edge * longer_edge <= MAX_PIXELS,
            f"{name}: {width} x {height} pixels are too thin: padded to a square they would be "
            f"{longer_edge} x {longer_edge}; crop it first",
        )
        size = (longer_edge, longer_edge)
    if image_processor.shortest_edge is not None:
        new_height, new_width = _size_with_shortest_edge(size, image_processor.shortest_edge)
        check(
            new_height * new_width <= MAX_PIXELS,
            f"{name}: {width} x {height} pixels are too thin: resized to "
            f"{image_processor.shortest_edge} pixels across it would be "
            f"{max(new_height, new_width)} long; crop it first",
        )


def _square_tile(image, image_processor):
    """Return the one S x S tile of an image.

    CLIP and LLaVA-1.5 crop, so they lose what lies outside the center. SigLIP squashes. Padding to
    a square keeps everything.
    """
    # 1. Pad to a square of the mean color.
    if image_processor.pad_to_square and image.width != image.height:
        mean_color = tuple(int(mean * 255) for mean in image_processor.mean)
        longer_edge = max(image.size)
        image = _center_on_canvas(image, (longer_edge, longer_edge), mean_color)

    # 2. Resize.
    size = image_processor.exact_size
    if image_processor.shortest_edge is not None:
        size = (image.height, image.width)
        size = _size_with_shortest_edge(size, image_processor.shortest_edge)
    if size is not None:
        height, width = size
        image = image.resize((width, height), image_processor.resample)

    # 3. Crop. Pillow fills what lies outside the image with black, as the reference does.
    if image_processor.center_crop:
        S = image_processor.tile_size
        left = (image.width - S) // 2
        top = (image.height - S) // 2
        image = image.crop((left, top, left + S, top + S))
    return image


def _size_with_shortest_edge(size, shortest_edge):
    """Return the size of an image after its shorter edge is resized to `shortest_edge`."""
    height, width = size
    shorter, longer = sorted(size)
    new_longer = int(shortest_edge * longer / shorter)  # the reference cuts, it does not round
    if width <= height:
        return new_longer, shortest_edge
    return shortest_edge, new_longer


def _center_on_canvas(image, size, color):
    """Return an image in the middle of a canvas. An odd spare pixel goes below or to the right."""
    height, width = size
    canvas = Image.new("RGB", (width, height), color)
    left = (width - image.width) // 2
    top = (height - image.height) // 2
    canvas.paste(image, (left, top))
    return canvas


def _anyres_tiles(image, image_processor):
    """Return the whole image squashed to S x S, then the tiles of its best grid row by row."""
    # 1. The whole image.
    S = image_processor.tile_size
    tiles = [image.resize((S, S), image_processor.resample)]

    # 2. The image at its best resolution, with its aspect kept, in the middle of a black canvas.
    size = (image.height, image.width)
    height, width = select_best_resolution(size, image_processor.grid_pinpoints)
    scale = min(width / image.width, height / image.height)
    # Rounded up, so that the image reaches the edge to which it was scaled.
    scaled_width = min(math.ceil(image.width * scale), width)
    scaled_height = min(math.ceil(image.height * scale), height)
    scaled = image.resize((scaled_width, scaled_height), image_processor.resample)
    canvas = _center_on_canvas(scaled, (height, width), "black")

    # 3. The tiles of the canvas.
    for top in range(0, height, S):
        for left in range(0, width, S):
            tiles.append(canvas.crop((left, top, left + S, top + S)))
    return tiles
