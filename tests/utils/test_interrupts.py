"""Signals: Ctrl-C, SIGTERM and SIGHUP end a command with a status of their own, and quietly."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from minialign.utils.interrupts import (
    STOP_SIGNALS,
    Interrupted,
    delay_interrupts,
    raise_interrupted,
    stop_signals_handled_by,
)


@pytest.mark.parametrize("signal_number", STOP_SIGNALS)
def test_a_signal_raises_what_no_except_exception_catches(signal_number):
    handler = signal.getsignal(signal_number)

    with pytest.raises(Interrupted) as caught, stop_signals_handled_by(raise_interrupted):
        os.kill(os.getpid(), signal_number)
        time.sleep(10)

    assert caught.value.signal_number == signal_number
    assert isinstance(caught.value, KeyboardInterrupt)
    assert signal.getsignal(signal_number) == handler


def test_signals_are_collected_while_they_are_delayed():
    """A block that does not look at them is interrupted at its end."""
    with pytest.raises(Interrupted) as caught, delay_interrupts() as signal_numbers:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        signals_in_block = list(signal_numbers)

    assert signals_in_block == [signal.SIGTERM, signal.SIGINT]
    assert caught.value.signal_number == signal.SIGTERM


def test_a_signal_that_is_ignored_stays_ignored(monkeypatch):
    """As SIGHUP is under nohup."""
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals_handled_by(raise_interrupted), delay_interrupts() as signal_numbers:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal_numbers == []
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.mark.parametrize(
    "command",
    [
        ["train.py"],
        ["sample.py"],
        ["-m", "minialign.evaluate"],
        ["-m", "minialign.annotators"],
        ["-m", "minialign.merge"],
        ["-m", "minialign.report"],
        ["data/make_tiny.py"],
        ["data/methods.py"],
        ["data/curation.py"],
        ["data/preferences.py"],
        ["data/study.py"],
        ["data/tiny_world/benchmarks.py"],
    ],
)
def test_ctrl_c_while_torch_is_imported_is_quiet(tmp_path, command):
    """A torch whose import presses Ctrl-C stands in for the seconds that the real one takes."""
    (tmp_path / "torch.py").write_text("import os\nos.kill(os.getpid(), 2)\nimport time\n")
    script = [ROOT / word if word.endswith(".py") else word for word in command]

    done = subprocess.run(
        [sys.executable, *script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
    )

    assert done.returncode == 130
    assert done.stdout + done.stderr == ""
