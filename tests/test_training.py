"""The loop: every example once an epoch, micro-batches that change nothing, a schedule by hand, restarts to the bit."""

import json
import os
import signal
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

from minialign.data.packing import pack
from minialign.methods.base import (
    Method,
    add_reference_logps,
    encode_example,
    microbatches,
    pack_examples,
)
from minialign.methods.preference import PreferenceMethod
from minialign.models.policy import Policy
from minialign.training.loop import Schedule, batch_indices, lr_multiplier, train
from minialign.utils.files import InputError

QUICK = Schedule(steps=5, batch_size=3, lr=1e-3, projector_lr=5e-4, seed=0, save_every=2)


def ready(vlm, records, rank, loss="dpo", n=5):
    """(policy, method, examples) for a short run."""
    policy = Policy(vlm.model, rank, 8, seed=1)
    examples = [
        encode_example(vlm, record, [record.chosen, "A red cup is here."]) for record in records[:n]
    ]
    add_reference_logps(policy, vlm, examples)
    return policy, PreferenceMethod(vlm, loss, 0.3), examples


def log_of(folder):
    """The log without what may differ between two runs."""
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


# --- order, micro-batches, rate ---


@pytest.mark.parametrize("n, batch", [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_covers_each_example_once(n, batch):
    """The stream of all steps, cut into epochs of n, holds every index once in each; epochs and seeds differ in order."""
    schedule = Schedule(n, batch, 1, 1, 0)
    stream = [index for step in range(n) for index in batch_indices(n, schedule, step)]
    epochs = [stream[first : first + n] for first in range(0, len(stream), n)]
    assert len(epochs) == batch and all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n == 10:
        assert (
            epochs[0] != epochs[1]
            and batch_indices(n, Schedule(n, batch, 1, 1, 1), 0) != stream[:batch]
        )


def test_microbatches_keep_every_example_and_the_budget(vlm, records):
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:9]]
    lengths = [pack(vlm.model, pack_examples(vlm, [e])).ids.shape[1] for e in examples]
    assert (
        lengths == [e.length for e in examples] and min(lengths) > 64
    )  # picture vectors count: they fill memory as words do
    length = {id(e): n for e, n in zip(examples, lengths)}
    parts = microbatches(examples, 300)
    assert (
        Counter(id(e) for part in parts for e in part) == Counter(map(id, examples))
        and len(parts) > 1
    )
    assert all(max(length[id(e)] for e in part) * len(part) <= 300 for part in parts)
    assert [len(part) for part in microbatches(examples, 1)] == [
        1
    ] * 9  # one that is too long stands alone
    assert (
        len(microbatches(examples[:1] * 3, 10**6)[0]) == 3
    )  # the same example twice or more, as with tiny data


def test_the_rate_by_hand():
    """103 steps: 3 % warm-up is 3 steps (1/3, 2/3, 1), then half a cosine over 100: 1 at its start, 1/2 in the middle, near 0 at its end."""
    schedule = Schedule(103, 1, 1, 1, 0)
    assert [lr_multiplier(step, schedule) for step in (0, 1, 2, 3, 53)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 0.5]
    )
    assert lr_multiplier(28, schedule) == pytest.approx(
        0.5 + 0.5 * 2**-0.5
    )  # a quarter of the way: cos 45 degrees
    assert 0 < lr_multiplier(102, schedule) < 3e-4
    assert lr_multiplier(0, Schedule(1, 1, 1, 1, 0)) == 1.0  # a run of one step has the full rate


def test_the_constant_rate_by_hand():
    """The same warm-up, then the peak to the end."""
    schedule = Schedule(103, 1, 1, 1, 0, constant=True)
    assert [lr_multiplier(step, schedule) for step in (0, 1, 2, 3, 53, 102)] == pytest.approx(
        [1 / 3, 2 / 3, 1, 1, 1, 1]
    )


# --- the loop ---


