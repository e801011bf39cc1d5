"""Every objective as a pure function of log-probabilities: tensors in, tensors out, no model, no data."""
import torch
from torch.nn import functional as F


def margin(logps, reference):
    """h (B,), the implicit reward margin over beta, in nats; logps and reference (B, 2): chosen, then rejected."""
    gain = logps - reference
    return gain[:, 0] - gain[:, 1]


def dpo(h, beta):
    """DPO (Eq. 3), (B,): -log sigmoid(beta h)."""
    return -F.logsigmoid(beta * h)


def ipo(h, beta):
    """IPO (Azar et al. 2024), (B,): (h - 1 / (2 beta))^2, h from summed log-probs."""
    return (h - 1 / (2 * beta)) ** 2


def slic(h, beta):
    """SLiC as a hinge on the margin with reference (Tang et al. 2024b), (B,): max(0, 1 - beta h)."""
    return torch.relu(1 - beta * h)


PAIR_LOSSES = {"dpo": dpo, "ipo": ipo, "slic": slic}


def sft(logps, counts):
    """Supervised loss, a scalar: mean negative log-likelihood per response token, in nats; logps and counts (B, k)."""
    return -logps.sum() / counts.sum()
