"""Image files are opened as transformers opens them, and bad ones are one line that names them."""

import struct
import warnings
import zlib

import pytest
from golden.images import cases
from golden_images import GOLDEN, assert_same_as_golden, load_golden_processor
from PIL import Image

from minialign.data.image_processor import preprocess
from minialign.data.images import open_image, to_rgb
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
