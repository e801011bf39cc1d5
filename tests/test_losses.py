"""Objectives as pure functions: values and slopes worked by hand, limits, and the closed-form optima of a world of two tokens."""

import math

import pytest
import torch

from minialign.losses import (
    PAIR_LOSSES,
    dpo_loss,
    gae_advantages,
    ipo_loss,
    log_ratio_margin,
    ppo_policy_loss,
    ppo_value_loss,
    reward_model_loss,
    rloo_advantages,
    sft_loss,
    slic_loss,
)

LN2 = math.log(2)


def log1pexp(x):
    return math.log(1 + math.exp(x))


def test_margin_by_hand():
    """Policy (-10, -12), reference (-11, -11.5): gains 1 and -0.5, h = 1.5."""
    assert log_ratio_margin(
        torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.5]])
    ).tolist() == [1.5]


@pytest.mark.parametrize(
    "loss, beta, h, value, slope",
    [
        (
            dpo_loss,
            0.5,
            2.0,
            math.log(1 + math.exp(-1)),
            -0.5 / (1 + math.e),
        ),  # -log s(1); derivative -beta (1 - s(1))
        (dpo_loss, 0.1, 0.0, LN2, -0.05),
        (ipo_loss, 0.5, 3.0, 4.0, 4.0),  # (3 - 1)^2, 2 (3 - 1)
        (ipo_loss, 0.1, 0.0, 25.0, -10.0),  # (0 - 5)^2, 2 (0 - 5)
        (slic_loss, 0.5, 1.0, 0.5, -0.5),
        (slic_loss, 0.5, 3.0, 0.0, 0.0),  # beyond the hinge
        (slic_loss, 0.2, 0.0, 1.0, -0.2),
    ],
)
def test_values_and_slopes_by_hand(loss, beta, h, value, slope):
    h = torch.tensor([h], requires_grad=True)
    out = loss(h, beta)
    out.sum().backward()
    assert out.item() == pytest.approx(value, abs=1e-6) and h.grad.item() == pytest.approx(
        slope, abs=1e-6
    )


def paired(name, logps, reference, counts, beta, smoothing=0.0):
    """(loss, its gradient for both log-probs) of one pair."""
    logps = torch.tensor([logps], requires_grad=True)
    out = PAIR_LOSSES[name](
        logps, torch.tensor([reference]), torch.tensor([counts]), beta, smoothing
    )
    out.sum().backward()
    return out.item(), logps.grad[0].tolist()


def test_smoothed_dpo_by_hand():
    """beta h = 1, a tenth of the labels wrong: .9 (-log s(1)) + .1 (-log s(-1)); flat where s(beta h) = .9."""
    value, slope = paired("dpo", [-10.0, -12.0], [-11.0, -11.0], [3, 3], 0.5, 0.1)  # h = 2
    wanted = -0.5 * (0.9 / (1 + math.e) - 0.1 / (1 + 1 / math.e))
    assert value == pytest.approx(
        0.9 * log1pexp(-1) + 0.1 * log1pexp(1)
    ) and slope == pytest.approx([wanted, -wanted], abs=1e-6)
    assert paired("dpo", [math.log(9) / 0.5, 0.0], [0.0, 0.0], [1, 1], 0.5, 0.1)[
        1
    ] == pytest.approx([0, 0], abs=1e-6)


def test_ipo_of_means_by_hand():
    """Gains 3 over 3 tokens and -2 over 2: h = 1 + 1, (2 - 1)^2, slopes 2 / 3 and -2 / 2; of sums h = 5, (5 - 1)^2."""
    pair = [-6.0, -8.0], [-9.0, -6.0], [3, 2], 0.5
    assert paired("ipo-mean", *pair) == (pytest.approx(1), pytest.approx([2 / 3, -1]))
    assert paired("ipo", *pair) == (pytest.approx(16), pytest.approx([8, -8]))


