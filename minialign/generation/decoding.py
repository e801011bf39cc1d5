"""Batched decoding from a key-value cache that can be forked and rewound.

`prefill` computes the keys and values of a batch once. A `DecodeRequest` names a point of that
cache where a continuation begins. Several requests may begin in one row of the cache, each at a
point of its own. `decode` continues all of them as one batch. It forks the cache, then repeats:
compute logits, sample a token, stop what is finished, advance, and now and then compact the batch.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from minialign.data.packing import PackedBatch, PackedExample, pack
from minialign.generation.cache_limits import cache_limits, requests_that_fit
from minialign.generation.cuda_graph import CudaGraphed
from minialign.generation.sample_tokens import contrast_logits, sample_tokens
from minialign.models.kv_cache import KVCache
from minialign.models.llava import hidden_states
from minialign.models.split import same_in_all_parts
from minialign.utils.distributed import num_parts

SPARE_POSITIONS_CPU = 32  # positions that a row of the cache grows by


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are generated.

    With `contrast` = a > 0 `generate` is greedy, and takes the token with the largest
    (1 + a) log p(.|image) - a log p(.|image masked).
    """

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling, 1 keeps every token
    seed: int = 0  # for callers that draw `uniforms`; decoding itself draws nothing
    contrast: float = 0.0


@dataclass
class DecodeRequest:
    """A continuation to be decoded, which begins at some point of a prefilled cache."""

    row: int  # row of the prefilled batch
    cache_positions: Sequence[int]  # positions of that row that it attends to, in order
    input_ids: list[int]  # tokens to read before the first new one, at least one
    position: int  # position id of the first of `input_ids`
    uniforms: torch.Tensor | None  # a number from U(0, 1) for each new token; None is greedy
    stop_ids: set[int]  # tokens that end it

    def ends_at(self, token, step, context_length):
        """Return whether the continuation ends with the token that was sampled in a step."""
        length = self.position + len(self.input_ids) + step + 1
        return token in self.stop_ids or length >= context_length


