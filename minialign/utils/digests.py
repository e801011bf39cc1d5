"""Digests of files, which tell whether their content is still the same."""

import functools
import hashlib
import os


def file_digest(path) -> str:
    """Return a hash of a file's content, whatever its name and its times are.

    A process reads a file once, and again if its `ctime` has changed, which every write sets.
    """
    status = os.stat(path)
    return _digest(str(path), status.st_size, status.st_ctime_ns)


@functools.cache
def _digest(path, size, ctime_ns):
    """Return the first half of the SHA-256 of a file. Size and time are only part of the key."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
