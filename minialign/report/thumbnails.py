"""Make small pictures that are part of a page, as data URIs."""

import base64
import io
from pathlib import Path

from PIL import Image

from minialign.data.images import open_image
from minialign.report.markup import Markup, element
from minialign.utils.files import InputError

MAX_EDGE = 288  # pixels; twice the width at which pages show a picture
JPEG_QUALITY = 82


def picture(path, description) -> Markup:
    """Return the image in a file as an element, or a word in its place if it cannot be opened."""
    try:
        image = open_image(path)
    except InputError:
        return missing_picture(f"{Path(path).name} cannot be opened in {Path(path).parent}")
    return image_element(image, description)


def missing_picture(reason) -> Markup:
    """Return what stands in the place of a picture that cannot be shown."""
    return element("p", f"No picture: {reason}.", class_="muted small")


def image_element(image: Image.Image, description) -> Markup:
    """Return an image as an element that holds its pixels."""
    small = image.copy()
    small.thumbnail((MAX_EDGE, MAX_EDGE))
    return element(
        "img",
        src=data_uri(small),
        alt=description,
        width=small.width,
        height=small.height,
    )


def data_uri(image: Image.Image) -> str:
    """Return an image as a data URI: as PNG for drawings, or as JPEG where that is smaller."""
    png = encode(image, format="PNG", optimize=True)
    jpeg = encode(image, format="JPEG", quality=JPEG_QUALITY)
    kind, content = ("png", png) if len(png) <= len(jpeg) else ("jpeg", jpeg)
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def encode(image, **settings) -> bytes:
    """Return the file that an image makes in a format of Pillow."""
    stream = io.BytesIO()
    image.save(stream, **settings)
    return stream.getvalue()
