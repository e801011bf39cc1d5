"""This module holds losses on pairs that were published beside the paper, as pure functions.

They go on with losses.py, and their notation is its own: B pairs, log-probs summed over tokens in
nats, and the reward r = beta * log(pi(y|x) / ref(y|x)) of a response.
"""

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
