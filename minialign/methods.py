"""One function per method: how a step comes by its responses, and what it minimises."""

from dataclasses import dataclass, field, replace
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

from .bdhs import distorted
from .data import Record
from .files import require
from .logprobs import response_logps, scored_states, token_logps
from .losses import (
    PAIR_LOSSES,
    clipped,
    clipped_value,
    generalised_advantages,
    leave_one_out,
    margin,
    ranking,
    sft,
)
from .parallel import spread
from .prompts import IMAGE, decode_response, encode_prompt, encode_response, end_id
from .rewards import scores
from .rows import Row
from .sampling import prefill, respond, seeded

SUPERVISED = (
    "sft",
    "bdhs",
    "online-bdhs",
)  # methods that learn from chosen responses alone; the others want pairs, or prompts of such


@dataclass
class Example:
    """A record as ids: its prompt, its responses (end tokens included), and the reference's log-probs (k,) of them once known.

    `vectors` counts its picture's vectors, `length` the slots of its row; `scored` as in Row; `rollout` is what reinforcement
    learning notes of its responses.
    """

    record: Record
    prompt: list
    responses: list
    vectors: int
    reference: torch.Tensor | None = None
    scored: list | None = None
    rollout: dict = field(default_factory=dict)

    @property
    def length(self):
        return (
            self.vectors
            + len(self.prompt)
            - len(self.record.paths)
            - 1
            + sum(map(len, self.responses))
        )


class Method(NamedTuple):
    """collect(batch, step) gives the step's examples and means for the log; loss(part, whole) the loss of a part of them, and its
    share of the batch's means; what was collected is used `passes` times."""

    collect: Callable
    loss: Callable
    passes: int = 1


class Writing(NamedTuple):
    """How the policy writes responses to learn from."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def encode_example(subject, record, texts):
    """An Example of a record with these responses. Raises BadInput if its picture is none or it does not fit the context."""
    responses = [encode_response(subject.tokenizer, subject.template, text) for text in texts]
    prompt, vectors = (
        encode_prompt(subject.tokenizer, subject.template, record.turns),
        sum(map(subject.count, record.paths)),
    )
    longest, response = subject.model.config.text.positions, max(map(len, responses))
    over = response - subject.room(record, prompt)
    require(
        over <= 0,
        f"record {record.id}: {vectors} picture vectors, a prompt and a response of {response} tokens are {longest + over} together, "
        f"the model's context is {longest}; shorten the text or remove the record (pictures are never cut)",
    )
    return Example(record, prompt, responses, vectors)


def rows_of(subject, examples):
    """One row for each example: its prompt with its pictures, its responses as branches."""
    return [
        Row.of(
            example.prompt,
            subject.look(example.record.paths),
            example.responses,
            scored=example.scored,
        )
        for example in examples
    ]


def microbatches(examples, tokens):
    """Split a batch into parts of like length whose padded size stays within `tokens` (a single longer one stands alone)."""
    parts = []
    for example in sorted(examples, key=lambda example: -example.length):
        if not parts or parts[-1][0].length * (len(parts[-1]) + 1) > tokens:
            parts.append([])
        parts[-1].append(example)
    return parts


def add_references(policy, subject, examples, tokens=16384):
    """Give every example the reference's summed log-probs (k,) in nats, computed once; examples of like length together."""
    with policy.reference() as model:
        parts = microbatches(examples, tokens)
        found = spread(
            parts,
            lambda own: [
                response_logps(model, rows_of(subject, part))[0].tolist()
                for part in tqdm(own, "reference", leave=False)
            ],
        )
    for part, numbers in zip(parts, found):
        for example, logps in zip(part, numbers):
            example.reference = torch.tensor(logps)


# --- pairs


def given(batch, step):
    """Offline: the examples as they are."""
    return batch, {}


