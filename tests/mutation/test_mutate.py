"""A short run of mutated inputs, and what counts as a fault."""

import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import end_with_children

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent / "data")]

from mutate import Outcome, find_fault  # noqa: E402
from mutations import HUGE_INTEGER, mutate_json  # noqa: E402

NAMES = ["config.json", "ckpt"]
GOOD_LINE = "sample.py: ckpt/config.json: broken JSON at line 1; is the file complete?\n"


def start_mutated_inputs():
    """Start 120 mutated inputs in a process of its own: one with threads must not fork."""
    return subprocess.Popen(
        [sys.executable, HERE / "mutate.py", "--inputs", "120", "--seed", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


@pytest.mark.early(start=start_mutated_inputs)
def test_mutated_inputs_are_accepted_or_refused_with_one_line(early_process):
    stdout, stderr = early_process.communicate()

    assert early_process.returncode == 0, stdout[-4000:] + stderr[-2000:]


def test_a_process_that_no_test_waited_for_ends_with_its_children():
    """The child holds the same pipe, which closes when both have ended."""
    command = ["sh", "-c", "sleep 60 & echo started; wait"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout.readline() == b"started\n"

        end_with_children(process)

        assert process.returncode == -signal.SIGKILL
        is_closed, _, _ = select.select([process.stdout], [], [], 5)
        assert is_closed
        assert process.stdout.read() == b""


def test_a_number_that_no_float_holds_can_be_mutated_again():
    """A long run would end there. Such numbers are among those that are put into files."""
    for seed in range(100):
        mutate_json([HUGE_INTEGER, -HUGE_INTEGER, 0.5], random.Random(seed))


@pytest.mark.parametrize(
    "status, stderr",
    [
        (0, ""),
        (0, "train:  50%|#####     | 1/2 [00:00<00:00]\r"),
        (2, GOOD_LINE),
        (2, "model ckpt, template vicuna, 3 records, results in out\n" + GOOD_LINE),
    ],
)
def test_what_is_no_fault(status, stderr):
    assert find_fault(Outcome(status, "", stderr), NAMES) is None


@pytest.mark.parametrize(
    "status, stderr, expected",
    [
        (1, "Traceback (most recent call last):\n", "status 1"),
        (-signal.SIGSEGV, "", "status -11"),
        (-signal.SIGXCPU, "", "CPU time"),
        (0, "UserWarning: something\n", "nobody expects"),
        (2, "", "0 lines"),
        (2, 2 * GOOD_LINE, "2 lines"),
        (2, "sample.py: something is wrong\n", "does not name config.json"),
        (2, GOOD_LINE.replace("broken", "\x1b[2J"), "control characters"),
        (2, GOOD_LINE.replace("broken", "x" * 2000), "characters"),
    ],
)
def test_what_is_a_fault(status, stderr, expected):
    assert expected in find_fault(Outcome(status, "", stderr), NAMES)