def test_a_step_by_hand(vlm, records, tmp_path):
    """Adam's first step moves every weight by its rate against the gradient's sign, the projector by its own; the log says so."""
    policy, method, examples = ready(vlm, records, 0)
    before = {name: p.detach().clone() for name, p in policy.parameters().items()}
    train(policy, method, examples, Schedule(1, 5, 1e-4, 3e-4, 0), tmp_path)
    for name, p in policy.parameters().items():
        steps = (p - before[name]).abs()
        rounding = 1e-7 * before[name].abs().max()
        wanted = 3e-4 if name.startswith("multi_modal_projector.") else 1e-4
        assert 0.95 * wanted <= steps.max() <= wanted * 1.001 + rounding
    (line,) = log_of(tmp_path)
    assert (
        line["step"] == 0
        and line["lr"] == 1e-4
        and line["loss"] == pytest.approx(0.6931, abs=1e-3)
        and line["grad_norm"] > 0
    )
    assert set(line) == {
        "step",
        "loss",
        "logp_chosen",
        "logp_rejected",
        "ref_logp_chosen",
        "ref_logp_rejected",
        "margin",
        "accuracy",
        "lr",
        "grad_norm",
    }


def test_a_step_collects_once_and_learns_from_it_several_times(vlm, records, tmp_path):
    """`collect` gets the batch of the step and its number; its examples alone are learnt from, its means logged; each pass is a step of Adam's."""
    policy, method, examples = ready(vlm, records, 4)
    asked, learnt = [], []

    def collect(batch, step):
        asked.append((batch, step))
        return batch[:2], {"found": 2 * step}

    def loss(part, whole):
        learnt.append((part, whole))
        return method.loss(part, whole)

    schedule = Schedule(2, 3, 1e-3, 1e-3, 0, max_tokens_per_microbatch=1)
    train(policy, Method(collect, loss, 3), examples, schedule, tmp_path)
    assert asked == [
        ([examples[i] for i in batch_indices(5, schedule, step)], step) for step in (0, 1)
    ]
    assert [whole for _, whole in learnt] == [
        asked[step][0][:2] for step in (0, 1) for _ in range(3 * 2)
    ]  # one by one, three times
    assert Counter(id(example) for part, _ in learnt for example in part) == Counter(
        id(example) for batch, _ in asked for example in 3 * batch[:2]
    )
    assert [line["found"] for line in log_of(tmp_path)] == [0, 2]
    assert {
        float(value)
        for name, value in load_file(tmp_path / "state.safetensors").items()
        if name.startswith("step.")
    } == {6.0}


def test_the_loss_falls_and_the_margin_grows(vlm, records, tmp_path):
    policy, method, examples = ready(vlm, records, 4)
    schedule = Schedule(8, 5, 1e-4, 1e-4, 0)
    train(policy, method, examples, schedule, tmp_path)
    log = log_of(tmp_path)
    assert (
        log[-1]["loss"] < log[0]["loss"]
        and log[-1]["margin"] > log[0]["margin"]
        and log[-1]["accuracy"] > 0.5
    )
    rates = [lr_multiplier(step, schedule) * 1e-4 for step in range(8)]
    assert [line["lr"] for line in log] == rates


def breaking(method, calls):
    """`method`, until it has been called that often: then the process 'dies'."""
    left = [calls]

    def step(examples, whole):
        left[0] -= 1
        if left[0] < 0:
            raise MemoryError("killed")
        return method.loss(examples, whole)

    return method._replace(loss=step)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("calls", [1, 3, 4])
