"""Shared fixtures: the shipped tiny LLaVA and a few of its records."""

from pathlib import Path

import pytest
import torch

from minialign.data.records import read_records
from minialign.logprobs import response_hidden_states, token_logps
from minialign.models.loading import load_vlm

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"


@pytest.fixture()
def vlm():
    """The shipped model, freshly loaded: a test may train it."""
    torch.manual_seed(0)
    return load_vlm(TINY / "model")


@pytest.fixture(scope="session")
def records():
    return read_records([TINY / "train" / "instruct.json"], None)


def each_token(model, rows, cache=None):
    """The token log-probs of every response of rows, in reading order."""
    hidden, targets, lengths = response_hidden_states(model, rows, cache)
    return token_logps(hidden, model.vocab_head, targets).split(lengths)
