"""These tests check every loss against values and slopes worked out by hand."""

import math

import pytest
import torch

from minialign.losses import (
    PAIR_LOSSES,
    PairLogps,
    contrastive_targets,
    distillation_loss,
    dpo_loss,
    gae_advantages,
    ipo_loss,
    log_ratio_margin,
    pair_loss,
    ppo_policy_loss,
    ppo_value_loss,
    reverse_distillation_loss,
    reward_model_loss,
    rloo_advantages,
    sft_loss,
    slic_loss,
)

LN2 = math.log(2)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log1pexp(x: float) -> float:
    """Return log(1 + exp(x)), which is -log sigmoid(-x)."""
    return math.log(1 + math.exp(x))


# --- Losses on preference pairs


def test_margin_is_the_difference_of_log_ratios():
    margin = log_ratio_margin(
        policy_chosen_logps=torch.tensor([-10.0]),
        policy_rejected_logps=torch.tensor([-12.0]),
        ref_chosen_logps=torch.tensor([-11.0]),
        ref_rejected_logps=torch.tensor([-11.5]),
    )

    assert margin.tolist() == [1.5]  # (-10 + 11) - (-12 + 11.5)


@pytest.mark.parametrize(
    "loss_function, beta, margin, expected_loss, expected_slope",
    [
        (dpo_loss, 0.5, 2.0, log1pexp(-1), -0.5 * sigmoid(-1)),
        (dpo_loss, 0.1, 0.0, LN2, -0.05),
        (ipo_loss, 0.5, 3.0, 4.0, 4.0),  # (3 - 1)^2, 2 (3 - 1)
        (ipo_loss, 0.1, 0.0, 25.0, -10.0),  # (0 - 5)^2, 2 (0 - 5)
        (slic_loss, 0.5, 1.0, 0.5, -0.5),
        (slic_loss, 0.5, 3.0, 0.0, 0.0),  # beyond the hinge
        (slic_loss, 0.2, 0.0, 1.0, -0.2),
    ],
)
def test_loss_and_slope_of_a_margin_worked_by_hand(
    loss_function, beta, margin, expected_loss, expected_slope
):
    margin = torch.tensor([margin], requires_grad=True)

    loss = loss_function(margin, beta)
    loss.sum().backward()

    assert loss.item() == pytest.approx(expected_loss, abs=1e-6)
    assert margin.grad.item() == pytest.approx(expected_slope, abs=1e-6)


def loss_and_slopes(
    name, policy_logps, *, ref_logps, token_counts=(1, 1), beta, label_smoothing=0.0
):
    """Return the loss of one pair (chosen, rejected) and its slopes for both policy log-probs."""
    policy_chosen_logps = torch.tensor([policy_logps[0]], requires_grad=True)
    policy_rejected_logps = torch.tensor([policy_logps[1]], requires_grad=True)
    pair = PairLogps(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=torch.tensor([ref_logps[0]]),
        ref_rejected_logps=torch.tensor([ref_logps[1]]),
        chosen_token_counts=torch.tensor([token_counts[0]]),
        rejected_token_counts=torch.tensor([token_counts[1]]),
    )
    loss = pair_loss(name, pair, beta, label_smoothing=label_smoothing)
    slopes = torch.autograd.grad(loss.sum(), [policy_chosen_logps, policy_rejected_logps])
    return loss.item(), [slope.item() for slope in slopes]


def test_dpo_with_smoothed_labels_worked_by_hand():
    """beta h = 1 and a tenth of the labels is flipped: 0.9 (-log s(1)) + 0.1 (-log s(-1))."""
    loss, slopes = loss_and_slopes(
        "dpo", (-10.0, -12.0), ref_logps=(-11.0, -11.0), beta=0.5, label_smoothing=0.1
    )

    expected_slope = -0.5 * (0.9 * sigmoid(-1) - 0.1 * sigmoid(1))
    assert loss == pytest.approx(0.9 * log1pexp(-1) + 0.1 * log1pexp(1))
    assert slopes == pytest.approx([expected_slope, -expected_slope], abs=1e-6)


