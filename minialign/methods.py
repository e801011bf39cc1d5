"""One function per method: how a step comes by its responses, and what it minimises."""
from dataclasses import dataclass

import torch
from tqdm import tqdm

from .logprobs import response_logps
from .losses import PAIR_LOSSES, margin, sft
from .prompts import encode_prompt, encode_response
from .rows import Row


@dataclass
class Example:
    """A record as ids: its prompt, its responses (end tokens included), and the reference's log-probs of them once known."""
    id: str
    path: str
    prompt: list
    responses: list
    reference: torch.Tensor | None = None


def encode_example(subject, record, texts):
    """An Example of a record with these responses."""
    responses = [encode_response(subject.tokenizer, subject.template, text) for text in texts]
    return Example(record.id, record.path, encode_prompt(subject.tokenizer, subject.template, record.turns), responses)


def rows_of(subject, examples):
    """One row for each example: its prompt with its picture, its responses as branches."""
    return [Row.of(example.prompt, subject.look([example.path]), example.responses) for example in examples]


def add_references(policy, subject, examples, batch=32):
    """Give every example the reference's summed log-probs (k,) in nats, computed once; examples of like length together."""
    order = sorted(examples, key=lambda example: len(example.prompt) + sum(map(len, example.responses)))
    with policy.reference() as model:
        for first in tqdm(range(0, len(order), batch), "reference", leave=False):
            some = order[first:first + batch]
            for example, logps in zip(some, response_logps(model, rows_of(subject, some))[0].cpu()):
                example.reference = logps


def preference(subject, loss, beta):
    """A step's loss on pairs (chosen, rejected) with cached reference log-probs: DPO (Eq. 3), IPO or SLiC, mean over pairs."""
    def step(examples, whole):
        logps, _ = response_logps(subject.model, rows_of(subject, examples))
        reference = torch.stack([example.reference for example in examples]).to(logps)
        h = margin(logps, reference)
        means = {"logp_chosen": logps[:, 0], "logp_rejected": logps[:, 1], "ref_logp_chosen": reference[:, 0], "ref_logp_rejected": reference[:, 1],
                 "margin": beta * h, "accuracy": (h > 0).float() + .5 * (h == 0)}
        return PAIR_LOSSES[loss](h, beta).sum() / len(whole), {name: float(value.sum()) / len(whole) for name, value in means.items()}
    return step


def supervised(subject):
    """A step's supervised loss on the first response of each example: token-mean negative log-likelihood over the batch."""
    def step(examples, whole):
        firsts = [Example(e.id, e.path, e.prompt, e.responses[:1]) for e in examples]
        logps, counts = response_logps(subject.model, rows_of(subject, firsts))
        share = counts.sum() / sum(len(example.responses[0]) for example in whole)
        return sft(logps, counts) * share, {"logp_chosen": float(logps.sum()) / len(whole)}
    return step
