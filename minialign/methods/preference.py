"""Train on responses and pairs: supervised fine-tuning, preference losses, and reward models."""

from collections import defaultdict
from dataclasses import dataclass, replace

import torch

from minialign.logprobs import response_logps
from minialign.losses import PairLogps, pair_loss, reward_model_loss, sft_loss
from minialign.methods.base import Method, pack_examples
from minialign.models.loading import VLM
from minialign.models.policy import Policy
from minialign.pairs.reward_model import score_responses


@dataclass
class SupervisedMethod(Method):
    """Supervised fine-tuning on the chosen response, which is the first of each example."""

    vlm: VLM

    def learned_from(self, examples):
        """Return the examples with their chosen responses only."""
        return [replace(example, responses=example.responses[:1]) for example in examples]

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the mean negative log-likelihood of a token."""
        rows = pack_examples(self.vlm, self.learned_from(micro_batch))
        logps, token_counts = response_logps(self.vlm.model, rows)  # (B, 1)

        # sft_loss is a mean over the tokens of the micro-batch. Its weight in the mean over the
        # tokens of the batch is its share of them.
        num_batch_tokens = sum(len(example.responses[0]) for example in batch)
        share_of_tokens = token_counts.sum() / num_batch_tokens
        loss = sft_loss(logps, token_counts) * share_of_tokens

        summed_logps = float(logps.detach().sum())
        return loss, {"logp_chosen": summed_logps / len(batch)}


@dataclass
class PreferenceMethod(Method):
    """A loss on preference pairs: DPO (Eq. 3), IPO or SLiC.

    The first response of an example is the chosen one, the others are rejected. With two rejected
    responses the loss is averaged over both pairs, with weights gamma and 1 - gamma (Eq. 5).
    slic-calibration does not read the reference log-probs, which are then only logged.
    """

    unit = "pairs"
    vlm: VLM  # its model is the policy
    loss_name: str  # one of PAIR_LOSSES, or that of a subclass
    beta: float
    smoothing: float = 0.0
    rejected_weights: tuple[float, ...] = (1.0,)  # one for each rejected response
    collector: object | None = None  # one of online.py, or None if the examples hold all responses

    def collect(self, batch, step):
        """Return the pairs of a step, and metrics of how they came about."""
        if self.collector is None:
            return batch, {}
        return self.collector.collect(batch, step)

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the mean loss over the pairs of the batch."""
        return self.mean_loss(self.score_pairs(micro_batch), batch)

    def score_pairs(self, micro_batch) -> list[PairLogps]:
        """Return the log-probs of the pairs (y+, y-), once for each of the rejected responses."""
        # 1. Summed log-probs of every response, (B, k), by the policy and by the reference.
        rows = pack_examples(self.vlm, micro_batch)
        policy_logps, token_counts = response_logps(self.vlm.model, rows)
        ref_logps = torch.stack([example.ref_logps for example in micro_batch])
        ref_logps = ref_logps.to(policy_logps)

        # 2. The chosen response is in every pair.
        pairs_of_rejected = []
        for rejected in range(1, len(self.rejected_weights) + 1):
            pairs = PairLogps(
                policy_chosen_logps=policy_logps[:, 0],
                policy_rejected_logps=policy_logps[:, rejected],
                ref_chosen_logps=ref_logps[:, 0],
                ref_rejected_logps=ref_logps[:, rejected],
                chosen_token_counts=token_counts[:, 0],
                rejected_token_counts=token_counts[:, rejected],
            )
            pairs_of_rejected.append(pairs)
        return pairs_of_rejected

    def mean_loss(self, pairs_of_rejected, batch):
        """Return a micro-batch's share of the mean loss over the pairs of the batch, and metrics.

        pairs_of_rejected: what `score_pairs` returned for the micro-batch.
        """
        total_loss = 0.0
        metrics = defaultdict(float)
        for pairs, weight in zip(pairs_of_rejected, self.rejected_weights, strict=True):
            # 1. The weighted mean over the rejected responses (Eq. 5). A single one has weight 1.
            losses = self.losses_of_pairs(pairs, batch)
            weighted_loss = weight * losses.sum()
            total_loss = total_loss + weighted_loss / len(batch)

            # 2. Metrics are averaged with the same weights.
            for name, values in pair_metrics(pairs, self.beta).items():
                weighted_value = weight * float(values.sum())
                metrics[name] += weighted_value / len(batch)
        return total_loss, dict(metrics)

    def losses_of_pairs(self, pairs, batch):
        """Return the loss of each pair, (B,)."""
        return pair_loss(self.loss_name, pairs, self.beta, label_smoothing=self.smoothing)


@torch.no_grad()
def pair_metrics(pairs, beta):
    """Return the metrics of B pairs, each (B,). Log-probs are summed over tokens, in nats.

    The metric `margin` is beta * h, by how much the implicit reward of the chosen response is
    larger. In losses.py the margin is h itself.
    """
    margin = pairs.margin()
    return {
        "logp_chosen": pairs.policy_chosen_logps.detach(),
        "logp_rejected": pairs.policy_rejected_logps.detach(),
        "ref_logp_chosen": pairs.ref_chosen_logps,
        "ref_logp_rejected": pairs.ref_rejected_logps,
        "margin": beta * margin,
        "accuracy": ranking_accuracy(margin),
    }


def ranking_accuracy(margin):
    """Return 1 where the chosen response is ahead, 0.5 at a tie and 0 elsewhere, (B,)."""
    return (margin > 0).float() + 0.5 * (margin == 0)


@dataclass
class RewardModelMethod(Method):
    """Train a reward model: a scalar head, and the policy below it, learn to rank pairs (Eq. 1)."""

    unit = "pairs"
    policy: Policy
    vlm: VLM

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the mean ranking loss over the pairs of the batch."""
        # 1. The scores of both responses.
        rows = pack_examples(self.vlm, micro_batch)
        scores = score_responses(self.vlm.model, self.policy.scalar_head, rows)  # (B, 2)
        chosen_scores = scores[:, 0]
        rejected_scores = scores[:, 1]
        losses = reward_model_loss(chosen_scores, rejected_scores)

        # 2. Metrics.
        margin = (chosen_scores - rejected_scores).detach()
        values = {
            "score_chosen": chosen_scores.detach(),
            "score_rejected": rejected_scores.detach(),
            "margin": margin,
            "accuracy": ranking_accuracy(margin),
        }
        metrics = {name: float(value.sum()) / len(batch) for name, value in values.items()}
        return losses.sum() / len(batch), metrics
