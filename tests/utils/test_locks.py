"""Locks: one process holds a place, and a process that is killed holds nothing."""

import errno
import os
import signal
import time

import pytest
from processes import RunningProcess

from minialign.utils.files import InputError, WriteError
from minialign.utils.locks import file_lock, read_holder


def hold_lock(path):
    """Hold a lock for as long as the process lives."""
    with file_lock(path, "place"):
        time.sleep(600)


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds the lock tmp_path/out/.lock."""
    lock_path = tmp_path / "out" / ".lock"
    process = RunningProcess(hold_lock, lock_path)
    while not lock_path.exists() or read_holder(lock_path) is None:
        assert not process.has_ended(), "the lock is not held"
        time.sleep(0.005)
    yield process
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_the_second_process_is_told_who_holds_the_lock(tmp_path, holder):
    lock_path = tmp_path / "out" / ".lock"

    with pytest.raises(InputError, match=f"^here: process {holder.pid} on .* is writing there"):
        with file_lock(lock_path, "here"):
            pytest.fail("two processes hold the lock")

    assert f"process {holder.pid}" in read_holder(lock_path)


def test_a_killed_process_holds_nothing(tmp_path, holder):
    """Its lock file stays, and the next process takes it over and removes it."""
    lock_path = tmp_path / "out" / ".lock"
    holder.send_signal(signal.SIGKILL)
    assert holder.wait().status == -signal.SIGKILL
    assert lock_path.exists()
    assert read_holder(lock_path) is None

    with file_lock(lock_path, "here"):
        assert f"process {os.getpid()}" in read_holder(lock_path)

    assert not lock_path.exists()


def test_a_full_disk_leaves_no_lock_file(tmp_path, monkeypatch):
    """It would keep its folder, and the same command would then find a folder that exists."""

    def fail(descriptor, content):
        """Fail as on a full disk."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.write", fail)
    with pytest.raises(WriteError, match="^here: .*No space left .*free some space"):
        with file_lock(tmp_path / "a" / ".lock", "here"):
            pytest.fail("the lock is not complete")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_stay_empty_are_removed(tmp_path):
    with file_lock(tmp_path / "a" / "b" / ".lock", "here"):
        assert (tmp_path / "a" / "b").exists()
    assert list(tmp_path.iterdir()) == []

    with file_lock(tmp_path / "a" / "b" / ".lock", "here"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


def test_the_lock_of_a_later_process_is_not_removed(tmp_path):
    """The folder is removed while the lock is held, and another run makes it anew."""
    lock_path = tmp_path / ".lock"
    with file_lock(lock_path, "here"):
        lock_path.unlink()
        lock_path.write_text("another")
    assert lock_path.read_text() == "another"