def test_dpo_with_smoothed_labels_is_flat_where_the_model_agrees_with_the_label_noise():
    """The slope is 0 where sigmoid(beta h) = 0.9, that is beta h = log 9."""
    _, slopes = loss_and_slopes(
        "dpo", (math.log(9) / 0.5, 0.0), ref_logps=(0.0, 0.0), beta=0.5, label_smoothing=0.1
    )

    assert slopes == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize(
    "name, expected_loss, expected_slopes",
    [
        ("ipo-mean", 1, [2 / 3, -1]),  # h = 3/3 + 2/2 = 2, (2 - 1)^2, slopes 2 / 3 and -2 / 2
        ("ipo", 16, [8, -8]),  # h = 3 + 2 = 5, (5 - 1)^2
    ],
)
def test_ipo_of_means_and_of_sums_worked_by_hand(name, expected_loss, expected_slopes):
    """The log ratios are 3 over 3 tokens and -2 over 2 tokens; 1 / (2 beta) = 1."""
    loss, slopes = loss_and_slopes(
        name, (-6.0, -8.0), ref_logps=(-9.0, -6.0), token_counts=(3, 2), beta=0.5
    )

    assert loss == pytest.approx(expected_loss)
    assert slopes == pytest.approx(expected_slopes)


@pytest.mark.parametrize("ref_logps", [(0.0, 0.0), (-7.0, 3.0)])
@pytest.mark.parametrize(
    "policy_logps, expected_loss, expected_slopes",
    [
        ((-4.0, -6.0), 0.6, [-0.275, 0.25]),  # 1 - 0.25 (-4 + 6) + 0.1 x 0.25 x 4
        ((-1.0, -9.0), 0.025, [-0.025, 0]),  # beyond the hinge only 0.1 x 0.25 x 1 is left
    ],
)
def test_slic_calibration_worked_by_hand_ignores_the_reference(
    policy_logps, expected_loss, expected_slopes, ref_logps
):
    loss, slopes = loss_and_slopes(
        "slic-calibration", policy_logps, ref_logps=ref_logps, token_counts=(2, 2), beta=0.25
    )

    assert loss == pytest.approx(expected_loss)
    assert slopes == pytest.approx(expected_slopes)


@pytest.mark.parametrize(
    "name, label_smoothing, expected_loss, expected_slopes",
    [
        ("dpo", 0.0, LN2, [-0.2 / 2, 0.2 / 2]),
        ("dpo", 0.1, LN2, [-0.2 * 0.8 / 2, 0.2 * 0.8 / 2]),  # 0.9 right labels less 0.1 flipped
        ("ipo", 0.0, 6.25, [-1 / 0.2, 1 / 0.2]),
        ("ipo-mean", 0.0, 6.25, [-1 / 0.2 / 5, 1 / 0.2 / 2]),  # each over its own tokens
        ("slic", 0.0, 1.0, [-0.2, 0.2]),
    ],
)
def test_loss_and_slopes_where_policy_and_reference_agree(
    name, label_smoothing, expected_loss, expected_slopes
):
    loss, slopes = loss_and_slopes(
        name,
        (-9.0, -4.0),
        ref_logps=(-9.0, -4.0),
        token_counts=(5, 2),
        beta=0.2,
        label_smoothing=label_smoothing,
    )

    assert loss == pytest.approx(expected_loss)
    assert slopes == pytest.approx(expected_slopes)


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_loss_and_gradient_are_finite_10000_nats_apart(name, label_smoothing):
    """fp32 overflows nowhere, whichever of the two responses has moved and to which side."""
    policy_chosen_logps = torch.tensor([-1e4, 0.0, -2e4, -1e4], requires_grad=True)
    policy_rejected_logps = torch.tensor([0.0, -1e4, -1e4, -2e4], requires_grad=True)
    pairs = PairLogps(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        ref_chosen_logps=torch.zeros(4),
        ref_rejected_logps=torch.zeros(4),
        chosen_token_counts=torch.ones(4),
        rejected_token_counts=torch.ones(4),
    )

    loss = pair_loss(name, pairs, 0.1, label_smoothing=label_smoothing)
    loss.sum().backward()

    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert policy_chosen_logps.grad.isfinite().all()
    assert policy_rejected_logps.grad.isfinite().all()


