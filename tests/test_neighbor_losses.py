"""These tests check the losses of methods beside the paper: by hand, at limits, and beside TRL."""

import json
import math

import pytest
import torch
from conftest import ROOT

from minialign import reference_neighbors
from minialign.losses import grpo_advantages, grpo_loss, kl_estimates, ppo_policy_loss

TRL = json.loads((ROOT / "tests" / "golden" / "trl_losses.json").read_text())

# --- GRPO


def test_grpo_advantages_worked_by_hand():
    """The rewards 1, 2, 6 have mean 3 and variance (4 + 1 + 9) / 2 = 7.

    Prompts do not mix. Equal rewards say nothing.
    """
    advantages = grpo_advantages(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))

    std = math.sqrt(7) + 1e-4
    assert advantages[0].tolist() == pytest.approx([-2 / std, -1 / std, 3 / std])
    assert advantages[1].tolist() == [0.0, 0.0, 0.0]
    slow_advantages = reference_neighbors.grpo_advantages([1.0, 2.0, 6.0])
    assert slow_advantages == pytest.approx([-2 / std, -1 / std, 3 / std])


@pytest.mark.parametrize(
    "logratio, expected_estimate, expected_slope",
    [
        (0.0, 0.0, 0.0),
        (math.log(2), 2 - math.log(2) - 1, -1.0),
        (-math.log(4), 0.25 + math.log(4) - 1, 0.75),
        (1e-4, 5e-9, -1e-4),  # no rounding error of a difference near 0
        (-1e4, 1e4 - 1, 1.0),
        (1e4, math.exp(20) * (1e4 - 19), -math.exp(20)),  # the tangent
    ],
)
def test_kl_estimates_worked_by_hand(logratio, expected_estimate, expected_slope):
    """exp(x) - x - 1 at x = log ref - log pi, and its slope 1 - exp(x) in log pi."""
    logps = torch.tensor([0.0], requires_grad=True)

    estimate = kl_estimates(logps, torch.tensor([logratio]))
    estimate.sum().backward()

    assert estimate.item() == pytest.approx(expected_estimate, rel=1e-3)
    assert logps.grad.item() == pytest.approx(expected_slope, rel=1e-3)


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_grpo_loss_is_finite_10000_nats_apart(gap):
    """Whichever of policy, old policy and reference is the unlikely one."""
    for logps_of_token in ((gap, 0.0, 0.0), (0.0, gap, 0.0), (0.0, 0.0, gap)):
        logps, old_logps, ref_logps = torch.tensor(logps_of_token)[:, None]
        logps.requires_grad_()

        for advantage in (1.0, -1.0):
            loss = grpo_loss(
                logps, old_logps, ref_logps, advantages=torch.tensor([advantage]), beta=0.1
            )
            (gradient,) = torch.autograd.grad(loss.sum(), logps)
            assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_grpo_loss_without_kl_is_the_clipped_surrogate():
    """The limit of beta to 0, in both directions of the advantage."""
    logps = torch.tensor([-1.0, -2.0, -0.5])
    old_logps = torch.tensor([-1.2, -1.0, -0.5])
    advantages = torch.tensor([1.0, -2.0, 0.5])

    loss = grpo_loss(logps, old_logps, logps - 3, advantages=advantages, beta=1e-12)

    expected = ppo_policy_loss(logps, old_logps, advantages)
    assert torch.allclose(loss, expected, rtol=0, atol=1e-6)


def test_grpo_equals_trl():
    """Advantages, loss and gradient of TRL's own code, made by tests/golden/make_trl_losses.py."""
    golden = TRL["grpo"]
    logps = torch.tensor(golden["logps"], requires_grad=True)
    lengths = torch.tensor(golden["lengths"])

    advantages = grpo_advantages(torch.tensor(golden["rewards"]))
    losses = grpo_loss(
        logps,
        torch.tensor(golden["old_logps"]),
        torch.tensor(golden["ref_logps"]),
        advantages=advantages.flatten().repeat_interleave(lengths),
        beta=golden["beta"],
    )
    of_responses = [losses_of_one.mean() for losses_of_one in losses.split(golden["lengths"])]
    loss = torch.stack(of_responses).mean()
    loss.backward()

    assert advantages.flatten().tolist() == pytest.approx(sum(golden["advantages"], []), abs=1e-5)
    assert loss.item() == pytest.approx(golden["loss"], abs=1e-5)
    assert logps.grad.tolist() == pytest.approx(golden["gradient"], abs=1e-5)


def test_kl_estimates_have_the_mean_of_the_divergence():
    """E[exp(x) - x - 1] = sum pi (ref / pi - 1) + KL = KL, over the tokens of a vocabulary."""
    policy = torch.tensor([0.5, 0.3, 0.2])
    reference = torch.tensor([0.2, 0.2, 0.6])

    estimates = kl_estimates(policy.log(), reference.log())

    divergence = (policy * (policy / reference).log()).sum()
    assert (policy * estimates).sum().item() == pytest.approx(divergence.item(), rel=1e-6)


@pytest.mark.parametrize(
    "ratio, advantage, expected_surrogate, expected_slope",
    [(1.1, 2.0, 2.2, -2.2), (1.5, 2.0, 2.4, 0.0), (0.5, -2.0, -1.6, 0.0), (1.5, -2.0, -3.0, 3.0)],
)
def test_grpo_loss_worked_by_hand(ratio, advantage, expected_surrogate, expected_slope):
    """The reference has half the policy's probability: the estimate is 1/2 + log 2 - 1."""
    logp = torch.tensor([-3.0 + math.log(ratio)], requires_grad=True)
    old_logp = torch.tensor([-3.0])
    ref_logp = logp.detach() - math.log(2)

    loss = grpo_loss(logp, old_logp, ref_logp, advantages=torch.tensor([advantage]), beta=0.5)
    loss.sum().backward()

    expected_loss = -expected_surrogate + 0.5 * (math.log(2) - 0.5)
    assert loss.item() == pytest.approx(expected_loss, abs=1e-5)
    assert logp.grad.item() == pytest.approx(expected_slope + 0.5 * 0.5, abs=1e-5)
    slow_loss = reference_neighbors.grpo_token_loss(logp, old_logp, ref_logp, advantage, 0.5)
    assert slow_loss.item() == pytest.approx(expected_loss, abs=1e-5)
