"""What a script says when it cannot print."""

import errno
import os
import sys

import pytest

from minialign.utils import cli


@pytest.mark.parametrize(
    "number, line",
    [
        (errno.EPIPE, "standard output: Broken pipe; read it to its end, or send it to a file"),
        (errno.ENOSPC, "standard output: No space left on device; free some space on that disk"),
    ],
)
def test_the_remedy_for_standard_output_is_no_other_out(capsys, monkeypatch, number, line):
    """The pipe of `sample.py answer ... | head -1` breaks, and that command has no --out."""
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(cli, "silence", lambda descriptor: None)  # pytest still prints

    def main():
        raise OSError(number, os.strerror(number))

    assert cli.run_script(main) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"sample.py: {line}")
    assert "--out" not in printed


def test_a_closed_standard_output_is_refused_before_the_work(capsys, monkeypatch):
    """Python has no sys.stdout then, and print drops everything without an error."""
    monkeypatch.setattr(sys, "argv", ["sample.py"])
    monkeypatch.setattr(sys, "stdout", None)

    def main():
        raise AssertionError("the work has begun")

    assert cli.run_script(main) == 2
    line = "sample.py: standard output: is closed; send it to a file with > FILE\n"
    assert capsys.readouterr().err == line


def test_a_forbidden_path_is_not_taken_for_the_output():
    """It may be a file that is read, such as the model's."""
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "model/config.json")
    assert cli.describe_error(error, "sample.py") == (
        "model/config.json: Permission denied; change its permissions, or give another path"
    )
