"""This module holds the losses of methods that were published beside the paper, as pure functions.

The notation is that of losses.py. The losses on pairs also speak of the reward of a response, which
is r = beta * log(pi(y|x) / ref(y|x)).

Shapes: B pairs or prompts, k responses a prompt, N tokens of all responses. For MRPO, N pairs are
all pairs of the data.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minialign.losses import PairLogps, dpo_loss, ppo_policy_loss

# The losses on pairs that `pair_loss` does not compute, because they read more than a pair's
# log-probs. Each has a method of its own (methods/mpo.py, methods/mdpo.py).
NEIGHBOR_LOSSES = ("mpo", "mdpo")

# --- Group relative policy optimization, GRPO (arXiv 2402.03300)


def grpo_advantages(rewards: Tensor) -> Tensor:
    """Compute GRPO's advantages (arXiv 2402.03300) of k responses to each of B prompts, (B, k).

    A_i = (r_i - mean r) / (std r + 1e-4)

    Mean and standard deviation (with k - 1, as in TRL) are those of the k responses to one prompt.
    So every prompt weighs the same, however far apart its rewards are. If they are all equal, the
    advantages are 0.
    """
    mean = rewards.mean(dim=1, keepdim=True)
    std = rewards.std(dim=1, keepdim=True)
    return (rewards - mean) / (std + 1e-4)


def kl_estimates(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Compute GRPO's estimate of KL(policy || reference) at each sampled token, in any shape.

    estimate = ref(y) / pi(y) - log(ref(y) / pi(y)) - 1

    It is never negative, and its mean over tokens that the policy samples is the KL divergence. Its
    mean gradient is not that of KL(policy || reference), but that of KL(reference || policy).

    exp overflows in fp32 above 88, so above 20 nats the estimate goes on along its tangent.
    """
    logratio = ref_logps - logps
    capped = logratio.clamp(max=20)
    excess = logratio - capped
    # expm1 is exp - 1, without the rounding error of the difference near 0.
    return capped.expm1() + capped.exp() * excess - logratio


def grpo_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor, *, advantages: Tensor, beta: float
) -> Tensor:
    """Compute the GRPO loss (arXiv 2402.03300) of each token, (N,).

    loss = -min(ratio * A, clip(ratio, 0.8, 1.2) * A) + beta * KL estimate

    `advantages` (N,) holds for each token the advantage of its response. The loss of a batch is a
    mean over the tokens of each response, then over responses (methods/grpo.py).
    """
    policy_losses = ppo_policy_loss(logps, old_logps, advantages)
    return policy_losses + beta * kl_estimates(logps, ref_logps)


# --- Mixed preference optimization, MPO (arXiv 2411.10442)

MPO_DPO_WEIGHT = 0.8
MPO_BCO_WEIGHT = 0.2
MPO_SFT_WEIGHT = 1.0


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float) -> Tensor:
    """Compute the BCO loss (arXiv 2404.04656) of each pair, (B,).

    loss = -log sigmoid(r+ - shift) - log sigmoid(-(r- - shift))

    A binary classifier tells chosen from rejected responses by their rewards. `shift` is the reward
    at which it is undecided. It has no gradient. Each response is judged on its own. So a pair
    whose rewards are both below the shift is not good, however far apart they are.
    """
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(shift - rejected_rewards)


def mpo_loss(pairs: PairLogps, beta: float, *, shift: float, mean_chosen_tokens: float) -> Tensor:
    """Compute the MPO loss (arXiv 2411.10442) of each pair, (B,).

    loss = 0.8 * DPO + 0.2 * BCO + 1.0 * SFT
    SFT  = -log pi(y+|x) / mean number of tokens of a chosen response of the batch

    So the mean of the SFT terms of a batch is the mean negative log-likelihood of a token.

    Where policy and reference agree and the shift is 0, the loss is 1.2 ln 2 + SFT. As beta goes to
    0, DPO and BCO become constants, and only SFT has a gradient.
    """
    chosen_rewards = beta * (pairs.policy_chosen_logps - pairs.ref_chosen_logps)
    rejected_rewards = beta * (pairs.policy_rejected_logps - pairs.ref_rejected_logps)
    sft_terms = -pairs.policy_chosen_logps / mean_chosen_tokens
    return (
        MPO_DPO_WEIGHT * dpo_loss(pairs.margin(), beta)
        + MPO_BCO_WEIGHT * bco_loss(chosen_rewards, rejected_rewards, shift)
        + MPO_SFT_WEIGHT * sft_terms
    )


