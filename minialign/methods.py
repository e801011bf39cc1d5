"""One function per method: how a step comes by its responses, and what it minimises."""
from dataclasses import dataclass, replace

import torch
from tqdm import tqdm

from .files import BadInput
from .logprobs import response_logps
from .losses import PAIR_LOSSES, margin, sft
from .prompts import encode_prompt, encode_response
from .rows import Row


@dataclass
class Example:
    """A record as ids: its prompt, its responses (end tokens included), and the reference's log-probs of them once known.

    `vectors` counts its picture's vectors, `length` the slots of its row.
    """
    id: str
    paths: tuple
    prompt: list
    responses: list
    vectors: int
    reference: torch.Tensor | None = None

    @property
    def length(self):
        return self.vectors + len(self.prompt) - len(self.paths) - 1 + sum(map(len, self.responses))


def encode_example(subject, record, texts):
    """An Example of a record with these responses. Raises BadInput if its picture is none or it does not fit the context."""
    responses = [encode_response(subject.tokenizer, subject.template, text) for text in texts]
    prompt, vectors = encode_prompt(subject.tokenizer, subject.template, record.turns), sum(map(subject.count, record.paths))
    text, longest = len(prompt) - len(record.paths) + max(map(len, responses)), subject.model.config.text.positions
    if vectors + text > longest:
        raise BadInput(f"record {record.id}: {vectors} picture vectors and {text} text tokens are {vectors + text} together, the model's context "
                       f"is {longest}; shorten the text or remove the record (pictures are never cut)")
    return Example(record.id, record.paths, prompt, responses, vectors)


def rows_of(subject, examples):
    """One row for each example: its prompt with its pictures, its responses as branches."""
    return [Row.of(example.prompt, subject.look(example.paths), example.responses) for example in examples]


def add_references(policy, subject, examples, batch=32):
    """Give every example the reference's summed log-probs (k,) in nats, computed once; examples of like length together."""
    order = sorted(examples, key=lambda example: example.length)
    with policy.reference() as model:
        for first in tqdm(range(0, len(order), batch), "reference", leave=False):
            some = order[first:first + batch]
            for example, logps in zip(some, response_logps(model, rows_of(subject, some))[0].cpu()):
                example.reference = logps


def preference(subject, loss, beta):
    """A step's loss on pairs (chosen, rejected) with cached reference log-probs: DPO (Eq. 3), IPO or SLiC, mean over pairs."""
    def step(examples, whole):
        """Loss of a part of the batch `whole`, and its share of the batch's means for the log."""
        logps, _ = response_logps(subject.model, rows_of(subject, examples))
        reference = torch.stack([example.reference for example in examples]).to(logps)
        h = margin(logps, reference)
        means = {"logp_chosen": logps[:, 0], "logp_rejected": logps[:, 1], "ref_logp_chosen": reference[:, 0], "ref_logp_rejected": reference[:, 1],
                 "margin": beta * h, "accuracy": (h > 0).float() + .5 * (h == 0)}
        return PAIR_LOSSES[loss](h, beta).sum() / len(whole), {name: float(value.detach().sum()) / len(whole) for name, value in means.items()}
    return step


def supervised(subject):
    """A step's supervised loss on the first response of each example: token-mean negative log-likelihood over the batch."""
    def step(examples, whole):
        logps, counts = response_logps(subject.model, rows_of(subject, [replace(example, responses=example.responses[:1]) for example in examples]))
        share = counts.sum() / sum(len(example.responses[0]) for example in whole)
        return sft(logps, counts) * share, {"logp_chosen": float(logps.detach().sum()) / len(whole)}
    return step
