"""Log-probabilities of all responses of a batch, without ever forming logits for all positions."""

import torch

from minialign.data.packing import pack
from minialign.models.fused_ops import BlockwiseTokenLogps
from minialign.models.llava import hidden_states
from minialign.utils.files import check


def token_logps(hidden, weight, targets, logits=1 << 22):
    """log p(targets) (N,) in fp32 nats from hidden states (N, D) and the vocabulary head (V, D).

    At most `logits` logits at a time, but always those of 64 vocabulary entries for all N; so the last bits depend on N.
    """
    return BlockwiseTokenLogps.apply(
        hidden, weight, targets, max(64, logits // len(hidden) // 64 * 64)
    )  # whole tiles of a GPU


def response_hidden_states(model, rows, cache=None):
    """(hidden (N, D), targets (N,), lengths) of the N positions that predict a response token; `lengths`: tokens of each response.

    With the cache of the same rows' `prefill` by the same policy, what all of them have as prefix is read there, not computed again.
    """
    check(
        all(response for row in rows for _, response in row.branches),
        "a response is empty; every response needs at least its end token",
    )
    batch = pack(model, rows)
    scored = batch.targets != -100
    read = scored.int().argsort(dim=1, descending=True, stable=True)[
        :, : int(scored.sum(1).max())
    ]  # (B, R), each row's scored positions first
    scored, targets, first = (
        scored.gather(1, read),
        batch.targets.gather(1, read),
        min(batch.prefix_lengths) if cache else 0,
    )
    cache = cache and cache.fork(
        torch.arange(len(rows)),
        torch.arange(first).expand(len(rows), -1),
        batch.ids.shape[1] - first,
    )
    hidden = hidden_states(
        model, batch, cache, (read - first).clamp(min=0), first
    )  # padding among what is read may lie before
    return (
        hidden[scored],
        targets[scored],
        [len(response) for row in rows for _, response in row.branches],
    )


def response_logps(model, rows):
    """Summed log-probabilities in nats of every response, end tokens included, and token counts, both (B, k).

    Rows that differ in k give flat (N,) results in reading order.
    """
    hidden, targets, lengths = response_hidden_states(model, rows)
    logps = token_logps(hidden, model.vocab_head, targets)
    counts = torch.tensor(lengths, device=logps.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=logps.device), counts)
    sums = torch.zeros(len(counts), device=logps.device).index_add(0, owner, logps)
    shape = (len(rows), -1) if len({len(row.branches) for row in rows}) == 1 else (-1,)
    return sums.view(shape), counts.view(shape)
