"""One function per method: how a step comes by its responses, and what it minimises."""

from dataclasses import dataclass, field
from typing import Callable, NamedTuple

import torch
from tqdm import tqdm

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PackedExample
from minialign.data.records import Record
from minialign.logprobs import response_logps
from minialign.utils.distributed import map_across_ranks
from minialign.utils.files import check

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
    prompt_ids: list
    responses: list
    num_image_tokens: int
    ref_logps: torch.Tensor | None = None
    scored_ids: list | None = None
    rollout: dict = field(default_factory=dict)

    @property
    def length(self):
        return (
            self.num_image_tokens
            + len(self.prompt_ids)
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


def encode_example(vlm, record, texts):
    """An Example of a record with these responses. Raises BadInput if its picture is none or it does not fit the context."""
    responses = [encode_response(vlm.tokenizer, vlm.template, text) for text in texts]
    prompt, vectors = (
        encode_prompt(vlm.tokenizer, vlm.template, record.turns),
        sum(map(vlm.num_image_tokens, record.paths)),
    )
    longest, response = vlm.model.config.text.max_position_embeddings, max(map(len, responses))
    over = response - vlm.max_response_tokens(record, prompt)
    check(
        over <= 0,
        f"record {record.id}: {vectors} picture vectors, a prompt and a response of {response} tokens are {longest + over} together, "
        f"the model's context is {longest}; shorten the text or remove the record (pictures are never cut)",
    )
    return Example(record, prompt, responses, vectors)


def pack_examples(vlm, examples):
    """One row for each example: its prompt with its pictures, its responses as branches."""
    return [
        PackedExample.of(
            example.prompt_ids,
            vlm.encode_images(example.record.paths),
            example.responses,
            scored_ids=example.scored_ids,
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


def add_reference_logps(policy, vlm, examples, tokens=16384):
    """Give every example the reference's summed log-probs (k,) in nats, computed once; examples of like length together."""
    with policy.reference() as model:
        parts = microbatches(examples, tokens)
        found = map_across_ranks(
            parts,
            lambda own: [
                response_logps(model, pack_examples(vlm, part))[0].tolist()
                for part in tqdm(own, "reference", leave=False)
            ],
        )
    for part, numbers in zip(parts, found):
        for example, logps in zip(part, numbers):
            example.ref_logps = torch.tensor(logps)
