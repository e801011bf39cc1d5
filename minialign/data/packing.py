"""Pack a prompt, its images and its k responses into one sequence, so that the prefix runs once.

The packed sequence has a prefix, which all responses share, and then one branch per response:

    [ images + prompt without its last token | last token + response 1 | last token + response 2 ]
      segment 0 (the prefix)                   segment 1                 segment 2

Here is an example with a prefix of 3 tokens (p0, p1, p2), the prompt's last token q, and two
responses of 2 and 3 tokens, (a0, a1) and (b0, b1, b2). The last token of a response is its end
token. It is predicted but never read, so a1 and b2 appear only as targets.

    token     p0  p1  p2 | q   a0 | q   b0  b1
    segment    0   0   0 | 1    1 | 2    2   2
    position   0   1   2 | 3    4 | 3    4   5
    target     -   -   - | a0  a1 | b0  b1  b2

- Every branch begins with the prompt's last token. So each response token is predicted inside its
  own branch, and the usual shift by one between inputs and targets needs no special case.
- Positions restart after the prefix. Each response has the positions it would have on its own.
- Query q sees key k if `k <= q and (segment[k] == 0 or segment[k] == segment[q])`. In words: a
  branch sees the prefix and itself. In the example (a row per query, a column per key):

              p0  p1  p2   q  a0   q  b0  b1
        p0     1   .   .   .   .   .   .   .
        p1     1   1   .   .   .   .   .   .
        p2     1   1   1   .   .   .   .   .
        q      1   1   1   1   .   .   .   .
        a0     1   1   1   1   1   .   .   .
        q      1   1   1   .   .   1   .   .
        b0     1   1   1   .   .   1   1   .
        b1     1   1   1   .   .   1   1   1

So the log-probs of each response are those of a sequence of its own, up to rounding.

Several questions about one image use the same layout. A branch then begins with a whole question:

    [ images | question 1 + answer 1 | question 2 + answer 2 | ... ]
"""

from dataclasses import dataclass

import numpy as np
import torch

from minialign.utils.files import check

# Segment of padding. Padding sees the prefix, the padding before it and itself, so that its softmax
# has a key. No real token sees padding, because it lies to the right of all of them.
PAD_SEGMENT = -1
IGNORED_TARGET = -100  # target of a position whose prediction is not scored


@dataclass
class PackedExample:
    """A prefix with its images, and the branches that continue it. Token ids are lists of int.

    prefix: token ids with one image placeholder per image.
    image_features: the ImageFeatures of each image.
    branches: pairs (lead, response) of token ids. The lead is what a branch reads before its
        response, at least one token. A response includes its end token. An empty response is one
        that is still to be generated.
    visible: indices of the image tokens that stay, counted over all images, in any order. None
        keeps them all.
    scored_ids: for each branch, the ids to score in the context of its response, one per response
        token (Sec. 3.3). None scores the responses themselves.
    """

    prefix: list
    image_features: list
    branches: list
    visible: list | None = None
    scored_ids: list | None = None

    @classmethod
    def of(cls, prompt_ids, image_features, responses, visible=None, scored_ids=None):
        """Return the example of one prompt and its k responses."""
        last_token = prompt_ids[-1:]
        return cls(
            prefix=prompt_ids[:-1],
            image_features=image_features,
            branches=[(last_token, response) for response in responses],
            visible=visible,
            scored_ids=scored_ids,
        )


@dataclass
class PackedBatch:
    """Packed examples, padded on the right to T tokens. The lists have one entry per example.

    ids: (B, T), 0 at image tokens and at padding.
    is_image: (B, T) bool, True at image tokens.
    image_tokens: (image tokens of all rows, D), the embeddings that belong where is_image is True,
        in reading order.
    positions: (B, T), what RoPE rotates by.
    segments: (B, T), 0 in the prefix, 1 to k in the branches, PAD_SEGMENT in padding.
    targets: (B, T), the token that each position predicts, IGNORED_TARGET where none is scored.
    prefix_lengths: number of tokens of each prefix.
    first_positions: the position at which all branches of an example start.
    branch_spans: for each branch, the pair (start, end) of its indices in the sequence, from its
        lead's first token to the last token that it reads.
    """

    ids: torch.Tensor
    is_image: torch.Tensor
    image_tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor
    prefix_lengths: list
    first_positions: list
    branch_spans: list