# --- Conditional preference optimization, mDPO (arXiv 2406.11839)


def conditional_loss(log_ratios: Tensor, damaged_log_ratios: Tensor, beta: float) -> Tensor:
    """Compute mDPO's conditional loss of each chosen response, (B,).

    loss = -log sigmoid(beta * [log pi/ref(y+|image) - log pi/ref(y+|damaged image)])

    This is DPO on a pair of images instead of a pair of responses. A policy that raises the chosen
    response without looking at the image raises both log ratios, and gains nothing. The loss is
    ln 2 where policy and reference agree, and as beta goes to 0.
    """
    return dpo_loss(log_ratios - damaged_log_ratios, beta)


def anchor_loss(log_ratios: Tensor, beta: float) -> Tensor:
    """Compute mDPO's anchor of each chosen response, (B,).

    loss = -log sigmoid(beta * log pi/ref(y+|image))

    The other two losses are differences, so they can be low although everything became unlikely.
    The anchor keeps the reward of the chosen response above 0. It is ln 2 where policy and
    reference agree, and as beta goes to 0.
    """
    return dpo_loss(log_ratios, beta)


# --- Two references, MRPO (arXiv 2405.16388)


def merged_reference_logps(base_logps: Tensor, extra_logps: Tensor, *, eta: float = 0.1) -> Tensor:
    """Compute the log-probs of MRPO's merged reference, (N, 2): those of y+, then those of y-.

    1 / ref(y|x) = w_extra / extra(y|x) + w_base / base(y|x),   w_extra + w_base = 1
    w_extra = |a_extra| / (|a_extra| + |a_base|),   a = log p(y+|x) - log p(y-|x)

    The arguments are the log-probs of the base model and of an extra one, both (N, 2), for all N
    pairs of the data. DPO, or another loss on pairs, is then computed with `ref` as its reference.
    If both references are equal, so is `ref`. If not, the margin is not 0 at step 0, where the
    policy is the base.

    First, log extra(y|x) is clipped to a band around log base(y|x), because the policy starts at
    the base and should not be drawn far from it. The band reaches from log base(y|x) * (1 + e) to
    log base(y|x) * (1 - e). `eta` is the sum of e for y+ and e for y-, which are in proportion to
    the mean sizes of their log-probs. These means are over all pairs of the data, so that the loss
    of a pair does not depend on its batch.

    Why an average of 1 / p? MRPO maximizes E[r] - beta * sum_k w_k KL(pi || ref_k). By Jensen's
    inequality, the sum over the references has an upper bound that is a single divergence:

    sum_k w_k E[log(pi / ref_k)] <= E[log sum_k w_k pi / ref_k] = KL(pi || ref)

    So the weight w_k of KL(pi || ref_k) is also the numerator over ref_k. It is large for the
    reference that tells the two responses apart more clearly.

    As eta goes to 0, the result is the base. Of two probabilities that are far apart, the lower one
    decides: an average of 1 / p is near its largest term.
    """
    # In float64, so that the result of two equal references is theirs to the last bit of fp32.
    base = base_logps.double()
    extra = extra_logps.double()

    # 1. Clip. Log-probs are negative, so (1 + eta) is the lower end.
    mean_sizes = base.abs().mean(dim=0)  # (2,)
    etas = eta * mean_sizes / mean_sizes.sum().clamp(min=1e-6)
    extra = extra.clamp(min=base * (1 + etas), max=base * (1 - etas))

    # 2. The weights of each pair, (N, 1). The small number avoids 0 / 0 if neither reference tells
    #    the two responses apart.
    extra_gaps = (extra[:, 0] - extra[:, 1]).abs()
    base_gaps = (base[:, 0] - base[:, 1]).abs()
    extra_weights = (extra_gaps / (extra_gaps + base_gaps + 1e-6))[:, None]
    base_weights = 1 - extra_weights

    # 3. log ref = -log(w_extra / extra + w_base / base). logaddexp adds two numbers that are given
    #    as logarithms: 1 / p of a long response overflows. The logarithm of a weight of 0 is minus
    #    infinity, which is exact there.
    merged = -torch.logaddexp(extra_weights.log() - extra, base_weights.log() - base)
    return merged.to(base_logps.dtype)
