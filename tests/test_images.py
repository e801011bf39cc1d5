"""Pictures against transformers' Pillow-backed processors (tests/golden/make_images.py), worked examples, and noise."""

import json
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from golden.images import cases
from PIL import Image

from minialign.data import images
from minialign.data.anyres import (
    count_image_tokens,
    grid_shape,
    select_best_resolution,
    unpadded_region,
)
from minialign.data.diffusion import diffuse, noise_schedule
from minialign.data.image_processor import ImageProcessor, preprocess
from minialign.utils.files import InputError

GOLDEN = Path(__file__).parent / "golden" / "images"
ABOUT = json.loads((GOLDEN / "golden.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "golden.npz"))
# The golden pixels are Pillow 13's. Earlier ones resample noise, which some of the pictures are, otherwise: single pixels more than their mean.
PIXEL, MEAN = (1e-6, 1e-6) if int(PIL.__version__.split(".")[0]) >= 13 else (0.2, 1e-3)
SIDES = {name: int(name.lstrip("abcdefghijklmnopqrstuvwxyz")) for name in ABOUT["processors"]} | {
    "edge64": 48
}


def write(directory, settings, nested=False):
    if nested:
        (directory / "processor_config.json").write_text(
            json.dumps({"image_processor": settings, "patch_size": 14})
        )
    else:
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def preparations(tmp_path_factory):
    """Every golden processor's own saved JSON, read as a checkpoint's would be."""
    return {
        name: ImageProcessor.load(
            write(tmp_path_factory.mktemp(name), settings, nested=number % 2 == 0), SIDES[name], 14
        )
        for number, (name, settings) in enumerate(ABOUT["processors"].items())
    }


def same_as_golden(number, tiles):
    assert tiles.dtype == torch.float32 and tiles.is_contiguous()
    assert tiles.shape == tuple(ARRAYS["shapes"][number])
    sums, samples = cases.digest(tiles.numpy())
    np.testing.assert_allclose(samples, ARRAYS["samples"][number], rtol=0, atol=PIXEL)
    np.testing.assert_allclose(
        sums / tiles[0, 0].numel(), ARRAYS["sums"][number] / tiles[0, 0].numel(), rtol=0, atol=MEAN
    )


@pytest.mark.parametrize("name", ABOUT["processors"])
def test_pixels_are_the_reference_processors(name, preparations):
    ours = [(number, case) for number, case in enumerate(cases.cases()) if case[0] == name]
    assert len(ours) >= 10
    for number, (_, mode, width, height) in ours:
        tiles, size = preprocess(
            images.to_rgb(cases.picture(mode, width, height)), preparations[name]
        )
        assert size == (height, width)
        same_as_golden(number, tiles)


def test_whole_tensors_are_the_reference_processors(preparations):
    for number, (name, mode, width, height) in enumerate(ABOUT["full"]):
        tiles, _ = preprocess(images.to_rgb(cases.picture(mode, width, height)), preparations[name])
        np.testing.assert_allclose(tiles.numpy(), ARRAYS[f"full{number}"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("number, file", list(enumerate(cases.FILES)))
def test_files_are_read_as_the_reference_reads_them(number, file, preparations):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opened = images.open_image(GOLDEN / file)
    same_as_golden(len(cases.cases()) + number, preprocess(opened, preparations["clip48"])[0])


def test_a_picture_on_its_side_is_put_upright():
    """Saved 40 wide and 24 high with EXIF orientation 6: a quarter turn clockwise shows it as it was meant."""
    opened = images.open_image(GOLDEN / "rotated.jpg")
    assert opened.size == (24, 40)
    with Image.open(GOLDEN / "rotated.jpg") as lying:
        assert (
            opened.tobytes() == lying.convert("RGB").transpose(Image.Transpose.ROTATE_270).tobytes()
        )


def test_transparency_is_laid_on_white():
    clear_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert images.to_rgb(clear_red).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("pixels, side", [(336, 24), (48, 8)])
def test_counts_of_twenty_thousand_sizes(pixels, side, preparations):
    """The count of LlavaNextProcessor, which the model's own packing was found to share, and where the kept map begins."""
    image_processor, golden = preparations[f"anyres{pixels}"], ARRAYS[f"counts{pixels}"].tolist()
    for size, (count, top, left) in zip(cases.random_sizes(), golden, strict=True):
        rows, columns = (
            tiles * side
            for tiles in grid_shape(size, image_processor.grid_pinpoints, image_processor.tile_size)
        )
        first, last, begin, end = unpadded_region(size, rows, columns)
        assert count_image_tokens(size, image_processor, side) == count, size
        nothing_left = (
            first == last or begin == end
        )  # of a thread, bars are cut from both sides until they meet
        assert top == left == -1 if nothing_left else (top, left) == (first, begin), size
        assert first + last == rows and begin + end == columns, size


def test_counts_worked_by_hand(preparations):
    square, anyres = preparations["clip336"], preparations["anyres336"]
    assert count_image_tokens((480, 640), square, 24) == 576  # LLaVA-1.5, any size
    # 640 x 480 fits 672 x 672 (2 x 2 tiles, 48 x 48 features) at 672 x 504: 36 rows, 6 bare ones above and below.
    assert grid_shape((480, 640), anyres.grid_pinpoints, anyres.tile_size) == (2, 2)
    assert unpadded_region((480, 640), 48, 48) == (6, 42, 0, 48)
    assert count_image_tokens((480, 640), anyres, 24) == 576 + 36 * 48 + 36 == 2340
    # 336 x 336 shows all it has in each grid; [336, 672] comes first of the two that waste least: 24 rows of 24.
    assert select_best_resolution((336, 336), anyres.grid_pinpoints) == (336, 672)
    assert count_image_tokens((336, 336), anyres, 24) == 576 + 24 * 24 + 24 == 1176
    # 672 x 672 fills its grid; no picture has more.
    assert count_image_tokens((672, 672), anyres, 24) == 576 + 48 * 48 + 48 == 2928
    assert ARRAYS["counts336"][:, 0].max() == 2928


def test_tiles_go_whole_picture_first_then_row_by_row(preparations):
    quarters = Image.new("RGB", (96, 96))
    for place, colour in {
        (0, 0): "red",
        (48, 0): "lime",
        (0, 48): "blue",
        (48, 48): "white",
    }.items():
        quarters.paste(Image.new("RGB", (48, 48), colour), place)
    tiles, _ = preprocess(quarters, preparations["anyres48"])
    seen = [(tile > 0).flatten(1).all(1).tolist() for tile in tiles]
    assert seen == [
        [False] * 3,
        [True, False, False],
        [False, True, False],
        [False, False, True],
        [True] * 3,
    ]


# What is wrong with a file is said in one line that names it.


def png_header(width, height):
    """A PNG of which only the announcement of its size is there."""

    def chunk(kind, body):
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", b"")
    )


def complaint(path):
    with warnings.catch_warnings(), pytest.raises(InputError) as caught:
        warnings.simplefilter("error")
        images.open_image(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ") and "\n" not in text
    return text


def test_bad_files_are_refused(tmp_path):
    text, large, huge = tmp_path / "text.png", tmp_path / "large.png", tmp_path / "huge.png"
    text.write_text("GIF? no, a letter\n")
    large.write_bytes(png_header(10_001, 10_000))
    huge.write_bytes(png_header(60_000, 60_000))
    assert "no such image" in complaint(tmp_path / "missing.jpg")
    assert "not an image" in complaint(text)
    assert "10001 x 10000 pixels, over 100 megapixels" in complaint(large)
    assert "over 100 megapixels" in complaint(huge)
    assert "cannot be read" in complaint(tmp_path)


@pytest.mark.parametrize("form", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_refused(form, tmp_path):
    path = tmp_path / f"picture.{form}"
    cases.picture("RGB", 90, 70).save(path)
    whole = path.read_bytes()
    images.open_image(path)
    for share in (0.3, 0.6):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert "complete?" in complaint(path) or "not an image" in complaint(path)


def test_a_thread_of_a_picture_is_refused_before_it_fills_memory(tmp_path, preparations):
    Image.new("RGB", (4000, 1)).save(tmp_path / "thread.png")
    with pytest.raises(InputError, match="thread.png: 4000 x 1 pixels are too thin"):
        preprocess(images.open_image(tmp_path / "thread.png"), preparations["clip336"])
    assert preprocess(Image.new("RGB", (4000, 1)), preparations["anyres336"])[0].shape == (
        3,
        3,
        336,
        336,
    )


# Settings.


def test_both_files_say_the_same_and_the_nested_one_wins(tmp_path):
    settings = ABOUT["processors"]["clip336"]
    flat = ImageProcessor.load(write(tmp_path, settings), 336, 14)
    assert (
        flat.tile_size,
        flat.shortest_edge,
        flat.exact_size,
        flat.center_crop,
        flat.pad_to_square,
        flat.resample,
        flat.grid_pinpoints,
    ) == (336, 336, None, True, False, 3, None)
    write(tmp_path, settings | {"resample": 2}, nested=True)
    nested = ImageProcessor.load(tmp_path, 336, 14)
    assert nested.resample == 2 and repr(nested) != repr(flat)
    (tmp_path / "processor_config.json").write_text(
        '{"patch_size": 14}'
    )  # as transformers 4 left it
    assert ImageProcessor.load(tmp_path, 336, 14) == flat
    old = {"feature_extractor_type": "CLIPFeatureExtractor", "size": 336, "crop_size": 336}
    assert (
        ImageProcessor.load(
            write(tmp_path, {**settings, "image_processor_type": None, **old}), 336, 14
        )
        == flat
    )


def test_the_models_pinpoints_make_it_anyres(tmp_path):
    write(tmp_path, ABOUT["processors"]["clip336"])
    image_processor = ImageProcessor.load(tmp_path, 336, 14, cases.PINPOINTS)
    assert image_processor.grid_pinpoints == tuple(map(tuple, cases.PINPOINTS))


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"image_processor_type": "Qwen2VLImageProcessor"},
            "Qwen2VLImageProcessor is not supported",
        ),
        ({"image_processor_type": None}, "image_processor_type None"),
        ({"crop_size": {"height": 224, "width": 224}}, "vision tower takes 336"),
        ({"do_center_crop": False}, "336 x 336 pixels of the vision tower"),
        ({"size": {"longest_edge": 336}}, "size is"),
        ({"size": {"shortest_edge": "336"}}, "size is"),
        (
            {"size": {"shortest_edge": 384}, "image_grid_pinpoints": cases.PINPOINTS},
            "make them agree",
        ),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"rescale_factor": "x"}, "rescale_factor is x"),
        ({"rescale_factor": None}, "rescale_factor is None"),
        ({"resample": 9}, "resample is 9"),
        ({"image_grid_pinpoints": [[336, 500]]}, "multiples of 336"),
        ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, "multiples of 336"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, words, tmp_path):
    write(tmp_path, ABOUT["processors"]["clip336"] | change)
    with pytest.raises(InputError, match="preprocessor_config.json: ") as caught:
        ImageProcessor.load(tmp_path, 336, 14)
    assert words in str(caught.value)


