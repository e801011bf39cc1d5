"""This module holds the objectives as pure functions: tensors in, losses out.

No function here knows a model, a tokenizer or a data set. Equation numbers are those of arXiv
2407.02477 ("the paper"). Log-probs are in nats. A response's log-prob is the sum over its tokens,
the end token included. The losses of methods that others published are in neighbor_losses.py.

Shapes: B pairs or prompts, k responses a prompt, T tokens of one response.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# --- Losses on preference pairs (Sec. 2.2 and 5.7)

# Each of these names has a branch in `pair_loss`.
PAIR_LOSSES = ("dpo", "ipo", "ipo-mean", "slic", "slic-calibration")


class PairLogps(NamedTuple):
    """The summed log-probs of B preference pairs, and the lengths of their responses, all (B,)."""

    policy_chosen_logps: Tensor
    policy_rejected_logps: Tensor
    ref_chosen_logps: Tensor
    ref_rejected_logps: Tensor
    chosen_token_counts: Tensor
    rejected_token_counts: Tensor

    def per_token(self) -> "PairLogps":
        """Return the same pairs with each log-prob divided by the number of tokens it sums over."""
        return self._replace(
            policy_chosen_logps=self.policy_chosen_logps / self.chosen_token_counts,
            policy_rejected_logps=self.policy_rejected_logps / self.rejected_token_counts,
            ref_chosen_logps=self.ref_chosen_logps / self.chosen_token_counts,
            ref_rejected_logps=self.ref_rejected_logps / self.rejected_token_counts,
        )

    def margin(self) -> Tensor:
        """Return the margin h of each pair, (B,)."""
        return log_ratio_margin(
            policy_chosen_logps=self.policy_chosen_logps,
            policy_rejected_logps=self.policy_rejected_logps,
            ref_chosen_logps=self.ref_chosen_logps,
            ref_rejected_logps=self.ref_rejected_logps,
        )


def log_ratio_margin(
    *,
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
) -> Tensor:
    """Compute the margin h of each pair, (B,): the gap between the log ratios of both responses.

    h = [log pi(y+|x) - log ref(y+|x)] - [log pi(y-|x) - log ref(y-|x)]

    beta * h is the margin between DPO's implicit rewards. The arguments are keyword-only because
    four tensors of one shape are easily swapped.
    """
    chosen_log_ratios = policy_chosen_logps - ref_chosen_logps
    rejected_log_ratios = policy_rejected_logps - ref_rejected_logps
    return chosen_log_ratios - rejected_log_ratios


def dpo_loss(margin: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute the DPO loss (Eq. 3) of each pair, (B,).

    loss = -log sigmoid(beta * h)

    With `label_smoothing` = e, a share e of the labels is assumed to be flipped (conservative DPO):

    loss = -(1 - e) log sigmoid(beta * h) - e log sigmoid(-beta * h)
    """
    loss_if_right = -F.logsigmoid(beta * margin)
    loss_if_flipped = -F.logsigmoid(-beta * margin)
    return (1 - label_smoothing) * loss_if_right + label_smoothing * loss_if_flipped


def ipo_loss(margin: Tensor, beta: float) -> Tensor:
    """Compute the IPO loss (Azar et al. 2024) of each pair, (B,).

    loss = (h - 1 / (2 beta))^2
    """
    target_margin = 1 / (2 * beta)
    return (margin - target_margin) ** 2


def slic_loss(margin: Tensor, beta: float) -> Tensor:
    """Compute the SLiC loss with a reference (Tang et al. 2024b) of each pair, (B,).

    loss = max(0, 1 - beta * h)
    """
    return torch.relu(1 - beta * margin)


def slic_calibration_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    beta: float,
    *,
    sft_weight: float = 0.1,
) -> Tensor:
    """Compute the original SLiC-HF loss (Zhao et al. 2023) of each pair, (B,), without a reference.

    loss = max(0, 1 - beta (log pi(y+|x) - log pi(y-|x))) - sft_weight * beta * log pi(y+|x)

    The second term keeps the policy near the chosen responses. In the notation of that paper,
    delta is 1 / beta, and its loss is this one divided by beta.
    """
    policy_margin = policy_chosen_logps - policy_rejected_logps
    calibration_loss = torch.relu(1 - beta * policy_margin)
    return calibration_loss - sft_weight * beta * policy_chosen_logps


