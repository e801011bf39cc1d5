"""Batched decoding from a cache: prefill rows once, then any number of continuations fork from any point of them."""

import functools
from dataclasses import dataclass, replace

import torch

from minialign.data.packing import PackedExample, pack
from minialign.generation.cuda_graph import CudaGraphed
from minialign.models.kv_cache import KVCache
from minialign.models.llava import hidden_states


@dataclass
class DecodeRequest:
    """Where a continuation begins: it sees `slots` of prefilled row `row`, reads the tokens `feed` at `position` and after.

    `uniforms` are its draws from U(0, 1), one a token (None: greedy); `stops` are the ids that end it.
    """

    row: int
    cache_positions: list
    input_ids: list
    position: int
    uniforms: torch.Tensor | None
    stop_ids: set


def sample_tokens(logits, uniforms, temperature=1.0, top_p=1.0):
    """Token ids (B,) drawn from logits (B, V) by inverting the cumulative distribution at `uniforms` (B,); None takes the largest.

    top_p keeps the smallest set of most likely tokens whose probabilities reach it (nucleus sampling).
    """
    if uniforms is None or temperature == 0:
        return logits.argmax(-1)
    p = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1:
        ranked, order = p.sort(-1, descending=True)
        ranked = ranked.masked_fill(
            ranked.cumsum(-1) - ranked >= top_p, 0
        )  # what is already reached without a token drops it
        p = torch.zeros_like(p).scatter(-1, order, ranked)
    cumulative = p.cumsum(-1)
    target = uniforms.to(p)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)


@torch.no_grad()
def prefill(model, rows):
    """(Cache, Batch) of rows: keys and values of every slot, computed once for all continuations."""
    batch = pack(model, rows)
    cache = KVCache(model.config.text, *batch.ids.shape, model.vocab_head)
    hidden_states(model, batch, cache)
    return cache, batch


def next_logits(model, cache, ids, positions, slots, last):
    """Logits (B, V) behind token `last` (B,) of `ids` (B, T), which stand at `positions` and go to `slots` of the cache, both (B, T)."""
    mask = torch.arange(cache.keys.shape[3], device=ids.device) <= slots[:, :, None]  # (B, T, S)
    hidden = model.language_model(
        model.language_model.embed_tokens(ids), positions, mask[:, None], cache, slots
    )
    return (hidden[torch.arange(len(ids), device=ids.device), last] @ model.vocab_head.T).float()


@torch.no_grad()
def decode(model, cache, starts, max_new_tokens, temperature=1.0, top_p=1.0, contrast=0.0):
    """Yield, step by step, the (start number, token) pairs of that step, the stopping token included.

    All starts run as one batch, which is compacted when a quarter of its rows is done (on a GPU three quarters, since fewer rows hardly
    take it less time and its graph is recorded anew). A continuation also ends at the model's longest context. With `contrast` = a > 0
    starts come in pairs, one that sees the picture and one that does not, which both read on what (1 + a) log p(.|picture)
    - a log p(.|hidden) gives.
    """
    device, longest = model.device, model.config.text.max_position_embeddings
    lengths, feeds = (
        [len(part) for part in parts]
        for parts in (
            [start.cache_positions for start in starts],
            [start.input_ids for start in starts],
        )
    )
    S, F = max(lengths), max(feeds)
    ids = torch.tensor(
        [start.input_ids + [0] * (F - len(start.input_ids)) for start in starts], device=device
    )
    seen = torch.tensor(
        [[*start.cache_positions] + [0] * (S - len(start.cache_positions)) for start in starts],
        dtype=torch.long,
        device=device,
    )
    cache = cache.fork(
        torch.tensor([start.row for start in starts], device=device), seen, F + max_new_tokens
    )
    positions = torch.tensor([[start.position] for start in starts], device=device) + torch.arange(
        F, device=device
    )
    slots = torch.tensor(lengths, device=device)[:, None] + torch.arange(
        F, device=device
    )  # padding is overwritten before it is seen
    last = torch.tensor(feeds, device=device) - 1
    draws = (
        torch.stack([start.uniforms for start in starts]).to(device)
        if starts[0].uniforms is not None
        else None
    )
    rows, done, gpu = list(range(len(starts))), set(), device.type == "cuda"
    advance = following = functools.partial(next_logits, model, cache)
    for step in range(max_new_tokens):
        logits, here = advance(ids, positions, slots, last), torch.arange(len(rows), device=device)
        if contrast:
            seeing, blind = torch.log_softmax(logits, -1).unflatten(0, (-1, 2)).unbind(1)
            logits = ((1 + contrast) * seeing - contrast * blind).repeat_interleave(2, 0)
        tokens = sample_tokens(
            logits, None if draws is None else draws[:, step], temperature, top_p
        )
        written = [
            (number, token) for number, token in zip(rows, tokens.tolist()) if number not in done
        ]
        yield written
        done |= {
            number
            for number, token in written
            if token in starts[number].stop_ids
            or starts[number].position + feeds[number] + step >= longest - 1
        }
        ids, positions, slots = (
            tokens[:, None],
            positions[here, last][:, None] + 1,
            slots[here, last][:, None] + 1,
        )
        last = torch.zeros_like(last)
        keep = [i for i, number in enumerate(rows) if number not in done]
        if not keep:
            return
        compact = len(keep) <= (0.25 if gpu else 0.75) * len(rows)
        if compact:
            rows, keep = [rows[i] for i in keep], torch.tensor(keep, device=device)
            ids, positions, slots, last, draws = (
                part if part is None else part[keep]
                for part in (ids, positions, slots, last, draws)
            )
            cache.keep(keep)
        if gpu and (compact or not step):
            advance = CudaGraphed(following)  # from now on a token a row, or fewer rows


