"""Shared fixtures: the shipped tiny LLaVA and a few of its records."""

from pathlib import Path

import pytest
import torch

from minialign.data import read_records
from minialign.logprobs import scored_states, token_logps
from minialign.subject import load_subject

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "data" / "tiny"


@pytest.fixture()
def subject():
    """The shipped model, freshly loaded: a test may train it."""
    torch.manual_seed(0)
    return load_subject(TINY / "model")


@pytest.fixture(scope="session")
def records():
    return read_records([TINY / "train" / "instruct.json"], None)


def each_token(model, rows, cache=None):
    """The token log-probs of every response of rows, in reading order."""
    hidden, targets, lengths = scored_states(model, rows, cache)
    return token_logps(hidden, model.head, targets).split(lengths)