@dataclass
class ExpandedPrompt:
    """A prompt with image tokens in place of the placeholders. The lists have one entry per token.

    The id of an image token is 0, because image tokens are not in the vocabulary. `next_position`
    is the position of whatever follows the prompt.
    """

    ids: list
    positions: list
    is_image: list
    next_position: int


@dataclass
class _PackedRow:
    """One laid-out example before padding. The fields are those of PackedBatch for one row."""

    ids: list
    positions: list
    is_image: list
    segments: list
    targets: list
    prefix_length: int
    first_position: int
    spans: list


def attention_mask_from_segments(segments, first_query=0):
    """Return which key each query from `first_query` on sees, as a bool tensor (B, 1, Q, T)."""
    index = torch.arange(segments.shape[1], device=segments.device)
    k = index  # (T,)
    q = index[first_query:, None]  # (Q, 1)
    segment_of_k = segments[:, None, :]  # (B, 1, T)
    segment_of_q = segments[:, first_query:, None]  # (B, Q, 1)
    sees = (k <= q) & ((segment_of_k == 0) | (segment_of_k == segment_of_q))  # (B, Q, T)
    return sees[:, None]  # the same for all heads


def expand_image_placeholders(prompt_ids, token_counts, image_token_id, visible=None):
    """Replace the placeholder of image i by `token_counts[i]` image tokens.

    With `visible`, only the image tokens with these indices stay, counted over all images. The
    paper masks the others in every layer (Eq. 6). Leaving them out computes the same:

    - A masked key has weight 0 in every softmax, as if it were absent.
    - Only attention mixes tokens. So, layer by layer, the other tokens have the states they would
      have without it.
    - RoPE depends on positions alone, and all other tokens keep theirs.
    - Nothing is predicted at an image token, so neither another token nor the loss reads its state.

    It is also much cheaper: with rho_th = 0.99, one image token in 100 is left.
    """
    num_placeholders = prompt_ids.count(image_token_id)
    check(
        num_placeholders == len(token_counts),
        f"the prompt has {num_placeholders} image placeholders and {len(token_counts)} images; "
        "put one <image> where each image belongs",
    )
    expanded = ExpandedPrompt(ids=[], positions=[], is_image=[], next_position=0)
    remaining_counts = iter(token_counts)
    image_start = 0  # index of the current image's first token, counted over all images
    for token_id in prompt_ids:
        position = expanded.next_position
        if token_id != image_token_id:
            expanded.ids.append(token_id)
            expanded.positions.append(position)
            expanded.is_image.append(False)
            expanded.next_position += 1
            continue

        num_tokens = next(remaining_counts)
        kept = range(num_tokens)
        if visible is not None:
            kept = [i for i in kept if image_start + i in visible]
        expanded.ids += [0] * len(kept)
        expanded.positions += [position + i for i in kept]
        expanded.is_image += [True] * len(kept)
        # Count the tokens that were left out as well: what follows keeps its position.
        expanded.next_position += num_tokens
        image_start += num_tokens
    return expanded


def pack(model, examples):
    """Pack examples for `model` into one PackedBatch. Raise InputError if one is too long."""
    # 1. Project the features of all images in one call, each image once.
    image_features = []
    for example in examples:
        image_features += example.image_features
    projected = iter(model.project_image_features(image_features))  # (I, D) for each image

    # 2. Lay out each example as a sequence, and collect the image tokens that stay in it.
    rows = []
    image_tokens = []
    for example in examples:
        example_tokens = [next(projected) for _ in example.image_features]
        token_counts = [len(tokens) for tokens in example_tokens]
        rows.append(_lay_out(example, token_counts, model.config))
        if example.visible is None:
            image_tokens += example_tokens
        else:
            # In the order of the sequence, whatever the order of `visible` is.
            in_order = sorted(set(example.visible))
            visible = torch.tensor(in_order, dtype=torch.long, device=model.device)
            image_tokens.append(torch.cat(example_tokens)[visible])
    if not image_tokens:
        image_tokens.append(torch.zeros(0, model.config.text.hidden_size, device=model.device))

    # 3. Pad the sequences to one length.
    return _pad_rows(rows, torch.cat(image_tokens), model.device)


