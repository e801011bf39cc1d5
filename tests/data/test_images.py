"""Image files are opened as transformers opens them, and bad ones are one line that names them."""

import errno
import gzip
import os
import random
import struct
import warnings
import zlib
from pathlib import Path

import pytest
from golden.images import cases
from golden_images import GOLDEN, assert_same_as_golden, load_golden_processor
from PIL import ExifTags, Image

from minialign.data import images
from minialign.data.image_processor import preprocess
from minialign.data.images import (
    FORMATS,
    MAX_EDGE,
    check_images,
    image_size,
    open_image,
    to_rgb,
)
from minialign.utils.files import InputError


@pytest.mark.parametrize("i, file", list(enumerate(cases.FILES)))
def test_files_are_read_as_transformers_reads_them(i, file, tmp_path):
    image_processor = load_golden_processor(tmp_path, "clip48")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = open_image(GOLDEN / file)

    tiles, _ = preprocess(image, image_processor)

    num_cases = len(cases.all_cases())  # the golden file has the files behind them
    assert_same_as_golden(num_cases + i, tiles)


def test_an_image_on_its_side_is_put_upright():
    """The file is 40 wide and 24 high. Its EXIF orientation, 6, means a clockwise quarter turn."""
    image = open_image(GOLDEN / "rotated.jpg")
    assert image.size == (24, 40)
    with Image.open(GOLDEN / "rotated.jpg") as stored:
        upright = stored.convert("RGB").transpose(Image.Transpose.ROTATE_270)
    assert image.tobytes() == upright.tobytes()


def test_transparency_is_laid_on_white():
    transparent_red = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert to_rgb(transparent_red).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("mode, format", [("I;16", "png"), ("I", "tiff"), ("F", "tiff")])
def test_clipped_gray_values_are_counted(mode, format, tmp_path, capsys):
    """A gray value of 256 is white, as with transformers. One of 255 is white by itself."""
    paths = []
    for value in (0, 255, 256):
        path = tmp_path / f"{value}.{format}"
        Image.new(mode, (8, 8), value).save(path)
        paths.append((path, "record"))

    check_images(paths[:2])
    assert "white" not in capsys.readouterr().err
    check_images(paths)

    assert open_image(paths[2][0]).getpixel((0, 0)) == (255, 255, 255)
    message = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 3 images have gray values above 255" in message
    assert str(paths[2][0]) in message


# Bad files.


def png_header(width, height):
    """Return a PNG file that announces its size and holds no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"")


def png_chunk(name, body):
    """Return a chunk of a PNG file: length, name, body and checksum."""
    checksum = zlib.crc32(name + body)
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def error_of(path):
    """Return the message with which a file is refused, one line that names it, without warnings."""
    with warnings.catch_warnings(), pytest.raises(InputError) as error:
        warnings.simplefilter("error")
        open_image(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_bad_files_are_refused(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("GIF? no, a letter\n")
    large = tmp_path / "large.png"
    large.write_bytes(png_header(10_001, 10_000))
    huge = tmp_path / "huge.png"
    huge.write_bytes(png_header(60_000, 60_000))

    assert "no such image" in error_of(tmp_path / "missing.jpg")
    assert "not an image" in error_of(text)
    assert "10001 x 10000 pixels, over 100 megapixels" in error_of(large)
    assert "over 100 megapixels" in error_of(huge)
    assert "cannot be read" in error_of(tmp_path)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "is empty; copy or download it again"),
        (b"<!DOCTYPE html><html>", "is HTML; download the file itself"),
        (b"<HTML><HEAD>", "is HTML; download the file itself"),
        (b"PAR1\x15\x04", "is a parquet file; write its images to files"),
        (b'<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN">', "convert it to PNG or JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        (gzip.compress(b"image"), "is a gzip file; unpack it first"),
    ],
)
def test_what_was_not_downloaded_is_told(content, problem, tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert problem in error_of(path)


def test_an_image_without_permission(tmp_path, monkeypatch):
    """The superuser may read every file, so the refusal of the system is made up."""

    def refuse(path, *args, **options):
        """Fail as a file or a folder does that belongs to somebody else."""
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = tmp_path / "image.png"
    cases.make_image("RGB", 40, 24).save(path)
    for function in ("PIL.Image.open", "os.stat"):
        with monkeypatch.context() as patched:
            patched.setattr(function, refuse)
            assert error_of(path).endswith("(Permission denied); change its permissions (chmod)")


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "bmp", "tiff", "webp"])
def test_a_truncated_file_is_refused(format, tmp_path):
    path = tmp_path / f"image.{format}"
    cases.make_image("RGB", 90, 70).save(path)
    content = path.read_bytes()
    open_image(path)
    for share in (0.3, 0.6):
        path.write_bytes(content[: int(len(content) * share)])
        message = error_of(path)
        assert "complete?" in message or "not an image" in message


@pytest.mark.parametrize("name", ["coco/val/coco/val/a.png", "coco/val/val/a.png", "coco/a.png"])
def test_an_image_in_a_folder_nearby_is_named(name, tmp_path):
    """The folder stands in the name and before it, or in neither."""
    folder = tmp_path / "coco" / "val"
    folder.mkdir(parents=True)
    cases.make_image("RGB", 40, 24).save(folder / "a.png")
    assert f"no such image; {folder / 'a.png'} is there" in error_of(tmp_path / name)
    assert "is there" not in error_of(tmp_path / name.replace("a.png", "b.png"))


def test_a_missing_image_is_looked_for_in_folders_alone(tmp_path, monkeypatch):
    """A folder of a data set has 100,000 files, and each look takes time on a network disk."""
    (tmp_path / "inner").mkdir()
    for i in range(30):
        (tmp_path / f"{i}.png").touch()
    looked_at = []
    is_file = Path.is_file

    def noted_is_file(path):
        looked_at.append(path)
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", noted_is_file)

    error_of(tmp_path / "a.png")

    assert tmp_path / "inner" / "a.png" in looked_at
    assert not [path for path in looked_at if path.parent.suffix == ".png"]


# Formats, sizes and names.


def save_image(path, format, orientation=1):
    """Save an image of 40 x 24 pixels, with an EXIF orientation, in a format named by Pillow."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    cases.make_image("RGB", 40, 24).save(path, format=format, exif=exif)


