"""This module holds losses on pairs that were published beside the paper, as pure functions.

They go on with losses.py, and their notation is its own: B pairs, log-probs summed over tokens in
nats, and the reward r = beta * log(pi(y|x) / ref(y|x)) of a response.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minialign.losses import PairLogps, dpo_loss, log_ratio_margin

# Each of these names has a method of its own (methods/mpo.py, methods/mdpo.py), because its loss
# reads more than a pair's log-probs.
NEIGHBOR_LOSSES = ("mpo", "mdpo")

# --- Mixed preference optimization, MPO (arXiv 2411.10442)

MPO_DPO_WEIGHT = 0.8
MPO_BCO_WEIGHT = 0.2
MPO_SFT_WEIGHT = 1.0


def bco_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, shift: float) -> Tensor:
    """Compute the BCO loss (arXiv 2404.04656) of each pair, (B,).

    loss = -log sigmoid(r+ - shift) - log sigmoid(-(r- - shift))

    A binary classifier tells chosen from rejected responses by their rewards. Each response is
    judged on its own, so a pair whose rewards both fall is not good, however far apart they are.
    `shift` is the reward at which the classifier is undecided. It has no gradient.
    """
    return -F.logsigmoid(chosen_rewards - shift) - F.logsigmoid(shift - rejected_rewards)


def mpo_loss(pairs: PairLogps, beta: float, *, shift: float, mean_chosen_tokens: float) -> Tensor:
    """Compute the MPO loss (arXiv 2411.10442) of each pair, (B,).

    loss = 0.8 * DPO + 0.2 * BCO + 1.0 * SFT
    SFT  = -log pi(y+|x) / mean number of tokens of a chosen response of the batch

    So over a batch, the mean of the SFT terms is the mean negative log-likelihood of a token.

    Where policy and reference agree and the shift is 0, the loss is 1.2 ln 2 + SFT. For beta to 0
    it is the same for every policy, and only SFT has a gradient.
    """
    margin = log_ratio_margin(
        policy_chosen_logps=pairs.policy_chosen_logps,
        policy_rejected_logps=pairs.policy_rejected_logps,
        ref_chosen_logps=pairs.ref_chosen_logps,
        ref_rejected_logps=pairs.ref_rejected_logps,
    )
    chosen_rewards = beta * (pairs.policy_chosen_logps - pairs.ref_chosen_logps)
    rejected_rewards = beta * (pairs.policy_rejected_logps - pairs.ref_rejected_logps)
    sft_terms = -pairs.policy_chosen_logps / mean_chosen_tokens
    return (
        MPO_DPO_WEIGHT * dpo_loss(margin, beta)
        + MPO_BCO_WEIGHT * bco_loss(chosen_rewards, rejected_rewards, shift)
        + MPO_SFT_WEIGHT * sft_terms
    )


# --- Conditional preference optimization, mDPO (arXiv 2406.11839)


def conditional_loss(log_ratios: Tensor, damaged_log_ratios: Tensor, beta: float) -> Tensor:
    """Compute mDPO's conditional loss of each chosen response, (B,).

    loss = -log sigmoid(beta * [log pi/ref(y+|image) - log pi/ref(y+|damaged image)])

    This is DPO on a pair of images instead of a pair of responses. A policy that raises the chosen
    response without looking at the image raises both log ratios, and gains nothing. Where policy
    and reference agree, and for beta to 0, the loss is ln 2.
    """
    return dpo_loss(log_ratios - damaged_log_ratios, beta)


def anchor_loss(log_ratios: Tensor, beta: float) -> Tensor:
    """Compute mDPO's anchor of each chosen response, (B,).

    loss = -log sigmoid(beta * log pi/ref(y+|image))

    Both other losses compare, so they are content if everything becomes unlikely. The anchor keeps
    the reward of the chosen response above 0. Where policy and reference agree, and for beta to 0,
    the loss is ln 2.
    """
    return dpo_loss(log_ratios, beta)


# --- Two references, MRPO (arXiv 2405.16388)


def merged_reference_logps(base_logps: Tensor, extra_logps: Tensor, *, eta: float = 0.1) -> Tensor:
    """Compute MRPO's merged reference: log-probs (N, 2) of all N pairs of the data, y+ first.

    1 / ref(y|x) = w_extra / extra(y|x) + w_base / base(y|x),   w_extra + w_base = 1
    w_extra = |a_extra| / (|a_extra| + |a_base|),   a = log p(y+|x) - log p(y-|x)

    The loss is then DPO, or another loss on pairs, against `ref`. With two equal references it is
    that of one. With others the margin is not 0 at step 0, where the policy is the base.

    First log extra(y|x) is clipped to log base(y|x) * (1 -+ eta of the side), because the policy
    starts at the base and should not be drawn far from it. `eta` is divided between y+ and y- as
    the mean sizes of their log-probs are. These are means over all pairs of the data, so that the
    loss of a pair does not depend on its batch.

    Which reference a weight belongs to follows from the objective E[r] - beta * sum_k w_k KL(pi ||
    ref_k). Its sum has, by Jensen's inequality, an upper bound that is one divergence:

    sum_k w_k E[log(pi / ref_k)] <= E[log sum_k w_k pi / ref_k] = KL(pi || ref)

    So w_k is over ref_k itself, and holds the policy to ref_k. The weight is large for the
    reference that tells the two responses apart more clearly.

    For eta to 0 the result is the base. Of two probabilities that are far apart, the lower one
    decides: an average of 1 / p is near its largest term.
    """
    # In float64: the result of two equal references is then theirs to the last bit of fp32.
    base = base_logps.double()
    extra = extra_logps.double()

    # 1. Clip. Log-probs are negative, so (1 + eta) is the lower end.
    mean_sizes = base.abs().mean(dim=0)  # (2,)
    etas = eta * mean_sizes / mean_sizes.sum().clamp(min=1e-6)
    extra = extra.clamp(min=base * (1 + etas), max=base * (1 - etas))

    # 2. The weights of each pair, (N, 1). The small number is for two references without a view.
    extra_gaps = (extra[:, 0] - extra[:, 1]).abs()
    base_gaps = (base[:, 0] - base[:, 1]).abs()
    extra_weights = (extra_gaps / (extra_gaps + base_gaps + 1e-6))[:, None]
    base_weights = 1 - extra_weights

    # 3. log ref = -log(w_extra / extra + w_base / base). logaddexp never leaves the logarithms, for
    #    1 / p of a long response overflows. A weight of 0 is minus infinity there, which is exact.
    merged = -torch.logaddexp(extra_weights.log() - extra, base_weights.log() - base)
    return merged.to(base_logps.dtype)