@pytest.mark.parametrize("reference", [[0.0, 0.0], [-7.0, 3.0]])
def test_calibration_by_hand_knows_no_reference(reference):
    """1 - .25 (-4 + 6) + .1 x .25 x 4 = .6; beyond the hinge the regulariser alone is left, .1 x .25 x 1."""
    assert paired("slic-calibration", [-4.0, -6.0], reference, [2, 2], 0.25) == (
        pytest.approx(0.6),
        pytest.approx([-0.275, 0.25]),
    )
    assert paired("slic-calibration", [-1.0, -9.0], reference, [2, 2], 0.25) == (
        pytest.approx(0.025),
        pytest.approx([-0.025, 0]),
    )


@pytest.mark.parametrize(
    "name, smoothing, value, slope",
    [
        ("dpo", 0.0, LN2, -0.2 / 2),
        ("dpo", 0.1, LN2, -0.2 * 0.8 / 2),  # the right labels less the wrong ones
        ("ipo", 0.0, 6.25, -1 / 0.2),
        ("ipo-mean", 0.0, 6.25, None),  # each side over its own tokens
        ("slic", 0.0, 1.0, -0.2),
    ],
)
def test_values_and_slopes_at_margin_0(name, smoothing, value, slope):
    """Where policy and reference agree, beta = .2; the rejected side's slope is the chosen one's, turned round."""
    found = paired(name, [-9.0, -4.0], [-9.0, -4.0], [5, 2], 0.2, smoothing)
    assert found == (
        pytest.approx(value),
        pytest.approx([-1.0, 2.5] if slope is None else [slope, -slope]),
    )


@pytest.mark.parametrize(
    "scores, value, slope",
    [
        ((3.0, 1.0), log1pexp(-2), -1 / (1 + math.exp(2))),
        ((1.0, 3.0), log1pexp(2), -1 / (1 + math.exp(-2))),
        ((-5.0, -5.0), LN2, -0.5),
    ],
)
def test_ranking_by_hand(scores, value, slope):
    """Eq. 1: -log s(r+ - r-), and its slopes."""
    scores = torch.tensor([scores], requires_grad=True)
    reward_model_loss(scores).sum().backward()
    assert reward_model_loss(scores).tolist() == pytest.approx([value]) and scores.grad[
        0
    ].tolist() == pytest.approx([slope, -slope])


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_10000_nats_apart_everything_is_finite(name, smoothing):
    """Values and gradients in fp32, with the margin on either side of either response."""
    logps = torch.tensor([[-1e4, 0.0], [0.0, -1e4], [-2e4, -1e4], [-1e4, -2e4]], requires_grad=True)
    out = PAIR_LOSSES[name](logps, torch.zeros(4, 2), torch.ones(4, 2), 0.1, smoothing)
    out.sum().backward()
    assert out.dtype == torch.float32 and out.isfinite().all() and logps.grad.isfinite().all()


def test_limits():
    """DPO and ranking far out are their asymptotes, -beta h and 0; for beta -> 0 DPO tends to ln 2 and the hinge to 1, both flat."""
    h = torch.tensor([-1e4, 1e4], requires_grad=True)
    assert dpo_loss(h, 0.1).tolist() == [1e3, 0.0]
    assert torch.autograd.grad(dpo_loss(h, 0.1).sum(), h)[0].tolist() == pytest.approx([-0.1, 0])
    assert dpo_loss(h, 0.1, 0.25).tolist() == [750.0, 250.0]
    assert reward_model_loss(torch.stack([h, torch.zeros(2)], 1)).tolist() == [1e4, 0.0]
    for loss, limit in ((dpo_loss, LN2), (slic_loss, 1.0)):
        near = torch.tensor([50.0, -50.0], requires_grad=True)
        out = loss(near, 1e-9)
        assert out.tolist() == pytest.approx([limit] * 2, abs=1e-6)
        assert torch.autograd.grad(out.sum(), near)[0].abs().max() <= 1e-9


def test_sft_is_the_mean_over_tokens_not_over_responses():
    """(6 + 2) / (5 + 3) = 1; the mean of the responses' own means would be (6/5 + 2/3) / 2 = .93."""
    assert sft_loss(torch.tensor([[-6.0], [-2.0]]), torch.tensor([[5], [3]])).item() == 1.0


