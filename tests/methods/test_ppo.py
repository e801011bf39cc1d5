"""Test PPO: its gradient in the first pass, and what its clips hold back in the second one."""

import math
from dataclasses import dataclass

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
        "ppo", vlm, records, num_records=2, reward_model=reward_model, reward_statistics=statistics
    )
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, _ = run.method.loss(examples, batch=examples)

    rollouts = []
    for question, example in zip(run.questions(examples), examples, strict=True):
        (response,) = example.responses
        (reward,) = score_slowly(reward_model, vlm, example, statistics)
        rollouts.append((*question, response, reward))
    slow_loss = reference.ppo_loss(vlm.model, run.ref_model, run.policy.scalar_head, rollouts, BETA)
    assert len(examples) == 2
    assert_equal_gradient(run, loss, slow_loss)


@dataclass
class TokenScores:
    """Log-probs and values of all tokens of all responses, as lists of numbers."""

    logps: list
    values: list


def score_tokens_slowly(run, examples):
    """Compute log-probs and values with the reference implementation."""
    scores = TokenScores(logps=[], values=[])
    model = run.vlm.model
    for question, example in zip(run.questions(examples), examples, strict=True):
        (ids,) = example.responses
        logps = reference.token_logps(model, *question, ids)
        values = reference.token_values(model, run.policy.scalar_head, *question, ids)
        scores.logps += [float(logp) for logp in logps]
        scores.values += [float(value) for value in values]
    return scores


def concat(examples, field_name):
    """Return a field of all rollouts as one list of numbers."""
    numbers = []
    for example in examples:
        for tensor in getattr(example.rollout, field_name):
            numbers += tensor.tolist()
    return numbers


@torch.no_grad()
def test_ratio_and_value_of_each_token_are_clipped(vlm, records):
    """After the policy and its values have moved: the loss by hand, token by token.

    Means are over all tokens of both responses.
    """
    run = make_run("ppo", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)
    old = score_tokens_slowly(run, examples)

    # Smaller values are nearer to their returns, some of them by more than the clip.
    smaller_head = 0.85 * run.policy.scalar_head.weight
    run.move_policy(0.01)
    run.policy.scalar_head.weight.copy_(smaller_head)
    new = score_tokens_slowly(run, examples)
    loss, metrics = run.method.loss(examples, batch=examples)

    advantages = concat(examples, "advantages")
    returns = concat(examples, "returns")
    policy_losses = []
    value_losses = []
    ratio_was_clipped = []
    value_was_clipped = []
    for i in range(len(returns)):
        ratio = math.exp(new.logps[i] - old.logps[i])
        clipped_ratio = min(max(ratio, 0.8), 1.2)
        policy_losses.append(-min(ratio * advantages[i], clipped_ratio * advantages[i]))
        ratio_was_clipped.append(ratio != clipped_ratio)

        value_change = min(max(new.values[i] - old.values[i], -0.2), 0.2)
        error = abs(new.values[i] - returns[i])
        clipped_error = abs(old.values[i] + value_change - returns[i])
        value_losses.append(0.5 * max(error, clipped_error) ** 2)
        value_was_clipped.append(clipped_error > error + 0.01)
    assert any(ratio_was_clipped)
    assert any(value_was_clipped) and not all(value_was_clipped)
    policy_loss = sum(policy_losses) / len(policy_losses)
    value_loss = sum(value_losses) / len(value_losses)
    assert metrics["value_loss"] == pytest.approx(value_loss, rel=1e-4)
    assert loss.item() == pytest.approx(policy_loss + 0.1 * value_loss, rel=1e-4)
