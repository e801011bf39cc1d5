"""A digest tells whether a file has the same content, whatever its name and its time."""

import os
import shutil

from minialign.utils.digests import file_digest


def test_a_digest_depends_on_the_content_alone(tmp_path):
    """By hand: the first half of the SHA-256 of "abc" (FIPS 180-2, example B.1)."""
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    digest = file_digest(path)

    os.utime(path, (1, 1))
    shutil.copy(path, tmp_path / "b.png")

    assert digest == "ba7816bf8f01cfea414140de5dae2223"
    assert file_digest(path) == digest
    assert file_digest(tmp_path / "b.png") == digest


def test_another_content_of_the_same_size_has_another_digest(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    digest = file_digest(path)

    path.write_bytes(b"abd")

    assert file_digest(path) != digest
