"""Log-probabilities of all responses of a batch, without ever forming logits for all positions."""

import torch
from torch.autograd.function import once_differentiable

from .files import require
from .rows import hidden_states, pack


class _TokenLogps(torch.autograd.Function):
    """log p(target | hidden) for N positions, (N, D) x (V, D) -> (N,), a block of the vocabulary at a time.

    d logp / d hidden = W[target] - softmax(W hidden) W does not depend on what follows, so it is formed in the forward pass, while a
    block's logits are there; maximum, sum and mean of the softmax are carried from block to block and scaled down where a larger
    logit comes. No more logits than one block's ever exist, the head is read once, and nothing is recomputed unless it is trained.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, block):
        """(N,) log-probs; the slopes are kept for `backward`."""
        top, total, own, mean = (
            hidden.new_full((len(hidden), 1), value, dtype=torch.float32)
            for value in (-torch.inf, 0.0, torch.nan, 0.0)
        )
        place = targets[:, None]
        for w in weight.split(block):
            logits = (
                hidden @ w.T
            ).float()  # (N, v), fp32, the only tensor of this size: all below is done in it
            own = torch.where(
                (place >= 0) & (place < len(w)), logits.gather(1, place.clamp(0, len(w) - 1)), own
            )
            higher = torch.maximum(top, logits.amax(-1, keepdim=True))
            logits.sub_(higher).exp_()
            shrink, top = (top - higher).exp_(), higher
            total = total * shrink + logits.sum(-1, keepdim=True)
            if ctx.needs_input_grad[0]:
                mean = (
                    mean * shrink + logits.to(weight.dtype) @ w
                )  # (N, D): softmax(W hidden) W times total
            place = place - len(w)
            del logits  # before the next ones are made
        ctx.block = block
        ctx.save_for_backward(
            weight[targets] - (mean / total).to(weight.dtype) if ctx.needs_input_grad[0] else None,
            *(hidden, weight, targets, top, total) if ctx.needs_input_grad[1] else (),
        )
        return (own - top - total.log())[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """Gradients for hidden (N, D) and, if it is trained, weight (V, D)."""
        slopes, *rest = ctx.saved_tensors
        grad, d_weight = grad[:, None], None
        if rest:  # d logp / d W[v] = (1[v = target] - softmax(W hidden)[v]) hidden
            hidden, weight, targets, top, total = rest
            share = (-grad / total).to(weight.dtype) * hidden
            d_weight = torch.cat(
                [
                    ((hidden @ w.T).float() - top).exp_().to(weight.dtype).T @ share
                    for w in weight.split(ctx.block)
                ]
            )
            d_weight.index_add_(0, targets, grad.to(weight.dtype) * hidden)
        return None if slopes is None else grad.to(slopes.dtype) * slopes, d_weight, None, None


def token_logps(hidden, weight, targets, logits=1 << 22):
    """log p(targets) (N,) in fp32 nats from hidden states (N, D) and the vocabulary head (V, D).

    At most `logits` logits at a time, but always those of 64 vocabulary entries for all N; so the last bits depend on N.
    """
    return _TokenLogps.apply(
        hidden, weight, targets, max(64, logits // len(hidden) // 64 * 64)
    )  # whole tiles of a GPU


def scored_states(model, rows, cache=None):
    """(hidden (N, D), targets (N,), lengths) of the N positions that predict a response token; `lengths`: tokens of each response.

    With the cache of the same rows' `prefill` by the same policy, what all of them have as prefix is read there, not computed again.
    """
    require(
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
        min(batch.prefix) if cache else 0,
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
    hidden, targets, lengths = scored_states(model, rows)
    logps = token_logps(hidden, model.head, targets)
    counts = torch.tensor(lengths, device=logps.device)
    owner = torch.repeat_interleave(torch.arange(len(counts), device=logps.device), counts)
    sums = torch.zeros(len(counts), device=logps.device).index_add(0, owner, logps)
    shape = (len(rows), -1) if len({len(row.branches) for row in rows}) == 1 else (-1,)
    return sums.view(shape), counts.view(shape)
