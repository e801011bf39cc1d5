"""A training run that is killed or interrupted resumes to the bit. A damaged one is refused."""

import os
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_runs import DyingMethod, WrappedMethod, make_run, read_log

from minialign.training import loop
from minialign.training.loop import Schedule
from minialign.utils.files import InputError

# --- restarts ---


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("steps_before", [1, 3, 4])
def test_a_killed_run_resumes_to_the_bit(vlm, records, tmp_path, rank, steps_before):
    """Killed before the first saved state, between two states, and right after one.

    Weights, moments and log are those of an uninterrupted run. The log of the killed run was ahead
    of its state. Those lines are written anew.
    """
    run = make_run(vlm, records, rank)
    run.train(tmp_path / "whole")
    run.reset()
    with pytest.raises(MemoryError):
        run.train(tmp_path / "killed", method=DyingMethod(run.method, steps_before))
    assert len(read_log(tmp_path / "killed")) == steps_before

    run.reset()
    run.train(tmp_path / "killed")

    assert len(read_log(tmp_path / "whole")) == 5
    assert read_log(tmp_path / "killed") == read_log(tmp_path / "whole")
    whole_state = load_file(tmp_path / "whole" / "state.safetensors")
    state = load_file(tmp_path / "killed" / "state.safetensors")
    assert set(state) == set(whole_state)
    assert all(torch.equal(state[name], whole_state[name]) for name in state)
    weights = run.weights()
    assert all(torch.equal(state[f"weight.{name}"], weights[name]) for name in weights)


def test_a_log_line_cut_in_half_is_written_anew(vlm, records, tmp_path):
    run = make_run(vlm, records)
    run.train(tmp_path / "whole")
    run.reset()
    with pytest.raises(MemoryError):
        run.train(tmp_path / "cut", method=DyingMethod(run.method, 3))
    log = tmp_path / "cut" / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])

    run.train(tmp_path / "cut")

    assert read_log(tmp_path / "cut") == read_log(tmp_path / "whole")


class InterruptedMethod(WrappedMethod):
    """A method during whose second step the user presses Ctrl-C."""

    def __init__(self, method):
        super().__init__(method)
        self.calls = 0

    def loss(self, examples, batch):
        self.calls += 1
        if self.calls == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return super().loss(examples, batch)


def test_ctrl_c_ends_the_step_and_saves_it(vlm, records, tmp_path):
    """The interrupted step is logged and saved although no state was due. Then the run resumes."""
    run = make_run(vlm, records)
    method = InterruptedMethod(run.method)
    schedule = Schedule(steps=5, batch_size=3, lr=1e-3, projector_lr=1e-3, seed=0, save_every=100)
    handler = signal.getsignal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run.train(tmp_path, schedule, method)

    assert method.calls == 2
    assert len(read_log(tmp_path)) == 2
    assert signal.getsignal(signal.SIGINT) == handler

    run.train(tmp_path, schedule, method)

    assert [line["step"] for line in read_log(tmp_path)] == [0, 1, 2, 3, 4]


def test_ctrl_c_while_the_last_state_is_saved(vlm, records, tmp_path, monkeypatch):
    """Only another process receives it, after the lists of both were joined for the last step."""
    run = make_run(vlm, records)
    joined_lists = iter([[], [signal.SIGINT]])
    monkeypatch.setattr(loop, "join_lists", lambda local_list: next(joined_lists))
    schedule = Schedule(steps=1, batch_size=1, lr=1e-3, projector_lr=1e-3, seed=0)

    with pytest.raises(KeyboardInterrupt):
        run.train(tmp_path, schedule)

    assert (tmp_path / "state.safetensors").exists()


def test_a_finished_run_is_left_as_it_is(vlm, records, tmp_path):
    """Resuming a finished run takes no step, and puts the trained weights in place."""
    run = make_run(vlm, records)
    run.train(tmp_path)
    log = (tmp_path / "metrics.jsonl").read_bytes()
    trained_weights = run.weights()
    for parameter in run.policy.parameters().values():
        parameter.data.zero_()

    run.train(tmp_path, method=DyingMethod(run.method, 0))

    assert (tmp_path / "metrics.jsonl").read_bytes() == log
    weights = run.weights()
    assert all(torch.equal(weights[name], trained_weights[name]) for name in weights)


# --- what cannot be resumed ---


@pytest.fixture
def killed_run(vlm, records, tmp_path):
    """Return a run that was killed after two steps. Its log and its state are in tmp_path."""
    run = make_run(vlm, records)
    with pytest.raises(MemoryError):
        run.train(tmp_path, method=DyingMethod(run.method, 2))
    return run


def without_metadata(tensors):
    """Return a state that does not say how many steps it has done."""
    return tensors, None


def with_a_word_for_a_step(tensors):
    return tensors, {"step": "two"}


def with_a_tensor_missing(tensors):
    first = next(iter(tensors))
    return {name: tensors[name] for name in tensors if name != first}, {"step": "2"}


def with_a_weight_of_another_shape(tensors):
    """Return a state in which a matrix has one element. A copy would fill the right matrix."""
    name = next(name for name in tensors if name.startswith("weight.") and tensors[name].ndim > 1)
    return tensors | {name: torch.zeros(1)}, {"step": "2"}


@pytest.mark.parametrize(
    "damage, problem",
    [
        (without_metadata, "not a complete state.safetensors"),
        (with_a_word_for_a_step, "invalid literal"),
        (with_a_tensor_missing, "is missing"),
        (with_a_weight_of_another_shape, r"has shape \(1,\)"),
    ],
)
def test_a_damaged_state_is_refused_in_one_line(killed_run, tmp_path, damage, problem):
    path = tmp_path / "state.safetensors"
    tensors, metadata = damage(load_file(path))
    save_file(tensors, path, metadata)

    with pytest.raises(InputError, match=problem) as caught:
        killed_run.train(tmp_path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "has 0 lines of the 2 steps"),
        ("{\n", "cannot resume from it"),
        ('{"step": 0, "grad_norm": "1"}\n[]\n', "line 1: not the numbers of a training step"),
        ('{"step": 0, "grad_norm": 1}\n[1]\n', "line 2: not the numbers of a training step"),
        ('{"step": 0, "loss": 1}\n{}\n', "line 1: not the numbers of a training step"),
    ],
    ids=["empty", "broken", "a text", "a list", "no norm"],
)
def test_a_damaged_log_is_refused_in_one_line(killed_run, tmp_path, text, problem):
    path = tmp_path / "metrics.jsonl"
    path.write_text(text)

    with pytest.raises(InputError, match=problem) as caught:
        killed_run.train(tmp_path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
