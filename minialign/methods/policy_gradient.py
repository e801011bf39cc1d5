"""Learn from the rewards of the policy's own responses: RLOO and PPO (Sec. 2.1, App. A).

Both maximize r(x, y) - beta * KL(policy || reference) (Eq. 2) over responses of the current policy.
A step collects rollouts:

1. It samples k responses a prompt, and scores them with the policy that sampled them.
2. It asks a reward model for their rewards, and normalizes these by the mean and the standard
   deviation of the rewards of the data's chosen responses.
3. It computes the reference's log-probs, for the KL penalty.
4. It turns rewards and penalties into advantages: how much better a response, or a token, was than
   expected.

Then PPO's clipped loss makes responses with positive advantages more likely. The two methods differ
in step 4. RLOO compares a response with the other responses to its prompt. PPO compares a token
with the estimate of a value head. GRPO (grpo.py) collects the same rollouts.
"""

from dataclasses import dataclass, field, replace

import torch

from minialign.data.chat_templates import decode_response, stop_ids
from minialign.generation.decoding import SamplingParams
from minialign.logprobs import (
    MAX_TOKENS,
    response_hidden_states,
    response_logps,
    token_logps,
)
from minialign.losses import gae_advantages, ppo_policy_loss, ppo_value_loss, rloo_advantages
from minialign.methods.base import Method, microbatches, pack_examples
from minialign.methods.responses import sample_chunk, split_to_fit_cache
from minialign.models.loading import VLM
from minialign.models.policy import Policy
from minialign.pairs.reward_model import RewardModel
from minialign.utils.distributed import gather_results, local_share


@dataclass
class Rollout:
    """What a step keeps of one prompt's k responses, computed before the policy changes.

    A list holds one tensor (R,) a response, with one entry a token, the end token included.
    """

    normalized_rewards: torch.Tensor | None = None  # (k,), without the KL penalty
    old_logps: list[torch.Tensor] = field(default_factory=list)  # by the policy that sampled
    ref_token_logps: list[torch.Tensor] = field(default_factory=list)  # by the reference
    old_values: list[torch.Tensor] = field(default_factory=list)  # by the value head (PPO)
    # RLOO and GRPO: a tensor (k,), one advantage a response. PPO: a list, one advantage a token.
    advantages: torch.Tensor | list[torch.Tensor] | None = None
    returns: list[torch.Tensor] = field(default_factory=list)  # targets of the value head (PPO)

    def summed_old_logps(self):
        """Return the log-prob of each whole response, (k,), by the policy that sampled it."""
        return torch.stack([logps.sum() for logps in self.old_logps])


