"""Fixtures and helpers that several test files share."""

import os
import signal
from pathlib import Path

# Before torch is imported, and for the processes that tests start. The models of the tests are so
# small that a second thread costs more than it saves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from minialign.data.records import Record, read_records
from minialign.logprobs import response_hidden_states, token_logps
from minialign.models.loading import VLM, load_vlm

# A shell that runs the tests in the background lets them ignore Ctrl-C, nohup SIGHUP.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"


@pytest.fixture()
def vlm() -> VLM:
    """Return the shipped tiny LLaVA, loaded anew for each test, so that a test may train it."""
    torch.manual_seed(0)
    return load_vlm(TINY / "model")


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
