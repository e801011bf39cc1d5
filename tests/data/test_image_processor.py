"""Tiles have the pixels of transformers' processors, and unsupported settings are refused."""

import numpy as np
import pytest
from golden.images import cases
from golden_images import (
    ABOUT,
    ARRAYS,
    PROCESSORS,
    assert_same_as_golden,
    load_golden_processor,
    write_settings,
)
from PIL import Image

from minialign.data.image_processor import ImageProcessor, normalize, normalize_plain, preprocess
from minialign.data.images import open_image, to_rgb
from minialign.utils.files import InputError

# Pixels.


@pytest.mark.parametrize("name", PROCESSORS)
def test_pixels_are_those_of_transformers(name, tmp_path):
    image_processor = load_golden_processor(tmp_path, name)
    num_compared = 0
    for case_index, case in enumerate(cases.all_cases()):
        if case.processor != name:
            continue
        image = to_rgb(cases.make_image(case.mode, case.width, case.height))

        tiles, size = preprocess(image, image_processor)

        assert size == (case.height, case.width)
        assert_same_as_golden(case_index, tiles)
        num_compared += 1
    assert num_compared >= 10


def test_whole_tensors_are_those_of_transformers(tmp_path):
    """The golden file has sums and samples of all cases, and all pixels of four."""
    for i, (name, mode, width, height) in enumerate(ABOUT["full"]):
        directory = tmp_path / name
        directory.mkdir()
        image_processor = load_golden_processor(directory, name)

        tiles, _ = preprocess(to_rgb(cases.make_image(mode, width, height)), image_processor)

        np.testing.assert_allclose(tiles.numpy(), ARRAYS[f"full{i}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PROCESSORS)
def test_looked_up_pixels_are_those_of_the_plain_form_to_the_bit(name, tmp_path):
    """Every level occurs in every channel of the first tile. The second tile has random pixels."""
    image_processor = load_golden_processor(tmp_path, name)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    pixels[0] = np.arange(256).reshape(16, 16, 1)

    normalized = normalize(pixels, image_processor)

    plain = normalize_plain(pixels, image_processor).transpose(0, 3, 1, 2)
    assert normalized.dtype == plain.dtype == np.float32
    assert np.array_equal(normalized, plain)


def test_anyres_gives_the_whole_image_and_then_its_tiles_row_by_row(tmp_path):
    """The first tile of four colored quarters has no color at its maximum everywhere."""
    image_processor = load_golden_processor(tmp_path, "anyres48")
    quarters = Image.new("RGB", (96, 96))
    corners = {"red": (0, 0), "lime": (48, 0), "blue": (0, 48), "white": (48, 48)}
    for color, corner in corners.items():
        quarters.paste(Image.new("RGB", (48, 48), color), corner)

    tiles, _ = preprocess(quarters, image_processor)

    is_bright = (tiles > 0).flatten(2).all(2)  # for each tile: red, green and blue
    assert is_bright.tolist() == [
        [False, False, False],
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [True, True, True],
    ]


def test_a_thin_image_is_refused_before_it_fills_the_memory(tmp_path):
    image_processor = load_golden_processor(tmp_path, "clip336")
    path = tmp_path / "thin.png"
    Image.new("RGB", (4000, 1)).save(path)
    with pytest.raises(InputError, match="thin.png: 4000 x 1 pixels are too thin"):
        preprocess(open_image(path), image_processor)


def test_a_thin_image_is_not_padded_to_a_square_that_fills_the_memory(tmp_path):
    image_processor = load_golden_processor(tmp_path, "square48")
    with pytest.raises(InputError, match="an image: 1 x 20000 pixels are too thin: padded"):
        preprocess(Image.new("RGB", (1, 20_000)), image_processor)


def test_a_thin_image_fits_a_grid_of_anyres(tmp_path):
    image_processor = load_golden_processor(tmp_path, "anyres336")
    tiles, _ = preprocess(Image.new("RGB", (4000, 1)), image_processor)
    assert tiles.shape == (3, 3, 336, 336)


# Settings.


def test_settings_are_read(tmp_path):
    write_settings(tmp_path, PROCESSORS["clip336"])

    image_processor = ImageProcessor.load(tmp_path, 336, 14)

    assert image_processor.tile_size == 336
    assert image_processor.shortest_edge == 336
    assert image_processor.exact_size is None
    assert image_processor.center_crop is True
    assert image_processor.pad_to_square is False
    assert image_processor.resample == 3
    assert image_processor.grid_pinpoints is None


def test_both_files_say_the_same_and_the_nested_one_wins(tmp_path):
    settings = PROCESSORS["clip336"]
    write_settings(tmp_path, settings)
    flat = ImageProcessor.load(tmp_path, 336, 14)

    write_settings(tmp_path, {**settings, "resample": 2}, nested=True)
    nested = ImageProcessor.load(tmp_path, 336, 14)
    assert nested.resample == 2
    assert repr(nested) != repr(flat)

    # transformers 4 leaves a processor_config.json without image settings.
    (tmp_path / "processor_config.json").write_text('{"patch_size": 14}')
    assert ImageProcessor.load(tmp_path, 336, 14) == flat


def test_older_names_and_numbers_say_the_same(tmp_path):
    settings = PROCESSORS["clip336"]
    write_settings(tmp_path, settings)
    flat = ImageProcessor.load(tmp_path, 336, 14)
    older = {
        **settings,
        "image_processor_type": None,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "size": 336,
        "crop_size": 336,
    }

    write_settings(tmp_path, older)

    assert ImageProcessor.load(tmp_path, 336, 14) == flat


def test_the_models_pinpoints_make_it_anyres(tmp_path):
    write_settings(tmp_path, PROCESSORS["clip336"])
    image_processor = ImageProcessor.load(tmp_path, 336, 14, cases.PINPOINTS)
    assert image_processor.grid_pinpoints == tuple(tuple(grid) for grid in cases.PINPOINTS)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"image_processor_type": "Qwen2VLImageProcessor"}, "Qwen2VLImageProcessor is not support"),
        ({"image_processor_type": None}, "image_processor_type None"),
        ({"crop_size": {"height": 224, "width": 224}}, "vision tower takes 336"),
        ({"do_center_crop": False}, "336 x 336 pixels of the vision tower"),
        ({"size": {"longest_edge": 336}}, "size is"),
        ({"size": {"shortest_edge": "336"}}, "size is"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, 10**400]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "image_mean"),
        ({"image_mean": [0.5, 0.5, True]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0]}, "so it must be above 0"),
        ({"rescale_factor": "x"}, "rescale_factor is x"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"resample": 9}, "resample is 9"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, problem, tmp_path):
    write_settings(tmp_path, {**PROCESSORS["clip336"], **changes})
    with pytest.raises(InputError, match="preprocessor_config.json: ") as error:
        ImageProcessor.load(tmp_path, 336, 14)
    assert problem in str(error.value)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"size": {"shortest_edge": 384}}, "336 x 336 pixels of the vision tower"),
        ({"image_grid_pinpoints": [[336, 500]]}, "multiples of 336"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "multiples of 336"),
        ({"image_grid_pinpoints": cases.PINPOINTS[:1]}, "differ from config.json's"),
    ],
)
@pytest.mark.parametrize("name", ["anyres336", "clip336"])
def test_settings_that_do_not_fit_a_llava_next_are_refused(name, changes, problem, tmp_path):
    write_settings(tmp_path, {**PROCESSORS[name], **changes})
    with pytest.raises(InputError, match="preprocessor_config.json: ") as error:
        ImageProcessor.load(tmp_path, 336, 14, cases.PINPOINTS)
    assert problem in str(error.value)


