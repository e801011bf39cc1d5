"""Seeded mutations of JSON, of texts, of bytes, of pictures and of command lines."""

import copy
import io
import json
import os
import struct
import sys
import zlib

from PIL import Image

HUGE_INTEGER = 10**400
EXTREME_NUMBERS = (
    HUGE_INTEGER,
    -HUGE_INTEGER,
    10**30,
    10**12,
    2**63,
    2**31,
    1e308,
    float("nan"),
    float("inf"),
    -1,
    0,
    1,
    0.5,
    -0.0,
)
ODD_TEXTS = (
    "",
    " ",
    "\n",
    "\0",
    "\x1b[2J\x1b[31m",
    "\ud800",
    "\ufeff",
    "\u202e\u200b",
    "é" * 3,
    "<image>",
    "<image>\n<image>",
    "</s>",
    "<s>USER: <image>\nQ? ASSISTANT:",
    "{{ messages }}",
    "{% for",
    "(?:[A-Za-z ]+)+!",
    "(",
    "../../etc/passwd",
    os.sep + "nowhere.png",
    "images",
    "1e400",
    "-1",
    "True",
    "None",
    "long " * 20_000,
    "x" * 100_000,
)
OTHER_TYPES = (None, True, False, [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": None})
# A marker in a JSON value that `to_json` replaces after serializing. Python's own serializer can
# write neither ten thousand brackets nor a key that occurs twice.
DEEP_MARKER = "@deep@"
REPEATED_KEY_MARKER = "@repeated@"
FOREIGN_BEGINNINGS = (
    b"PAR1",
    b"\x1f\x8b\x08\x00",
    b"\x89PNG\r\n\x1a\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n",
    b"<!DOCTYPE html>",
    b"\xff\xfe",
    b"",
)
ENCODINGS = ("utf-16", "utf-32", "utf-8-sig", "latin-1", "cp037")
PICTURE_FORMATS = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "ICO", "PDF", "EPS")
PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "F", "I;16", "HSV")
PICTURE_SIZES = ((1, 1), (1, 500), (700, 1), (3, 2), (640, 200), (64, 64))


# --- JSON