@dataclass(kw_only=True)
class PolicyGradientMethod(Method):
    """What RLOO, PPO and GRPO share: how a step collects its rollouts."""

    policy: Policy
    vlm: VLM
    reward_model: RewardModel
    reward_mean: float  # rewards are normalized with these two
    reward_std: float
    sampling: SamplingParams
    beta: float  # weight of the KL penalty
    k: int  # responses a prompt

    def collect(self, batch, step):
        """Return the prompts of a batch, each with k new responses and their rollout."""
        # 1. Sample k responses per prompt, and score them with the cache they were sampled from.
        examples = self.sample_rollouts(batch, step)

        # 2. Rewards of whole responses, normalized.
        raw_rewards = self.score_responses(examples)  # (B, k)
        normalized_rewards = (raw_rewards - self.reward_mean) / self.reward_std
        for example, rewards_of_example in zip(examples, normalized_rewards, strict=True):
            example.rollout.normalized_rewards = rewards_of_example

        # 3. Reference log-probs, for the KL penalty.
        add_reference_token_logps(self.policy, self.vlm, examples)

        # 4. Advantages. Each method has its own.
        self.add_advantages([example.rollout for example in examples])
        return examples, self.rollout_metrics(examples, normalized_rewards)

    def add_advantages(self, rollouts: list[Rollout]):
        """Set the advantages of the rollouts of a step."""
        raise NotImplementedError

    @torch.no_grad()
    def sample_rollouts(self, batch, step):
        """Sample k responses to each prompt, and start their rollouts with the policy's scores."""
        # 1. The processes share the prompts. Each samples and scores its share, a chunk at a time.
        prompts = local_share(batch)
        local_results = []
        model = self.vlm.model
        for chunk in split_to_fit_cache(model, prompts, self.k, self.sampling.max_new_tokens):
            sampled_chunk, prompt_cache = sample_chunk(
                self.vlm, chunk, self.k, sampling=self.sampling, step=step
            )
            local_results += self.score_from_cache(sampled_chunk, prompt_cache)

        # 2. All processes get all results.
        results = gather_results(local_results, num_items=len(batch))
        examples = []
        for example, result in zip(batch, results, strict=True):
            rollout = Rollout()
            rollout.old_logps = to_tensors(result["old_logps"])
            rollout.old_values = to_tensors(result["old_values"])
            examples.append(replace(example, responses=result["responses"], rollout=rollout))
        return examples

    def score_from_cache(self, examples, prompt_cache):
        """Return each example's responses with the policy's log-probs and values of their tokens.

        The policy has not changed since it sampled them. So the keys and values of the prompts,
        which hold most of the tokens, are read from the cache instead of computed again.
        """
        rows = pack_examples(self.vlm, examples)
        hidden, targets, lengths = response_hidden_states(self.vlm.model, rows, prompt_cache)
        logps = token_logps(hidden, self.vlm.model.vocab_head, targets)
        logps_of_responses = to_lists(logps, lengths)
        values_of_responses = []
        if self.policy.scalar_head is not None:
            values = estimate_values(self.policy, hidden)
            values_of_responses = to_lists(values, lengths)

        # The lists hold the k responses of the first example, then those of the second, and so on.
        results = []
        for i, example in enumerate(examples):
            first = i * self.k
            result = {
                "responses": example.responses,
                "old_logps": logps_of_responses[first : first + self.k],
                "old_values": values_of_responses[first : first + self.k],
            }
            results.append(result)
        return results

    def score_responses(self, examples):
        """Return the rewards (B, k) that the reward model gives to the responses, as texts."""
        records = []
        texts = []
        for example in examples:
            records.append(example.record)
            texts_of_example = []
            for ids in example.responses:
                texts_of_example.append(decode_response(self.vlm.tokenizer, self.vlm.template, ids))
            texts.append(texts_of_example)
        return self.reward_model.score(records, texts)

    def rollout_metrics(self, examples, normalized_rewards):
        """Return what the log says of a step's rollouts, as means."""
        # 1. The log-probs of all tokens, (N,).
        rollouts = [example.rollout for example in examples]
        old_logps = concat_tokens(rollouts, "old_logps")
        ref_logps = concat_tokens(rollouts, "ref_token_logps")

        # 2. How many responses there are, and how many of them reached an end token.
        end_ids = stop_ids(self.vlm.tokenizer, self.vlm.template)
        num_responses = 0
        num_ended = 0
        for example in examples:
            for response in example.responses:
                num_responses += 1
                num_ended += response[-1] in end_ids

        mean_reward = float(normalized_rewards.mean())
        return {
            "reward": mean_reward,
            "reward_raw": mean_reward * self.reward_std + self.reward_mean,
            "kl": float((old_logps - ref_logps).sum()) / num_responses,  # nats a response
            "entropy": -float(old_logps.mean()),  # nats a token, estimated from the samples
            "length": len(old_logps) / num_responses,  # tokens a response
            "ended": num_ended / num_responses,
        }


