"""Pictures: a file to RGB, RGB to normalised tiles (square or AnyRes), how many vectors come of them, and diffusion noise.

The reference is transformers' Pillow-backed image processor of each kind (CLIP, SigLIP, LLaVA, LLaVA-NeXT). Its pixels
are matched to the last bit, since one pixel of difference in a crop moves every log-probability a little.
"""

import contextlib
import struct
import warnings
import zlib

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from minialign.utils.files import InputError, check

MAX_PIXELS = 100_000_000
# What Pillow's decoders raise on damaged files: each format has its own habit.
DAMAGED_IMAGE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
)


@contextlib.contextmanager
def _opened(path):
    """Pillow's lazily opened picture. Raises BadInput: missing, no picture, damaged, over 100 megapixels."""
    try:
        # Pillow warns from 89 megapixels; the limit here is checked before anything is decoded.
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(path) as picture,
        ):
            width, height = picture.size
            check(
                width * height <= MAX_PIXELS,
                f"{path}: {width} x {height} pixels, over {MAX_PIXELS // 10**6} megapixels; scale it down",
            )
            yield picture
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such picture; check the name and the folder of images"
        ) from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path}: not a picture that Pillow can read; convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: over {MAX_PIXELS // 10**6} megapixels; scale it down") from None
    except DAMAGED_IMAGE_ERRORS as error:
        raise InputError(
            f"{path}: cannot be read as a picture ({' '.join(str(error).split())}); is the file complete?"
        ) from None


def image_size(path):
    """(height, width) of the picture in a file, upright, from its header alone. Raises BadInput as `open_picture` does."""
    with _opened(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
        return (picture.width, picture.height) if turned else (picture.height, picture.width)


def check_images(paths):
    """Decode each picture once, for its errors alone: a file that is cut short may begin well. Raises BadInput as `open_picture` does."""
    for path in tqdm(dict.fromkeys(map(str, paths)), "pictures", leave=False):
        with _opened(path) as picture:
            picture.load()


def open_image(path):
    """The picture in a file, upright and in RGB. Raises BadInput: missing, no picture, damaged, over 100 megapixels.

    EXIF's orientation is applied, as transformers' `load_image` (and the datasets library, so TRL) does on opening a
    file; a bare `Image.open` does not. Colours are those of `as_rgb`.
    """
    with _opened(path) as picture:
        upright = to_rgb(ImageOps.exif_transpose(picture))
        upright.info["file"] = str(path)  # for the errors of `prepare`
        return upright


def to_rgb(picture):
    """RGB as transformers 5 has it: transparency is laid on white, 16-bit greys above 255 are white (Pillow's clipping)."""
    if "A" in picture.getbands() or picture.info.get("transparency") is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
