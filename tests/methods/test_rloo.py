"""Test RLOO: its gradient is that of REINFORCE, and its clip acts on whole responses."""

import math

import pytest
import torch
from method_runs import BETA, assert_equal_gradient, load_random_reward_model, make_run
from slow_rewards import score_slowly

from minialign import reference


def test_gradient_equals_the_reference(vlm, records):
    """On rollouts that were collected once, with the rewards of a real reward model.

    The loss itself is another expression with the same gradient, so it is not compared.
    """
    reward_model = load_random_reward_model()
    statistics = (0.5, 1.5)
    run = make_run(
        "rloo",
        vlm,
        records,
        num_records=2,
        reward_model=reward_model,
        reward_statistics=statistics,
    )
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, _ = run.method.loss(examples, batch=examples)

    rollouts = []
    for question, example in zip(run.questions(examples), examples, strict=True):
        rewards = score_slowly(reward_model, vlm, example, statistics)
        rollouts.append((*question, example.responses, rewards))
    slow_loss = reference.rloo_loss(vlm.model, run.ref_model, rollouts, BETA)
    assert len(examples) == 2
    assert_equal_gradient(run, loss, slow_loss)


@torch.no_grad()
def test_the_ratio_of_a_whole_response_is_clipped(vlm, records):
    """After the policy has moved: the loss by hand from the slow log-probs of both policies."""
    run = make_run("rloo", vlm, records, num_records=1)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)
    responses = examples[0].responses
    (question,) = run.questions(examples)
    old_logps = [float(reference.response_logp(vlm.model, *question, ids)) for ids in responses]

    run.move_policy(0.01)
    loss, _ = run.method.loss(examples, batch=examples)

    ratios = []
    losses = []
    advantages = examples[0].rollout.advantages.tolist()
    for ids, old_logp, advantage in zip(responses, old_logps, advantages, strict=True):
        logp = float(reference.response_logp(vlm.model, *question, ids))
        ratio = math.exp(logp - old_logp)
        clipped_ratio = min(max(ratio, 0.8), 1.2)
        ratios.append(ratio)
        losses.append(-min(ratio * advantage, clipped_ratio * advantage))
    was_clipped = [not 0.8 < ratio < 1.2 for ratio in ratios]
    assert any(was_clipped) and not all(was_clipped)
    assert loss.item() == pytest.approx(sum(losses) / 4, rel=1e-4)