def generate_continuations(
    model, cache, starts, max_new_tokens, temperature=1.0, top_p=1.0, contrast=0.0, slots=1 << 16
):
    """The new tokens of every start, as lists, the stopping token included; at most `slots` cache slots at a time."""
    written = [[] for _ in starts]
    longest = max_new_tokens + max(
        len(start.cache_positions) + len(start.input_ids) for start in starts
    )
    some = max(1, slots // longest // 2) * 2  # pairs stay together
    for first in range(0, len(starts), some):
        for step in decode(
            model, cache, starts[first : first + some], max_new_tokens, temperature, top_p, contrast
        ):
            for number, token in step:
                written[first + number].append(token)
    return written


def branch_requests(batch, rows, uniforms, stops):
    """A Start for every branch of prefilled rows: it sees the prefix and its own lead, whose last token it is fed.

    `uniforms`: draws (max_new_tokens,) for each branch in reading order, or None.
    """
    starts = []
    for number, row in enumerate(rows):
        for (lead, _), (begin, end) in zip(row.branches, batch.response_spans[number]):
            slots = [*range(batch.prefix_lengths[number]), *range(begin, end)]
            starts.append(
                DecodeRequest(
                    number,
                    slots,
                    lead[-1:],
                    batch.first_positions[number] + len(lead) - 1,
                    uniforms and uniforms[len(starts)],
                    stops,
                )
            )
    return starts


def share_prefix(prompts, pictures):
    """One Row for several prompts about the same pictures: what they have in common is its prefix."""
    shared, shortest = 0, min(map(len, prompts)) - 1
    while shared < shortest and len({prompt[shared] for prompt in prompts}) == 1:
        shared += 1
    return PackedExample(
        prompts[0][:shared], pictures, [(prompt[shared:], []) for prompt in prompts]
    )


def generate(
    model,
    rows,
    max_new_tokens,
    stops,
    uniforms=None,
    temperature=1.0,
    top_p=1.0,
    contrast=0.0,
    prefilled=None,
):
    """The response (ids, end token included if reached) of every branch of rows made by `share_prefix`, in reading order.

    `prefilled`: what `prefill` made of the rows (None: it is made here). With `contrast` = a > 0 it is decoded, greedily, from
    (1 + a) log p(.|picture) - a log p(.|picture hidden).
    """
    rows = [*rows, *(replace(row, visible=[]) for row in rows if contrast)]
    cache, batch = prefilled or prefill(model, rows)
    starts = branch_requests(batch, rows, uniforms, stops)
    if contrast:
        starts = [
            start
            for both in zip(starts[: len(starts) // 2], starts[len(starts) // 2 :])
            for start in both
        ]
    return generate_continuations(
        model, cache, starts, max_new_tokens, temperature, top_p, contrast
    )[:: 2 if contrast else 1]