def test_settings_and_model_must_agree(tmp_path):
    with pytest.raises(InputError, match="neither preprocessor_config.json nor"):
        ImageProcessor.load(tmp_path, 336, 14)
    write(tmp_path, ABOUT["processors"]["anyres336"], nested=True)
    with pytest.raises(InputError, match="patch_size is 14.* has 16"):
        ImageProcessor.load(tmp_path, 336, 16)
    with pytest.raises(InputError, match="differ from config.json's"):
        ImageProcessor.load(tmp_path, 336, 14, [[336, 672]])
    (tmp_path / "processor_config.json").write_text("[]")
    with pytest.raises(InputError, match="not a JSON object"):
        ImageProcessor.load(tmp_path, 336, 14)


# Diffusion noise.


def closed_form(ramp):
    """abar by the paper's products, in Python floats; `ramp(k)` is the argument of the sigmoid."""
    abar, products = 1.0, []
    for k in range(1000):
        beta = 1 / (1 + math.exp(-ramp(k))) * (0.5e-2 - 1e-5) + 1e-5
        abar *= 1 - beta
        products.append(abar)
    return products


def test_the_schedule_is_povids():
    abar = noise_schedule()
    assert abar.shape == (1000,) and abar.dtype == torch.float64
    np.testing.assert_allclose(abar.numpy(), closed_form(lambda k: -6 + 12 * k / 999), rtol=1e-12)
    # The paper's printed k / 1000 is near but another schedule, and is not what is tested for.
    assert abs(abar[500] - closed_form(lambda k: -6 + 12 * (k + 1) / 1000)[499]) > 5e-4
    assert abar[0].item() == pytest.approx(1 - (0.00499 / (1 + math.exp(6)) + 1e-5), rel=1e-14)


@pytest.mark.parametrize("steps", [0, 500, 999])
def test_noise_has_the_mean_and_variance_of_eq_9(steps):
    tiles = torch.full((4, 3, 96, 96), 2.0)
    noised = diffuse(tiles, steps, torch.Generator().manual_seed(1)).double()
    abar, count = noise_schedule()[steps].item(), tiles.numel()
    # Five standard errors, of the mean and of the variance of a normal sample.
    assert abs(noised.mean() - 2 * math.sqrt(abar)) < 5 * math.sqrt((1 - abar) / count)
    assert abs(noised.var() - (1 - abar)) < 5 * (1 - abar) * math.sqrt(2 / count)


def test_noise_is_the_generators_alone():
    tiles = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    draws = [diffuse(tiles, 500, torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    half = diffuse(tiles.bfloat16(), 500, torch.Generator().manual_seed(7))
    assert half.dtype == torch.bfloat16 and (half.float() - draws[0]).abs().max() < 0.05


@pytest.mark.parametrize("steps", [-1, 1000])
def test_steps_outside_the_schedule_are_refused(steps):
    with pytest.raises(InputError, match="give 0 to 999"):
        diffuse(torch.zeros(1, 3, 2, 2), steps, torch.Generator())
