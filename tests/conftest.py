"""Fixtures and helpers that several test files share."""

import copy
import os
import signal
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, and for the processes that tests start. The models of the tests are so
# small that a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from minialign.data.records import Record, read_records
from minialign.logprobs import response_hidden_states, token_logps
from minialign.models.loading import VLM, load_vlm

# Where a shell runs the tests in the background they ignore Ctrl-C, and under nohup they ignore
# SIGHUP. Both are undone here.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"


def pytest_configure(config):
    """Describe the mark for a test that only waits for a process."""
    config.addinivalue_line(
        "markers",
        "early(start=...): call `start`, which returns a Popen with a session of its own, before "
        "the first test. So the process works beside the other tests. The fixture `early_process` "
        "is that process.",
    )


@pytest.fixture(scope="session", autouse=True)
def early_processes(request):
    """Start the processes of all selected tests with the mark `early`."""
    processes = {}
    for item in request.session.items:
        mark = item.get_closest_marker("early")
        if mark is not None:
            processes[item.nodeid] = mark.kwargs["start"]()
    yield processes
    for process in processes.values():
        end_with_children(process)


def end_with_children(process):
    """Kill a process with a session of its own, and those that it started, unless it has ended."""
    if process.poll() is None:  # its test was not reached
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def early_process(request, early_processes):
    """Return the process of a test with the mark `early`."""
    return early_processes[request.node.nodeid]


@pytest.fixture(scope="session")
def shipped_vlm() -> Iterator[VLM]:
    """Return the shipped tiny LLaVA, which no test may change."""
    vlm = load_vlm(TINY / "model")
    weights = copy.deepcopy(vlm.model.state_dict())
    yield vlm
    for name, tensor in vlm.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), f"a test changed {name}, which all tests share"


@pytest.fixture()
def vlm(shipped_vlm) -> VLM:
    """Return a copy of the shipped tiny LLaVA for each test, so that a test may train it."""
    torch.manual_seed(0)
    return copy.deepcopy(shipped_vlm)


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory) -> Path:
    """Return the folder of a reward model that was trained for two steps."""
    from processes import run_process  # it imports this module

    folder = tmp_path_factory.mktemp("reward") / "run"
    words = "--method reward --limit 8 --batch-size 4 --steps 2 --eval --lora-rank 4".split()
    outcome = run_process("train.py", *words, "--out", folder)
    assert outcome.status == 0, outcome.stderr
    return folder


@pytest.fixture(scope="session")
def records() -> list[Record]:
    """Return the shipped instruction records, which have no rejected responses."""
    return read_records([TINY / "train" / "instruct.json"], None)


def set_device_memory(monkeypatch, num_bytes):
    """Bound the caches of decoding as on a device with so many bytes of memory."""
    monkeypatch.setattr("minialign.generation.cache_limits.total_memory", lambda device: num_bytes)


def token_logps_per_response(model, rows, cache=None):
    """Return the token log-probs of each response of the rows, one tensor a response.

    Responses come in reading order. `cache` is as in response_hidden_states.
    """
    hidden, targets, response_lengths = response_hidden_states(model, rows, cache)
    logps = token_logps(hidden, model.vocab_head, targets)
    return logps.split(response_lengths)
