"""One function per method: how a step comes by its responses, and what it minimises."""

from dataclasses import replace

import torch

from minialign.data.chat_templates import end_token_id
from minialign.logprobs import response_hidden_states, response_logps, token_logps
from minialign.losses import gae_advantages, ppo_policy_loss, ppo_value_loss, rloo_advantages
from minialign.methods.base import Method, microbatches, pack_examples
from minialign.methods.responses import generate_responses, response_text
from minialign.utils.distributed import map_across_ranks


def reward_statistics(reward, records):
    """(mean, standard deviation) of the reward over the records' chosen responses, by which rewards are normalised (App. A)."""
    found = reward.score(records, [[record.chosen] for record in records])
    return float(found.mean()), max(float(found.std(correction=0)), 1e-6)


def collect_rollouts(policy, vlm, reward, scale, sampling, k, finish):
    """How reinforcement learning collects: k responses a prompt, their normalised rewards, token log-probs of policy and reference.

    `finish(examples)` adds what the loss needs to each rollout: {"rewards" (k,), "old" and "reference" (k lists of (R,) nats)}.
    """

    def tell(rows, cache=None):
        """Token log-probs of the rows' responses in reading order, as lists; with a cache, which is the policy's, values too if it has a head."""
        hidden, targets, lengths = response_hidden_states(vlm.model, rows, cache)
        found = [token_logps(hidden, vlm.model.vocab_head, targets)] + (
            [policy.scalar_head(hidden.float())[:, 0]] if policy.scalar_head and cache else []
        )
        return [[own.tolist() for own in one.split(lengths)] for one in found]

    def collect(batch, step):
        """Responses of this step's policy with everything that is known of them before it changes."""
        with torch.no_grad():
            responses, *told = zip(*generate_responses(vlm, batch, k, sampling, step, tell))
        texts = [[response_text(vlm, ids) for ids in own] for own in responses]
        rewards = (reward.score([example.record for example in batch], texts) - scale[0]) / scale[1]
        examples = [
            replace(example, responses=own, rollout={"rewards": earned})
            for example, own, earned in zip(batch, responses, rewards)
        ]
        with policy.reference():
            parts = microbatches(examples, 16384)
            for part, [logps] in zip(
                parts,
                map_across_ranks(
                    parts, lambda own: [tell(pack_examples(vlm, part)) for part in own]
                ),
            ):
                logps = iter(logps)
                for example in part:
                    example.rollout["reference"] = [
                        torch.tensor(next(logps)) for _ in example.responses
                    ]
        for example, *noted in zip(examples, *told):
            example.rollout |= {
                name: [torch.tensor(own) for own in lists]
                for name, lists in zip(("old", "values"), noted)
            }
        finish(examples)
        old, ids = (
            torch.cat([part for example in examples for part in example.rollout["old"]]),
            [ids for own in responses for ids in own],
        )
        gaps = old - torch.cat(
            [part for example in examples for part in example.rollout["reference"]]
        )
        end, n = end_token_id(vlm.tokenizer, vlm.template), len(ids)
        return examples, {
            "reward": float(rewards.mean()),
            "reward_raw": float(rewards.mean()) * scale[1] + scale[0],
            "kl": float(gaps.sum()) / n,
            "entropy": -float(old.mean()),
            "length": len(old) / n,
            "ended": sum(own[-1] == end for own in ids) / n,
        }

    return collect


def rloo_method(policy, vlm, reward, scale, sampling, beta, k=4):
    """RLOO (Ahmadian et al. 2024): reward - beta KL of a whole response against the mean of its k - 1 siblings, ratio clipped by sequence."""

    def finish(examples):
        """Advantages (k,) of each prompt's responses."""
        for example in examples:
            noted = example.rollout
            kl = torch.stack(
                [
                    (old - reference).sum()
                    for old, reference in zip(noted["old"], noted["reference"])
                ]
            )
            noted["advantages"] = rloo_advantages((noted["rewards"] - beta * kl)[None])[0]

    def loss_of(examples, whole):
        """The clipped surrogate over whole responses."""
        logps, _ = response_logps(vlm.model, pack_examples(vlm, examples))  # (B, k)
        old = torch.tensor(
            [[float(part.sum()) for part in example.rollout["old"]] for example in examples]
        ).to(logps)
        advantages = torch.stack([example.rollout["advantages"] for example in examples]).to(logps)
        return ppo_policy_loss(logps, old, advantages).sum() / (k * len(whole)), {}

    return Method(collect_rollouts(policy, vlm, reward, scale, sampling, k, finish), loss_of)


def ppo_method(policy, vlm, reward, scale, sampling, beta, passes=2, value_weight=0.1):
    """PPO: a per-token KL penalty, the reward at the last token, GAE over the value head, clipped policy and value; means over tokens."""

    def finish(examples):
        """Advantages and returns (R,) of each response."""
        for example in examples:
            noted = example.rollout
            token_rewards = [
                beta * (reference - old) for old, reference in zip(noted["old"], noted["reference"])
            ]
            for own, final in zip(token_rewards, noted["rewards"]):
                own[-1] += final
            noted["advantages"] = [
                gae_advantages(own, values) for own, values in zip(token_rewards, noted["values"])
            ]
            noted["returns"] = [
                advantages + values
                for advantages, values in zip(noted["advantages"], noted["values"])
            ]
        everything = torch.cat(
            [part for example in examples for part in example.rollout["advantages"]]
        )
        mean, deviation = (
            everything.mean(),
            everything.std(correction=0) + 1e-8,
        )  # whitened over real tokens
        for example in examples:
            example.rollout["advantages"] = [
                (part - mean) / deviation for part in example.rollout["advantages"]
            ]

    def loss_of(examples, whole):
        """The clipped surrogate and the value loss over tokens."""
        hidden, targets, _ = response_hidden_states(vlm.model, pack_examples(vlm, examples))
        logps, values = (
            token_logps(hidden, vlm.model.vocab_head, targets),
            policy.scalar_head(hidden.float())[:, 0],
        )
        old, advantages, old_values, returns = (
            torch.cat([part for example in examples for part in example.rollout[name]]).to(logps)
            for name in ("old", "advantages", "values", "returns")
        )
        n = sum(len(response) for example in whole for response in example.responses)
        errors = ppo_value_loss(values, old_values, returns).sum() / n
        return ppo_policy_loss(logps, old, advantages).sum() / n + value_weight * errors, {
            "value_loss": float(errors.detach())
        }

    return Method(
        collect_rollouts(policy, vlm, reward, scale, sampling, 1, finish), loss_of, passes
    )