def preference(subject, loss, beta, smoothing=0.0, weights=(1.0,), collect=given):
    """DPO (Eq. 3), IPO or SLiC, mean over examples (chosen, rejected, ...); with several rejected ones the weighted mean over them (Eq. 5)."""

    def loss_of(examples, whole):
        """The loss on pairs of a part of the batch."""
        logps, counts = response_logps(subject.model, rows_of(subject, examples))  # (B, k)
        reference = torch.stack([example.reference for example in examples]).to(logps)
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
            pair, pair_reference, pair_counts = (
                part[:, [0, other]] for part in (logps, reference, counts)
            )
            h = margin(pair, pair_reference)
            value = value + weight * PAIR_LOSSES[loss](
                pair, pair_reference, pair_counts, beta, smoothing
            ).sum() / len(whole)
            parts = (
                *pair.detach().T,
                *pair_reference.T,
                beta * h,
                (h > 0).float() + 0.5 * (h == 0),
            )
            means = {
                name: mean + weight * float(part.detach().sum()) / len(whole)
                for (name, mean), part in zip(means.items(), parts)
            }
        return value, means

    return Method(collect, loss_of)


def supervised(subject):
    """Supervised training on the first response of each example: token-mean negative log-likelihood over the batch."""

    def loss_of(examples, whole):
        logps, counts = response_logps(
            subject.model,
            rows_of(
                subject, [replace(example, responses=example.responses[:1]) for example in examples]
            ),
        )
        share = counts.sum() / sum(len(example.responses[0]) for example in whole)
        return sft(logps, counts) * share, {"logp_chosen": float(logps.detach().sum()) / len(whole)}

    return Method(given, loss_of)