def test_a_killed_run_goes_on_to_the_bit(vlm, records, tmp_path, rank, calls):
    """Killed before the first checkpoint, between two, and right at one (states lie after steps 2, 4, 5): weights, moments and log are
    those of an uninterrupted run. The log had run ahead of the checkpoint; those lines are written anew."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    policy, method, examples = ready(vlm, records, rank)
    start = {name: p.detach().clone() for name, p in policy.parameters().items()}

    def again():
        """The state of a new process: the policy as it began."""
        for name, p in policy.parameters().items():
            p.data.copy_(start[name])
            p.grad = None

    train(policy, method, examples, QUICK, whole)
    again()
    with pytest.raises(MemoryError):
        train(policy, breaking(method, calls), examples, QUICK, broken)
    assert len(log_of(broken)) == calls
    again()
    train(policy, method, examples, QUICK, broken)
    assert log_of(broken) == log_of(whole) and len(log_of(whole)) == 5
    state, other = (load_file(folder / "state.safetensors") for folder in (broken, whole))
    assert set(state) == set(other) and all(torch.equal(state[name], other[name]) for name in state)
    assert all(torch.equal(state[f"weight.{name}"], p) for name, p in policy.parameters().items())


def test_gradients_are_clipped_to_length_one(vlm, records, tmp_path, monkeypatch):
    """What the optimiser is given; the log has the length before."""
    policy, method, examples = ready(vlm, records, 4)
    lengths, step = [], torch.optim.AdamW.step

    def measured(self, *args, **kwargs):
        lengths.append(
            float(
                torch.cat(
                    [p.grad.flatten() for group in self.param_groups for p in group["params"]]
                ).norm()
            )
        )
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    train(policy, method, examples, QUICK, tmp_path)
    before = [line["grad_norm"] for line in log_of(tmp_path)]
    assert max(before) > 1.1 and lengths == pytest.approx(
        [min(1.0, length) for length in before], rel=1e-4
    )


def shrunk(state):
    name = next(name for name in state if name.startswith("weight.") and state[name].ndim > 1)
    return state | {name: torch.zeros(1)}


@pytest.mark.parametrize(
    "file, spoil, problem",
    [
        ("state.safetensors", lambda state: (state, None), "not a whole state.safetensors"),
        ("state.safetensors", lambda state: (state, {"step": "two"}), "invalid literal"),
        (
            "state.safetensors",
            lambda state: (dict(list(state.items())[1:]), {"step": "2"}),
            "is missing",
        ),
        ("state.safetensors", lambda state: (shrunk(state), {"step": "2"}), r"has shape \(1,\)"),
        ("metrics.jsonl", "", "has 0 lines of the 2 steps"),
        ("metrics.jsonl", "{\n", "cannot resume from it"),
    ],
)
def test_what_is_not_this_runs_is_not_gone_on_with(vlm, records, tmp_path, file, spoil, problem):
    """One clear line; a weight of another shape is not spread over the right one."""
    policy, method, examples = ready(vlm, records, 4)
    with pytest.raises(MemoryError):
        train(policy, breaking(method, 2), examples, QUICK, tmp_path)
    path = tmp_path / file
    if callable(spoil):
        state, metadata = spoil(load_file(path))
        save_file(state, path, metadata)
    else:
        path.write_text(spoil)
    with pytest.raises(InputError, match=problem) as caught:
        train(policy, method, examples, QUICK, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_log_line_cut_in_half_is_written_anew(vlm, records, tmp_path):
    policy, method, examples = ready(vlm, records, 4)
    start = {name: p.detach().clone() for name, p in policy.parameters().items()}
    train(policy, method, examples, QUICK, tmp_path / "whole")
    for name, p in policy.parameters().items():
        p.data.copy_(start[name])
    with pytest.raises(MemoryError):
        train(policy, breaking(method, 3), examples, QUICK, tmp_path / "torn")
    log = tmp_path / "torn" / "metrics.jsonl"
    log.write_text(log.read_text()[:-20])
    train(policy, method, examples, QUICK, tmp_path / "torn")
    assert log_of(tmp_path / "torn") == log_of(tmp_path / "whole")


def test_ctrl_c_finishes_the_step_saves_it_and_goes_up(vlm, records, tmp_path):
    """A SIGINT inside step 1: its line and its state are there (though no checkpoint was due), and the handler is the old one again."""
    policy, method, examples = ready(vlm, records, 4)
    calls, handler = [], signal.getsignal(signal.SIGINT)

    def step(part, whole):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return method.loss(part, whole)

    with pytest.raises(KeyboardInterrupt):
        train(
            policy,
            method._replace(loss=step),
            examples,
            Schedule(5, 3, 1e-3, 1e-3, 0, save_every=100),
            tmp_path,
        )
    assert len(log_of(tmp_path)) == len(calls) == 2 and signal.getsignal(signal.SIGINT) == handler
    train(policy, method, examples, Schedule(5, 3, 1e-3, 1e-3, 0, save_every=100), tmp_path)
    assert [line["step"] for line in log_of(tmp_path)] == [0, 1, 2, 3, 4]


def test_a_finished_run_is_left_as_it_is(vlm, records, tmp_path):
    """Going on with a run that is whole trains no step, and puts its weights in place."""
    policy, method, examples = ready(vlm, records, 4)
    train(policy, method, examples, QUICK, tmp_path)
    before, weights = (
        (tmp_path / "metrics.jsonl").read_bytes(),
        {name: p.detach().clone() for name, p in policy.parameters().items()},
    )
    for p in policy.parameters().values():
        p.data.zero_()
    train(policy, breaking(method, 0), examples, QUICK, tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert all(torch.equal(weights[name], p) for name, p in policy.parameters().items())
