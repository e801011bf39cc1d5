"""Open image files upright and in RGB, with one-line errors for missing and damaged files."""

import contextlib
import struct
import warnings
import zlib

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from minialign.utils.files import InputError, check

MAX_PIXELS = 100_000_000
MAX_MEGAPIXELS = MAX_PIXELS // 1_000_000
# What Pillow raises on damaged files. Each of its decoders fails in its own way.
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
    """Yield the image in a file, of which Pillow has read the header only.

    Raises InputError if the file is missing, damaged, not an image or over 100 megapixels. This
    covers errors inside the `with` block, where the pixels are decoded.
    """
    # Pillow warns from 89 megapixels on. The limit here is checked before anything is decoded.
    no_warning = warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning)
    try:
        with no_warning, Image.open(path) as image:
            check(
                image.width * image.height <= MAX_PIXELS,
                f"{path}: {image.width} x {image.height} pixels, over {MAX_MEGAPIXELS} megapixels; "
                "scale it down",
            )
            yield image
    except FileNotFoundError:
        raise InputError(f"{path}: no such image; check the name and the image folder") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{path}: not an image that Pillow can read; convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: over {MAX_MEGAPIXELS} megapixels; scale it down") from None
    except DAMAGED_IMAGE_ERRORS as error:
        reason = " ".join(str(error).split())  # one line
        raise InputError(
            f"{path}: cannot be read as an image ({reason}); is the file complete?"
        ) from None


def image_size(path):
    """Return (height, width) of the image in a file, upright, from the file's header alone."""
    with _opened(path) as image:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        if orientation >= 5:  # turned by 90 degrees
            return image.width, image.height
        return image.height, image.width


def check_images(paths):
    """Raise InputError unless every image can be decoded to its end.

    A file that was cut short has a valid header, so only decoding it shows the error.
    """
    unique_paths = dict.fromkeys(str(path) for path in paths)
    for path in tqdm(unique_paths, "images", leave=False):
        with _opened(path) as image:
            image.load()


def open_image(path):
    """Return the image in a file, upright and in RGB.

    EXIF's orientation is applied, as transformers' `load_image` and the datasets library (and so
    TRL) do. `Image.open` alone does not apply it.
    """
    with _opened(path) as image:
        upright = to_rgb(ImageOps.exif_transpose(image))
    upright.info["file"] = str(path)  # `preprocess` names the file in its errors
    return upright


def to_rgb(image):
    """Convert an image to RGB as transformers 5 does.

    Transparent pixels are laid on white. 16-bit gray values above 255 become white, because Pillow
    clips them.
    """
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    if has_alpha:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
