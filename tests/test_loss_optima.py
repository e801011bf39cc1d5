"""These tests minimize the losses in a world where the optimal policy is known in closed form.

A response is one of two tokens, and the policy is two logits.
"""

import math

import pytest
import torch

from minialign.losses import (
    PairLogps,
    contrastive_targets,
    distillation_loss,
    gae_advantages,
    pair_loss,
    ppo_policy_loss,
    ppo_value_loss,
    rloo_advantages,
)
from minialign.neighbor_losses import grpo_advantages, grpo_loss, merged_reference_logps

REF_LOGPS = torch.tensor([0.3, 0.7]).log()


def minimize(loss_function, learning_rate: float, steps: int) -> list:
    """Return the policy (2,) after gradient descent on a loss of its log-probs (2,).

    The descent starts at the reference.
    """
    logits = REF_LOGPS.clone().requires_grad_()
    for _ in range(steps):
        loss = loss_function(logits.log_softmax(0))
        (gradient,) = torch.autograd.grad(loss, logits)
        logits.data -= learning_rate * gradient
    return logits.detach().softmax(0).tolist()


def normalize(weights) -> list:
    """Return the weights divided by their sum."""
    return [weight / sum(weights) for weight in weights]


def expected_pair_loss(name, probability, beta, label_smoothing=0.0, *, ref_logps=REF_LOGPS):
    """Return the expected loss, a function of log-probs (2,).

    Token 0 is preferred to token 1 with `probability`.
    """
    chosen = torch.tensor([0, 1])
    rejected = torch.tensor([1, 0])
    probabilities = torch.tensor([probability, 1 - probability])

    def loss_function(logps):
        pairs = PairLogps(
            policy_chosen_logps=logps[chosen],
            policy_rejected_logps=logps[rejected],
            ref_chosen_logps=ref_logps[chosen],
            ref_rejected_logps=ref_logps[rejected],
            chosen_token_counts=torch.ones(2),
            rejected_token_counts=torch.ones(2),
        )
        losses = pair_loss(name, pairs, beta, label_smoothing=label_smoothing)
        return probabilities @ losses

    return loss_function


@pytest.mark.parametrize(
    "probability, beta, label_smoothing",
    [(0.8, 1.0, 0.0), (0.35, 0.5, 0.0), (0.5, 0.1, 0.0), (0.9, 0.5, 0.2)],
)
def test_dpo_finds_the_policy_whose_rewards_explain_the_preferences(
    probability, beta, label_smoothing
):
    """-p log s(z) - (1 - p) log s(-z) with z = beta h is least where s(z) = p.

    So h = log(p / (1 - p)) / beta, and pi / ref is in the ratio exp(h). Smoothing by e flips
    labels: p becomes (1 - e) p + e (1 - p).
    """
    loss_function = expected_pair_loss("dpo", probability, beta, label_smoothing)

    policy = minimize(loss_function, learning_rate=2 / beta**2, steps=200)

    p = (1 - label_smoothing) * probability + label_smoothing * (1 - probability)
    expected = normalize([0.3 * (p / (1 - p)) ** (1 / beta), 0.7])
    assert policy == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("extra_probs", [(0.3, 0.7), (0.4, 0.6)])
def test_dpo_finds_its_closed_form_for_two_references(extra_probs):
    """It is that of DPO, with 1 / (w / extra + (1 - w) / base) in the place of the reference.

    With two equal references it is that of DPO. The other extra reference is within the band.
    """
    extra_logps = torch.tensor([extra_probs]).log()
    (merged_logps,) = merged_reference_logps(REF_LOGPS[None], extra_logps, eta=1.0)
    loss_function = expected_pair_loss("dpo", 0.8, 1.0, ref_logps=merged_logps)

    policy = minimize(loss_function, learning_rate=2.0, steps=200)

    extra_gap = math.log(extra_probs[1] / extra_probs[0])
    base_gap = math.log(0.7 / 0.3)
    weight = extra_gap / (extra_gap + base_gap)
    merged = []
    for extra_probability, base_probability in zip(extra_probs, (0.3, 0.7), strict=True):
        merged.append(1 / (weight / extra_probability + (1 - weight) / base_probability))
    expected = normalize([merged[0] * 0.8 / 0.2, merged[1]])
    assert policy == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", ["ipo", "ipo-mean"])
