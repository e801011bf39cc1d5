"""This module computes the log-probs of responses without ever forming all logits of a batch.

A 7B model has 32,000 logits at each position. Those of all positions would be one of the largest
tensors of a training step. Only the positions that predict a response token need logits, and of
each only one number is kept: the log-prob of its target. So the decoder returns hidden states,
`response_hidden_states` picks the positions that count, and `token_logps` applies the vocabulary
head there, a block at a time.

Shapes: B rows, T positions of a row, R scored positions of a row, N scored positions of all rows,
D hidden size, V vocabulary, k responses of a row, M entries of N sparse distributions.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from minialign.data.packing import IGNORED_TARGET, PackedBatch, PackedExample, pack
from minialign.models.fused_ops import BlockwiseTokenLogps
from minialign.models.kv_cache import KVCache
from minialign.models.llava import Llava, hidden_states
from minialign.utils.files import check

MAX_TOKENS = 16384  # the most padded positions that are read together without gradients


# --- From hidden states to log-probs


def token_logps_plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Compute log p(target) in nats, (N,).

    hidden  (N, D): the decoder's state at each position that predicts a token
    weight  (V, D): the vocabulary head
    targets (N,):   the token to predict at each position
    """
    logits = (hidden @ weight.T).float()  # (N, V)
    vocab_logps = torch.log_softmax(logits, dim=-1)  # (N, V)
    target_logps = vocab_logps.gather(dim=1, index=targets[:, None])  # (N, 1)
    return target_logps.squeeze(1)


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    max_logits: int = 1 << 22,
) -> Tensor:
    """Compute the same result as token_logps_plain, with at most `max_logits` logits at a time.

    The forward and the backward pass go through the vocabulary in blocks, see BlockwiseTokenLogps.
    Both functions are equal up to rounding, which depends on the block size and so on N.
    """
    # A multiple of 64 tokens fills the tiles of a GPU's matrix product. A block has at least 64.
    tokens_per_block = max_logits // len(hidden)
    block_size = max(64, tokens_per_block // 64 * 64)
    return BlockwiseTokenLogps.apply(hidden, weight, targets, block_size)


def expected_token_logps(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, probs: Tensor, *, counts: Tensor
) -> Tensor:
    """Compute E_q[log p(v)] in nats at each of N positions, (N,), for sparse distributions q.

    hidden    (N, D): the decoder's state at each position that predicts a token
    weight    (V, D): the vocabulary head W
    token_ids (M,):   the tokens v with q(v) > 0, position after position
    probs     (M,):   q(v) of these tokens, with the sum 1 at each position
    counts    (N,):   how many of the M entries each position has, at least one

    log p(v) = hidden . W[v] - log Z, and log Z is the same for all v. So for any token u

    E_q[log p(v)] = log p(u) + hidden . (E_q[W[v]] - W[u])

    Only log p(u) needs the whole vocabulary. So as long as M is far below N * V, this costs little
    more than the log-probs of single targets.
    """
    # 1. The mean row E_q[W[v]] of the vocabulary head at each position, (N, D). In fp32, because a
    #    difference of close numbers follows. Only the rows that some q needs are converted.
    #    embedding_bag adds up the weighted rows of a position without forming all M of them.
    first_entries = counts.cumsum(0) - counts  # (N,), where each position's entries begin
    used_ids, row_of_entry = token_ids.unique(return_inverse=True)
    used_rows = weight[used_ids].float()
    mean_rows = F.embedding_bag(
        row_of_entry, used_rows, first_entries, mode="sum", per_sample_weights=probs
    )

    # 2. Each position's first token serves as u.
    first_logps = token_logps(hidden, weight, token_ids[first_entries])  # log p(u), (N,)
    first_rows = used_rows[row_of_entry[first_entries]]  # W[u], (N, D)
    mean_differences = (hidden.float() * (mean_rows - first_rows)).sum(dim=-1)  # (N,)
    return first_logps + mean_differences


def sparse_token_logps(
    hidden: Tensor, weight: Tensor, token_ids: Tensor, *, counts: Tensor
) -> Tensor:
    """Compute log p(v) in nats of several tokens v at each of N positions, (M,).

    The arguments are those of `expected_token_logps`. For the first token u of a position

    log p(v) = log p(u) + hidden . (W[v] - W[u])

    This forms M rows of the vocabulary head, one for each entry.
    """
    position_of_entry = torch.repeat_interleave(counts)  # (M,)
    first_entries = counts.cumsum(0) - counts  # (N,), where each position's entries begin
    first_ids = token_ids[first_entries]  # u
    first_logps = token_logps(hidden, weight, first_ids)  # log p(u), (N,)

    row_differences = weight[token_ids].float() - weight[first_ids].float()[position_of_entry]
    logit_differences = (hidden.float()[position_of_entry] * row_differences).sum(dim=-1)  # (M,)
    return first_logps[position_of_entry] + logit_differences


# --- From packed rows to hidden states


def batches_that_fit(
    lengths: list[int], batch_size: int | None = None, max_tokens: int = MAX_TOKENS
) -> list[slice]:
    """Return which rows are read together without gradients, as slices of rows in their order.

    A batch has at most `max_tokens` positions when all of its rows are padded to the longest. A row
    of more than `max_tokens` positions is a batch of its own. Unlike `microbatches`
    (methods/base.py), this keeps the order.

    lengths: the positions of each row.
    batch_size: the most rows of a batch. None: no limit.
    """
    batches = []
    start = 0
    longest = 0
    for i, length in enumerate(lengths):
        longest = max(longest, length)
        num_rows = i + 1 - start
        has_room = batch_size is None or num_rows <= batch_size
        fits = has_room and num_rows * longest <= max_tokens
        if num_rows > 1 and not fits:  # row i begins the next batch
            batches.append(slice(start, i))
            start = i
            longest = length
    if lengths:
        batches.append(slice(start, len(lengths)))
    return batches


def left_align(is_scored: Tensor) -> Tensor:
    """Return each row's scored positions first, as positions (B, R), R being the most of any row.

    With S for scored, two rows of two responses each become R = 4 columns:

        position     0 1 2 3 4 5 6 7
        row 0        . . S S . S S .    ->   2 3 5 6
        row 1        . . . S . . S .    ->   3 6 0 1

    A row with fewer than R is filled up with positions that are not scored (0 and 1 in row 1).
    """
    # A stable sort keeps the scored positions in their order.
    scored_first = is_scored.int().argsort(dim=1, descending=True, stable=True)  # (B, T)
    most_scored = int(is_scored.sum(dim=1).max())
    return scored_first[:, :most_scored]


def reuse_prefix(cache: KVCache, batch: PackedBatch, prefix_length: int) -> KVCache:
    """Return a copy of the rows' prefilled cache that holds their first `prefix_length` positions.

    The copy has empty slots for the other positions of the batch. The cache itself does not change.
    """
    num_rows, row_length = batch.ids.shape
    rows = torch.arange(num_rows)
    positions = torch.arange(prefix_length).expand(num_rows, -1)
    return cache.fork(rows, positions, row_length - prefix_length)


def response_hidden_states(
    model: Llava,
    rows: list[PackedExample],
    cache: KVCache | None = None,
) -> tuple[Tensor, Tensor, list[int]]:
    """Compute the hidden states (N, D) at all positions that predict a response token.

    Returns them with the tokens that they predict (N,) and the number of tokens of each response.
    All are in reading order: row by row, response by response, token by token.

    `cache` saves time. `prefill` made it of the same prompts, before they had responses, with the
    same policy. The positions that belong to the prefix in every row are read from it and not
    computed again.
    """
    # 1. Pack the rows. IGNORED_TARGET marks where nothing is scored.
    response_lengths = []
    for row in rows:
        for _, response in row.branches:
            check(response, "a response is empty; every response needs at least its end token")
            response_lengths.append(len(response))
    batch = pack(model, rows)

    # 2. Left-align the scored positions: the last layer is computed at R positions instead of T.
    is_scored = batch.targets != IGNORED_TARGET  # (B, T)
    columns = left_align(is_scored)  # (B, R), which of the T positions
    is_scored = is_scored.gather(1, columns)  # (B, R)
    targets = batch.targets.gather(1, columns)  # (B, R)

    # 3. Run the decoder over all positions, or over those that the cache does not hold.
    if cache is None:
        hidden = hidden_states(model, batch, query_positions=columns)  # (B, R, D)
    else:
        prefix_length = min(batch.prefix_lengths)
        # Columns now count from the end of the prefix. Those that fill up a row may lie in it.
        columns = (columns - prefix_length).clamp(min=0)
        hidden = hidden_states(
            model,
            batch,
            kv_cache=reuse_prefix(cache, batch, prefix_length),
            query_positions=columns,
            num_cached=prefix_length,
        )

    # 4. Drop the positions that fill up the rows.
    return hidden[is_scored], targets[is_scored], response_lengths


def response_logps(model: Llava, rows: list[PackedExample]) -> tuple[Tensor, Tensor]:
    """Compute the summed log-probs of all responses in nats, and their token counts, both (B, k).

    The end token counts. If the rows differ in k, both results are flat, in reading order.
    """
    # 1. The log-prob of each token of each response.
    hidden, targets, response_lengths = response_hidden_states(model, rows)
    logps = token_logps(hidden, model.vocab_head, targets)

    # 2. Add up the tokens of each response.
    token_counts = torch.tensor(response_lengths, device=logps.device)
    num_responses = len(token_counts)
    response_ids = torch.arange(num_responses, device=logps.device)
    response_of_token = torch.repeat_interleave(response_ids, token_counts)
    summed_logps = torch.zeros(num_responses, device=logps.device)
    summed_logps = summed_logps.index_add(0, response_of_token, logps)

    # 3. One row for each prompt, where all have the same number of responses.
    responses_per_row = {len(row.branches) for row in rows}
    if len(responses_per_row) == 1:
        shape = (len(rows), -1)
        return summed_logps.view(shape), token_counts.view(shape)
    return summed_logps, token_counts
