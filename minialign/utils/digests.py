"""Digests of files, which tell whether their content is still the same."""

import functools
import hashlib
import os


def file_digest(path) -> str:
    """Return a hash of a file's content, whatever its name and its times are.

    A process reads a file once, and again if its size or `ctime` has changed. Every write sets the
    ctime, and no tool can set it back as it can the time of modification.
    """
    status = os.stat(path)
    return _digest(str(path), status.st_size, status.st_ctime_ns)


@functools.cache
def _digest(path, size, ctime_ns):
    """Return half of the SHA-256 of a file. Size and time are only there for the cache's key."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]
