"""Test GRPO: loss and gradient of the slow form, before and after its clip acts."""

import pytest
import torch
from conftest import token_logps_per_response
from method_runs import BETA, assert_equal_loss_and_gradient, make_run

from minialign import reference, reference_neighbors
from minialign.methods.base import pack_examples
from minialign.training.loop import Schedule, train
from minialign.utils.files import read_jsonl


def slow_rollouts(run, examples):
    """Return the examples of `reference_neighbors.grpo_loss`, scored by the policy as it is now."""
    rollouts = []
    for question, example in zip(run.questions(examples), examples, strict=True):
        old_logps = []
        for ids in example.responses:
            logps = reference.token_logps(run.vlm.model, *question, ids)
            old_logps.append([float(logp) for logp in logps])
        rewards = example.rollout.normalized_rewards.tolist()
        rollouts.append((*question, example.responses, rewards, old_logps))
    return rollouts


def test_loss_and_gradient_equal_the_reference(vlm, records):
    """After the policy has moved so far from the one that sampled that some tokens are clipped."""
    run = make_run("grpo", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)
    with torch.no_grad():
        rollouts = slow_rollouts(run, examples)
        old_logps = torch.cat(token_logps_per_response(vlm.model, pack_examples(vlm, examples)))
    run.move_policy(0.01)

    loss, _ = run.method.loss(examples, batch=examples)

    with torch.no_grad():
        logps = torch.cat(token_logps_per_response(vlm.model, pack_examples(vlm, examples)))
    is_clipped = ((logps - old_logps).exp() - 1).abs() > 0.2
    assert is_clipped.any() and not is_clipped.all()
    slow_loss = reference_neighbors.grpo_loss(vlm.model, run.ref_model, rollouts, BETA)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def test_rewards_that_are_all_the_same_teach_nothing(vlm, records):
    """The advantages are 0, not noise divided by a tiny deviation, and there is no KL yet."""
    run = make_run("grpo", vlm, records, num_records=1)
    run.method.reward_model.score = lambda records, texts: torch.full((1, 4), 3.0)
    examples, _ = run.method.collect(run.examples, step=0)

    loss, _ = run.method.loss(examples, batch=examples)

    assert examples[0].rollout.advantages.tolist() == [0.0] * 4
    assert float(run.gradient(loss).norm()) < 1e-5


@pytest.mark.parametrize("name", ["rloo", "ppo", "grpo"])
def test_more_passes_take_more_steps_on_the_same_responses(vlm, records, tmp_path, name):
    """The responses are sampled once, and the log has the loss of the last pass."""
    run = make_run(name, vlm, records, num_records=2)
    run.method.passes = 3
    sampled_at = []
    collect = run.method.collect

    def noting_collect(batch, step):
        sampled_at.append(step)
        return collect(batch, step)

    run.method.collect = noting_collect
    losses = []
    loss = run.method.loss

    def noting_loss(micro_batch, batch):
        value, metrics = loss(micro_batch, batch)
        losses.append(value.item())
        return value, metrics

    run.method.loss = noting_loss
    train(run.policy, run.method, run.examples, Schedule(1, 2, 1e-2, 1e-2, 0), tmp_path)

    assert sampled_at == [0]
    assert len(losses) == 3
    assert len(set(losses)) == 3
    (line,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert line["loss"] == losses[-1]