def test_labels_are_not_smoothed_unless_asked():
    """With a beta * h of 1 the loss is log(1 + exp(-1)). Smoothing would add to it."""
    one = torch.tensor([1.0])
    pairs = PairLogps(
        policy_chosen_logps=-one,
        policy_rejected_logps=-3 * one,
        ref_chosen_logps=-one,
        ref_rejected_logps=-one,
        chosen_token_counts=one,
        rejected_token_counts=one,
    )

    assert pair_loss("dpo", pairs, 0.5).item() == pytest.approx(log1pexp(-1))


def test_unknown_pair_loss_is_refused():
    with pytest.raises(ValueError, match="unknown pair loss 'kto'"):
        loss_and_slopes("kto", (0.0, 0.0), ref_logps=(0.0, 0.0), beta=0.1)


def test_dpo_and_reward_model_loss_far_out_are_their_asymptotes():
    """For large margins -log sigmoid(x) is -x on one side and 0 on the other."""
    margin = torch.tensor([-1e4, 1e4], requires_grad=True)

    loss = dpo_loss(margin, 0.1)
    (slopes,) = torch.autograd.grad(loss.sum(), margin)

    assert loss.tolist() == [1e3, 0.0]
    assert slopes.tolist() == pytest.approx([-0.1, 0])
    assert dpo_loss(margin, 0.1, label_smoothing=0.25).tolist() == [750.0, 250.0]
    assert reward_model_loss(margin, torch.zeros(2)).tolist() == [1e4, 0.0]


@pytest.mark.parametrize("loss_function, limit", [(dpo_loss, LN2), (slic_loss, 1.0)])
def test_dpo_and_slic_become_constant_as_beta_tends_to_0(loss_function, limit):
    margin = torch.tensor([50.0, -50.0], requires_grad=True)

    loss = loss_function(margin, 1e-9)
    (slopes,) = torch.autograd.grad(loss.sum(), margin)

    assert loss.tolist() == pytest.approx([limit, limit], abs=1e-6)
    assert slopes.abs().max() <= 1e-9


# --- Supervised loss and reward model


def test_sft_loss_is_the_mean_over_tokens_not_over_responses():
    """(6 + 2) / (5 + 3) = 1. The mean of the two responses' means is (6/5 + 2/3) / 2 = 0.93."""
    loss = sft_loss(torch.tensor([[-6.0], [-2.0]]), torch.tensor([[5], [3]]))

    assert loss.item() == 1.0


@pytest.mark.parametrize(
    "chosen_score, rejected_score, expected_loss, expected_slope",
    [
        (3.0, 1.0, log1pexp(-2), -sigmoid(-2)),
        (1.0, 3.0, log1pexp(2), -sigmoid(2)),
        (-5.0, -5.0, LN2, -0.5),
    ],
)
def test_reward_model_loss_worked_by_hand(
    chosen_score, rejected_score, expected_loss, expected_slope
):
    """Eq. 1: -log s(r+ - r-), whose slope for r+ is -s(r- - r+)."""
    chosen = torch.tensor([chosen_score], requires_grad=True)
    rejected = torch.tensor([rejected_score], requires_grad=True)

    loss = reward_model_loss(chosen, rejected)
    loss.sum().backward()

    assert loss.tolist() == pytest.approx([expected_loss])
    assert chosen.grad.tolist() == pytest.approx([expected_slope])
    assert rejected.grad.tolist() == pytest.approx([-expected_slope])


# --- Policy gradients


