"""This module holds the losses of methods beside the paper, in the most obvious form.

It goes on with reference.py: one token at a time, nothing cached, and nothing used of the fast code
that it specifies.
"""

import math

import torch

from minialign.reference import token_logps

# --- GRPO (arXiv 2402.03300)


def grpo_advantages(rewards):
    """Compute (r - mean) / (std + 1e-4) of each reward, for the responses to one prompt."""
    mean = sum(rewards) / len(rewards)
    variance = 0.0
    for reward in rewards:
        variance += (reward - mean) ** 2 / (len(rewards) - 1)
    return [(reward - mean) / (math.sqrt(variance) + 1e-4) for reward in rewards]


def grpo_token_loss(logp, old_logp, ref_logp, advantage, beta):
    """Compute the loss of one token: the clipped surrogate, and beta times the KL estimate."""
    ratio = torch.exp(logp - old_logp)
    clipped_ratio = torch.clamp(ratio, 0.8, 1.2)
    surrogate = torch.minimum(ratio * advantage, clipped_ratio * advantage)
    kl_estimate = torch.exp(ref_logp - logp) - (ref_logp - logp) - 1
    return -surrogate + beta * kl_estimate


def grpo_loss(policy, ref_model, examples, beta):
    """Compute the GRPO loss: the mean over a response's tokens, then over all responses.

    An example is (prompt_ids, image_features, responses, rewards, old_logps), and old_logps has a
    list of numbers for each response: those of the policy that sampled it, one for each token.
    """
    losses = []
    for prompt_ids, image_features, responses, rewards, old_logps in examples:
        advantages = grpo_advantages(rewards)
        for i, response in enumerate(responses):
            logps = token_logps(policy, prompt_ids, image_features, response)
            with torch.no_grad():
                ref_logps = token_logps(ref_model, prompt_ids, image_features, response)
            token_losses = []
            for logp, old_logp, ref_logp in zip(logps, old_logps[i], ref_logps, strict=True):
                token_loss = grpo_token_loss(logp, old_logp, ref_logp, advantages[i], beta)
                token_losses.append(token_loss)
            losses.append(sum(token_losses) / len(token_losses))
    return sum(losses) / len(losses)
