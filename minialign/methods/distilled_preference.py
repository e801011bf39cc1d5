"""Add contrastive distillation of the chosen responses to a loss on pairs (not the paper's).

DPO says which of two responses is the better one. Distillation says of every token of the chosen
response what should stand there. The sum of both losses learns both from one run:

    loss = loss on the pairs (y+, y-) + weight * mean over the tokens of y+ of KL(q || pi)

Log-probs of the reference, and the targets that it gives, are stored before training. Both losses
have the same frozen reference, unless --reference-adapter merges that of the pairs with another.
"""

from dataclasses import dataclass, replace

from minialign.methods.base import Method
from minialign.methods.distillation import DistillationMethod
from minialign.methods.preference import PreferenceMethod


@dataclass
class DistilledPreferenceMethod(Method):
    """The loss of one method on pairs, plus the weighted distillation of the chosen responses.

    A step reads the chosen responses twice, once for each loss.
    """

    unit = "pairs"
    preference: PreferenceMethod
    distillation: DistillationMethod
    weight: float
    stores_targets = True  # not a field: the chosen responses never change, so their targets stay

    def settings(self) -> str:
        """Return what the stored targets depend on besides model and data, as a text."""
        return self.distillation.settings()

    def prepare(self, examples) -> list:
        """Return the examples with the targets of their chosen responses."""
        prepared = self.distillation.prepare(chosen_only(examples))
        examples_with_targets = []
        for example, prepared_example in zip(examples, prepared, strict=True):
            examples_with_targets.append(replace(example, targets=prepared_example.targets))
        return examples_with_targets

    def collect(self, batch, step):
        """Return the pairs of a step. Some losses on pairs compute more here."""
        return self.preference.collect(batch, step)

    def state_tensors(self):
        """Return what the loss on pairs keeps between steps."""
        return self.preference.state_tensors()

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the sum of both losses."""
        pair_loss, pair_metrics = self.preference.loss(micro_batch, batch)
        # Of the batch it reads the number of chosen tokens, which are those of the first responses.
        divergence, target_metrics = self.distillation.loss(chosen_only(micro_batch), batch)
        metrics = {**pair_metrics, **target_metrics, "divergence": float(divergence.detach())}
        return pair_loss + self.weight * divergence, metrics


def chosen_only(examples) -> list:
    """Return the examples with their first response, the chosen one, alone."""
    return [replace(example, responses=example.responses[:1]) for example in examples]
