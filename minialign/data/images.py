"""Open image files upright and in RGB, with one-line errors for missing and damaged files."""

import contextlib
import logging
import os
import stat
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from minialign.utils.files import InputError, check, check_beginning
from minialign.utils.messages import print_message
from minialign.utils.unreadable import describe_read_error

# Pillow's names of the formats that are read here. It decodes all of them itself, whereas it starts
# other programs on some formats (Ghostscript on EPS). A file's content tells its format, not its
# name. MPO, the format of stereo cameras, counts as JPEG.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# A small file may hold a huge image. With this limit, opening it takes at most 2 GB: 8 bytes a
# pixel for the image and its copy in RGB, and as much again in the decoders of WebP and JPEG 2000.
MAX_PIXELS = 100_000_000
MAX_MEGAPIXELS = MAX_PIXELS // 1_000_000
# Pillow resizes the rows first. So an image one pixel wide, of a hundred million rows, would become
# as wide as a tile before its height shrinks.
MAX_EDGE = 100_000
PIXELS_PER_BAND = 1 << 22  # of a transparent image that is laid on white (to_rgb)
# Pillow's modes of images with one number a pixel that may exceed 255, in which case it is clipped.
DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
SIDEWAYS = (5, 6, 7, 8)  # EXIF's orientations that swap height and width
MAX_REASON_LENGTH = 200  # characters
MAX_NAME_LENGTH = 400

# Without a handler, Python prints what Pillow logs about damaged files.
logging.getLogger("PIL").addHandler(logging.NullHandler())


def check_image_file(path, remedy="check the name and the image folder"):
    """Raise InputError unless there is a file at `path`. It is not opened.

    remedy: what the error for a missing file says to do, unless its cause is known.
    """
    name = str(path)[:MAX_NAME_LENGTH]
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{name}: no such image; {_missing_image_hint(Path(path)) or remedy}"
        ) from None
    except PermissionError as error:  # of a folder
        raise InputError(describe_read_error(name, error)) from None
    except (OSError, ValueError) as error:  # a loop of symbolic links, a name that is too long
        raise InputError(f"{name}: no image, {_reason(error)}; check the name") from None
    check(not stat.S_ISDIR(mode), f"{name}: cannot be read, it is a folder; name an image in it")
    # Opening a named pipe would wait for ever, and a device has no end.
    check(stat.S_ISREG(mode), f"{name}: cannot be read, it is a device or a pipe; name a file")


def _missing_image_hint(path):
    """Return why an image is missing, or None if the cause is not known."""
    if path.is_symlink():
        return "it is a symbolic link to a file that is not there"
    if "\\" in path.name:
        return "write / between folders, as \\ is a part of a name here"
    with contextlib.suppress(OSError):
        for name in sorted(os.listdir(path.parent)):
            if name.casefold() == path.name.casefold():
                return f"the folder has {name}, so correct the upper and lower case"
    nearby = _find_nearby(path)
    if nearby is not None:
        return f"{nearby} is there, so correct the name or the image folder"
    return None


def _find_nearby(path):
    """Return a file of this name above or just below the folder of a missing image, or None.

    A name may repeat the end of the image folder, or lack a folder that lies in it.
    """
    folders = list(path.parents)[1:4]
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:  # if there is one
        # The system tells the folders without a look at each of the files, perhaps 100,000.
        inner_folders = [Path(entry) for entry in entries if entry.is_dir()]
        folders += sorted(inner_folders)
    for folder in folders:
        with contextlib.suppress(OSError):  # a folder that may not be searched
            if (folder / path.name).is_file():
                return folder / path.name
    return None


@contextlib.contextmanager
def _opened(path):
    """Yield the image in a file, of which Pillow has read the header only.

    Raises InputError if the file is missing, damaged, of another format, or too large. This covers
    errors inside the `with` block, where the pixels are decoded.
    """
    check_image_file(path)
    Image.init()  # fills Image.OPEN
    formats = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow lacks AVIF
    try:
        # Pillow warns of what it repairs, and of images that are large but within the limit here.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=formats) as image:
            _check_size(path, image)
            yield image
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(describe_read_error(path, error)) from None
    except UnidentifiedImageError:
        _check_kind(path)
        names = ", ".join(formats)
        raise InputError(
            f"{path}: not an image that can be read here ({names}); convert it to PNG or JPEG"
        ) from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: over {MAX_MEGAPIXELS} megapixels; scale it down") from None
    except Exception as error:  # every decoder fails in its own way on damaged files
        raise InputError(
            f"{path}: cannot be read as an image ({_reason(error)}); is the file complete?"
        ) from None