@dataclass(kw_only=True)
class RlooMethod(PolicyGradientMethod):
    """REINFORCE with a leave-one-out baseline (RLOO, Ahmadian et al. 2024).

    A whole response is one action. Its baseline is the mean penalized reward (reward - beta * KL)
    of the other k - 1 responses to the prompt, so no value head is needed.

    By default what was collected serves one optimizer step (`passes` is 1). In that step the policy
    is still the one that sampled the responses. The ratio is 1 up to rounding, the clip never acts,
    and the gradient is that of REINFORCE. With more passes the policy moves, and the clip acts.
    """

    k: int = 4
    passes: int = 1

    def add_advantages(self, rollouts):
        """Set one advantage a response, (k,) a prompt."""
        for rollout in rollouts:
            # The KL penalty of a whole response is its log ratio, summed over the tokens: an
            # estimate from one sample, and a constant through which no gradient flows.
            log_ratios = []
            for old_logps, ref_logps in zip(
                rollout.old_logps, rollout.ref_token_logps, strict=True
            ):
                log_ratios.append((old_logps - ref_logps).sum())
            log_ratio_per_response = torch.stack(log_ratios)  # (k,), some may be negative
            penalized_rewards = rollout.normalized_rewards - self.beta * log_ratio_per_response
            rollout.advantages = rloo_advantages(penalized_rewards[None])[0]

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the clipped policy loss.

        It is a mean over all responses of the batch, each taken as one action.
        """
        rows = pack_examples(self.vlm, micro_batch)
        logps, _ = response_logps(self.vlm.model, rows)  # (B, k)

        rollouts = [example.rollout for example in micro_batch]
        old_logps = torch.stack([rollout.summed_old_logps() for rollout in rollouts]).to(logps)
        advantages = torch.stack([rollout.advantages for rollout in rollouts]).to(logps)

        losses = ppo_policy_loss(logps, old_logps, advantages)
        return losses.sum() / (self.k * len(batch)), {}


@dataclass(kw_only=True)
class PpoMethod(PolicyGradientMethod):
    """Proximal policy optimization (PPO, Schulman et al. 2017) with a value head.

    A token is one action. It pays the KL penalty, the last one also receives the reward, and the
    value head estimates what is still to come. By default what was collected serves two optimizer
    steps (`passes` is 2). In the first one the ratio is 1 and nothing is clipped. In the second one
    the policy has moved, and a token whose ratio left [0.8, 1.2] in the direction of its advantage
    gets no gradient.
    """

    k: int = 1
    passes: int = 2
    value_weight: float = 0.1

    def add_advantages(self, rollouts):
        """Set the advantages and the returns, one a token."""
        for rollout in rollouts:
            rollout.advantages = []
            for i, response_reward in enumerate(rollout.normalized_rewards):
                # 1. The KL penalty at every token, the reward at the last one.
                token_rewards = -self.beta * (rollout.old_logps[i] - rollout.ref_token_logps[i])
                token_rewards[-1] += response_reward

                # 2. How much better each token did than its value, and what its value should be.
                old_values = rollout.old_values[i]
                advantages = gae_advantages(token_rewards, old_values)
                rollout.advantages.append(advantages)
                rollout.returns.append(advantages + old_values)  # before whitening

        # 3. Advantages of one scale, whatever the scale of the rewards.
        whiten_advantages(rollouts)

    def loss(self, micro_batch, batch):
        """Return this micro-batch's share of the clipped policy loss plus the weighted value loss.

        Both are means over all tokens of the batch.
        """
        # 1. Log-probs and values of the current policy, (N,) over the tokens of all responses.
        rows = pack_examples(self.vlm, micro_batch)
        hidden, targets, _ = response_hidden_states(self.vlm.model, rows)
        logps = token_logps(hidden, self.vlm.model.vocab_head, targets)
        values = estimate_values(self.policy, hidden)

        # 2. What was collected, in the same order.
        rollouts = [example.rollout for example in micro_batch]
        old_logps = concat_tokens(rollouts, "old_logps").to(logps)
        old_values = concat_tokens(rollouts, "old_values").to(logps)
        advantages = concat_tokens(rollouts, "advantages").to(logps)
        returns = concat_tokens(rollouts, "returns").to(logps)

        # 3. Both losses are means over the tokens of the whole batch.
        num_tokens = 0
        for example in batch:
            num_tokens += sum(len(response) for response in example.responses)
        policy_loss = ppo_policy_loss(logps, old_logps, advantages).sum() / num_tokens
        value_loss = ppo_value_loss(values, old_values, returns).sum() / num_tokens
        metrics = {"value_loss": float(value_loss.detach())}
        return policy_loss + self.value_weight * value_loss, metrics


def reward_statistics(reward_model, records):
    """Return mean and standard deviation of the rewards of the records' chosen responses (App. A).

    They are measured once, before training. Rewards that are all equal have no scale. They get the
    standard deviation 1, which leaves the scale of later rewards as it is.
    """
    chosen_texts = [[record.chosen] for record in records]
    rewards = reward_model.score(records, chosen_texts)  # (n, 1)
    reward_mean = float(rewards.mean())
    reward_std = float(rewards.std(correction=0))
    if reward_std < 1e-6:  # equal up to rounding
        reward_std = 1.0
    return reward_mean, reward_std


def add_reference_token_logps(policy, vlm, examples):
    """Set `ref_token_logps` of every rollout: the reference's log-prob of each token, in nats."""
    micro_batches = microbatches(examples, MAX_TOKENS)

    # 1. Each process computes the log-probs of its share of the micro-batches.
    local_logps = []
    with policy.reference() as reference_model:
        for micro_batch in local_share(micro_batches):
            rows = pack_examples(vlm, micro_batch)
            hidden, targets, lengths = response_hidden_states(reference_model, rows)
            logps = token_logps(hidden, reference_model.vocab_head, targets)
            local_logps.append(to_lists(logps, lengths))

    # 2. All processes get all of them. A micro-batch's list has one entry a response.
    gathered_logps = gather_results(local_logps, num_items=len(micro_batches))
    for micro_batch, logps_of_responses in zip(micro_batches, gathered_logps, strict=True):
        first = 0
        for example in micro_batch:
            k = len(example.responses)
            example.rollout.ref_token_logps = to_tensors(logps_of_responses[first : first + k])
            first += k


def estimate_values(policy, hidden):
    """Return the value head's estimate (N,) at each hidden state (N, D), in fp32."""
    return policy.scalar_head(hidden.float())[:, 0]


def whiten_advantages(rollouts):
    """Shift and scale advantages to mean 0 and standard deviation 1 over all tokens of a step."""
    all_advantages = concat_tokens(rollouts, "advantages")
    mean = all_advantages.mean()
    std = all_advantages.std(correction=0) + 1e-8
    for rollout in rollouts:
        rollout.advantages = [(advantages - mean) / std for advantages in rollout.advantages]


def concat_tokens(rollouts, field_name):
    """Return a field of rollouts, one tensor a response, as one tensor (N,) over all tokens."""
    tensors = []
    for rollout in rollouts:
        tensors += getattr(rollout, field_name)
    return torch.cat(tensors)


def to_lists(tensor, lengths):
    """Split a tensor (N,) over all tokens into one list of numbers a response."""
    return [numbers.tolist() for numbers in tensor.split(lengths)]


def to_tensors(lists):
    """Return each list of numbers as a tensor. A float32 passes through a list unchanged."""
    return [torch.tensor(numbers) for numbers in lists]
