"""Pictures: a file to RGB, RGB to normalised tiles (square or AnyRes), how many vectors come of them, and diffusion noise.

The reference is transformers' Pillow-backed image processor of each kind (CLIP, SigLIP, LLaVA, LLaVA-NeXT). Its pixels
are matched to the last bit, since one pixel of difference in a crop moves every log-probability a little.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from minialign.data.anyres import select_best_resolution
from minialign.data.images import MAX_PIXELS
from minialign.utils.files import InputError, check, read_json

KNOWN_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPFeatureExtractor",
    "SiglipImageProcessor",
    "LlavaImageProcessor",
    "LlavaNextImageProcessor",
)


@dataclass(frozen=True)
class ImageProcessor:
    """How a checkpoint wants its pictures: everything that `prepare` depends on. Lengths are in pixels.

    `edge` is what the shorter edge becomes, `exact` a (height, width) to squash to; at most one is set, neither when
    nothing is resized. `pinpoints` are AnyRes's grids as (height, width), None for square preparation. Its repr, which
    holds every setting, serves in the keys of caches.
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
    def load(cls, directory, vision_size, patch, grid_pinpoints=None):
        """Read `processor_config.json` (transformers v5, nested) or `preprocessor_config.json` (older, flat).

        `vision_size`, `patch` and `grid_pinpoints` are what the model's config.json says, and the files must agree.
        Raises BadInput, naming file and field, where they do not or where the field is of a kind not known here.
        """
        file, settings = _settings(Path(directory), patch)
        kind = str(
            settings.get("image_processor_type") or settings.get("feature_extractor_type")
        ).removesuffix("Fast")
        check(
            kind in KNOWN_PROCESSORS,
            f"{file}: image_processor_type {kind} is not supported; use one of {', '.join(KNOWN_PROCESSORS)}",
        )
        edge, exact = (
            _lengths(file, "size", settings.get("size"))
            if settings.get("do_resize", True)
            else (None, None)
        )
        crop = bool(settings.get("do_center_crop", kind != "SiglipImageProcessor"))
        if crop and _lengths(file, "crop_size", settings.get("crop_size"), square=True)[1] != (
            vision_size,
            vision_size,
        ):
            raise InputError(
                f"{file}: crop_size is {settings['crop_size']}, but the vision tower takes {vision_size} pixels; make them agree"
            )
        # do_pad means "pad to a square" in LLaVA's processor alone; LLaVA-NeXT's speaks of padding a batch.
        pad_square = kind == "LlavaImageProcessor" and bool(settings.get("do_pad", False))
        resample = settings.get("resample", Image.Resampling.BICUBIC)
        check(
            resample in list(Image.Resampling),
            f"{file}: resample is {resample}; it must be one of Pillow's filters, 0 to 5",
        )
        rescale = (
            settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
        )
        check(
            isinstance(rescale, (int, float)),
            f"{file}: rescale_factor is {rescale}; it must be a number",
        )
        colours = (
            [_channels(file, settings, name) for name in ("image_mean", "image_std")]
            if settings.get("do_normalize", True)
            else [(0.0,) * 3, (1.0,) * 3]
        )
        pinpoints = _pinpoints(
            file, vision_size, grid_pinpoints, settings.get("image_grid_pinpoints")
        )
        # Every picture must come out square and of the tower's size: found here, not at the first picture that does not.
        sized = exact == (vision_size, vision_size) or edge == vision_size
        if not (sized if pinpoints else crop or sized and (exact is not None or pad_square)):
            raise InputError(
                f"{file}: size and crop do not bring a picture to the {vision_size} x {vision_size} pixels of the vision tower; make them agree"
            )
        return cls(
            vision_size,
            edge,
            exact,
            crop,
            pad_square,
            int(resample),
            float(rescale),
            *colours,
            pinpoints,
        )


def _settings(directory, patch):
    """(file, picture settings). The nested form wins where both exist, as in the reference."""
    nested, flat = directory / "processor_config.json", directory / "preprocessor_config.json"
    processor = read_json(nested, dict) if nested.exists() else {}
    given = processor.get("patch_size")
    check(
        given in (None, patch),
        f"{nested}: patch_size is {given}, but config.json's vision tower has {patch}; make them agree",
    )
    if isinstance(processor.get("image_processor"), dict):
        return nested, processor["image_processor"]
    check(
        flat.exists(),
        f"{directory}: neither preprocessor_config.json nor a processor_config.json with image_processor; add the checkpoint's own",
    )
    return flat, read_json(flat, dict)


def _lengths(file, name, value, square=False):
    """(shorter edge, None) or (None, (height, width)) of a `size` or `crop_size`; an int is the old way to say either."""
    if isinstance(value, int):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    given = (
        {key: length for key, length in value.items() if length is not None}
        if isinstance(value, dict)
        else {}
    )
    known = set(given) == {"height", "width"} or set(given) == {"shortest_edge"} and not square
    whole = known and all(isinstance(length, int) and length > 0 for length in given.values())
    check(
        whole,
        f"{file}: {name} is {value}; it must hold {'' if square else 'shortest_edge, or '}height and width in whole pixels",
    )
    return given.get("shortest_edge"), (
        given["height"],
        given["width"],
    ) if "height" in given else None


