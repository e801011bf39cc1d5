"""These tests check the losses of methods beside the paper: by hand, at limits, and beside TRL."""

import json
import math

import pytest
import torch
from conftest import ROOT

from minialign import reference_neighbors
from minialign.losses import PairLogps, ppo_policy_loss
from minialign.neighbor_losses import (
    anchor_loss,
    bco_loss,
    conditional_loss,
    grpo_advantages,
    grpo_loss,
    kl_estimates,
    merged_reference_logps,
    mpo_loss,
)

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
    losses_of_responses = losses.split(golden["lengths"])
    response_losses = [token_losses.mean() for token_losses in losses_of_responses]
    loss = torch.stack(response_losses).mean()
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


# --- MPO


def make_pairs(policy_logps, ref_logps) -> PairLogps:
    """Return the pairs with these log-probs, (chosen, rejected) each of the policy's and the ref's.

    The policy's have gradients.
    """
    policy_chosen_logps, policy_rejected_logps = policy_logps
    ref_chosen_logps, ref_rejected_logps = ref_logps
    num_pairs = len(policy_chosen_logps)
    return PairLogps(
        policy_chosen_logps=torch.tensor(policy_chosen_logps, requires_grad=True),
        policy_rejected_logps=torch.tensor(policy_rejected_logps, requires_grad=True),
        ref_chosen_logps=torch.tensor(ref_chosen_logps),
        ref_rejected_logps=torch.tensor(ref_rejected_logps),
        chosen_token_counts=torch.ones(num_pairs),
        rejected_token_counts=torch.ones(num_pairs),
    )


def slopes_of(loss, pairs) -> list:
    """Return the slopes of a loss in the policy's chosen and rejected log-probs."""
    gradients = torch.autograd.grad(
        loss.sum(), (pairs.policy_chosen_logps, pairs.policy_rejected_logps)
    )
    return torch.cat(gradients).tolist()


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_bco_loss_worked_by_hand():
    """-log s(1 - 0.25) - log s(-(-0.5 - 0.25)): both responses are 0.75 on their right side."""
    chosen_rewards = torch.tensor([1.0], requires_grad=True)

    loss = bco_loss(chosen_rewards, torch.tensor([-0.5]), shift=0.25)
    loss.backward()

    assert loss.item() == pytest.approx(-2 * math.log(sigmoid(0.75)))
    assert chosen_rewards.grad.item() == pytest.approx(-sigmoid(-0.75))


def test_mpo_loss_worked_by_hand():
    """At beta = 0.5 the rewards are 1 and -2, so the margin is 3. The chosen have 4 tokens."""
    pairs = make_pairs(([-6.0], [-9.0]), ([-8.0], [-5.0]))

    loss = mpo_loss(pairs, 0.5, shift=0.5, mean_chosen_tokens=4.0)

    dpo = -math.log(sigmoid(3))
    bco = -math.log(sigmoid(0.5)) - math.log(sigmoid(2.5))
    assert loss.item() == pytest.approx(0.8 * dpo + 0.2 * bco + 6 / 4, rel=1e-6)
    chosen_slope = 0.5 * (-0.8 * sigmoid(-3) - 0.2 * sigmoid(-0.5)) - 1 / 4
    rejected_slope = 0.5 * (0.8 * sigmoid(-3) + 0.2 * sigmoid(-2.5))
    assert slopes_of(loss, pairs) == pytest.approx([chosen_slope, rejected_slope], rel=1e-6)


def test_mpo_loss_for_beta_to_0_has_the_gradient_of_sft_alone():
    """Its value is then 1.2 ln 2 + SFT, and so it is where policy and reference agree."""
    pairs = make_pairs(([-6.0], [-9.0]), ([-8.0], [-5.0]))
    equal_pairs = make_pairs(([-6.0], [-9.0]), ([-6.0], [-9.0]))

    loss = mpo_loss(pairs, 1e-9, shift=0.0, mean_chosen_tokens=4.0)
    loss_at_step_0 = mpo_loss(equal_pairs, 0.5, shift=0.0, mean_chosen_tokens=4.0)

    assert loss.item() == pytest.approx(1.2 * math.log(2) + 1.5)
    assert loss_at_step_0.item() == pytest.approx(1.2 * math.log(2) + 1.5)
    assert slopes_of(loss, pairs) == pytest.approx([-0.25, 0.0], abs=1e-8)


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_mpo_loss_is_finite_10000_nats_apart(shift):
    pairs = make_pairs(([-1e4, 0.0, -2e4], [0.0, -1e4, -1e4]), ([0.0] * 3, [0.0] * 3))

    loss = mpo_loss(pairs, 1.0, shift=shift, mean_chosen_tokens=4.0)

    assert loss.isfinite().all()
    assert all(math.isfinite(slope) for slope in slopes_of(loss, pairs))


@pytest.mark.parametrize("golden", TRL["mpo"], ids=lambda golden: f"shift {golden['shift']}")
def test_mpo_loss_equals_trl(golden):
    """Loss and gradient of TRL's own code, made by tests/golden/make_trl_losses.py."""
    logps = torch.tensor(golden["logps"], requires_grad=True)
    summed_logps = [token_logps.sum() for token_logps in logps.split(golden["lengths"])]
    num_pairs = len(summed_logps) // 2
    token_counts = torch.tensor(golden["lengths"])
    pairs = PairLogps(
        policy_chosen_logps=torch.stack(summed_logps[:num_pairs]),
        policy_rejected_logps=torch.stack(summed_logps[num_pairs:]),
        ref_chosen_logps=torch.tensor(golden["ref_chosen_logps"]),
        ref_rejected_logps=torch.tensor(golden["ref_rejected_logps"]),
        chosen_token_counts=token_counts[:num_pairs],
        rejected_token_counts=token_counts[num_pairs:],
    )

    losses = mpo_loss(
        pairs,
        golden["beta"],
        shift=golden["shift"],
        mean_chosen_tokens=pairs.chosen_token_counts.float().mean().item(),
    )
    losses.mean().backward()

    assert losses.mean().item() == pytest.approx(golden["loss"], abs=1e-5)
    assert logps.grad.tolist() == pytest.approx(golden["gradient"], abs=1e-5)


