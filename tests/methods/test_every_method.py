"""Test what holds for every method: micro-batches, the fixed reference, the margin at step 0."""

import math

import pytest
import torch
from conftest import TINY
from method_runs import (
    BETA,
    METHOD_NAMES,
    make_run,
    relative_distance,
    short_records,
    sum_over_microbatches,
)

from minialign.logprobs import response_logps
from minialign.losses import PAIR_LOSSES
from minialign.methods.base import encode_example, microbatches, pack_examples
from minialign.methods.registry import METHODS
from minialign.models.loading import load_vlm
from minialign.neighbor_losses import NEIGHBOR_LOSSES
from minialign.training.loop import Schedule, train


def test_every_method_is_tested_here():
    """The names of method_runs.py are the table of methods.

    Two names differ: what `bdhs` samples before training is a pair of the data for the loss, whose
    names stand for `dpo` and `bdhs`. With --gamma online BDHS is called averaged-bdhs, and
    distillation has a name for each value of --on. dpo-distill is dpo with --distill-weight.
    """
    other_names = {"averaged-bdhs", "distill-reference", "distill-policy", "dpo-distill"}
    other_names |= {*PAIR_LOSSES, *NEIGHBOR_LOSSES}
    assert set(METHOD_NAMES) - other_names == METHODS.keys() - {"dpo", "bdhs"}
    assert "dpo" in PAIR_LOSSES


@pytest.mark.parametrize("name", ["reinforce", "bdhs"])
def test_an_unknown_method_has_no_run(vlm, records, name):
    """A method that is missing in method_runs.py is not tested as another one."""
    with pytest.raises(ValueError, match=name):
        make_run(name, vlm, records)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_microbatches_add_up_to_the_whole_batch(vlm, records, name):
    """Loss, gradient and metrics are the same in micro-batches of three, two and one examples."""
    run = make_run(name, vlm, records, num_records=3)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)
    whole_loss, whole_metrics = sum_over_microbatches(run.method, examples)
    whole_gradient = run.gradient(whole_loss)

    longest = max(example.length for example in examples)
    for max_tokens, num_microbatches in ((2 * longest, 2), (1, 3)):
        assert len(microbatches(examples, max_tokens)) == num_microbatches
        loss, metrics = sum_over_microbatches(run.method, examples, max_tokens)
        assert loss.item() == pytest.approx(whole_loss.item(), rel=1e-5, abs=1e-6)
        assert metrics == pytest.approx(whole_metrics, rel=1e-4, abs=1e-5)
        assert relative_distance(run.gradient(loss), whole_gradient) <= 1e-5


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_the_reference_never_moves(vlm, records, tmp_path, rank, name):
    """Two steps at a high learning rate change the policy, and not one bit of the reference."""
    run = make_run(name, vlm, records, num_records=2, rank=rank)
    probe = []
    for record in short_records(records)[:2]:
        probe.append(encode_example(vlm, record, [record.chosen, record.rejected]))
    before = reference_logps(run, probe)

    train(run.policy, run.method, run.examples, Schedule(2, 2, 1e-2, 1e-2, 0), tmp_path)

    assert torch.equal(reference_logps(run, probe), before)
    with torch.no_grad():
        policy_logps, _ = response_logps(vlm.model, pack_examples(vlm, probe))
    assert not torch.allclose(policy_logps, before, atol=0.01)


def test_methods_without_a_reference():
    """Supervised training and the ranking loss know the policy alone."""
    assert [name for name in METHODS if not METHODS[name].reads_reference] == ["sft", "reward"]


@pytest.mark.parametrize("name", ["sft", "reward"])
def test_a_method_without_a_reference_learns_the_same_when_it_is_forgotten(records, tmp_path, name):
    """Rank 0 then holds one model in place of two."""
    trained = []
    for forgets in (False, True):
        run = make_run(name, load_vlm(TINY / "model"), records, rank=0)
        if forgets:
            run.policy.forget_reference()
        folder = tmp_path / str(forgets)
        folder.mkdir()
        train(run.policy, run.method, run.examples, Schedule(2, 3, 1e-2, 1e-2, 0), folder)
        trained.append(run.policy.parameters())

    with_reference, without = trained
    for parameter_name, parameter in with_reference.items():
        assert torch.equal(without[parameter_name], parameter)


def reference_logps(run, examples):
    """Return the reference's log-probs (B, k) of the examples' responses."""
    with run.policy.reference() as model:
        logps, _ = response_logps(model, pack_examples(run.vlm, examples))
    return logps


LOSSES_AT_STEP_0 = {
    "dpo": math.log(2),
    "ipo": 1 / (4 * BETA**2),
    "ipo-mean": 1 / (4 * BETA**2),
    "slic": 1.0,
    "mdpo": 3 * math.log(2),
    "reward": math.log(2),
    "online-dpo": math.log(2),
    "online-bdhs": math.log(2),
    "averaged-bdhs": math.log(2),
    "distortion": math.log(2),
}
# SFT, the calibration loss, policy gradients and distillation have no margin to a reference, and
# half of the pairs of mixed-dpo have stored reference log-probs, of another layout. The loss of MPO
# holds that of SFT (test_mpo.py).
WITHOUT_EXACT_MARGIN = {"sft", "slic-calibration", "mpo", "mixed-dpo", "rloo", "ppo", "grpo"}
WITHOUT_EXACT_MARGIN |= {"distill", "distill-reference", "distill-policy", "dpo-distill"}


def test_every_method_has_a_loss_at_step_0():
    assert LOSSES_AT_STEP_0.keys() | WITHOUT_EXACT_MARGIN == set(METHOD_NAMES)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name, expected_loss", LOSSES_AT_STEP_0.items())
def test_the_margin_is_exactly_0_at_step_0(vlm, records, rank, name, expected_loss):
    """Policy and reference are one model there, and compute the same bits in the same layout.

    A scalar head starts at zero, so a reward model's scores are equal as well.
    """
    run = make_run(name, vlm, records, rank=rank)
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = sum_over_microbatches(run.method, examples)

    assert metrics["margin"] == 0.0
    assert metrics["accuracy"] == 0.5
    assert loss.item() == pytest.approx(expected_loss, rel=2e-7)  # rounding of mean and beta alone