def written(subject, examples, k, writing, step, tell=lambda rows, cache: (), slots=1 << 15):
    """k responses (ids, end token included if reached) to each example's prompt by the current policy; draws by (seed, record, step).

    A list of tuples: an example's responses, then, as lists of theirs, what `tell` says of the rows that hold them: the policy has not
    changed, so that the prompts' cache that they were written from serves once more.
    """

    def some(own):
        """Those of a few examples together."""
        rows, stops = (
            rows_of(subject, [replace(example, responses=[[]] * k) for example in own]),
            {end_id(subject.tokenizer, subject.template)},
        )
        generators = [
            seeded(writing.seed, example.record.id, step, number)
            for example in own
            for number in range(k)
        ]
        uniforms = [
            torch.rand(writing.max_new_tokens, generator=generator) for generator in generators
        ]
        prefilled = prefill(subject.model, rows)
        ids = respond(
            subject.model,
            rows,
            writing.max_new_tokens,
            stops,
            uniforms,
            writing.temperature,
            writing.top_p,
            prefilled=prefilled,
        )
        with_responses = [
            replace(example, responses=ids[number * k : (number + 1) * k])
            for number, example in enumerate(own)
        ]
        told = tell(rows_of(subject, with_responses), prefilled[0])
        return [
            tuple(column[first : first + k] for column in (ids, *told))
            for first in range(0, len(ids), k)
        ]

    def write(own):
        """Those of this process's share, as many together as fill so many slots of the cache: 16 GB of it for a 7B in bfloat16."""
        longest = (
            max(example.vectors + len(example.prompt) for example in own)
            + k * writing.max_new_tokens
        )
        several = max(1, slots // longest)
        return [
            one
            for first in range(0, len(own), several)
            for one in some(own[first : first + several])
        ]

    return spread(examples, write)


def as_text(subject, ids):
    """A response's ids as text, without its end token, and without an <image> that the policy may have spelt out."""
    return decode_response(subject.tokenizer, subject.template, ids).replace(IMAGE, "")


def online(policy, subject, annotator, writing, mix=0.0):
    """How Online-DPO collects (Sec. 2.3): two responses of the current policy, ranked by an annotator; ties are left out.

    With `mix` = p each example keeps its own offline pair with probability p: Mixed-DPO (Eq. 4).
    """

    def collect(batch, step):
        """Pairs of this step's policy."""
        offline = [
            bool(
                torch.rand(1, generator=seeded(writing.seed, example.record.id, step, "mix")) < mix
            )
            for example in batch
        ]
        fresh = [example for example, kept in zip(batch, offline) if not kept]
        both = [own for (own,) in written(subject, fresh, 2, writing, step)]
        texts = [[as_text(subject, ids).strip() for ids in own] for own in both]
        differing = [i for i, (a, b) in enumerate(texts) if a != b]
        first, second = ([texts[i][side] for i in differing] for side in (0, 1))
        verdicts = dict(
            zip(differing, annotator.better([fresh[i].record for i in differing], first, second))
        )
        # Verdict 1 is for the second response, which then comes first; a tie is left out.
        ranked = [
            replace(fresh[i], responses=both[i][::-1] if verdicts[i] else both[i])
            for i in differing
            if verdicts[i] is not None
        ]
        add_references(policy, subject, ranked)
        means = {
            "same": (len(fresh) - len(differing)) / max(1, len(fresh)),
            "tied": (len(differing) - len(ranked)) / max(1, len(fresh)),
            "offline": sum(offline) / len(batch),
        }
        return [example for example, kept in zip(batch, offline) if kept] + ranked, means

    return collect


def online_bdhs(policy, subject, sampler):
    """How online BDHS collects: the rejected response is sampled anew from the current policy; those equal to the chosen, or too long, are left out.

    Examples with two responses keep both, the sampled one last (Eq. 5).
    """

    def collect(batch, step):
        """The batch with rejected responses of this step's policy."""
        pairs = spread([example.record for example in batch], lambda own: sampler.pairs(own, step))
        rejected = [
            encode_response(subject.tokenizer, subject.template, pair["rejected"]) for pair in pairs
        ]
        found = [
            replace(example, responses=[*example.responses, ids])
            for example, pair, ids in zip(batch, pairs, rejected)
            if pair["rejected"] not in ("", pair["chosen"])
            and len(ids) <= subject.room(example.record, example.prompt)
        ]
        add_references(policy, subject, found)
        return found, {
            "rounds": sum(pair["rounds"] for pair in pairs) / len(pairs),
            "same": 1 - len(found) / len(batch),
        }

    return collect


def distortion(policy, subject, noise, seed):
    """How the distortion of Sec. 3.3 collects: [y+, y-, y~-], where y~- are the policy's tokens under a noisy picture.

    They are scored under the clean picture, each in the context of y+; policy and reference both score the policy's.
    """

    def collect(batch, step):
        """The batch with the tokens of this step's policy under this step's noise."""
        chosen = [example.responses[0] for example in batch]

        def predicted(own):
            """Their tokens under noise."""
            generators = [seeded(seed, example.record.id, step, "noise") for example in own]
            return distorted(
                subject,
                [example.prompt for example in own],
                [example.record.paths for example in own],
                [example.responses[0] for example in own],
                noise,
                generators,
            )

        tokens = spread(batch, predicted)
        found = [
            replace(
                example, responses=[*example.responses, right], scored=[*example.responses, wrong]
            )
            for example, right, wrong in zip(batch, chosen, tokens)
        ]
        add_references(policy, subject, found)
        changed = [a != b for right, wrong in zip(chosen, tokens) for a, b in zip(right, wrong)]
        return found, {"changed": sum(changed) / len(changed)}

    return collect


# --- reinforcement learning


def reward_model(policy, subject):
    """Trains the scalar head and the policy below it to rank pairs (Eq. 1)."""

    def loss_of(examples, whole):
        """The ranking loss of a part of the batch."""
        found = scores(subject.model, policy.score, rows_of(subject, examples))
        gap = (found[:, 0] - found[:, 1]).detach()
        means = {
            "score_chosen": found[:, 0],
            "score_rejected": found[:, 1],
            "margin": gap,
            "accuracy": (gap > 0).float() + 0.5 * (gap == 0),
        }
        return ranking(found).sum() / len(whole), {
            name: float(value.detach().sum()) / len(whole) for name, value in means.items()
        }

    return Method(given, loss_of)


def normaliser(reward, records):
    """(mean, standard deviation) of the reward over the records' chosen responses, by which rewards are normalised (App. A)."""
    found = reward.score(records, [[record.chosen] for record in records])
    return float(found.mean()), max(float(found.std(correction=0)), 1e-6)


def rollouts(policy, subject, reward, scale, writing, k, finish):
    """How reinforcement learning collects: k responses a prompt, their normalised rewards, token log-probs of policy and reference.

    `finish(examples)` adds what the loss needs to each rollout: {"rewards" (k,), "old" and "reference" (k lists of (R,) nats)}.
    """

    def tell(rows, cache=None):
        """Token log-probs of the rows' responses in reading order, as lists; with a cache, which is the policy's, values too if it has a head."""
        hidden, targets, lengths = scored_states(subject.model, rows, cache)
        found = [token_logps(hidden, subject.model.head, targets)] + (
            [policy.score(hidden.float())[:, 0]] if policy.score and cache else []
        )
        return [[own.tolist() for own in one.split(lengths)] for one in found]

    def collect(batch, step):
        """Responses of this step's policy with everything that is known of them before it changes."""
        with torch.no_grad():
            responses, *told = zip(*written(subject, batch, k, writing, step, tell))
        texts = [[as_text(subject, ids) for ids in own] for own in responses]
        rewards = (reward.score([example.record for example in batch], texts) - scale[0]) / scale[1]
        examples = [
            replace(example, responses=own, rollout={"rewards": earned})
            for example, own, earned in zip(batch, responses, rewards)
        ]
        with policy.reference():
            parts = microbatches(examples, 16384)
            for part, [logps] in zip(
                parts, spread(parts, lambda own: [tell(rows_of(subject, part)) for part in own])
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
        end, n = end_id(subject.tokenizer, subject.template), len(ids)
        return examples, {
            "reward": float(rewards.mean()),
            "reward_raw": float(rewards.mean()) * scale[1] + scale[0],
            "kl": float(gaps.sum()) / n,
            "entropy": -float(old.mean()),
            "length": len(old) / n,
            "ended": sum(own[-1] == end for own in ids) / n,
        }

    return collect


def rloo(policy, subject, reward, scale, writing, beta, k=4):
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
            noted["advantages"] = leave_one_out((noted["rewards"] - beta * kl)[None])[0]

    def loss_of(examples, whole):
        """The clipped surrogate over whole responses."""
        logps, _ = response_logps(subject.model, rows_of(subject, examples))  # (B, k)
        old = torch.tensor(
            [[float(part.sum()) for part in example.rollout["old"]] for example in examples]
        ).to(logps)
        advantages = torch.stack([example.rollout["advantages"] for example in examples]).to(logps)
        return clipped(logps, old, advantages).sum() / (k * len(whole)), {}

    return Method(rollouts(policy, subject, reward, scale, writing, k, finish), loss_of)


def ppo(policy, subject, reward, scale, writing, beta, passes=2, value_weight=0.1):
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
                generalised_advantages(own, values)
                for own, values in zip(token_rewards, noted["values"])
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
        hidden, targets, _ = scored_states(subject.model, rows_of(subject, examples))
        logps, values = (
            token_logps(hidden, subject.model.head, targets),
            policy.score(hidden.float())[:, 0],
        )
        old, advantages, old_values, returns = (
            torch.cat([part for example in examples for part in example.rollout[name]]).to(logps)
            for name in ("old", "advantages", "values", "returns")
        )
        n = sum(len(response) for example in whole for response in example.responses)
        errors = clipped_value(values, old_values, returns).sum() / n
        return clipped(logps, old, advantages).sum() / n + value_weight * errors, {
            "value_loss": float(errors.detach())
        }

    return Method(rollouts(policy, subject, reward, scale, writing, 1, finish), loss_of, passes)