def test_leave_one_out_by_hand():
    """Against the mean of the other two: 1 - 4, 2 - 3.5, 6 - 1.5; prompts know nothing of each other."""
    assert rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]])).tolist() == [
        [-3.0, -1.5, 4.5],
        [0.0, 0.0, 0.0],
    ]


@pytest.mark.parametrize(
    "ratio, advantage, value, slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # the policy that wrote: plain policy gradient
        (1.1, 2.0, -2.2, -2.2),
        (1.1, -2.0, 2.2, 2.2),
        (1.5, 2.0, -2.4, 0.0),  # better, and more likely already: held
        (1.5, -2.0, 3.0, 3.0),  # worse, yet more likely: pushed back
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_the_clipped_surrogate_by_hand(ratio, advantage, value, slope):
    """-min(ratio A, clip(ratio, .8, 1.2) A); d ratio / d logp = ratio."""
    logp = torch.tensor([-3.0 + math.log(ratio)], requires_grad=True)
    out = ppo_policy_loss(logp, torch.tensor([-3.0]), torch.tensor([advantage]))
    out.sum().backward()
    assert out.item() == pytest.approx(value) and logp.grad.item() == pytest.approx(slope, abs=1e-5)


@pytest.mark.parametrize(
    "value, loss, slope",
    [
        (1.1, 0.405, -0.9),  # within .2 of the old value 1
        (2.0, 0.32, 0.0),  # right, but further than the clip: (1.2 - 2)^2 / 2, held
        (1.5, 0.32, 0.0),
        (0.5, 1.125, -1.5),  # away from the return: the unclipped error is the larger
    ],
)
def test_the_clipped_value_loss_by_hand(value, loss, slope):
    """Old value 1, return 2: half the larger of (v - 2)^2 and (clip(v, .8, 1.2) - 2)^2."""
    values = torch.tensor([value], requires_grad=True)
    out = ppo_value_loss(values, torch.tensor([1.0]), torch.tensor([2.0]))
    out.sum().backward()
    assert out.item() == pytest.approx(loss) and values.grad.item() == pytest.approx(
        slope, abs=1e-6
    )


@pytest.mark.parametrize(
    "settings, wanted",
    [
        ({"lam": 0.0}, [1.5, -0.75, 1.75]),  # the temporal differences themselves
        ({"lam": 1.0}, [2.5, 1.0, 1.75]),  # rewards still to come, 3, 2, 2, less the value
        ({"lam": 0.5}, [1.5 + 0.5 * 0.125, -0.75 + 0.5 * 1.75, 1.75]),
        ({}, [1.5 + 0.95 * 0.9125, -0.75 + 0.95 * 1.75, 1.75]),
        (
            {"gamma": 0.5, "lam": 0.5},
            [1 - 0.25 * 0.4375, -0.875 + 0.25 * 1.75, 1.75],
        ),  # differences 1, -.875, 1.75
    ],
)
def test_generalised_advantages_by_hand(settings, wanted):
    """Rewards 1, 0, 2, values .5, 1, .25: differences 1 + 1 - .5, 0 + .25 - 1, 2 - .25, each the later ones' shrunk by gamma lam."""
    found = gae_advantages(
        torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.5, 1.0, 0.25]), **settings
    )
    assert found.tolist() == pytest.approx(wanted)


# --- a world of two tokens: responses are one token, the policy is two logits ---

REF = torch.tensor([0.3, 0.7]).log()


def descended(loss, rate, steps):
    """The policy (2,) after gradient descent from the reference on `loss(its log-probs)`."""
    logits = REF.clone().requires_grad_()
    for step in range(steps):
        (slope,) = torch.autograd.grad(loss(logits.log_softmax(0)), logits)
        logits.data -= rate * slope
    return logits.detach().softmax(0)


def normalised(weights):
    return [weight / sum(weights) for weight in weights]


def preferred(name, p, beta, smoothing=0.0):
    """The expected loss, as a function of log-probs (2,), where token 0 is preferred to token 1 with probability p."""
    ways = torch.tensor([[0, 1], [1, 0]])
    return lambda logps: (
        torch.tensor([p, 1 - p])
        @ PAIR_LOSSES[name](logps[ways], REF[ways], torch.ones(2, 2), beta, smoothing)
    )