def _channels(file, settings, name):
    values = settings.get(name)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(value, (int, float)) for value in values)
    ):
        raise InputError(f"{file}: {name} is {values}; it must list three numbers, one a colour")
    return tuple(float(value) for value in values)


def _pinpoints(file, side, model, processor):
    """The AnyRes grids, which cut the picture (processor) and lay out its features (model): one list, or the two drift apart."""
    for grid in (*(model or ()), *(processor or ())):
        whole = isinstance(grid, (list, tuple)) and all(isinstance(length, int) for length in grid)
        if not whole or len(grid) != 2 or any(length < side or length % side for length in grid):
            raise InputError(
                f"{file}: grid pinpoint {grid} is not a (height, width) in multiples of {side} pixels; correct it here or in config.json"
            )
    model, processor = (tuple(map(tuple, grids or ())) for grids in (model, processor))
    check(
        not (model and processor) or model == processor,
        f"{file}: image_grid_pinpoints differ from config.json's; make them agree",
    )
    return model or processor or None


def preprocess(picture, image_processor):
    """An RGB picture's normalised tiles, (n, 3, S, S) float32, and its own size (height, width).

    Square preparation gives n = 1. AnyRes gives the whole picture squashed to S x S, then its tiles row by row
    (LLaVA-1.6). Raises BadInput for a picture so thin that its shorter edge cannot be brought to size in memory.
    """
    size = picture.height, picture.width
    tiles = (
        [_square(picture, image_processor)]
        if image_processor.grid_pinpoints is None
        else _anyres(picture, image_processor)
    )
    pixels = np.stack([np.asarray(tile) for tile in tiles])  # (n, S, S, 3) uint8
    # In float64 and rounded once, then in float32: the reference's order, which decides the last bit.
    values = (pixels.astype(np.float64) * image_processor.rescale).astype(np.float32)
    values = (values - np.float32(image_processor.mean)) / np.float32(image_processor.std)
    return torch.from_numpy(
        np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    ), size  # (n, 3, S, S)


def _square(picture, image_processor):
    """One S x S picture: LLaVA-1.5 and CLIP lose what is outside the centre, SigLIP squashes, padding keeps everything."""
    if image_processor.pad_to_square and picture.width != picture.height:
        picture = _on_canvas(
            picture,
            (max(picture.size),) * 2,
            tuple(int(mean * 255) for mean in image_processor.mean),
        )
    size = (
        image_processor.exact_size
        or image_processor.shortest_edge
        and _shorter_edge_to(picture, image_processor.shortest_edge)
    )
    if size is not None:
        picture = picture.resize(size[::-1], image_processor.resample)
    if image_processor.center_crop:
        # Pillow fills with black what lies outside, which is also the reference's padding of smaller pictures.
        left, top = (
            (picture.width - image_processor.tile_size) // 2,
            (picture.height - image_processor.tile_size) // 2,
        )
        picture = picture.crop(
            (left, top, left + image_processor.tile_size, top + image_processor.tile_size)
        )
    return picture


def _shorter_edge_to(picture, edge):
    """(height, width) with the shorter edge at `edge`; the longer is cut down to whole pixels, not rounded."""
    short, long = sorted(picture.size)
    longer = int(edge * long / short)
    what = f"{picture.info.get('file', 'a picture')}: {picture.width} x {picture.height} pixels"
    check(
        edge * longer <= MAX_PIXELS,
        f"{what} are too thin: at {edge} across it would be {longer} long; crop it first",
    )
    return (longer, edge) if picture.width <= picture.height else (edge, longer)


def _on_canvas(picture, size, colour):
    """The picture in the middle of a (height, width) canvas; an odd pixel to spare goes below and to the right."""
    canvas = Image.new("RGB", (size[1], size[0]), colour)
    canvas.paste(picture, ((size[1] - picture.width) // 2, (size[0] - picture.height) // 2))
    return canvas


def _anyres(picture, image_processor):
    """The whole picture squashed to S x S, then the tiles of its best grid, row by row."""
    side = image_processor.tile_size
    height, width = select_best_resolution(
        (picture.height, picture.width), image_processor.grid_pinpoints
    )
    scale = min(width / picture.width, height / picture.height)
    # Rounded up, so that the picture never falls short of the edge it was scaled to.
    fitted = (
        min(math.ceil(picture.width * scale), width),
        min(math.ceil(picture.height * scale), height),
    )
    canvas = _on_canvas(picture.resize(fitted, image_processor.resample), (height, width), "black")
    cuts = [
        canvas.crop((left, top, left + side, top + side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    return [picture.resize((side, side), image_processor.resample), *cuts]
