"""Grids and token counts of AnyRes: worked by hand, and those of transformers for 20,000 sizes."""

import pytest
from golden.images import cases
from golden_images import ARRAYS, load_golden_processor
from PIL import ExifTags, Image

from minialign.data.anyres import (
    count_image_tokens,
    grid_shape,
    select_best_resolution,
    unpadded_region,
)
from minialign.data.image_processor import preprocess
from minialign.data.images import image_size, open_image


@pytest.mark.parametrize("tile_size, patches_per_side", [(336, 24), (48, 8)])
def test_counts_of_twenty_thousand_sizes(tile_size, patches_per_side, tmp_path):
    """The golden file has LlavaNextProcessor's count, and the first feature that is kept.

    The bars of a very thin image are cut from both sides until nothing is left. Then the golden
    file has -1 for the first feature.
    """
    image_processor = load_golden_processor(tmp_path, f"anyres{tile_size}")
    golden_counts = ARRAYS[f"counts{tile_size}"].tolist()
    for size, golden in zip(cases.random_sizes(), golden_counts, strict=True):
        golden_count, golden_top, golden_left = golden
        tile_rows, tile_columns = grid_shape(size, image_processor.grid_pinpoints, tile_size)
        rows = tile_rows * patches_per_side
        columns = tile_columns * patches_per_side

        count = count_image_tokens(size, image_processor, patches_per_side)
        top, bottom, left, right = unpadded_region(size, rows, columns)

        assert count == golden_count, size
        if top == bottom or left == right:
            assert (golden_top, golden_left) == (-1, -1), size
        else:
            assert (golden_top, golden_left) == (top, left), size
        assert top + bottom == rows, size
        assert left + right == columns, size


def test_llava_15_has_576_tokens_for_any_size(tmp_path):
    image_processor = load_golden_processor(tmp_path, "clip336")
    assert count_image_tokens((480, 640), image_processor, 24) == 576


def test_an_image_of_640_x_480_pixels(tmp_path):
    """It fits 672 x 672 pixels, 2 x 2 tiles or 48 x 48 features, at 672 x 504: 36 rows.

    Six empty rows are above it and six below.
    """
    image_processor = load_golden_processor(tmp_path, "anyres336")
    size = (480, 640)
    assert grid_shape(size, image_processor.grid_pinpoints, image_processor.tile_size) == (2, 2)
    assert unpadded_region(size, 48, 48) == (6, 42, 0, 48)
    assert count_image_tokens(size, image_processor, 24) == 576 + 36 * 48 + 36
    assert count_image_tokens(size, image_processor, 24) == 2340


def test_an_image_of_336_x_336_pixels(tmp_path):
    """It shows all its pixels on every grid. [336, 672] is the first of the two that waste least.

    There it fills 24 rows and 24 columns.
    """
    image_processor = load_golden_processor(tmp_path, "anyres336")
    size = (336, 336)
    assert select_best_resolution(size, image_processor.grid_pinpoints) == (336, 672)
    assert count_image_tokens(size, image_processor, 24) == 576 + 24 * 24 + 24
    assert count_image_tokens(size, image_processor, 24) == 1176


def test_no_image_has_more_tokens_than_one_that_fills_its_grid(tmp_path):
    image_processor = load_golden_processor(tmp_path, "anyres336")
    assert count_image_tokens((672, 672), image_processor, 24) == 576 + 48 * 48 + 48
    assert count_image_tokens((672, 672), image_processor, 24) == 2928
    assert ARRAYS["counts336"][:, 0].max() == 2928


@pytest.mark.parametrize("format", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_the_counted_tokens_of_a_turned_image_are_those_that_are_made(format, tmp_path):
    """640 x 200 pixels have 1,360 tokens, and 1,392 when they stand upright."""
    image_processor = load_golden_processor(tmp_path, "anyres336")
    path = tmp_path / "turned"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        Image.new("RGB", (640, 200)).save(path, format=format, exif=exif)

        count = count_image_tokens(image_size(path), image_processor, 24)
        _, size = preprocess(open_image(path), image_processor)

        assert count == count_image_tokens(size, image_processor, 24)
        assert count == (1392 if orientation >= 5 else 1360)