def test_rloo_advantages_worked_by_hand():
    """The baselines of the rewards 1, 2, 6 are the means of the others, 4, 3.5 and 1.5.

    Prompts do not mix.
    """
    advantages = rloo_advantages(torch.tensor([[1.0, 2.0, 6.0], [5.0, 5.0, 5.0]]))

    assert advantages.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    "ratio, advantage, expected_loss, expected_slope",
    [
        (1.0, 2.0, -2.0, -2.0),  # the policy has not changed: plain policy gradient
        (1.1, 2.0, -2.2, -2.2),
        (1.1, -2.0, 2.2, 2.2),
        (1.5, 2.0, -2.4, 0.0),  # good, and already more likely: clipped
        (1.5, -2.0, 3.0, 3.0),  # bad, and yet more likely: pushed back
        (0.5, 2.0, -1.0, -1.0),
        (0.5, -2.0, 1.6, 0.0),
    ],
)
def test_ppo_policy_loss_worked_by_hand(ratio, advantage, expected_loss, expected_slope):
    """-min(ratio A, clip(ratio, 0.8, 1.2) A), and d ratio / d logp = ratio."""
    logps = torch.tensor([-3.0 + math.log(ratio)], requires_grad=True)

    loss = ppo_policy_loss(logps, torch.tensor([-3.0]), torch.tensor([advantage]))
    loss.sum().backward()

    assert loss.item() == pytest.approx(expected_loss)
    assert logps.grad.item() == pytest.approx(expected_slope, abs=1e-5)


@pytest.mark.parametrize("advantage, expected_loss", [(2.0, -2.4), (-2.0, 2 * math.exp(50))])
def test_ppo_policy_loss_is_finite_200_nats_apart(advantage, expected_loss):
    """exp(200) overflows in fp32, and its gradient would be NaN even where the ratio is clipped."""
    logps = torch.tensor([-3.0], requires_grad=True)

    loss = ppo_policy_loss(logps, torch.tensor([-203.0]), torch.tensor([advantage]))
    loss.sum().backward()

    assert loss.item() == pytest.approx(expected_loss)
    assert logps.grad.item() == 0


@pytest.mark.parametrize(
    "value, expected_loss, expected_slope",
    [
        (1.1, 0.405, -0.9),  # within 0.2 of the old value 1: (1.1 - 2)^2 / 2
        (2.0, 0.32, 0.0),  # equal to the return but beyond the clip: (1.2 - 2)^2 / 2
        (1.5, 0.32, 0.0),
        (0.5, 1.125, -1.5),  # further from the return: the unclipped error is the larger
    ],
)
def test_ppo_value_loss_worked_by_hand(value, expected_loss, expected_slope):
    """Old value 1, return 2: half the larger of (v - 2)^2 and (clip(v, 0.8, 1.2) - 2)^2."""
    values = torch.tensor([value], requires_grad=True)

    loss = ppo_value_loss(values, torch.tensor([1.0]), torch.tensor([2.0]))
    loss.sum().backward()

    assert loss.item() == pytest.approx(expected_loss)
    assert values.grad.item() == pytest.approx(expected_slope, abs=1e-6)


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"gae_lambda": 0.0}, [1.5, -0.75, 1.75]),  # the deltas themselves
        ({"gae_lambda": 1.0}, [2.5, 1.0, 1.75]),  # rewards still to come, 3, 2, 2, less the value
        ({"gae_lambda": 0.5}, [1.5 + 0.5 * 0.125, -0.75 + 0.5 * 1.75, 1.75]),
        ({}, [1.5 + 0.95 * 0.9125, -0.75 + 0.95 * 1.75, 1.75]),
        # With gamma = 0.5 the deltas are 1, -0.875, 1.75.
        ({"gamma": 0.5, "gae_lambda": 0.5}, [1 - 0.25 * 0.4375, -0.875 + 0.25 * 1.75, 1.75]),
    ],
)
def test_gae_advantages_worked_by_hand(settings, expected):
    """The deltas of rewards 1, 0, 2 and values 0.5, 1, 0.25 are 1.5, -0.75 and 1.75."""
    rewards = torch.tensor([1.0, 0.0, 2.0])
    values = torch.tensor([0.5, 1.0, 0.25])

    advantages = gae_advantages(rewards, values, **settings)

    assert advantages.tolist() == pytest.approx(expected)


