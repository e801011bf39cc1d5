"""Run train.py and sample.py inside the process of a test, and judge what they leave."""

import json
import sys
from pathlib import Path

from processes import Outcome
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