def pair_loss(name: str, pairs: PairLogps, beta: float, *, label_smoothing: float = 0.0) -> Tensor:
    """Compute the loss called `name` (one of PAIR_LOSSES) of each pair, (B,).

    "ipo-mean" is IPO on log-probs per token instead of sums, as TRL computes it.
    `label_smoothing` concerns DPO alone.
    """
    # 1. The one loss that compares without a reference.
    if name == "slic-calibration":
        return slic_calibration_loss(pairs.policy_chosen_logps, pairs.policy_rejected_logps, beta)

    # 2. All others are functions of the margin over the reference.
    if name == "ipo-mean":
        pairs = pairs.per_token()
    margin = pairs.margin()
    if name == "dpo":
        return dpo_loss(margin, beta, label_smoothing)
    if name in ("ipo", "ipo-mean"):
        return ipo_loss(margin, beta)
    if name == "slic":
        return slic_loss(margin, beta)
    raise ValueError(f"unknown pair loss {name!r}, choose one of {', '.join(PAIR_LOSSES)}")


# --- Supervised loss and reward model


def sft_loss(logps: Tensor, token_counts: Tensor) -> Tensor:
    """Compute the supervised loss, a scalar: the mean negative log-likelihood of a response token.

    loss = -sum_i log pi(y_i|x_i) / sum_i |y_i|

    `logps` and `token_counts` have one entry for each response, in any shape. The mean is over
    tokens, not over responses.
    """
    return -logps.sum() / token_counts.sum()


def reward_model_loss(chosen_scores: Tensor, rejected_scores: Tensor) -> Tensor:
    """Compute the reward model's loss (Eq. 1) of each pair, (B,).

    loss = -log sigmoid(r(x, y+) - r(x, y-))
    """
    return -F.logsigmoid(chosen_scores - rejected_scores)


# --- Contrastive distillation (beyond the paper)


def contrastive_targets(
    logps_with_image: Tensor,
    logps_without_image: Tensor,
    contrast: float,
    *,
    plausibility: float = 0.1,
) -> Tensor:
    """Compute the target distribution q of each of N tokens, as log-probs (N, V).

    q(v) ~ ref(v|image)^(1 + a) / ref(v|no image)^a   if v is plausible, else 0 (~: proportional to)
    v is plausible if ref(v|image) >= plausibility * max_u ref(u|image)

    The arguments are log ref(v|image) and log ref(v|no image) of the whole vocabulary, both (N, V),
    and `contrast` is a.

    Suppose that chosen responses are sampled from the reference with the image, and rejected ones
    without it. Then, for responses of one token, the optimum of DPO is q with a = 1 / beta and
    plausibility 0 (minialign/README.md, stop 11).

    The plausible set is that of visual contrastive decoding (Leng et al., arXiv 2311.16922). It
    keeps q from raising a token that is unlikely with the image and still less likely without it.
    """
    best_logps = logps_with_image.amax(dim=-1, keepdim=True)  # (N, 1)
    # With plausibility 0 the threshold is minus infinity, and every token is plausible.
    threshold = best_logps + torch.tensor(plausibility).log()
    is_plausible = logps_with_image >= threshold
    scores = (1 + contrast) * logps_with_image - contrast * logps_without_image
    scores = scores.masked_fill(~is_plausible, -torch.inf)
    return torch.log_softmax(scores, dim=-1)


def distillation_loss(target_entropies: Tensor, expected_logps: Tensor) -> Tensor:
    """Compute KL(q || pi) of each token, (N,).

    loss = sum_v q(v) [log q(v) - log pi(v)] = -H(q) - E_q[log pi]

    The arguments are H(q) and E_q[log pi] of each token, both (N,). H(q) does not depend on the
    policy. It only makes the loss 0 where the policy equals the target.
    """
    return -target_entropies - expected_logps


