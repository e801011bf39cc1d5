"""Say in one line why a file cannot be read, and what to do about it."""

import errno

# Files that are often given in place of others: how they begin, what they are, and the remedy.
CONVERT = "convert it to JSON first; data/README.md shows how"
SAVE_AS_UTF8 = "save it as UTF-8"
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
    (b"<!", "HTML", "download the file itself, not the page about it"),
    (b"<html", "HTML", "download the file itself, not the page about it"),
    (b"version https://git-lfs", "a Git LFS pointer", "fetch the file itself with git lfs pull"),
)

# What to do about a file that cannot be read. Other errors of the operating system have no remedy.
READ_REMEDIES = {
    errno.EACCES: "change its permissions (chmod)",
    errno.EISDIR: "name a file in this folder",
}

# What people write that is not JSON, and what to do about it.
JSON_REMEDIES = (
    (",", "remove this comma"),  # behind the last value of a list, or behind a line of JSON Lines
    ("'", "put texts into double quotes"),
    ("None", "write null in place of None"),
    ("True", "write true in lower case"),
    ("False", "write false in lower case"),
    (("//", "#", "/*"), "remove this comment"),
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


def describe_kind(content) -> str | None:
    """Return what a file is that begins like one of FOREIGN_FILES, and the remedy. Else None.

    content: the bytes of the file, or its first 64.
    """
    start = content[:64].lstrip()
    for beginning, kind, remedy in FOREIGN_FILES:
        if start.startswith(beginning):
            return f"{kind}; {remedy}"
    return None


def json_remedy(error):
    """Return what to do about broken JSON, by what stands where it is broken."""
    before = error.doc[: error.pos].rstrip()
    after = error.doc[error.pos :].lstrip()
    if not after or error.msg.startswith("Unterminated string"):
        return "is the file complete?"
    if after[0] in "]}" and before.endswith(","):
        return "remove the comma before it"
    for beginning, remedy in JSON_REMEDIES:
        if after.startswith(beginning):
            return remedy
    return "is a comma missing before it, or a backslash before a quotation mark in a text?"