def _lay_out(example, token_counts, config):
    """Lay out one example as a sequence. `token_counts` is the number of tokens of each image."""
    # 1. The prefix is segment 0. Nothing in it is scored.
    visible = None
    if example.visible is not None:
        visible = set(example.visible)
    prefix = expand_image_placeholders(example.prefix, token_counts, config.image_token_id, visible)
    prefix_length = len(prefix.ids)
    row = _PackedRow(
        ids=prefix.ids,
        positions=prefix.positions,
        is_image=prefix.is_image,
        segments=[0] * prefix_length,
        targets=[IGNORED_TARGET] * prefix_length,
        prefix_length=prefix_length,
        first_position=prefix.next_position,
        spans=[],
    )

    # 2. The branches are segments 1 to k. All of them start at the same position.
    for branch_index, (lead, response) in enumerate(example.branches):
        _check_branch(lead, response, row.first_position, config)
        if response:
            # The end token is a target and never read. The lead's last token has the first target.
            ids = lead + response[:-1]
            scored_ids = response
            if example.scored_ids:
                scored_ids = example.scored_ids[branch_index]
            targets = [IGNORED_TARGET] * (len(lead) - 1) + scored_ids
        else:
            # Still to be generated: decoding begins by reading the lead's last token.
            ids = lead[:-1]
            targets = [IGNORED_TARGET] * len(ids)
        start = len(row.ids)
        row.spans.append((start, start + len(ids)))
        row.ids += ids
        row.positions += range(row.first_position, row.first_position + len(ids))
        row.is_image += [False] * len(ids)
        row.segments += [branch_index + 1] * len(ids)
        row.targets += targets
    return row


def _check_branch(lead, response, first_position, config):
    """Raise InputError unless a branch is free of image placeholders and fits the context."""
    # A placeholder in a response, which a model may have sampled, is a token like any other.
    check(
        config.image_token_id not in lead,
        "an image placeholder follows the text that all branches share; remove <image> from it",
    )
    context_length = config.text.max_position_embeddings
    num_read_of_response = max(0, len(response) - 1)  # its last token is not read
    num_read = first_position + len(lead) + num_read_of_response
    check(
        num_read <= context_length,
        f"images and prompt are {first_position + len(lead)} tokens and the response "
        f"{len(response)}, together more than the model's context of {context_length}; "
        "shorten the text (image tokens are never cut)",
    )


def _pad_rows(rows, image_tokens, device):
    """Join laid-out examples to a PackedBatch."""
    return PackedBatch(
        ids=_pad([row.ids for row in rows], 0, device),
        is_image=_pad([row.is_image for row in rows], False, device),
        image_tokens=image_tokens,
        positions=_pad([row.positions for row in rows], 0, device),
        segments=_pad([row.segments for row in rows], PAD_SEGMENT, device),
        targets=_pad([row.targets for row in rows], IGNORED_TARGET, device),
        prefix_lengths=[row.prefix_length for row in rows],
        first_positions=[row.first_position for row in rows],
        branch_spans=[row.spans for row in rows],
    )


def _pad(lists, value, device):
    """Return lists of different lengths as a tensor (B, T), filled up on the right with `value`."""
    T = max(len(values) for values in lists)
    padded = [values + [value] * (T - len(values)) for values in lists]
    # NumPy reads nested lists six times as fast as torch does.
    return torch.from_numpy(np.array(padded)).to(device)