def test_contrastive_targets_worked_by_hand():
    """Contrast 1 gives weights p^2 / p': .25 / .25, .09 / .5 and .0225 / .2.

    A token is plausible from `plausibility` times .5 on.
    """
    with_image = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).double().log()
    without_image = torch.tensor([[0.25, 0.5, 0.2, 0.05]]).double().log()
    weights = [1.0, 0.18, 0.1125, 0.05]

    for plausibility, num_plausible in ((0.0, 4), (0.2, 3), (0.5, 2), (0.7, 1), (1.0, 1)):
        targets = contrastive_targets(with_image, without_image, 1.0, plausibility=plausibility)
        total = sum(weights[:num_plausible])
        expected = [weight / total for weight in weights[:num_plausible]]
        expected += [0.0] * (4 - num_plausible)
        assert targets.exp()[0].tolist() == pytest.approx(expected, abs=1e-7)


def test_a_token_exactly_at_the_border_is_plausible():
    """0.25 is exactly half of 0.5, also as rounded logarithms."""
    with_image = torch.tensor([[0.5, 0.25, 0.25]]).log()

    targets = contrastive_targets(with_image, with_image, 1.0, plausibility=0.5)

    assert targets.exp()[0].tolist() == pytest.approx([0.5, 0.25, 0.25])


def test_where_the_image_adds_nothing_the_target_is_the_reference():
    """p^(1 + a) / p^a is p."""
    reference = torch.tensor([[0.5, 0.3, 0.2]]).log()

    targets = contrastive_targets(reference, reference, 2.0, plausibility=0.0)

    assert targets.exp()[0].tolist() == pytest.approx([0.5, 0.3, 0.2], rel=1e-5)


def test_distillation_loss_is_the_divergence_from_the_target():
    """KL((.5, .5) || (.25, .75)) = .5 log 2 + .5 log (2 / 3), and 0 at the target itself."""
    target = torch.tensor([0.5, 0.5])
    entropy = math.log(2)
    policy_logps = torch.tensor([0.25, 0.75]).log()

    loss = distillation_loss(torch.tensor(entropy), target @ policy_logps)
    loss_at_target = distillation_loss(torch.tensor(entropy), target @ target.log())

    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), rel=1e-5)
    assert loss_at_target.item() == pytest.approx(0.0, abs=1e-7)


def test_reverse_distillation_loss_worked_by_hand():
    """Three tokens whose targets have two, one and two entries.

    First: q = (.5, .5) and pi = (.6, .2), of mass .8, so pi_S = (.75, .25). The loss is
    .75 log 1.5 + .25 log .5 - log .8. Second: a single token of probability .3 costs -log .3, as in
    the forward loss. Third: the policy equals the target.
    """
    target_logps = torch.tensor([0.5, 0.5, 1.0, 0.9, 0.1]).log()
    policy_logps = torch.tensor([0.6, 0.2, 0.3, 0.9, 0.1]).log()

    losses = reverse_distillation_loss(target_logps, policy_logps, torch.tensor([2, 1, 2]))

    first = 0.75 * math.log(1.5) + 0.25 * math.log(0.5) - math.log(0.8)
    assert losses.tolist() == pytest.approx([first, -math.log(0.3), 0.0], abs=1e-6)


def test_the_reverse_loss_is_finite_where_the_policy_finds_all_plausible_tokens_impossible():
    """exp(-200) is 0 in fp32. Two equal tokens of log-prob -200 have mass 2 exp(-200)."""
    target_logps = torch.tensor([0.5, 0.5]).log()

    loss = reverse_distillation_loss(target_logps, torch.full((2,), -200.0), torch.tensor([2]))

    assert loss.item() == pytest.approx(200 - math.log(2))


def test_over_the_whole_vocabulary_the_reverse_loss_is_torch_s_divergence():
    """torch.nn.functional.kl_div(log q, log pi) is KL(pi || q)."""
    generator = torch.Generator().manual_seed(0)
    target_logps = torch.randn(3, 5, generator=generator).log_softmax(-1)
    policy_logps = torch.randn(3, 5, generator=generator).log_softmax(-1)

    losses = reverse_distillation_loss(
        target_logps.flatten(), policy_logps.flatten(), torch.tensor([5, 5, 5])
    )

    expected = torch.nn.functional.kl_div(
        target_logps, policy_logps, reduction="none", log_target=True
    )
    assert losses.tolist() == pytest.approx(expected.sum(-1).tolist(), rel=1e-5)
