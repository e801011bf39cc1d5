"""Locks that keep two processes from writing to the same place.

The operating system holds the lock (flock) and drops it with the process, however that one ends.
So a process that is killed leaves at most a file that nobody has locked.
"""

import contextlib
import fcntl
import os
import platform
import re
from pathlib import Path

from minialign.utils.distributed import is_main_process
from minialign.utils.files import InputError, is_running, write_errors
from minialign.utils.messages import print_message


@contextlib.contextmanager
def file_lock(path, place, *, wait=False):
    """Hold the lock file `path` while the block runs, and remove it afterwards.

    Folders that are made for it are removed too, if the block leaves them empty. Of several
    processes that run one command, only the main one holds the lock.
    place: the file or folder that the lock protects, which errors name.
    wait: if another process holds the lock, wait for it, instead of raising InputError with its
        name.
    """
    if not is_main_process():
        yield
        return
    path = Path(path)
    new_folders = missing_folders(path.parent)
    with write_errors(place):
        stream = _open_locked(path, place, wait)
    try:
        with write_errors(place):  # a full disk
            # Not through the stream, which would try to write once more when it is closed.
            os.write(stream.fileno(), f"process {os.getpid()} on {platform.node()}".encode())
        yield
    finally:
        if _is_same_file(stream, path):  # the folder may have been removed and made again
            path.unlink()
        stream.close()
        remove_empty(new_folders)


def _open_locked(path, place, wait):
    """Return the lock file, open, empty and locked."""
    operation = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "a+", encoding="utf-8")
        try:
            fcntl.flock(stream, operation)
        except BlockingIOError:
            stream.close()
            raise InputError(describe_use(path, place)) from None
        except OSError as error:
            print_message(
                f"{place} cannot be locked ({error.strerror}): start no second command that "
                "writes there",
            )
        # The process that held the lock before may have removed the file after it was opened here.
        # A lock of a removed file protects nothing, so a new file is opened.
        if _is_same_file(stream, path):
            stream.truncate(0)
            return stream
        stream.close()


def _is_same_file(stream, path):
    """Return whether `path` is still the file that was opened as `stream`."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


def describe_use(path, place):
    """Return one line that says which process holds the lock file `path`."""
    holder = read_holder(path) or "another process"
    return f"{place}: {holder} is writing there; wait for it, or give another --out"


def read_holder(path):
    """Return which process has written itself into the lock file `path`, or None if it is gone."""
    try:
        holder = Path(path).read_text(encoding="utf-8")
    except OSError:
        return None
    match = re.fullmatch(r"process (\d+) on (.*)", holder)
    if not match:
        return None
    process_id, node = match.groups()
    if node == platform.node() and not is_running(int(process_id)):
        return None
    return holder


def missing_folders(path):
    """Return the folders of a path that do not exist: `path` itself, then its parents."""
    missing = []
    with write_errors(path):
        while not path.exists() and not path.is_symlink():
            missing.append(path)
            path = path.parent
    return missing


def remove_empty(folders):
    """Remove the folders that are empty. The innermost one comes first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
