"""One function per method: how a step comes by its responses, and what it minimises."""

from dataclasses import replace

import torch

from minialign.logprobs import response_logps
from minialign.losses import PairLogps, log_ratio_margin, pair_loss, reward_model_loss, sft_loss
from minialign.methods.base import Method, pack_examples
from minialign.pairs.reward_model import score_responses

# --- pairs


def collect_offline(batch, step):
    """Offline: the examples as they are."""
    return batch, {}


def preference_method(vlm, loss, beta, smoothing=0.0, weights=(1.0,), collect=collect_offline):
    """DPO (Eq. 3), IPO or SLiC, mean over examples (chosen, rejected, ...); with several rejected ones the weighted mean over them (Eq. 5)."""

    def loss_of(examples, whole):
        """The loss on pairs of a part of the batch."""
        logps, counts = response_logps(vlm.model, pack_examples(vlm, examples))  # (B, k)
        reference = torch.stack([example.ref_logps for example in examples]).to(logps)
        value, means = (
            0.0,
            dict.fromkeys(
                (
                    "logp_chosen",
                    "logp_rejected",
                    "ref_logp_chosen",
                    "ref_logp_rejected",
                    "margin",
                    "accuracy",
                ),
                0.0,
            ),
        )
        for other, weight in enumerate(weights, 1):
            pairs = PairLogps(
                policy_chosen_logps=logps[:, 0],
                policy_rejected_logps=logps[:, other],
                ref_chosen_logps=reference[:, 0],
                ref_rejected_logps=reference[:, other],
                chosen_token_counts=counts[:, 0],
                rejected_token_counts=counts[:, other],
            )
            h = log_ratio_margin(
                policy_chosen_logps=pairs.policy_chosen_logps,
                policy_rejected_logps=pairs.policy_rejected_logps,
                ref_chosen_logps=pairs.ref_chosen_logps,
                ref_rejected_logps=pairs.ref_rejected_logps,
            )
            losses = pair_loss(loss, pairs, beta, label_smoothing=smoothing)
            value = value + weight * losses.sum() / len(whole)
            parts = (
                pairs.policy_chosen_logps,
                pairs.policy_rejected_logps,
                pairs.ref_chosen_logps,
                pairs.ref_rejected_logps,
                beta * h,
                (h > 0).float() + 0.5 * (h == 0),
            )
            means = {
                name: mean + weight * float(part.detach().sum()) / len(whole)
                for (name, mean), part in zip(means.items(), parts)
            }
        return value, means

    return Method(collect, loss_of)


def sft_method(vlm):
    """Supervised training on the first response of each example: token-mean negative log-likelihood over the batch."""

    def loss_of(examples, whole):
        logps, counts = response_logps(
            vlm.model,
            pack_examples(
                vlm, [replace(example, responses=example.responses[:1]) for example in examples]
            ),
        )
        share = counts.sum() / sum(len(example.responses[0]) for example in whole)
        return sft_loss(logps, counts) * share, {
            "logp_chosen": float(logps.detach().sum()) / len(whole)
        }

    return Method(collect_offline, loss_of)


# --- reinforcement learning


def reward_model_method(policy, vlm):
    """Trains the scalar head and the policy below it to rank pairs (Eq. 1)."""

    def loss_of(examples, whole):
        """The ranking loss of a part of the batch."""
        found = score_responses(vlm.model, policy.scalar_head, pack_examples(vlm, examples))
        gap = (found[:, 0] - found[:, 1]).detach()
        means = {
            "score_chosen": found[:, 0],
            "score_rejected": found[:, 1],
            "margin": gap,
            "accuracy": (gap > 0).float() + 0.5 * (gap == 0),
        }
        return reward_model_loss(found[:, 0], found[:, 1]).sum() / len(whole), {
            name: float(value.detach().sum()) / len(whole) for name, value in means.items()
        }

    return Method(collect_offline, loss_of)
