"""Run train.py and sample.py for the tests: as processes, or inside the process of a test."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from safetensors.torch import load_file

import sample
import train
from minialign.methods.registry import METHODS
from minialign.utils.cli import run_script

MAIN_FUNCTIONS = {"train.py": train.main, "sample.py": sample.main}

# Two steps on eight records, without evaluation. A run takes a second or two.
BRIEF = "--limit 8 --batch-size 4 --steps 2 --eval --lora-rank 4".split()


def brief(method) -> list[str]:
    """Return the options of a brief run, with short responses if the method samples any."""
    words = ["--method", method, *BRIEF]
    # Distillation samples only with --on.
    if "max_new_tokens" in METHODS[method].options and method != "distill":
        words += ["--max-new-tokens", "8"]
    return words


@dataclass
class Outcome:
    """What a script left: its exit status, and what it printed."""

    status: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        """The lines of standard error, without progress bars."""
        lines = self.stderr.replace("\r", "\n").split("\n")
        return [line for line in lines if line.strip() and "%|" not in line]


def run_inside(monkeypatch, capfd, script, *words) -> Outcome:
    """Run a script inside this process, which saves the start of Python and torch."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    capfd.readouterr()  # drop what was printed before
    try:
        status = run_script(MAIN_FUNCTIONS[script])
    except SystemExit as error:  # argparse exits this way
        status = error.code
    stdout, stderr = capfd.readouterr()
    return Outcome(status, stdout, stderr)


def run_process(script, *words) -> Outcome:
    """Run a script as a process of its own."""
    process = start_process(script, *words, stderr=subprocess.PIPE)
    stdout, stderr = process.communicate()
    return Outcome(process.returncode, stdout, stderr)


def run_until(path, num_lines, signal_number, script, *words) -> Outcome:
    """Run a script as a process, and send it a signal once the file `path` has `num_lines` lines.

    Standard error goes to a file. A pipe that nobody reads would be full after some hundred steps
    of a progress bar, and the script would wait forever.
    """
    with tempfile.TemporaryFile("w+") as stderr:
        process = start_process(script, *words, stderr=stderr)
        while count_lines(path) < num_lines:
            assert process.poll() is None, "the script ended too early"
            time.sleep(0.005)
        process.send_signal(signal_number)
        stdout, _ = process.communicate()
        stderr.seek(0)
        return Outcome(process.returncode, stdout, stderr.read())


def start_process(script, *words, stderr):
    """Start a script and return its process."""
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, words)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def count_lines(path):
    """Return the number of lines of a file, 0 if it does not exist yet."""
    if not path.exists():
        return 0
    return len(path.read_text().splitlines())


def read_log(folder) -> list[dict]:
    """Return the lines of metrics.jsonl, without the seconds that may differ between two runs."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["seconds"]
        lines.append(line)
    return lines


def files_in(folder) -> set[str]:
    """Return the relative paths of all files in a folder."""
    paths = folder.rglob("*")
    return {path.relative_to(folder).as_posix() for path in paths if path.is_file()}


def assert_same_tensors(path, expected_path):
    """Assert that two safetensors files hold the same tensors to the bit."""
    tensors = load_file(path)
    expected = load_file(expected_path)
    assert tensors.keys() == expected.keys()
    for name in tensors:
        assert tensors[name].equal(expected[name]), name


def assert_adapter_was_trained(folder):
    """Assert that an adapter of rank 4 differs from its start, where every lora_B is zero."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == 4
    tensors = load_file(folder / "adapter_model.safetensors")
    assert any(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)


def assert_refused(outcome, *expected, started=False):
    """Assert that a script ended with status 2 and one line that holds all of `expected`.

    started: the mistake is found late, so that the line which announces the run comes first.
    """
    messages = outcome.messages
    if started:
        assert messages[0].startswith("model ")
        messages = messages[1:]
    assert outcome.status == 2, outcome.stderr
    assert outcome.stdout == ""
    assert len(messages) == 1, messages
    for text in expected:
        assert str(text) in messages[0]


def write_json(path, value) -> Path:
    """Write a value as JSON and return the path."""
    path.write_text(json.dumps(value))
    return path
