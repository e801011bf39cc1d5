"""Test that stored targets are those that were computed, and that others are not taken for them."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minialign.methods.base import Example
from minialign.methods.distillation import Targets
from minialign.training.stored_targets import read_or_prepare_targets, read_targets


class FixedTargets:
    """A method that prepares known targets, and counts how often it is asked."""

    def __init__(self):
        self.calls = 0

    def prepare(self, examples):
        """Give the first example two tokens and the second one."""
        self.calls += 1
        first = Targets(
            token_ids=torch.tensor([4, 7, 1], dtype=torch.int32),
            probs=torch.tensor([0.25, 0.75, 1.0]),
            counts=torch.tensor([2, 1], dtype=torch.int32),
        )
        second = Targets(
            token_ids=torch.tensor([3], dtype=torch.int32),
            probs=torch.tensor([1.0]),
            counts=torch.tensor([1], dtype=torch.int32),
        )
        return [make_example([5, 2], first), make_example([2], second)]


def make_example(response, targets=None):
    """Return an example of one response."""
    return Example(
        record=None, prompt_ids=[1], responses=[response], num_image_tokens=0, targets=targets
    )


def flatten(examples):
    """Return what is stored of examples, as lists."""
    values = []
    for example in examples:
        targets = example.targets
        values.append(
            (
                example.responses,
                targets.token_ids.tolist(),
                targets.probs.tolist(),
                targets.counts.tolist(),
            )
        )
    return values


@pytest.fixture()
def stored(tmp_path):
    """Return the path of stored targets, made with the key "a", and the examples they are of."""
    examples = [make_example([9, 2]), make_example([2])]
    method = FixedTargets()
    path = tmp_path / "targets.safetensors"
    prepared = read_or_prepare_targets(method, examples, path=path, key="a")
    assert method.calls == 1
    assert flatten(prepared) == flatten(method.prepare(examples))
    return path, examples


def test_responses_and_targets_are_read_back(stored):
    """A resumed run computes nothing, and has the responses that were sampled."""
    path, examples = stored
    method = FixedTargets()

    again = read_or_prepare_targets(method, examples, path=path, key="a")

    assert method.calls == 0
    assert flatten(again) == flatten(method.prepare(examples))


def test_rejected_responses_stay_beside_the_stored_ones(stored):
    """Distillation may be added to a loss on pairs. The targets are those of the first response."""
    path, examples = stored
    pairs = [replace(example, responses=[*example.responses, [8, 2]]) for example in examples]

    again = read_targets(pairs, path, "a")

    assert [example.responses for example in again] == [[[5, 2], [8, 2]], [[2], [8, 2]]]
    assert [example.targets.counts.tolist() for example in again] == [[2, 1], [1]]


def test_targets_of_other_settings_are_computed_again(stored, capsys):
    """The key says what they depend on, and one line says that they are made anew."""
    path, examples = stored
    method = FixedTargets()

    read_or_prepare_targets(method, examples, path=path, key="b")

    assert method.calls == 1
    assert "computing it again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["response_ids", "response_lengths", "token_ids", "probs", "counts"]
)
def test_targets_that_lack_something_are_not_used(stored, name):
    """The right key alone is not enough."""
    path, examples = stored
    tensors = load_file(path)
    shorter = tensors | {name: tensors[name][:-1].contiguous()}
    missing = {key: tensor for key, tensor in tensors.items() if key != name}

    for damaged in (shorter, missing):
        save_file(damaged, path, metadata={"key": "a"})
        assert read_targets(examples, path, "a") is None
