"""This module holds the losses of methods beside the paper, in the most obvious form.

Like reference.py, it computes one token at a time, caches nothing, and uses none of the fast code
that it specifies.
"""

import math

import torch

from minialign.reference import log_ratio, response_logp, sft_loss, token_logps

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


# --- MPO (arXiv 2411.10442)


def mpo_loss(policy, ref_model, examples, beta, earlier_rewards=()):
    """Compute the MPO loss of a batch: 0.8 * DPO + 0.2 * BCO + SFT.

    An example is (prompt_ids, image_features, chosen, rejected). `earlier_rewards` has the rewards
    of all responses of the batches before, chosen and rejected.
    """
    # 1. The reward of each response.
    chosen_rewards = []
    rejected_rewards = []
    for prompt_ids, image_features, chosen, rejected in examples:
        chosen_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, chosen)
        rejected_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, rejected)
        chosen_rewards.append(beta * chosen_log_ratio)
        rejected_rewards.append(beta * rejected_log_ratio)

    # 2. The mean of all rewards so far, those of this batch included, as a number.
    all_rewards = list(earlier_rewards)
    for reward in chosen_rewards + rejected_rewards:
        all_rewards.append(reward.item())
    shift = sum(all_rewards) / len(all_rewards)

    # 3. The losses that compare, as means over pairs.
    dpo_losses = []
    bco_losses = []
    for chosen_reward, rejected_reward in zip(chosen_rewards, rejected_rewards, strict=True):
        dpo_losses.append(-torch.log(torch.sigmoid(chosen_reward - rejected_reward)))
        loss_of_chosen = -torch.log(torch.sigmoid(chosen_reward - shift))
        loss_of_rejected = -torch.log(torch.sigmoid(-(rejected_reward - shift)))
        bco_losses.append(loss_of_chosen + loss_of_rejected)
    dpo_loss = sum(dpo_losses) / len(dpo_losses)
    bco_loss = sum(bco_losses) / len(bco_losses)

    # 4. The supervised loss, a mean over tokens.
    chosen_examples = []
    for prompt_ids, image_features, chosen, _ in examples:
        chosen_examples.append((prompt_ids, image_features, chosen))
    return 0.8 * dpo_loss + 0.2 * bco_loss + sft_loss(policy, chosen_examples)


# --- mDPO (arXiv 2406.11839)


def mdpo_loss(policy, ref_model, examples, beta):
    """Compute the mDPO loss, the mean over pairs of DPO, the conditional loss and the anchor.

    An example is (prompt_ids, image_features, chosen, rejected, damaged_features, visible). The
    last two are the damaged image, and the indices of its tokens that are not masked (None: all).
    """
    losses = []
    for prompt_ids, image_features, chosen, rejected, damaged_features, visible in examples:
        # 1. The log ratios of y+ and y- with the image, and of y+ with the damaged image.
        chosen_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, chosen)
        rejected_log_ratio = log_ratio(policy, ref_model, prompt_ids, image_features, rejected)
        damaged_logp = response_logp(policy, prompt_ids, damaged_features, chosen, visible)
        with torch.no_grad():
            damaged_ref_logp = response_logp(
                ref_model, prompt_ids, damaged_features, chosen, visible
            )
        damaged_log_ratio = damaged_logp - damaged_ref_logp

        # 2. Compare y+ with y-, the image with the damaged one, and y+ with the reference.
        dpo_loss = -torch.log(torch.sigmoid(beta * (chosen_log_ratio - rejected_log_ratio)))
        conditional_loss = -torch.log(torch.sigmoid(beta * (chosen_log_ratio - damaged_log_ratio)))
        anchor_loss = -torch.log(torch.sigmoid(beta * chosen_log_ratio))
        losses.append(dpo_loss + conditional_loss + anchor_loss)
    return sum(losses) / len(losses)


# --- MRPO (arXiv 2405.16388)


def merged_reference(base_pairs, extra_pairs, eta=0.1):
    """Compute [log ref(y+), log ref(y-)] of each pair by the merged reference.

    The arguments hold (log p(y+), log p(y-)) of each pair, as numbers. The inverse probabilities
    themselves are averaged here, which works for responses of a few hundred nats.
    """
    # The sides of a pair are 0 (chosen) and 1 (rejected).
    mean_sizes = []
    for side in (0, 1):
        mean_sizes.append(sum(abs(pair[side]) for pair in base_pairs) / len(base_pairs))
    merged_pairs = []
    for base, extra in zip(base_pairs, extra_pairs, strict=True):
        # 1. Clip each side of the extra reference.
        clipped = []
        for side in (0, 1):
            width = eta * mean_sizes[side] / sum(mean_sizes) * abs(base[side])
            clipped.append(max(base[side] - width, min(base[side] + width, extra[side])))

        # 2. The weight of the extra reference.
        extra_gap = abs(clipped[0] - clipped[1])
        base_gap = abs(base[0] - base[1])
        extra_weight = extra_gap / (extra_gap + base_gap + 1e-6)

        # 3. The weighted harmonic mean.
        merged = []
        for side in (0, 1):
            inverse = extra_weight / math.exp(clipped[side])
            inverse += (1 - extra_weight) / math.exp(base[side])
            merged.append(math.log(1 / inverse))
        merged_pairs.append(merged)
    return merged_pairs


def reference_logps_of_pairs(ref_model, examples):
    """Compute (log ref(y+), log ref(y-)) of each pair, as numbers."""
    pairs = []
    for prompt_ids, image_features, chosen, rejected in examples:
        with torch.no_grad():
            chosen_logp = response_logp(ref_model, prompt_ids, image_features, chosen)
            rejected_logp = response_logp(ref_model, prompt_ids, image_features, rejected)
        pairs.append((chosen_logp.item(), rejected_logp.item()))
    return pairs


def mrpo_loss(policy, base_model, extra_model, examples, beta):
    """Compute DPO against the merged reference, the mean over pairs.

    An example is (prompt_ids, image_features, chosen, rejected).
    """
    # 1. Merge the log-probs of both references.
    base_pairs = reference_logps_of_pairs(base_model, examples)
    extra_pairs = reference_logps_of_pairs(extra_model, examples)
    merged_pairs = merged_reference(base_pairs, extra_pairs)

    # 2. DPO.
    losses = []
    for example, merged in zip(examples, merged_pairs, strict=True):
        prompt_ids, image_features, chosen, rejected = example
        ref_chosen_logp, ref_rejected_logp = merged
        chosen_log_ratio = (
            response_logp(policy, prompt_ids, image_features, chosen) - ref_chosen_logp
        )
        rejected_log_ratio = (
            response_logp(policy, prompt_ids, image_features, rejected) - ref_rejected_logp
        )
        h = chosen_log_ratio - rejected_log_ratio
        losses.append(-torch.log(torch.sigmoid(beta * h)))
    return sum(losses) / len(losses)
