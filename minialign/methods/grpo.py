"""GRPO: learn from rewards that are compared among the responses to one prompt (not the paper's).

Group relative policy optimization (arXiv 2402.03300) collects rollouts as RLOO does, and needs no
value head either. With the k responses of a prompt, their rewards r_i and their tokens t:

    A_i   = (r_i - mean r) / (std r + 1e-4)
    ratio = pi(y_t) / pi_old(y_t)
    loss  = mean over i of the mean over t of
            -min(ratio A_i, clip(ratio, .8, 1.2) A_i) + beta * (ref / pi - log(ref / pi) - 1)

Three things differ from RLOO. The rewards of a prompt are divided by their standard deviation. Each
token has a ratio and a clip of its own. The KL penalty is a term of the loss, and not of the
reward.

Limits: the optimum is not that of Eq. 2. Dividing by the standard deviation makes small differences
of reward count as much as large ones, and the KL term pulls with the gradient of KL(ref || pi)
(tests/test_loss_optima.py). The mean over its tokens makes every response weigh the same, so a long
bad response is punished less at each of its tokens. With k = 4 the standard deviation is a coarse
estimate. A prompt whose responses all have one reward teaches nothing.
"""

from dataclasses import dataclass

import torch

from minialign.logprobs import response_hidden_states, token_logps
from minialign.methods.base import pack_examples
from minialign.methods.policy_gradient import PolicyGradientMethod, concat_tokens
from minialign.neighbor_losses import grpo_advantages, grpo_loss


@dataclass(kw_only=True)
class GrpoMethod(PolicyGradientMethod):
    """Group relative policy optimization, with `beta` as the weight of the KL estimate.

    As in the paper of GRPO, what was collected serves one optimizer step. With more `passes` the
    policy moves away from the one that sampled, and the clip acts.
    """

    k: int = 4
    passes: int = 1

    def add_advantages(self, rollouts):
        """Set one advantage a response, (k,) a prompt."""
        for rollout in rollouts:
            rollout.advantages = grpo_advantages(rollout.normalized_rewards[None])[0]

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the loss.

        It is a mean over the responses of the batch, each of which is a mean over its tokens.
        """
        # 1. Log-probs of the current policy, (N,) over the tokens of all responses.
        rows = pack_examples(self.vlm, micro_batch)
        hidden, targets, lengths = response_hidden_states(self.vlm.model, rows)
        logps = token_logps(hidden, self.vlm.model.vocab_head, targets)

        # 2. What was collected, in the same order. All tokens of a response share its advantage.
        rollouts = [example.rollout for example in micro_batch]
        old_logps = concat_tokens(rollouts, "old_logps").to(logps)
        ref_logps = concat_tokens(rollouts, "ref_token_logps").to(logps)
        advantages = torch.cat([rollout.advantages for rollout in rollouts]).to(logps)
        token_counts = torch.tensor(lengths, device=logps.device)
        token_advantages = advantages.repeat_interleave(token_counts)

        # 3. The loss of each token, and its mean.
        token_losses = grpo_loss(
            logps, old_logps, ref_logps, advantages=token_advantages, beta=self.beta
        )
        response_losses = [losses.mean() for losses in token_losses.split(lengths)]
        return torch.stack(response_losses).sum() / (self.k * len(batch)), {}
