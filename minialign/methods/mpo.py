"""Mixed preference optimization, MPO: DPO, a classifier of single responses, and SFT at once.

Published beside the paper (arXiv 2411.10442). The loss is `mpo_loss` in neighbor_losses.py. It
needs a number that no single pair has: the mean reward of all responses so far.
"""

from dataclasses import dataclass, field

import torch

from minialign.logprobs import MAX_TOKENS, response_logps
from minialign.methods.base import microbatches, pack_examples
from minialign.methods.preference import PreferenceMethod
from minialign.neighbor_losses import mpo_loss
from minialign.utils.distributed import gather_results, local_share


@dataclass
class MpoMethod(PreferenceMethod):
    """MPO on preference pairs.

    The shift of its classifier is the mean over all steps so far, the present one included, of
    (r+ + r-) / 2. So the rewards of the whole batch must be known before the loss of its first
    micro-batch. `collect` computes them in a forward pass of its own, without gradients. The
    processes share the examples. Thus the shift depends neither on micro-batches nor on processes.
    """

    # (2,): the sum of (r+ + r-) / 2 over all pairs so far, and their number. In float64, so that a
    # long run counts each pair.
    reward_sums: torch.Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    @property
    def shift(self) -> float:
        """Return the mean reward of all responses so far. It is 0 before the first step."""
        reward_sum, num_pairs = self.reward_sums.tolist()
        return reward_sum / max(1, num_pairs)

    def state_tensors(self):
        """Return the sums behind the shift."""
        return {"reward_sums": self.reward_sums}

    def collect(self, batch, step):
        """Return the pairs of a step, and count their rewards before the loss uses the shift."""
        examples, metrics = super().collect(batch, step)
        for mean_reward in self.mean_rewards(examples):
            self.reward_sums += torch.tensor([mean_reward, 1.0])
        return examples, {**metrics, "shift": self.shift}

    @torch.no_grad()
    def mean_rewards(self, examples) -> list[float]:
        """Return (r+ + r-) / 2 of each example, in the order of the micro-batches.

        With two rejected responses (Eq. 5), r- is the weighted mean of their rewards.
        """
        micro_batches = microbatches(examples, MAX_TOKENS)
        local_rewards = []
        for micro_batch in local_share(micro_batches):
            policy_logps, _ = response_logps(self.vlm.model, pack_examples(self.vlm, micro_batch))
            ref_logps = torch.stack([example.ref_logps for example in micro_batch])
            rewards = self.beta * (policy_logps.cpu() - ref_logps)  # (B, k)
            weights = torch.tensor([1.0, *self.rejected_weights])
            mean_rewards_of_pairs = (rewards * weights).sum(dim=1) / 2
            local_rewards.append(mean_rewards_of_pairs.tolist())
        gathered_rewards = gather_results(local_rewards, num_items=len(micro_batches))
        mean_rewards = []
        for rewards_of_micro_batch in gathered_rewards:
            mean_rewards += rewards_of_micro_batch
        return mean_rewards

    def losses_of_pairs(self, pairs, batch):
        """Return the MPO loss of each pair."""
        num_chosen_tokens = sum(len(example.responses[0]) for example in batch)
        return mpo_loss(
            pairs,
            self.beta,
            shift=self.shift,
            mean_chosen_tokens=num_chosen_tokens / len(batch),
        )
