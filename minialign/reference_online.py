"""This module samples responses from the current policy, in the most obvious form.

It continues reference.py. It works on one response at a time, runs every sequence anew, and uses
nothing of the fast code that it specifies. Here are online and mixed DPO (Sec. 2.3) and the
rollouts of RLOO and PPO (Sec. 2.1, App. A) of arXiv 2407.02477. Everywhere `uniforms` holds a
number in [0, 1) for each token that is sampled.
"""

import math
from dataclasses import dataclass

import torch

from minialign.data.chat_templates import (
    decode_response,
    encode_prompt,
    encode_response,
    stop_ids,
)
from minialign.reference import (
    gae_advantages,
    generate,
    penalized_token_rewards,
    rloo_advantages,
    token_logps,
    token_values,
    whiten,
)
from minialign.reference_bdhs import encode_images

# --- Online and mixed DPO (Sec. 2.3)


def sample_response(vlm, record, uniforms):
    """Return the ids and the text of a response that the policy gives to a record's prompt."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns, system=record.system)
    end_ids = stop_ids(vlm.tokenizer, vlm.template)
    ids = generate(vlm.model, prompt_ids, encode_images(vlm, record), [], uniforms, end_ids)
    text = decode_response(vlm.tokenizer, vlm.template, ids)
    return ids, text


def online_pair(vlm, record, annotate, uniforms):
    """Sample two responses and return them as ids, the better one first, or None for a tie.

    `annotate` maps the record and two texts to 0 if the first is better, to 1 if the second is, and
    to None for a tie. Equal texts are a tie without asking. `uniforms` has those of each response.
    """
    # 1. Two responses of the current policy.
    first_ids, first_text = sample_response(vlm, record, uniforms[0])
    second_ids, second_text = sample_response(vlm, record, uniforms[1])
    if first_text.strip() == second_text.strip():
        return None

    # 2. The annotator says which is better.
    verdict = annotate(record, first_text.strip(), second_text.strip())
    if verdict is None:
        return None
    if verdict == 0:
        return first_ids, second_ids
    return second_ids, first_ids


def mixed_pair(vlm, record, annotate, uniforms, *, coin, mix=0.5):
    """Return the record's own pair with probability `mix`, else an online pair (Eq. 4)."""
    if coin < mix:
        chosen = encode_response(vlm.tokenizer, vlm.template, record.chosen)
        rejected = encode_response(vlm.tokenizer, vlm.template, record.rejected)
        return chosen, rejected
    return online_pair(vlm, record, annotate, uniforms)


# --- Rollouts of RLOO and PPO (Sec. 2.1, App. A)


@dataclass
class Rollout:
    """A sampled response and what is noted of it before the policy changes."""

    response: list  # ids
    reward: float  # r(x, y), normalized
    logps: list  # of each token, in nats, by the policy that sampled it
    ref_logps: list  # of each token, by the reference
    values: list  # of each token, by the value head, empty without one


def reward_statistics(rewards):
    """Return the mean and the standard deviation by which rewards are normalized (App. A)."""
    mean = sum(rewards) / len(rewards)
    variance = 0.0
    for reward in rewards:
        variance += (reward - mean) ** 2 / len(rewards)
    return mean, math.sqrt(variance)


@torch.no_grad()
def sample_rollout(vlm, ref_model, record, uniforms, *, score, statistics, value_head=None):
    """Sample one response and note what RLOO and PPO need to know of it.

    `score` maps a record and a response's text to the raw reward. `statistics` is what
    reward_statistics returns for the records' chosen responses.
    """
    # 1. Sample a response at temperature 1.
    response, text = sample_response(vlm, record, uniforms)

    # 2. Score it, and normalize the score.
    reward_mean, reward_std = statistics
    reward = (score(record, text) - reward_mean) / reward_std

    # 3. Log-probs and values of each token.
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns, system=record.system)
    image_features = encode_images(vlm, record)
    logps = token_logps(vlm.model, prompt_ids, image_features, response)
    ref_logps = token_logps(ref_model, prompt_ids, image_features, response)
    values = []
    if value_head is not None:
        values = token_values(vlm.model, value_head, prompt_ids, image_features, response)

    return Rollout(
        response=response,
        reward=reward,
        logps=torch.tensor(logps).tolist(),
        ref_logps=torch.tensor(ref_logps).tolist(),
        values=torch.tensor(values).tolist(),
    )


def rloo_rollout_advantages(rollouts, beta):
    """Compute RLOO's advantage of each of the k rollouts of one prompt, a list of k numbers."""
    penalized_rewards = []
    for rollout in rollouts:
        kl = sum(rollout.logps) - sum(rollout.ref_logps)
        penalized_rewards.append(rollout.reward - beta * kl)
    return rloo_advantages(penalized_rewards)


def ppo_rollout_advantages(rollouts, beta):
    """Compute PPO's advantages and returns of all tokens of all rollouts, two flat lists.

    The advantages are whitened over all these tokens.
    """
    all_advantages = []
    all_returns = []
    for rollout in rollouts:
        token_rewards = penalized_token_rewards(
            rollout.logps, rollout.ref_logps, rollout.reward, beta
        )
        advantages = gae_advantages(token_rewards, rollout.values)
        all_advantages += advantages
        for advantage, value in zip(advantages, rollout.values, strict=True):
            all_returns.append(advantage + value)
    whitened = whiten(torch.tensor(all_advantages))
    return whitened.tolist(), all_returns