# --- mDPO


def test_losses_of_mdpo_worked_by_hand():
    """At beta = 0.5: -log s(0.5 (3 - 1)) for the two images, -log s(0.5 * 3) for the anchor."""
    log_ratios = torch.tensor([3.0], requires_grad=True)
    damaged_log_ratios = torch.tensor([1.0], requires_grad=True)

    conditional = conditional_loss(log_ratios, damaged_log_ratios, 0.5)
    anchor = anchor_loss(log_ratios, 0.5)
    slopes = torch.autograd.grad(conditional + anchor, (log_ratios, damaged_log_ratios))

    assert conditional.item() == pytest.approx(-math.log(sigmoid(1)))
    assert anchor.item() == pytest.approx(-math.log(sigmoid(1.5)))
    assert slopes[0].item() == pytest.approx(-0.5 * sigmoid(-1) - 0.5 * sigmoid(-1.5))
    assert slopes[1].item() == pytest.approx(0.5 * sigmoid(-1))


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_losses_of_mdpo_at_their_limits(gap):
    """They are finite 10,000 nats apart, and ln 2 without a gradient for beta to 0."""
    log_ratios = torch.tensor([gap], requires_grad=True)

    loss = conditional_loss(log_ratios, torch.zeros(1), 1.0) + anchor_loss(log_ratios, 1.0)
    (slope,) = torch.autograd.grad(loss, log_ratios)
    loss_at_0 = conditional_loss(log_ratios, torch.zeros(1), 1e-12) + anchor_loss(log_ratios, 1e-12)
    (slope_at_0,) = torch.autograd.grad(loss_at_0, log_ratios)

    assert loss.item() == pytest.approx(max(0.0, -2 * gap), abs=1e-6)
    assert slope.isfinite().all()
    assert loss_at_0.item() == pytest.approx(2 * math.log(2), rel=1e-6)
    assert slope_at_0.item() == pytest.approx(0.0, abs=1e-11)


# --- MRPO


def test_merged_reference_worked_by_hand():
    """The gaps are 3 and 1, so the extra reference has weight 3/4. Nothing is clipped."""
    base_logps = torch.tensor([[-20.0, -21.0]])
    extra_logps = torch.tensor([[-19.5, -22.5]])

    ((chosen_logp, rejected_logp),) = merged_reference_logps(base_logps, extra_logps, eta=1.0)

    expected_chosen = -math.log(0.75 * math.exp(19.5) + 0.25 * math.exp(20))
    expected_rejected = -math.log(0.75 * math.exp(22.5) + 0.25 * math.exp(21))
    assert chosen_logp.item() == pytest.approx(expected_chosen, rel=1e-6)
    assert rejected_logp.item() == pytest.approx(expected_rejected, rel=1e-6)


def test_merged_reference_equals_the_slow_form():
    """Both sides of the band clip, and so do both references of a pair that is not clipped."""
    base_logps = torch.tensor([[-20.0, -21.0], [-9.0, -30.0], [-200.0, -180.0], [-5.0, -5.0]])
    extra_logps = torch.tensor([[-19.5, -22.0], [-8.9, -31.0], [-20.0, -400.0], [-5.0, -5.0]])

    merged = merged_reference_logps(base_logps, extra_logps)

    slow = reference_neighbors.merged_reference(base_logps.tolist(), extra_logps.tolist())
    assert merged.dtype == torch.float32
    assert torch.allclose(merged, torch.tensor(slow), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("base_logp", [-1e-3, -5.0, -1e4])
def test_two_equal_references_are_one(base_logp):
    """To the bit, and so are two that are merged in a band of no width."""
    base_logps = torch.tensor([[base_logp, 2 * base_logp], [base_logp, base_logp]])

    assert torch.equal(merged_reference_logps(base_logps, base_logps), base_logps)
    assert torch.equal(merged_reference_logps(base_logps, 3 * base_logps, eta=0.0), base_logps)


def test_merged_reference_is_finite_10000_nats_apart():
    """The band is a share of the base's log-prob: without the clip 1 / p decides."""
    base_logps = torch.tensor([[-1e4, -1.0], [-1.0, -1e4], [0.0, 0.0]])
    extra_logps = torch.tensor([[-1.0, -1e4], [-1e4, -2e4], [-1e4, 0.0]])

    clipped = merged_reference_logps(base_logps, extra_logps)
    unclipped = merged_reference_logps(base_logps, extra_logps, eta=1e9)

    assert clipped.isfinite().all() and unclipped.isfinite().all()
    assert (clipped - base_logps).abs().max() <= 0.1 * 1e4
    assert unclipped[0].tolist() == pytest.approx([-1e4, -1e4], abs=1.0)


def test_weight_belongs_to_the_reference_that_tells_the_responses_apart():
    """A reference with two equal log-probs has weight 0, whichever of the two it is."""
    unequal = torch.tensor([[-10.0, -14.0]])
    equal = torch.tensor([[-12.0, -12.0]])

    for base_logps, extra_logps in ((unequal, equal), (equal, unequal)):
        merged = merged_reference_logps(base_logps, extra_logps, eta=1.0)
        assert torch.allclose(merged, unequal, atol=2e-5)
