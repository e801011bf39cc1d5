"""Log-probabilities of all responses of a batch, without ever forming logits for all positions."""
import torch

from .files import require
from .rows import hidden_states, pack


class _TokenLogps(torch.autograd.Function):
    """log p(target | hidden) for N positions, (N, D) x (V, D) -> (N,), in chunks.

    d logp / d hidden = W[target] - softmax(W hidden) W does not depend on what follows, so it is formed in the forward pass,
    chunk by chunk, and only (N, D) numbers are kept: no (N, V) tensor outlives its chunk, and nothing is recomputed unless the
    head itself is trained.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        """(N,) log-probs; the slopes are kept for `backward`."""
        logps, slopes = [], []
        for h, y in zip(hidden.split(chunk), targets.split(chunk)):
            logits = (h @ weight.T).float()  # (n, V), fp32, the only tensor of this size: all below is done in it
            logits.sub_(logits.amax(-1, keepdim=True))
            own = logits.gather(1, y[:, None])
            total = logits.exp_().sum(-1, keepdim=True)
            logps.append((own - total.log())[:, 0])
            if ctx.needs_input_grad[0]:
                slopes.append(weight[y] - ((logits.to(weight.dtype) @ weight) / total).to(weight.dtype))
            del logits  # before the next ones are made
        ctx.chunk = chunk
        ctx.save_for_backward(torch.cat(slopes) if slopes else None, hidden, weight, targets)
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        """Gradients for hidden (N, D) and, if it is trained, weight (V, D)."""
        slopes, hidden, weight, targets = ctx.saved_tensors
        d_hidden = grad[:, None].to(slopes.dtype) * slopes if slopes is not None else None
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight)
            for h, y, g in zip(hidden.split(ctx.chunk), targets.split(ctx.chunk), grad.split(ctx.chunk)):
                d_logits = -torch.softmax((h @ weight.T).float(), -1)
                d_logits[torch.arange(len(y), device=y.device), y] += 1
                d_weight += (g[:, None] * d_logits).to(weight.dtype).T @ h
        return d_hidden, d_weight, None, None


def token_logps(hidden, weight, targets, logits=1 << 22):
    """log p(targets) (N,) in fp32 nats from hidden states (N, D) and the vocabulary head (V, D); at most `logits` logits at a time."""
    return _TokenLogps.apply(hidden, weight, targets, max(1, logits // len(weight)))


def scored_states(model, rows, cache=None):
    """(hidden (N, D), targets (N,), lengths) of the N positions that predict a response token; `lengths`: tokens of each response.

    With the cache of the same rows' `prefill` by the same policy, what all of them have as prefix is read there, not computed again.
    """
    require(all(response for row in rows for _, response in row.branches), "a response is empty; every response needs at least its end token")
    batch = pack(model, rows)
    scored = batch.targets != -100
    read = scored.int().argsort(dim=1, descending=True, stable=True)[:, :int(scored.sum(1).max())]  # (B, R), each row's scored positions first
    scored, targets, first = scored.gather(1, read), batch.targets.gather(1, read), min(batch.prefix) if cache else 0
    cache = cache and cache.fork(torch.arange(len(rows)), torch.arange(first).expand(len(rows), -1), batch.ids.shape[1] - first)
    hidden = hidden_states(model, batch, cache, (read - first).clamp(min=0), first)  # padding among what is read may lie before
    return hidden[scored], targets[scored], [len(response) for row in rows for _, response in row.branches]


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