@pytest.mark.parametrize("probability, beta", [(0.8, 0.5), (0.3, 0.2), (1.0, 0.25)])
def test_ipo_finds_its_closed_form(name, probability, beta):
    """p (h - c)^2 + (1 - p) (h + c)^2 with c = 1 / (2 beta) is least at h = (2 p - 1) c.

    The optimum is finite even where one token always wins.
    """
    loss_function = expected_pair_loss(name, probability, beta)

    policy = minimize(loss_function, learning_rate=0.1, steps=200)

    expected = normalize([0.3 * math.exp((2 * probability - 1) / (2 * beta)), 0.7])
    assert policy == pytest.approx(expected, rel=0.05)


WITH_IMAGE = REF_LOGPS
WITHOUT_IMAGE = torch.tensor([0.6, 0.4]).log()


def optimum_of_dpo_without_image(beta):
    """Return ref(y|image) (ref(y|image) / ref(y|no image))^(1 / beta), normalized."""
    weights = []
    for with_image, without_image in ((0.3, 0.6), (0.7, 0.4)):
        weights.append(with_image * (with_image / without_image) ** (1 / beta))
    return normalize(weights)


@pytest.mark.parametrize("beta", [1.0, 2.0, 0.5])
def test_dpo_on_responses_without_the_image_finds_its_closed_form(beta):
    """The chosen response is sampled with the image, the rejected one without it.

    The loss is least where sigmoid(beta h) is the probability that token 0 is the chosen one of a
    pair of both tokens, that is where h = [log .3/.7 - log .6/.4] / beta. Pairs of equal tokens
    have no gradient.
    """
    first_is_chosen = 0.3 * 0.4  # token 0 with the image, token 1 without it
    second_is_chosen = 0.7 * 0.6
    probability = first_is_chosen / (first_is_chosen + second_is_chosen)
    loss_function = expected_pair_loss("dpo", probability, beta)

    policy = minimize(loss_function, learning_rate=2 / beta**2, steps=400)

    assert policy == pytest.approx(optimum_of_dpo_without_image(beta), rel=0.01)


@pytest.mark.parametrize("beta", [1.0, 2.0, 0.5])
def test_distillation_finds_the_optimum_of_dpo_without_the_image(beta):
    """With contrast 1 / beta the target is the optimum of DPO, and the policy learns the target."""
    target_logps = contrastive_targets(
        WITH_IMAGE[None], WITHOUT_IMAGE[None], contrast=1 / beta, plausibility=0.0
    )[0]
    target = target_logps.exp()
    entropy = -(target * target_logps).sum()

    def loss_function(logps):
        return distillation_loss(entropy, expected_logps=target @ logps)

    policy = minimize(loss_function, learning_rate=0.5, steps=400)

    expected = optimum_of_dpo_without_image(beta)
    assert target.tolist() == pytest.approx(expected, rel=1e-5)
    assert policy == pytest.approx(expected, rel=1e-3)


# The objective E[r] - beta KL (Eq. 2) is maximized by pi* ~ ref exp(r / beta).
REWARDS = torch.tensor([1.0, 0.0])
BETA = 0.5
OPTIMAL_POLICY = normalize([0.3 * math.exp(1 / BETA), 0.7])
# The value of the optimal policy is beta log sum ref exp(r / beta).
OPTIMAL_VALUE = BETA * math.log(0.3 * math.exp(1 / BETA) + 0.7)


def test_rloo_finds_the_optimum_of_reward_minus_kl():
    """Each step samples four responses to each of sixteen prompts.

    The reward less the KL penalty is r - beta (log pi - log ref).
    """
    generator = torch.Generator().manual_seed(0)

    def loss_function(logps):
        old_logps = logps.detach()
        tokens = torch.multinomial(
            old_logps.exp(), 16 * 4, replacement=True, generator=generator
        ).view(16, 4)
        penalized_rewards = REWARDS - BETA * (old_logps - REF_LOGPS)
        advantages = rloo_advantages(penalized_rewards[tokens])
        return ppo_policy_loss(logps[tokens], old_logps[tokens], advantages).mean()

    policy = minimize(loss_function, learning_rate=0.5, steps=300)

    assert policy == pytest.approx(OPTIMAL_POLICY, rel=0.05)


