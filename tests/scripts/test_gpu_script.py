"""The script that runs all GPU benchmarks: where its output goes, and how it ends."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

PARTS = ["dpo", "profile", "kernels", "cold", "bdhs", "device", "split-gloo"]  # on a CPU
needs_programs = pytest.mark.skipif(
    not (shutil.which("sh") and shutil.which("timeout")), reason="needs sh and timeout"
)


def run_gpu_script(folder, *words, python="true"):
    """Run the script from a folder. In place of Python a program runs that only succeeds."""
    return subprocess.run(
        ["sh", ROOT / "tests" / "bench" / "gpu.sh", *words],
        cwd=folder,
        env=os.environ | {"DEVICE": "cpu", "PYTHON": python},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_programs
def test_each_part_has_a_file_in_a_folder_that_is_relative_to_the_caller(tmp_path):
    done = run_gpu_script(tmp_path, "out")

    assert done.returncode == 0, done.stderr
    names = [f"{part}.txt" for part in PARTS]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*names, "summary.txt"]
    )
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert [line.split(":")[0] for line in summary.splitlines()] == PARTS
    assert done.stdout == 2 * summary  # each line as its part ends, and all of them at the end


@needs_programs
def test_a_part_that_fails_does_not_stop_the_others(tmp_path):
    done = run_gpu_script(tmp_path, "out", python="false")

    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("status 1, ") == len(PARTS)


@needs_programs
def test_the_output_of_an_earlier_run_is_kept(tmp_path):
    """The folders of its training runs are there, so the same parts would fail."""
    run_gpu_script(tmp_path, "out")
    summary = (tmp_path / "out" / "summary.txt").read_bytes()

    done = run_gpu_script(tmp_path, "out", python="false")

    assert done.returncode == 2
    assert done.stderr == "out: holds the output of an earlier run; give another folder\n"
    assert (tmp_path / "out" / "summary.txt").read_bytes() == summary


@needs_programs
def test_a_run_without_a_folder_is_refused(tmp_path):
    done = run_gpu_script(tmp_path)

    assert done.returncode == 2
    assert "give the folder for the output" in done.stderr
    assert not any(tmp_path.iterdir())
