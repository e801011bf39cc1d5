"""Say in one line why a file cannot be read, and what to do about it."""

import errno

CONVERT = "convert it to JSON first; data/README.md shows how"
SAVE_AS_UTF8 = "save it as UTF-8"
# Files that are often given in place of others: how they begin, what they are, and the remedy.
# A beginning in lower case counts in upper case too.
FOREIGN_FILES = (
    (b"PAR1", "a parquet file", CONVERT),
    (b"ARROW1", "an Arrow file", CONVERT),
    (b"\xff\xff\xff\xff", "an Arrow stream", CONVERT),
    (b"\x1f\x8b", "a gzip file", "unpack it first, with gunzip"),
    (b"BZh", "a bzip2 file", "unpack it first, with bunzip2"),
    (b"\xfd7zXZ", "an xz file", "unpack it first, with unxz"),
    (b"\x28\xb5\x2f\xfd", "a zstandard file", "unpack it first, with unzstd"),
    (b"PK\x03\x04", "a zip archive", "unpack it first, with unzip"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it first"),
    (b"<!doctype html", "HTML", "download the file itself, not the page about it"),
    (b"<html", "HTML", "download the file itself, not the page about it"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
)

# What to do about a file that cannot be read. Other errors of the operating system have no remedy.
READ_REMEDIES = {
    errno.EACCES: "change its permissions (chmod)",
    errno.EISDIR: "name a file in this folder",
}

NO_JSON = "a JSON file begins with [ or {; is this another file?"

# Messages of Python that tell what is wrong with broken JSON, by how they begin.
REMEDIES_BY_MESSAGE = (
    ("Unterminated string", "is the file complete?"),
    ("Invalid \\", "write \\\\ for a backslash in a text, or / between folders"),
    ("Invalid control character", "write \\n for a line break in a text, and \\t for a tab"),
    ("Expecting ':'", "is a colon missing before it?"),
)

# What people write that is not JSON, and what to do about it.
JSON_REMEDIES = (
    (",", "remove this comma"),  # behind the last value of a list, or behind a line of JSON Lines
    ("'", "put texts into double quotes"),
    ("None", "write null in place of None"),
    ("True", "write true in lower case"),
    ("False", "write false in lower case"),
    (("//", "#", "/*"), "remove this comment"),
    (("\u201c", "\u201d", "\u2018", "\u2019"), 'write straight double quotes (")'),
)

# What else the messages tell, if it is none of JSON_REMEDIES.
OTHER_REMEDIES_BY_MESSAGE = (
    ("Expecting property name", "put the names of fields into double quotes"),
    (
        "Expecting value",
        "write a text in double quotes, a number, true, false, null, [...] or {...}",
    ),
    ("Extra data", "the JSON is complete before it; remove what follows, or write a list of both"),
)


def describe_read_error(path, error) -> str:
    """Return one line: the file, why it cannot be read, and the remedy if there is one."""
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such file"
    reason = getattr(error, "strerror", error)
    line = f"{path}: cannot be read ({reason})"
    remedy = READ_REMEDIES.get(getattr(error, "errno", None))
    if remedy is None:
        return line
    return f"{line}; {remedy}"


def kind_and_remedy(content, convert_remedy=CONVERT) -> str | None:
    """Return what a file is that begins like one of FOREIGN_FILES, and the remedy. Else None.

    content: the bytes of the file, or its first 64.
    convert_remedy: what to do about parquet and Arrow files.
    """
    start = content[:64].lstrip()
    for beginning, kind, remedy in FOREIGN_FILES:
        if start.startswith(beginning) or start.lower().startswith(beginning):
            if remedy == CONVERT:
                remedy = convert_remedy
            return f"{kind}; {remedy}"
    return None


def json_remedy(error):
    """Return what to do about broken JSON, by the message and what stands where it is broken."""
    # 1. What the message alone tells.
    before = error.doc[: error.pos].rstrip()
    after = error.doc[error.pos :].lstrip()
    if not after:
        return "is the file complete?"
    remedy = _find_remedy(REMEDIES_BY_MESSAGE, error.msg)
    if remedy is not None:
        return remedy

    # 2. What stands there. All files read here are objects and lists, not a text or a number alone.
    if error.msg.startswith("Extra data") and before[-1] not in "]}":
        return NO_JSON
    if after[0] in "]}" and before.endswith(","):
        return "remove the comma before it"
    remedy = _find_remedy(JSON_REMEDIES, after)
    if remedy is not None:
        return remedy
    if not before:
        return NO_JSON

    # 3. What another message of Python tells. Where it expects a comma, that is missing, or else a
    #    quotation mark has ended a text too early.
    comma_or_quote = (
        "is a comma missing before it, or a backslash before a quotation mark in a text?"
    )
    return _find_remedy(OTHER_REMEDIES_BY_MESSAGE, error.msg) or comma_or_quote


def _find_remedy(remedies, text):
    """Return the remedy of the first (beginning, remedy) with which a text begins, or None."""
    for beginning, remedy in remedies:
        if text.startswith(beginning):
            return remedy
    return None
