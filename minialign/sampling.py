"""Batched decoding from a cache: prefill rows once, then any number of continuations fork from any point of them."""
import hashlib
from dataclasses import dataclass

import torch

from .decoder import Cache
from .rows import Row, hidden_states, pack


def seeded(*parts):
    """A generator that depends on these values alone, so that a record's draws know nothing of batches, order or restarts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass
class Start:
    """Where a continuation begins: it sees `slots` of prefilled row `row`, reads the tokens `feed` at `position` and after.

    `uniforms` are its draws from U(0, 1), one a token (None: greedy); `stops` are the ids that end it.
    """
    row: int
    slots: list
    feed: list
    position: int
    uniforms: torch.Tensor | None
    stops: set


def pick(logits, uniforms, temperature=1.0, top_p=1.0):
    """Token ids (B,) drawn from logits (B, V) by inverting the cumulative distribution at `uniforms` (B,); None takes the largest.

    top_p keeps the smallest set of most likely tokens whose probabilities reach it (nucleus sampling).
    """
    if uniforms is None or temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(-1) - ranked >= top_p, 0)  # what is already reached without a token drops it
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cumulative = p.cumsum(-1)
    target = uniforms.to(p)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def prefill(model, rows):
    """(Cache, Batch) of rows: keys and values of every slot, computed once for all continuations."""
    batch = pack(model, rows)
    cache = Cache(model.config.text, *batch.ids.shape, model.head)
    hidden_states(model, batch, cache)
    return cache, batch


@torch.no_grad()
def decode(model, cache, starts, max_new_tokens, temperature=1.0, top_p=1.0):
    """Yield, step by step, the (start number, token) pairs of that step, the stopping token included.

    All starts run as one batch; finished rows leave it. A continuation also ends at the model's longest context.
    """
    device = model.device
    lengths = torch.tensor([len(start.slots) for start in starts], device=device)
    feeds = torch.tensor([len(start.feed) for start in starts], device=device)
    S, F = int(lengths.max()), int(feeds.max())
    ids = torch.tensor([start.feed + [0] * (F - len(start.feed)) for start in starts], device=device)
    slots = torch.tensor([list(start.slots) + [0] * (S - len(start.slots)) for start in starts], dtype=torch.long, device=device)
    cache = cache.fork(torch.tensor([start.row for start in starts], device=device), slots, F + max_new_tokens)
    positions = torch.tensor([start.position for start in starts], device=device)[:, None] + torch.arange(F, device=device)
    slots = lengths[:, None] + torch.arange(F, device=device)  # padding lands behind the feed and is overwritten before it is seen
    last = feeds - 1
    alive = list(range(len(starts)))
    draws = None
    if temperature > 0 and starts[0].uniforms is not None:
        draws = torch.stack([start.uniforms for start in starts]).to(device)
    for step in range(max_new_tokens):
        mask = torch.arange(S + F + max_new_tokens, device=device) <= slots[:, :, None]  # (B, T, slots)
        hidden = model.language_model(model.language_model.embed_tokens(ids), positions, mask[:, None], cache, slots)
        here = torch.arange(len(alive), device=device)
        logits = (hidden[here, last] @ model.head.T).float()  # (B, V)
        tokens = pick(logits, None if draws is None else draws[:, step], temperature, top_p)
        positions, slots = positions[here, last][:, None] + 1, slots[here, last][:, None] + 1
        chosen = tokens.tolist()
        yield list(zip(alive, chosen))
        room = (positions[:, 0] < model.config.text.positions - 1).tolist()
        going = [i for i, (number, token) in enumerate(zip(alive, chosen)) if token not in starts[number].stops and room[i]]
        if not going:
            return
        ids, last = tokens[:, None], torch.zeros_like(last)
        if len(going) < len(alive):
            keep = torch.tensor(going, device=device)
            alive = [alive[i] for i in going]
            ids, positions, slots, last = ids[keep], positions[keep], slots[keep], last[keep]
            draws = draws if draws is None else draws[keep]
            cache.keep(keep)


def continuations(model, cache, starts, max_new_tokens, temperature=1.0, top_p=1.0):
    """The new tokens of every start, as lists, the stopping token included."""
    written = [[] for _ in starts]
    for step in decode(model, cache, starts, max_new_tokens, temperature, top_p):
        for number, token in step:
            written[number].append(token)
    return written


def branch_starts(batch, rows, uniforms, stops):
    """A Start for every branch of prefilled rows: it sees the prefix and its own lead, whose last token it is fed.

    `uniforms`: draws (max_new_tokens,) for each branch in reading order, or None.
    """
    starts = []
    for number, row in enumerate(rows):
        for (lead, _), (begin, end) in zip(row.branches, batch.spans[number]):
            slots = [*range(batch.prefix[number]), *range(begin, end)]
            starts.append(Start(number, slots, lead[-1:], batch.start[number] + len(lead) - 1, uniforms and uniforms[len(starts)], stops))
    return starts


def share_prefix(prompts, pictures):
    """One Row for several prompts about the same pictures: what they have in common is its prefix."""
    shared, shortest = 0, min(map(len, prompts)) - 1
    while shared < shortest and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    return Row(prompts[0][:shared], pictures, [(prompt[shared:], []) for prompt in prompts])


def respond(model, rows, max_new_tokens, stops, uniforms=None, temperature=1.0, top_p=1.0):
    """The response (ids, end token included if reached) of every branch of rows made by `share_prefix`, in reading order."""
    cache, batch = prefill(model, rows)
    return continuations(model, cache, branch_starts(batch, rows, uniforms, stops), max_new_tokens, temperature, top_p)