@dataclass
class DecodeState:
    """The inputs of the next decoding step. T is 1 from the second step on."""

    input_ids: torch.Tensor  # (B, T) tokens to read
    positions: torch.Tensor  # (B, T) their position ids
    cache_positions: torch.Tensor  # (B, T) where their keys and values are stored
    last_index: torch.Tensor  # (B,) index of each row's last token, behind which is padding
    uniforms: torch.Tensor | None  # (B, max_new_tokens)

    def uniforms_at(self, step):
        """Return the random numbers (B,) of a step, or None for greedy decoding."""
        if self.uniforms is None:
            return None
        return self.uniforms[:, step]

    def advance(self, tokens):
        """Make the sampled tokens (B,) the next input, one position behind the last one."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self.input_ids = tokens[:, None]
        self.positions = self.positions[rows, self.last_index][:, None] + 1
        self.cache_positions = self.cache_positions[rows, self.last_index][:, None] + 1
        self.last_index = torch.zeros_like(self.last_index)

    def keep_rows(self, rows):
        """Drop all rows but these (a tensor of indices)."""
        self.input_ids = self.input_ids[rows]
        self.positions = self.positions[rows]
        self.cache_positions = self.cache_positions[rows]
        self.last_index = self.last_index[rows]
        if self.uniforms is not None:
            self.uniforms = self.uniforms[rows]


def generate(
    model,
    examples: list[PackedExample],
    sampling: SamplingParams,
    *,
    stop_ids: set[int],
    uniforms: list[torch.Tensor] | None = None,
    prefilled: tuple[KVCache, PackedBatch] | None = None,
) -> list[list[int]]:
    """Generate a response (ids) for every branch of packed examples, in reading order.

    A response ends with its stop token, if it reached one. `uniforms` holds the random numbers of
    each response; None is greedy. If `prefill` was called for `examples` already, pass what it
    returned as `prefilled`. With `sampling.contrast` neither of the two is read.
    """
    if sampling.contrast:
        return generate_with_contrast(model, examples, sampling, stop_ids)
    if prefilled is None:
        prefilled = prefill(model, examples)
    cache, batch = prefilled
    requests = branch_requests(batch, examples, uniforms, stop_ids=stop_ids)
    return generate_continuations(model, cache, requests, sampling)


def generate_with_contrast(model, examples, sampling, stop_ids):
    """Generate greedily; contrast the log-probs with those of a masked image."""
    # 1. Prefill every example twice, the second time without its image tokens.
    masked = [replace(example, visible=[]) for example in examples]
    cache, batch = prefill(model, examples + masked)
    requests = branch_requests(batch, examples + masked, None, stop_ids=stop_ids)
    # 2. Put the two requests of each branch side by side.
    num_branches = len(requests) // 2
    paired = []
    for request, masked_request in zip(
        requests[:num_branches], requests[num_branches:], strict=True
    ):
        paired += [request, masked_request]
    # 3. Both requests of a pair read and write the same tokens, so that one of them is returned.
    responses = generate_continuations(model, cache, paired, sampling)
    return responses[::2]


def share_prefix(prompts: list[list[int]], image_features: list) -> PackedExample:
    """Pack several prompts (ids) about the same images as one example with a shared prefix."""
    # Each branch keeps at least its prompt's last token, which predicts the first new one.
    length = min(len(prompt) for prompt in prompts) - 1
    for prompt in prompts:
        length = min(length, common_prefix_length(prompt, prompts[0]))
    branches = [(prompt[length:], []) for prompt in prompts]
    return PackedExample(prompts[0][:length], image_features, branches)


def common_prefix_length(first: list[int], second: list[int]) -> int:
    """Return how many tokens two lists have in common at their beginning."""
    length = 0
    for first_token, second_token in zip(first, second, strict=False):
        if first_token != second_token:
            break
        length += 1
    return length


@torch.no_grad()
def prefill(model, examples: list[PackedExample]) -> tuple[KVCache, PackedBatch]:
    """Compute the keys and values of packed examples once, for all continuations."""
    batch = pack(model, examples)
    num_rows, num_positions = batch.ids.shape
    cache = KVCache.empty(
        model.config.text, num_rows, num_positions=num_positions, like=model.vocab_head
    )
    hidden_states(model, batch, cache)  # stores keys and values in the cache
    return cache, batch


def packed_length(model, example: PackedExample, num_image_tokens: int) -> int:
    """Return how many positions the packed row of an example has. `prefill` caches as many.

    num_image_tokens: of all its images together, without those that are masked.
    """
    num_placeholders = example.prefix.count(model.config.image_token_id)
    length = len(example.prefix) - num_placeholders + num_image_tokens
    for lead, response in example.branches:
        length += len(lead) + len(response) - 1  # the last token is not read
    return length


def branch_requests(
    batch: PackedBatch, examples: list[PackedExample], uniforms, *, stop_ids
) -> list[DecodeRequest]:
    """Make a request for every branch of prefilled examples, in reading order.

    The responses of the branches are empty, since they are to be generated. A request attends to
    the prefix and to its branch. It reads the branch's last token first, which `prefill` leaves
    out. `uniforms` holds the random numbers of each branch; None is greedy.
    """
    requests = []
    for row, example in enumerate(examples):
        prefix_positions = range(batch.prefix_lengths[row])
        spans = batch.branch_spans[row]
        for (lead, _), (span_start, span_end) in zip(example.branches, spans, strict=True):
            request = DecodeRequest(
                row=row,
                cache_positions=[*prefix_positions, *range(span_start, span_end)],
                input_ids=lead[-1:],
                position=batch.first_positions[row] + len(lead) - 1,
                uniforms=None if uniforms is None else uniforms[len(requests)],
                stop_ids=stop_ids,
            )
            requests.append(request)
    return requests


def generate_continuations(
    model,
    cache: KVCache,
    requests: list[DecodeRequest],
    sampling: SamplingParams,
) -> list[list[int]]:
    """Return the new tokens of every request, the stop token included.

    A chunk of the requests is decoded at a time. Its forked cache begins with no more positions
    than `cache_limits` allows, unless a single request needs more. On a CPU it may grow beyond
    that: if many of the requests go on for long, each of their rows gets more positions.
    """
    # 1. How many requests fit. `decode` pads what they attend to and what they read, each to the
    #    longest of its chunk.
    most_cached = max(len(request.cache_positions) for request in requests)
    most_read = max(len(request.input_ids) for request in requests)
    num_spare = spare_positions(sampling.max_new_tokens, model.device.type)
    row_length = most_cached + most_read + num_spare
    chunk_size = requests_that_fit(
        cache_limits(model).forked, row_length, are_pairs=sampling.contrast > 0
    )
    # 2. Decode one chunk after the other.
    responses = [[] for _ in requests]
    for start in range(0, len(requests), chunk_size):
        chunk = requests[start : start + chunk_size]
        for new_tokens in decode(model, cache, chunk, sampling):
            for i, token in new_tokens:
                responses[start + i].append(token)
    return responses


@torch.no_grad()
def decode(
    model, cache: KVCache, requests: list[DecodeRequest], sampling: SamplingParams
) -> Iterator[list[tuple[int, int]]]:
    """Continue all requests as one batch; yield the (request index, token) pairs of each step.

    A continuation ends with a stop token, which is yielded too, after `max_new_tokens` tokens, or
    where the model's context ends. With `sampling.contrast`, requests 2i and 2i + 1 are a pair:
    the same prompt with the image and with the image masked.
    """
    device = model.device
    context_length = model.config.text.max_position_embeddings
    # 1. Fork the cache: each request gets a row of its own, with space for what it will read first.
    state = pad_requests(requests, device)
    num_spare = spare_positions(sampling.max_new_tokens, device.type)
    cache = fork_cache(cache, requests, state.input_ids.shape[1] + num_spare)
    forward = functools.partial(next_logits, model, cache)
    active = list(range(len(requests)))  # the request index of each row
    finished = set()

    for step in range(sampling.max_new_tokens):
        # 2. Compute the logits (B, V) of the next token.
        logits = forward(state.input_ids, state.positions, state.cache_positions, state.last_index)
        if sampling.contrast:
            logits = contrast_logits(logits, sampling.contrast)
        # 3. Sample it.
        tokens = sample_tokens(
            logits,
            state.uniforms_at(step),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
        )
        tokens = same_in_all_parts(tokens)
        # 4. Stop what is finished. Its rows run along, unused, until the batch is compacted.
        new_tokens = []
        for i, token in zip(active, tokens.tolist(), strict=True):
            if i not in finished:
                new_tokens.append((i, token))
                if requests[i].ends_at(token, step, context_length):
                    finished.add(i)
        yield new_tokens
        if len(finished) == len(requests):
            return
        # 5. Advance: the new tokens are the next input.
        state.advance(tokens)
        # 6. Compact: drop the rows of finished requests once there are enough of them.
        kept_rows = rows_to_keep(active, finished, device)
        if len(kept_rows) < len(active):
            active = [active[row] for row in kept_rows]
            kept_rows = torch.tensor(kept_rows, device=device)
            state.keep_rows(kept_rows)
            cache.keep_rows(kept_rows)
            forward = fixed_shape_forward(model, cache)
        elif step == 0:
            forward = fixed_shape_forward(model, cache)  # from now on one token a row
        # 7. Make space for the next tokens. Each step after the first has used one position.
        if step > 0 and step % num_spare == 0:
            cache.add_empty_positions(num_spare)


def pad_requests(requests, device):
    """Return the first DecodeState of requests, their input ids padded to one length."""
    # 1. One row a request. Positions count on from the first one of the row.
    longest = max(len(request.input_ids) for request in requests)
    input_ids = []
    first_positions = []
    first_cache_positions = []
    last_index = []
    for request in requests:
        num_padding = longest - len(request.input_ids)
        input_ids.append(request.input_ids + [0] * num_padding)
        first_positions.append([request.position])
        first_cache_positions.append([len(request.cache_positions)])
        last_index.append(len(request.input_ids) - 1)
    offsets = torch.arange(longest, device=device)  # (T,)
    # 2. Random numbers (B, max_new_tokens).
    uniforms = None
    if requests[0].uniforms is not None:
        uniforms = torch.stack([request.uniforms for request in requests]).to(device)
    # Padding goes to the cache as well. New tokens overwrite it before anything attends to it.
    return DecodeState(
        input_ids=torch.tensor(input_ids, device=device),
        positions=torch.tensor(first_positions, device=device) + offsets,
        cache_positions=torch.tensor(first_cache_positions, device=device) + offsets,
        last_index=torch.tensor(last_index, device=device),
        uniforms=uniforms,
    )


def fork_cache(cache, requests, num_new_positions):
    """Copy the cache positions of each request to a row of its own, empty positions behind them.

    Shorter requests are filled up with copies of position 0. The mask hides these until new tokens
    overwrite them, because a row stores its next token at `len(request.cache_positions)`.
    """
    device = cache.keys.device
    longest = max(len(request.cache_positions) for request in requests)
    rows = []
    cache_positions = []
    for request in requests:
        num_padding = longest - len(request.cache_positions)
        rows.append(request.row)
        cache_positions.append([*request.cache_positions] + [0] * num_padding)
    rows = torch.tensor(rows, device=device)
    cache_positions = torch.tensor(cache_positions, dtype=torch.long, device=device)
    return cache.fork(rows, cache_positions, num_new_positions)


def next_logits(model, cache, input_ids, positions, cache_positions, last_index):
    """Read input_ids (B, T) into the cache; return the logits (B, V) behind token last_index."""
    # A token attends to everything in its row up to itself.
    all_positions = torch.arange(cache.num_positions, device=input_ids.device)  # (S,)
    mask = all_positions <= cache_positions[:, :, None]  # (B, T, S)
    hidden = model.language_model(
        model.language_model.embed_tokens(input_ids),
        positions,
        mask[:, None],
        kv_cache=cache,
        cache_positions=cache_positions,
    )  # (B, T, D)
    rows = torch.arange(len(input_ids), device=input_ids.device)
    return (hidden[rows, last_index] @ model.vocab_head.T).float()


def rows_to_keep(active, finished, device):
    """Return the rows to keep: all, or those of unfinished requests if compacting pays.

    On a CPU it pays when a quarter of the rows are finished. On a GPU a smaller batch hardly takes
    less time, and its CUDA graph has to be recorded anew, so three quarters must be finished.
    """
    unfinished_rows = [row for row, i in enumerate(active) if i not in finished]
    largest_share = 0.25 if device.type == "cuda" else 0.75
    if len(unfinished_rows) <= largest_share * len(active):
        return unfinished_rows
    return list(range(len(active)))


def spare_positions(max_new_tokens, device_type):
    """Return how many positions for new tokens a row of the forked cache gets at a time.

    Attention reads all positions of a row, empty ones too. Most continuations are far shorter than
    `max_new_tokens`. So on a CPU a row gets a few positions, and more when these are used. On a GPU
    it gets all of them at once, because a CUDA graph needs a cache that stays where it is.
    """
    if device_type == "cuda":
        return max_new_tokens
    return min(SPARE_POSITIONS_CPU, max_new_tokens)


def fixed_shape_forward(model, cache):
    """Return `next_logits` of a model and a cache for many calls with inputs of the same shapes."""
    forward = functools.partial(next_logits, model, cache)
    # A split model sums over processes, which no recording here has been tested with.
    if model.device.type == "cuda" and num_parts() == 1:
        return CudaGraphed(forward)
    return forward