def optimum_of_grpo(beta, k):
    """Return the policy at which the expected gradient of GRPO is 0, with k responses a prompt.

    Let p be the probability of token 0, m of k responses be token 0, and d be d/dlogit. The rewards
    are 1 and 0, with mean m / k and standard deviation sqrt(m (k - m) / (k (k - 1))). The mean of
    A d log pi over the k responses is m (k - m) / k^2 divided by the deviation. The mean of d KL
    estimate is p - ref. They are equal, up to beta, at one p.
    """

    def surplus(p):
        """Return the mean pull of the rewards less that of the KL term."""
        pull = 0.0
        for m in range(1, k):
            deviation = math.sqrt(m * (k - m) / (k * (k - 1)))
            probability = math.comb(k, m) * p**m * (1 - p) ** (k - m)
            pull += probability * m * (k - m) / k**2 / (deviation + 1e-4)
        return pull - beta * (p - 0.3)

    low = 0.3
    high = 1.0
    for _ in range(50):
        middle = (low + high) / 2
        if surplus(middle) > 0:
            low = middle
        else:
            high = middle
    return [low, 1 - low]


def optimum_of_grpo_with_many_responses(beta):
    """Return the closed form of the above for k to infinity: sqrt(p (1 - p)) = beta (p - ref).

    Squared it is (1 + beta^2) p^2 - (1 + 2 beta^2 ref) p + beta^2 ref^2 = 0.
    """
    a = 1 + beta**2
    b = 1 + 2 * beta**2 * 0.3
    c = beta**2 * 0.3**2
    p = (b + math.sqrt(b**2 - 4 * a * c)) / (2 * a)
    return [p, 1 - p]


@pytest.mark.parametrize("beta, k", [(1.0, 4), (2.0, 4), (1.5, 32)])
def test_grpo_finds_its_own_optimum(beta, k):
    """It is not that of reward minus KL: the rewards' scale is divided out.

    Each step samples k responses to each of 16 prompts. With 32 responses the closed form for
    infinitely many is as near as the policy.
    """
    generator = torch.Generator().manual_seed(0)

    def loss_function(logps):
        old_logps = logps.detach()
        tokens = torch.multinomial(
            old_logps.exp(), 16 * k, replacement=True, generator=generator
        ).view(16, k)
        return grpo_loss(
            logps[tokens],
            old_logps[tokens],
            REF_LOGPS[tokens],
            advantages=grpo_advantages(REWARDS[tokens]),
            beta=beta,
        ).mean()

    policy = minimize(loss_function, learning_rate=0.1, steps=400)

    assert policy == pytest.approx(optimum_of_grpo(beta, k), rel=0.05)
    if k == 32:
        assert policy == pytest.approx(optimum_of_grpo_with_many_responses(beta), rel=0.05)


def test_ppo_finds_the_optimum_of_reward_minus_kl_and_its_value():
    """One token is the whole response, and a single number is the value head.

    Each of 250 steps samples 32 tokens, whitens their GAE advantages and takes two passes at a
    falling learning rate.
    """
    generator = torch.Generator().manual_seed(0)
    batch_size = 32
    logits = REF_LOGPS.clone().requires_grad_()
    value = torch.zeros(1, requires_grad=True)

    for step in range(250):
        # 1. Sample tokens, with the KL penalty and the reward at each.
        old_logps = logits.detach().log_softmax(0)
        old_values = value.detach().expand(batch_size)
        tokens = torch.multinomial(
            old_logps.exp(), batch_size, replacement=True, generator=generator
        )
        token_rewards = REWARDS[tokens] + BETA * (REF_LOGPS - old_logps)[tokens]

        # 2. Advantages of responses of one token, whitened over the batch.
        per_response = [gae_advantages(reward[None], value.detach()) for reward in token_rewards]
        advantages = torch.cat(per_response)
        returns = advantages + old_values
        whitened = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-8)

        # 3. Two passes over the batch.
        for _ in range(2):
            logps = logits.log_softmax(0)[tokens]
            policy_loss = ppo_policy_loss(logps, old_logps[tokens], whitened).mean()
            value_loss = ppo_value_loss(value.expand(batch_size), old_values, returns).mean()
            gradients = torch.autograd.grad(policy_loss + 0.1 * value_loss, [logits, value])
            logits.data -= (1 - step / 250) * gradients[0]
            value.data -= (1 - step / 250) * gradients[1]

    assert logits.detach().softmax(0).tolist() == pytest.approx(OPTIMAL_POLICY, rel=0.05)
    assert value.item() == pytest.approx(OPTIMAL_VALUE, rel=0.05)