def _check_kind(path):
    """Raise InputError if a file that is no image is empty, or of a kind that is often found."""
    with open(path, "rb") as stream:
        start = stream.read(64)
    check(start, f"{path}: is empty; copy or download it again")
    check_beginning(path, start, "write its images to files, as data/README.md shows")


def _reason(error):
    """Return the text of an error as a short line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror  # without the path, with which the caller's message begins
    return " ".join(text.split())[:MAX_REASON_LENGTH]


def _check_size(path, image):
    """Raise InputError if an image would fill the memory when it is decoded or resized."""
    size = f"{image.width} x {image.height} pixels"
    check(
        image.width * image.height <= MAX_PIXELS,
        f"{path}: {size}, over {MAX_MEGAPIXELS} megapixels; scale it down",
    )
    check(
        max(image.size) <= MAX_EDGE,
        f"{path}: {size}, an edge of over {MAX_EDGE} pixels; crop it",
    )


def image_size(path):
    """Return (height, width) of the image in a file, upright.

    The header gives it, and EXIF's orientation tells whether the image is turned. Only a TIFF is
    decoded, because versions of Pillow differ in whether the header of a turned TIFF gives the size
    before or after the turn.
    """
    with _opened(path) as image:
        if image.format != "TIFF":
            # The header's size is the one before the turn, which swaps height and width.
            is_turned = image.getexif().get(ExifTags.Base.Orientation) in SIDEWAYS
            width, height = image.size
            return (width, height) if is_turned else (height, width)
    image = open_image(path)
    return image.height, image.width


def check_images(images):
    """Raise InputError unless every image can be opened. Print how many have clipped gray values.

    A file that was cut short has a valid header, so only decoding it shows the error.

    images: (path, place) pairs. The error begins with the place, the record that names the image.
        An image that several records name is opened once.
    """
    place_of = {}
    for path, place in images:
        place_of.setdefault(str(path), place)
    clipped_paths = []
    for path, place in tqdm(place_of.items(), "images", leave=False, delay=1):
        try:
            image = open_image(path)
        except InputError as error:
            raise InputError(f"{place}: {error}") from None
        if image.info["clipped"]:
            clipped_paths.append(path)
    if clipped_paths:
        print_clipped(clipped_paths, len(place_of))


def print_clipped(paths, num_images):
    """Print a message about the images at `paths`, whose gray values are clipped."""
    print_message(
        f"{len(paths)} of {num_images} images have gray values above 255, which become white as in "
        f"transformers, the first is {paths[0]}; save them with 8 bits a pixel"
    )


def open_image(path):
    """Return the image in a file, upright and in RGB.

    EXIF's orientation is applied, as transformers' `load_image` and the datasets library (and so
    TRL) do. `Image.open` alone does not apply it. Of several frames or pages this is the first.
    """
    with _opened(path) as image:
        silence = contextlib.nullcontext()
        if image.format == "TIFF":
            silence = _silent_libtiff()
        with silence:
            ImageOps.exif_transpose(image, in_place=True)  # decodes the image
        upright = to_rgb(image)
        upright.info["clipped"] = _has_clipped_values(image)
    upright.info["file"] = str(path)  # `preprocess` names the file in its errors
    return upright


@contextlib.contextmanager
def _silent_libtiff():
    """Send standard error to nowhere while libtiff decodes.

    It prints what is wrong with a file past Python's warnings. Pillow raises an error as well.
    """
    try:
        stderr = os.dup(2)
    except OSError:  # closed: there is nothing to silence
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _has_clipped_values(image):
    """Return whether `to_rgb` clips gray values of an image, those above 255."""
    if image.mode not in DEEP_MODES:
        return False
    _, largest_value = image.getextrema()
    return largest_value > 255


def to_rgb(image):
    """Convert an image to RGB as transformers 5 does.

    Transparent pixels are laid on white. 16-bit gray values above 255 become white, because Pillow
    clips them.
    """
    has_alpha = "A" in image.getbands() or image.info.get("transparency") is not None
    if not has_alpha:
        return image.convert("RGB")

    # The image is laid on white in bands of rows. All at once would take five copies of it.
    rgb = Image.new("RGB", image.size)
    rows_per_band = max(1, PIXELS_PER_BAND // image.width)
    for top in range(0, image.height, rows_per_band):
        bottom = min(top + rows_per_band, image.height)
        band = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", band.size, "white")
        rgb.paste(Image.alpha_composite(white, band).convert("RGB"), (0, top))
    return rgb