@pytest.mark.parametrize(
    "p, beta, smoothing", [(0.8, 1.0, 0.0), (0.35, 0.5, 0.0), (0.5, 0.1, 0.0), (0.9, 0.5, 0.2)]
)
def test_dpo_finds_the_policy_whose_rewards_explain_the_preferences(p, beta, smoothing):
    """-p log s(z) - (1 - p) log s(-z), z = beta h, is least where s(z) = p, so h = log(p / (1 - p)) / beta, and pi / ref in the ratio exp(h).

    Smoothing by e turns labels round: p becomes (1 - e) p + e (1 - p).
    """
    found = descended(preferred("dpo", p, beta, smoothing), 2 / beta**2, 200)
    p = (1 - smoothing) * p + smoothing * (1 - p)
    assert found.tolist() == pytest.approx(
        normalised([0.3 * (p / (1 - p)) ** (1 / beta), 0.7]), rel=0.05
    )


@pytest.mark.parametrize("name", ["ipo", "ipo-mean"])
@pytest.mark.parametrize("p, beta", [(0.8, 0.5), (0.3, 0.2), (1.0, 0.25)])
def test_ipo_finds_its_closed_form(name, p, beta):
    """p (h - c)^2 + (1 - p) (h + c)^2, c = 1 / (2 beta), is least at h = (2 p - 1) c: finite even where one always wins."""
    found = descended(preferred(name, p, beta), 0.1, 200)
    assert found.tolist() == pytest.approx(
        normalised([0.3 * math.exp((2 * p - 1) / (2 * beta)), 0.7]), rel=0.05
    )


REWARDS, BETA = torch.tensor([1.0, 0.0]), 0.5
OPTIMUM = normalised([0.3 * math.exp(1 / 0.5), 0.7])  # of E r - beta KL: pi* ~ ref exp(r / beta)


def test_rloo_finds_the_optimum_of_reward_less_kl():
    """Four seeded samples a prompt, r - beta (log pi - log ref) of each against its siblings'."""
    generator = torch.Generator().manual_seed(0)

    def loss(logps):
        old = logps.detach()
        tokens = torch.multinomial(old.exp(), 16 * 4, replacement=True, generator=generator).view(
            16, 4
        )
        advantages = rloo_advantages((REWARDS - BETA * (old - REF))[tokens])
        return ppo_policy_loss(logps[tokens], old[tokens], advantages).mean()

    assert descended(loss, 0.5, 300).tolist() == pytest.approx(OPTIMUM, rel=0.05)


def test_ppo_finds_the_optimum_of_reward_less_kl_and_its_value():
    """One token is the whole response: its KL penalty and its reward, GAE over a scalar value, whitened, two passes a batch at a falling rate.

    The value of the optimum is beta log sum ref exp(r / beta).
    """
    generator, n = torch.Generator().manual_seed(0), 32
    logits, value = REF.clone().requires_grad_(), torch.zeros(1, requires_grad=True)
    for step in range(250):
        old, old_values = logits.detach().log_softmax(0), value.detach().expand(n)
        tokens = torch.multinomial(old.exp(), n, replacement=True, generator=generator)
        rewards = REWARDS[tokens] + BETA * (REF - old)[tokens]
        advantages = torch.cat([gae_advantages(reward[None], value.detach()) for reward in rewards])
        returns, whitened = (
            advantages + old_values,
            (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8),
        )
        for _ in range(2):
            loss = (
                ppo_policy_loss(logits.log_softmax(0)[tokens], old[tokens], whitened).mean()
                + 0.1 * ppo_value_loss(value.expand(n), old_values, returns).mean()
            )
            for p, slope in zip((logits, value), torch.autograd.grad(loss, (logits, value))):
                p.data -= (1 - step / 250) * slope
    assert logits.detach().softmax(0).tolist() == pytest.approx(OPTIMUM, rel=0.05)
    assert value.item() == pytest.approx(0.5 * math.log(0.3 * math.exp(1 / 0.5) + 0.7), rel=0.05)