@pytest.mark.parametrize("nested", [False, True])
def test_the_processor_of_a_llava_next_does_not_fit_another_model(nested, tmp_path):
    """It would cut images into tiles, which a LLaVA-1.5 joins without a grid.

    The image tokens that were counted would differ from the features that are made.
    """
    write_settings(tmp_path, PROCESSORS["anyres336"], nested=nested)
    with pytest.raises(InputError, match="config.json: lists .* is no LLaVA-NeXT; make them"):
        ImageProcessor.load(tmp_path, 336, 14)


@pytest.mark.parametrize("grids", [cases.PINPOINTS, [[336, 500]], "(1x1),...,(6x6)", []])
def test_a_processor_without_tiles_ignores_grids_that_are_left_over(grids, tmp_path):
    """So do the processors of transformers. The model has one tile per image."""
    settings = PROCESSORS["clip336"]
    write_settings(tmp_path, settings)
    expected = ImageProcessor.load(tmp_path, 336, 14)

    write_settings(tmp_path, {**settings, "image_grid_pinpoints": grids})

    assert ImageProcessor.load(tmp_path, 336, 14) == expected


def test_settings_and_model_must_agree(tmp_path):
    with pytest.raises(InputError, match="neither preprocessor_config.json nor"):
        ImageProcessor.load(tmp_path, 336, 14)

    write_settings(tmp_path, PROCESSORS["anyres336"], nested=True)
    with pytest.raises(InputError, match="patch_size is 14.* has 16"):
        ImageProcessor.load(tmp_path, 336, 16)
    with pytest.raises(InputError, match="differ from config.json's"):
        ImageProcessor.load(tmp_path, 336, 14, [[336, 672]])

    (tmp_path / "processor_config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        ImageProcessor.load(tmp_path, 336, 14)