def reverse_distillation_loss(target_logps: Tensor, policy_logps: Tensor, counts: Tensor) -> Tensor:
    """Compute the divergence of each of N tokens with its direction reversed, (N,).

    S holds the tokens with q(v) > 0. The policy gives S the probability pi(S), the sum of pi(v)
    over S. Within S its distribution is pi_S(v) = pi(v) / pi(S), so log pi(v) is
    log pi_S(v) + log pi(S), and the forward loss has two terms:

    KL(q || pi) = KL(q || pi_S) - log pi(S)

    The second one moves probability from all other tokens into S. KL(pi || q) itself is infinite,
    because q is 0 outside S and pi is not. So this loss reverses the first term alone:

    loss = KL(pi_S || q) - log pi(S)

    If S is the whole vocabulary, it is KL(pi || q). If S is a single token, both losses are equal.
    The forward loss is large where pi lacks what q has. The reverse loss is large where pi has what
    q lacks, so pi may settle on one of several likely tokens.

    The arguments are log q(v) and log pi(v) of the M tokens of all S, both (M,), position after
    position, and how many of them each position has, (N,).
    """
    # 1. log pi(S), (N,). The largest log-prob of each S is taken out, so that not all exp
    #    underflow. It cancels out of the result, so it needs no gradient.
    position_of_entry = torch.repeat_interleave(counts)  # (M,): 0 0 0 1 2 2 ...
    zeros = policy_logps.new_zeros(len(counts))
    largest = zeros.scatter_reduce(
        0, position_of_entry, policy_logps.detach(), "amax", include_self=False
    )
    scaled_probs = (policy_logps - largest[position_of_entry]).exp()
    log_masses = largest + zeros.index_add(0, position_of_entry, scaled_probs).log()

    # 2. KL(pi_S || q) - log pi(S), (N,)
    logps_within = policy_logps - log_masses[position_of_entry]  # log pi_S(v)
    terms = logps_within.exp() * (logps_within - target_logps)
    return zeros.index_add(0, position_of_entry, terms) - log_masses


# --- Policy gradients (Sec. 2.1 and App. A), with the names of CleanRL's PPO


def rloo_advantages(rewards: Tensor) -> Tensor:
    """Compute RLOO's advantages (Ahmadian et al. 2024) of k responses to each of B prompts, (B, k).

    A_i = r_i - sum_{j != i} r_j / (k - 1)

    The baseline of a response is the mean reward of the other k - 1 responses to its prompt. The
    KL penalty of Eq. 2 is already in the rewards (methods/policy_gradient.py).
    """
    num_others = rewards.shape[1] - 1
    sum_of_others = rewards.sum(dim=1, keepdim=True) - rewards
    baselines = sum_of_others / num_others
    return rewards - baselines


def ppo_policy_loss(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, clip_coef: float = 0.2
) -> Tensor:
    """Compute PPO's clipped surrogate loss (Schulman et al. 2017) of each element, in any shape.

    ratio = pi(y|x) / pi_old(y|x)
    loss  = -min(ratio * A, clip(ratio, 1 - clip_coef, 1 + clip_coef) * A)

    `old_logps` are those of the policy that sampled the responses.
    """
    logratio = logps - old_logps
    # exp overflows in fp32 above 88, and the gradient of the overflowed value is NaN.
    ratio = logratio.clamp(max=50).exp()
    clipped_ratio = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    pg_loss1 = -advantages * ratio
    pg_loss2 = -advantages * clipped_ratio
    return torch.maximum(pg_loss1, pg_loss2)


def ppo_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip_coef: float = 0.2
) -> Tensor:
    """Compute PPO's clipped value loss of each element, in any shape.

    V_clipped = V_old + clip(V - V_old, -clip_coef, clip_coef)
    loss      = 0.5 * max((V - R)^2, (V_clipped - R)^2)

    `old_values` are the value head's estimates when the responses were sampled.
    """
    v_loss_unclipped = (values - returns) ** 2
    v_clipped = old_values + (values - old_values).clamp(-clip_coef, clip_coef)
    v_loss_clipped = (v_clipped - returns) ** 2
    v_loss_max = torch.maximum(v_loss_unclipped, v_loss_clipped)
    return 0.5 * v_loss_max


def gae_advantages(
    rewards: Tensor, values: Tensor, *, gamma: float = 1.0, gae_lambda: float = 0.95
) -> Tensor:
    """Compute the generalized advantage estimates (Schulman et al. 2016) of one response, (T,).

    delta_t = r_t + gamma * V_{t+1} - V_t,   V = 0 after the last token
    A_t     = delta_t + gamma * gae_lambda * A_{t+1}

    The KL penalty of Eq. 2 is already in the rewards (methods/policy_gradient.py).
    """
    advantages = torch.zeros_like(rewards)
    lastgaelam = 0.0
    nextvalue = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * nextvalue - values[t]
        lastgaelam = delta + gamma * gae_lambda * lastgaelam
        advantages[t] = lastgaelam
        nextvalue = values[t]
    return advantages