def mutate_json(value, rng):
    """Return a JSON value with one or two places changed, the argument itself unchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2))):
        places = list(places_in(value))
        if not places or rng.random() < 0.03:
            return other_value(value, rng)
        container, key = rng.choice(places)
        change_place(container, key, rng)
    return value


def places_in(value):
    """Yield (container, key or index) of every place within a JSON value."""
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    else:
        return
    for key, inner in items:
        yield value, key
        yield from places_in(inner)


def change_place(container, key, rng):
    """Change what is at a place: its value, its key, or whether and how often it is there."""
    what = rng.randrange(10)
    old = container[key]
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, dict):
        container[odd_key(key, rng)] = container.pop(key)
    elif what == 2 and isinstance(container, dict):
        container[key + REPEATED_KEY_MARKER] = other_value(old, rng)
    elif what == 2:
        container.insert(rng.randrange(len(container) + 1), copy.deepcopy(old))
    elif what == 3:
        container[key] = rng.choice(([old], {"value": old}, [old, old], DEEP_MARKER))
    else:
        container[key] = other_value(old, rng)


def odd_key(key, rng):
    """Return a key that is nearly the given one."""
    return rng.choice((key.upper(), key + "s", " " + key, key[:-1], key + "\u200b", "x" * 5000))


def other_value(old, rng):
    """Return a value in the place of `old`: a neighbor of it, or something of another type."""
    if isinstance(old, str) and rng.random() < 0.5:
        return change_text(old, rng)
    if isinstance(old, bool) and rng.random() < 0.5:
        return not old
    if isinstance(old, int | float) and rng.random() < 0.4:
        return rng.choice((old + 1, old - 1, old * 2, -old, half_of(old), str(old), [old]))
    if isinstance(old, list) and old and rng.random() < 0.4:
        return rng.choice((old[::-1], old[1:], old * 3, dict(enumerate(map(str, old)))))
    return rng.choice(rng.choice((EXTREME_NUMBERS, ODD_TEXTS, OTHER_TYPES)))


def half_of(number):
    """Return half of a number, as a whole number if no float is as large."""
    if abs(number) > sys.float_info.max:
        return number // 2
    return number / 2


def change_text(text, rng):
    """Return a text with something odd in front of it, behind it or in it, or a part of it."""
    odd = rng.choice(ODD_TEXTS)
    position = rng.randrange(len(text) + 1)
    choices = (odd, odd + text, text + odd, text[:position] + odd + text[position:])
    return rng.choice((*choices, text[:position], text * 3, text.upper()))


def to_json(value, rng):
    """Return a JSON value as text, with the deep nesting and the repeated keys that it asks for."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    text = text.replace(f'{REPEATED_KEY_MARKER}"', '"')
    depth = rng.choice((10, 500, 100_000))
    deep = rng.choice(("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth))
    return text.replace(f'"{DEEP_MARKER}"', deep)


def encode_odd(text):
    """Return a text as UTF-8, half a surrogate pair included, as no valid file has it."""
    return text.encode("utf-8", "surrogatepass")


# --- texts and bytes


def mutate_text_file(content, rng):
    """Return the bytes of a text file that is damaged, in another encoding, or of another kind."""
    what = rng.randrange(7)
    if what == 0:
        text = content.decode("utf-8", "replace")
        return text.encode(rng.choice(ENCODINGS), "replace")
    if what == 1:
        return b"\xef\xbb\xbf" * rng.choice((1, 2)) + content
    if what == 2:
        position = rng.randrange(len(content) + 1)
        odd = encode_odd(rng.choice(ODD_TEXTS))
        return content[:position] + odd + content[position:]
    if what == 3:
        return content.replace(b"\n", b"\r\n").replace(b'"', b"'", rng.randrange(3))
    if what == 4:
        return content + rng.choice((content, b"\n\n", b"]", b"{}", b"\0\0"))
    return mutate_bytes(content, rng)


def mutate_bytes(content, rng):
    """Return bytes with bits flipped, a part cut, zeroed, repeated or replaced."""
    what = rng.randrange(6)
    start = rng.randrange(len(content) + 1)
    # Errors near the beginning hit headers, which are a small part of a large file.
    if rng.random() < 0.6:
        start = rng.randrange(min(len(content), 200) + 1)
    end = min(len(content), start + rng.choice((1, 4, 50, 5000)))
    if what == 0:
        return content[:start]
    if what == 1:
        return content[:start] + bytes(end - start) + content[end:]
    if what == 2:
        return content[:start] + content[end:]
    if what == 3:
        return content[:end] + content[start:]
    if what == 4:
        return rng.choice(FOREIGN_BEGINNINGS) + content[: 0 if rng.random() < 0.3 else None]
    flipped = bytearray(content)
    for _ in range(rng.choice((1, 1, 8))):
        if start < len(flipped):
            flipped[start] ^= 1 << rng.randrange(8)
        start = rng.randrange(len(content))
    return bytes(flipped)


# --- safetensors


def mutate_safetensors(content, rng):
    """Return a safetensors file whose header, header length or tensors are changed."""
    what = rng.randrange(4)
    length = int.from_bytes(content[:8], "little")
    if what == 0:
        odd_length = rng.choice((0, 1, length - 1, length + 1, 2**40, 2**63, len(content)))
        return odd_length.to_bytes(8, "little") + content[8:]
    if what == 1:
        return mutate_bytes(content, rng)
    if what == 2:
        return spoil_numbers(content, 8 + length, rng)
    header = mutate_json(json.loads(content[8 : 8 + length]), rng)
    encoded = encode_odd(to_json(header, rng))
    return len(encoded).to_bytes(8, "little") + encoded + content[8 + length :]


def spoil_numbers(content, first, rng):
    """Return the file with NaN, Inf or huge numbers (float32) somewhere behind its header."""
    spoiled = bytearray(content)
    number = struct.pack("<f", rng.choice((float("nan"), float("inf"), -float("inf"), 1e38)))
    count = rng.choice((1, 1000))
    position = first + 4 * rng.randrange(max(1, (len(content) - first) // 4 - count))
    spoiled[position : position + 4 * count] = number * count
    return bytes(spoiled[: len(content)])


# --- pictures


def mutate_picture(content, rng):
    """Return a picture of another format, mode, size or orientation, or a damaged one."""
    what = rng.randrange(5)
    if what == 0:
        return mutate_bytes(content, rng)
    if what == 1:
        return resized_header(content, rng)
    picture = Image.open(io.BytesIO(content)).convert("RGB")
    if rng.random() < 0.5:
        picture = picture.resize(rng.choice(PICTURE_SIZES))
    encoded = encode_picture(picture, rng)
    if what == 2:
        return mutate_bytes(encoded, rng)
    return encoded


def encode_picture(picture, rng):
    """Return a picture in a random format and mode, in PNG where the two do not go together."""
    exif = Image.Exif()
    exif[0x0112] = rng.choice((0, 1, 3, 6, 8, 99))  # the orientation
    buffer = io.BytesIO()
    try:
        picture.convert(rng.choice(PICTURE_MODES)).save(
            buffer, format=rng.choice(PICTURE_FORMATS), exif=exif
        )
    except Exception:  # Pillow raises errors of many types where format and mode do not go together
        buffer = io.BytesIO()
        picture.save(buffer, format="PNG", exif=exif)
    return buffer.getvalue()


def resized_header(content, rng):
    """Return a PNG whose header claims another size, with a checksum that is right."""
    sides = (0, 1, 65_535, 100_000, 2**31 - 1, 2**32 - 1)
    header = struct.pack(">II", rng.choice(sides), rng.choice(sides)) + content[24:29]
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return content[:16] + header + checksum + content[33:]


# --- command lines

ODD_WORDS = (
    "",
    " ",
    "-1",
    "0",
    "1e400",
    "nan",
    "inf",
    "1_0",
    "٣",
    "0x10",
    "1,5",
    "None",
    "true",
    "9" * 5000,
    "x" * 5000,
    "\x1b[2J",
    "\n",
    "\udcff",
    "é",
    "..",
    ".",
    "--",
    "-",
    "@file",
    "*",
    "no/such/file",
    "recs",
    "recs.json",
    "ckpt",
    "pics",
    "evalset/captions.json",
    "runfolder",
)


def mutate_words(words, rng, all_options):
    """Return the words of a command line with one to three of them changed."""
    words = list(words)
    for _ in range(rng.choice((1, 1, 2, 3))):
        position = rng.randrange(len(words) + 1)
        what = rng.randrange(6)
        if what == 0 and position < len(words):
            del words[position]
        elif what == 1 and position < len(words):
            words[position] = rng.choice(ODD_WORDS)
        elif what == 2 and position < len(words):
            words[position] = words[position].replace("--", "-", 1) + rng.choice(("", "=", "x"))
        elif what == 3:
            words.insert(position, rng.choice(all_options))
        else:
            words[len(words) :] = [rng.choice(all_options), rng.choice(ODD_WORDS)]
    return words
