"""Every objective as a pure function of log-probabilities: tensors in, tensors out, no model, no data."""

import torch
from torch.nn import functional as F


def log_ratio_margin(logps, reference):
    """h (B,), the implicit reward margin divided by beta, in nats; logps and reference (B, 2): chosen, then rejected."""
    gain = logps - reference
    return gain[:, 0] - gain[:, 1]


def dpo_loss(h, beta, smoothing=0.0):
    """DPO (Eq. 3), (B,): -log sigmoid(beta h); with `smoothing` that share of the labels is taken to be the wrong way round."""
    return -(1 - smoothing) * F.logsigmoid(beta * h) - smoothing * F.logsigmoid(-beta * h)


def ipo_loss(h, beta):
    """IPO (Azar et al. 2024), (B,): (h - 1 / (2 beta))^2."""
    return (h - 1 / (2 * beta)) ** 2


def slic_loss(h, beta):
    """SLiC as a hinge on the margin with reference (Tang et al. 2024b), (B,): max(0, 1 - beta h)."""
    return torch.relu(1 - beta * h)


def slic_calibration_loss(logps, beta, weight=0.1):
    """SLiC-HF's own form (Zhao et al. 2023), (B,), without a reference: max(0, 1 - beta (logp+ - logp-)) - weight beta logp+.

    Their delta is 1 / beta and their loss beta times smaller; the second term keeps the policy near the chosen responses.
    """
    return torch.relu(1 - beta * (logps[:, 0] - logps[:, 1])) - weight * beta * logps[:, 0]


# Name: the loss (B,) of summed log-probs (B, 2), the reference's, and token counts; sums by default, "ipo-mean" is TRL's per-token form.
PAIR_LOSSES = {
    "dpo": lambda logps, reference, counts, beta, smoothing: dpo_loss(
        log_ratio_margin(logps, reference), beta, smoothing
    ),
    "ipo": lambda logps, reference, counts, beta, smoothing: ipo_loss(
        log_ratio_margin(logps, reference), beta
    ),
    "ipo-mean": lambda logps, reference, counts, beta, smoothing: ipo_loss(
        log_ratio_margin(logps / counts, reference / counts), beta
    ),
    "slic": lambda logps, reference, counts, beta, smoothing: slic_loss(
        log_ratio_margin(logps, reference), beta
    ),
    "slic-calibration": lambda logps, reference, counts, beta, smoothing: slic_calibration_loss(
        logps, beta
    ),
}


def sft_loss(logps, counts):
    """Supervised loss, a scalar: mean negative log-likelihood per response token, in nats; logps and counts (B, k)."""
    return -logps.sum() / counts.sum()


def reward_model_loss(scores):
    """The reward model's loss (Eq. 1), (B,): -log sigmoid(r(x, y+) - r(x, y-)); scores (B, 2)."""
    return -F.logsigmoid(scores[:, 0] - scores[:, 1])


def rloo_advantages(rewards):
    """RLOO's advantages (Ahmadian et al. 2024), (B, k): each reward minus the mean of the other k - 1 of its prompt."""
    others = (rewards.sum(1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others


def ppo_policy_loss(logps, old, advantages, clip=0.2):
    """The clipped surrogate of PPO, any shape: -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), ratio = exp(logps - old)."""
    ratio = (logps - old).clamp(max=50).exp()  # beyond that fp32 overflows, and its gradient is NaN
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def ppo_value_loss(values, old, returns, clip=0.2):
    """PPO's value loss, any shape: half the larger squared error of the value and of the value clipped around its old one."""
    near = old + (values - old).clamp(-clip, clip)
    return 0.5 * torch.maximum((values - returns) ** 2, (near - returns) ** 2)


def gae_advantages(rewards, values, gamma=1.0, lam=0.95):
    """GAE of one response, (R,): sum over l of (gamma lam)^l delta_{t+l}, delta_t = r_t + gamma V_{t+1} - V_t, V = 0 after the end."""
    advantages, following, value = torch.zeros_like(rewards), 0.0, 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * value - values[t] + gamma * lam * following
        advantages[t], value = following, values[t]
    return advantages