@pytest.mark.parametrize("format", ["TIFF", "JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_of_a_turned_image_is_that_of_its_pixels(format, orientation, tmp_path):
    """Pillow 11 swaps the edges of a turned TIFF before it decodes it, Pillow 10.1 afterwards."""
    path = tmp_path / "turned"
    save_image(path, format, orientation)

    image = open_image(path)

    expected = (24, 40) if orientation >= 5 else (40, 24)
    assert image.size == expected
    assert image_size(path) == (image.height, image.width)


@pytest.mark.parametrize("format", FORMATS)
def test_the_content_tells_the_format_not_the_name(format, tmp_path):
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format}")
    path = tmp_path / "image.txt"
    cases.make_image("RGB", 40, 24).save(path, format=format)
    assert open_image(path).size == (40, 24)


@pytest.mark.parametrize("format", ["EPS", "PDF", "DDS", "ICO"])
def test_formats_outside_the_list_are_refused(format, tmp_path, monkeypatch):
    """An EPS file would start Ghostscript, however it is named."""
    path = tmp_path / "image.png"
    cases.make_image("RGB", 40, 24).save(path, format=format)
    for function in ("Popen", "run", "check_call"):
        monkeypatch.setattr(f"subprocess.{function}", None)
    assert "not an image that can be read here" in error_of(path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_file_is_an_image_or_one_line(format, tmp_path, capfd):
    """Random bytes of small files are changed. Nothing else is raised, printed or warned of."""
    Image.init()
    if format not in Image.SAVE:
        pytest.skip(f"this Pillow cannot write {format}")
    path = tmp_path / "image.png"
    cases.make_image("RGB", 40, 24).save(path, format=format)
    content = path.read_bytes()
    generator = random.Random(0)
    num_refused = 0
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(4):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged[: generator.randrange(len(damaged) // 2, 2 * len(damaged))])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert open_image(path).mode == "RGB"
        except InputError as error:
            num_refused += 1
            assert str(error).startswith(f"{path}: ")
            assert "\n" not in str(error)
    assert num_refused > 0
    assert capfd.readouterr() == ("", "")


def test_an_edge_has_a_limit(tmp_path):
    path = tmp_path / "long.png"
    Image.new("L", (1, MAX_EDGE)).save(path)
    assert open_image(path).size == (1, MAX_EDGE)
    Image.new("L", (1, MAX_EDGE + 1)).save(path)
    assert "1 x 100001 pixels" in error_of(path)


def test_a_missing_image_is_explained(tmp_path):
    (tmp_path / "Dog.JPG").write_bytes(b"")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(tmp_path / "pipe.png")

    assert "the folder has Dog.JPG" in error_of(tmp_path / "dog.jpg")
    assert "symbolic links" in error_of(tmp_path / "loop.png")
    assert "symbolic link to a file that is not there" in error_of(tmp_path / "dangling.png")
    assert "a pipe" in error_of(tmp_path / "pipe.png")
    assert "write / between folders" in error_of(tmp_path / "images\\dog.png")
    assert "a folder" in error_of(tmp_path)
    assert "no such image" in error_of(tmp_path / "Dog.JPG" / "a.png")
    assert "is empty" in error_of(tmp_path / "Dog.JPG")
    assert "no image" in error_of(tmp_path / ("x" * 300))
    assert "null" in error_of(tmp_path / "a\0.png")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P alphas", "RGB transparent"])
def test_transparency_in_bands_is_transparency_at_once(mode, monkeypatch):
    image = cases.make_image(mode, 40, 24)
    at_once = to_rgb(image)
    monkeypatch.setattr(images, "PIXELS_PER_BAND", 40 * 7)
    assert to_rgb(image).tobytes() == at_once.tobytes()
