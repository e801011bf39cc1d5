"""Run train.py, sample.py and functions of tests as processes of their own.

To import torch takes a process seconds. So one server imports it, and each process is forked from
there. It then does all that a new one does: `python train.py` runs the same file.
"""

import functools
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import ROOT
from PIL import Image

import sample  # noqa: F401  (for the server, which imports this module)
import train  # noqa: F401

Image.init()  # for the server too: a process imports 50 plugins before its first image


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


class RunningProcess:
    """A function that runs in a process of its own. Its output goes to files.

    A pipe that nobody reads would be full after some hundred steps of a progress bar.
    """

    def __init__(self, function, *arguments, **environment):
        self.outcome = None
        self.folder = tempfile.TemporaryDirectory()
        words = (self.folder.name, environment, function, *arguments)
        self.process = forks().Process(target=call_in_child, args=words, daemon=True)
        self.process.start()

    def wait(self) -> Outcome:
        """Wait for its end."""
        if self.outcome is None:
            self.process.join()
            with self.folder:
                stdout = Path(self.folder.name, "stdout").read_text()
                stderr = Path(self.folder.name, "stderr").read_text()
            self.outcome = Outcome(self.process.exitcode, stdout, stderr)
        return self.outcome

    @property
    def pid(self) -> int:
        """The id of the process."""
        return self.process.pid

    def send_signal(self, signal_number):
        """Send it a signal, unless it has ended."""
        if not self.has_ended():
            os.kill(self.pid, signal_number)

    def has_ended(self) -> bool:
        """Return whether it has ended."""
        return not self.process.is_alive()


@functools.cache
def forks():
    """Return the context of multiprocessing that forks from the server, which is started here.

    It finds modules where this process does. A server that multiprocessing starts by itself does
    not find this module and says nothing, and then each process imports the package anew.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # torch.optim imports the second
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()
    return context


def call_in_child(folder, environment, function, *arguments):
    """Call a function in the forked process, and end as Python ends."""
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
    # Where a shell runs the tests in the background they ignore Ctrl-C, and under nohup they ignore
    # SIGHUP. Both are undone here.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    os.chdir(ROOT)
    os.environ.update(environment)
    try:
        function(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


def run_file(script, *words):
    """Run a script, or a module of the package, as Python runs its main program."""
    sys.argv = [script, *words]
    if script.endswith(".py"):
        runpy.run_path(ROOT / script, run_name="__main__")
    else:
        runpy.run_module(script, run_name="__main__", alter_sys=True)


def start_process(script, *words, **environment) -> RunningProcess:
    """Start a script, or a module of the package, with the words of its command line."""
    return RunningProcess(run_file, script, *map(str, words), **environment)


def run_process(script, *words) -> Outcome:
    """Run a script, or a module of the package, until it ends."""
    return start_process(script, *words).wait()


def run_until(path, num_lines, signal_number, script, *words) -> Outcome:
    """Run a script, and send it a signal once the file `path` has `num_lines` lines."""
    process = start_process(script, *words)
    while count_lines(path) < num_lines:
        assert not process.has_ended(), "the script ended too early"
        time.sleep(0.005)
    process.send_signal(signal_number)
    return process.wait()


def count_lines(path):
    """Return the number of lines of a file, 0 if it does not exist yet."""
    if not path.exists():
        return 0
    return len(path.read_text().splitlines())


def run_in_two(function, *arguments) -> list[Outcome]:
    """Call a function in two processes that work as one, as torchrun starts them."""
    return run_together(2, function, *arguments)


def run_together(num_processes, function, *arguments) -> list[Outcome]:
    """Call a function in several processes that work as one, as torchrun starts them.

    This process holds the store through which they find each other, as torchrun does. So it is
    still there when the first of them has ended.
    """
    store = dist.TCPStore("127.0.0.1", port=0, is_master=True, wait_for_workers=False)
    processes = []
    for rank in range(num_processes):
        processes.append(
            RunningProcess(
                function,
                *arguments,
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(num_processes),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True",
            )
        )
    return [process.wait() for process in processes]
