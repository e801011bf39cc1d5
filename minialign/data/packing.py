"""A prompt with its pictures and its k responses as ONE row of the batch: ids, positions, who sees whom.

    [ picture + prompt without its last token | last token, y1 without its end | last token, y2 without its end | ... ]

Each branch starts with the prompt's last token, so that every response token is predicted inside its own branch and the shift
by one needs no special case. Positions restart after the prefix; a branch sees the prefix and itself. Several questions about
one picture are the same thing with a longer lead: [ picture | question 1, answer 1 | question 2, answer 2 | ... ].
"""

from dataclasses import dataclass

import numpy as np
import torch

from minialign.utils.files import check

PAD_SEGMENT = -1  # segment of padding: it sees the prefix and its own kind, and nobody sees it


@dataclass
class PackedExample:
    """A shared prefix (ids, one placeholder a picture), its pictures' Features, and branches (lead ids, response ids).

    A lead is what a branch reads before its response, at least one token; a response holds its end token. `visible` gives
    the indices, over all the row's picture vectors, of those that stay (None: all): a hidden vector is left out and everyone
    else keeps its position, which is what masking it in every layer computes (Eq. 6). `scored` (None: the responses) gives the
    ids whose log-probs are asked for where a branch reads its response, one for each of its tokens (Sec. 3.3).
    """

    prefix: list
    image_features: list
    branches: list
    visible: list | None = None
    scored_ids: list | None = None

    @classmethod
    def of(cls, prompt, pictures, responses, visible=None, scored_ids=None):
        """One prompt and its k responses."""
        return cls(
            prompt[:-1],
            pictures,
            [(prompt[-1:], response) for response in responses],
            visible,
            scored_ids,
        )


@dataclass
class PackedBatch:
    """Rows packed and padded: everything (B, T) but `vectors` (N, D), which fill the True `slots` in reading order.

    targets: the token that a position predicts, -100 elsewhere; segments: 0 prefix, 1..k branches, PAD. Per row, as plain
    numbers: the prefix's length in slots (`prefix`), the first position after it (`start`), each branch's slots (`spans`).
    """

    ids: torch.Tensor
    is_image: torch.Tensor
    image_tokens: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor
    targets: torch.Tensor
    prefix_lengths: list
    first_positions: list
    response_spans: list


def attention_mask_from_segments(segments, first=0):
    """(B, 1, T - first, T) bool, queries from `first` on: query q sees key k iff k <= q and k is in the prefix or in q's own segment."""
    order = torch.arange(segments.shape[1], device=segments.device)
    same = (segments[:, None, :] == 0) | (
        segments[:, None, :] == segments[:, first:, None]
    )  # (B, q, k)
    return (same & (order <= order[first:, None]))[:, None]


def expand_image_placeholders(prompt, counts, image_token, visible=None):
    """(ids, positions, is_vector, next position) of a prompt whose placeholders become `counts[i]` vectors, hidden ones left out."""
    found = prompt.count(image_token)
    check(
        found == len(counts),
        f"the prompt has {found} picture placeholders and {len(counts)} pictures; put one <image> where each belongs",
    )
    ids, positions, is_vector, position, left = [], [], [], 0, list(counts)
    stays = set(visible or ())
    for token in prompt:
        vectors = left.pop(0) if token == image_token else 0
        if vectors:
            before = sum(counts) - sum(left) - vectors  # vectors of earlier pictures
            kept = (
                range(vectors)
                if visible is None
                else [i for i in range(vectors) if before + i in stays]
            )
            ids += [0] * len(kept)
            positions += [position + i for i in kept]
            is_vector += [True] * len(kept)
        else:
            ids.append(token)
            positions.append(position)
            is_vector.append(False)
        position += vectors or 1
    return ids, positions, is_vector, position


def pack(model, rows):
    """Batch of rows for `model`; each picture is projected here, once. Raises BadInput when a row is too long."""
    config, device = model.config, model.device
    vectors, parts, laid = (
        iter(
            model.project_image_features(
                [picture for row in rows for picture in row.image_features]
            )
        ),
        [],
        [],
    )
    for row in rows:
        own = [next(vectors) for _ in row.image_features]
        parts += (
            own
            if row.visible is None
            else [torch.cat(own)[torch.tensor(row.visible, dtype=torch.long, device=device)]]
        )
        laid.append(_lay_out(row, [len(v) for v in own], config))
    T = max(len(row[0]) for row in laid)
    padded = (
        np.array([row[i] + [fill] * (T - len(row[i])) for row in laid])
        for i, fill in enumerate((0, 0, False, PAD_SEGMENT, -100))
    )
    ids, positions, slots, segments, targets = (
        torch.from_numpy(each).to(device) for each in padded
    )  # NumPy reads lists six times as fast as torch does
    vectors = torch.cat(parts) if parts else torch.zeros(0, config.text.hidden_size, device=device)
    return PackedBatch(
        ids,
        slots,
        vectors,
        positions,
        segments,
        targets,
        *([row[i] for row in laid] for i in (5, 6, 7)),
    )


def _lay_out(row, counts, config):
    """One row's five lists, its prefix's length, the position after the prefix, and its branches' spans."""
    ids, positions, is_vector, start = expand_image_placeholders(
        row.prefix, counts, config.image_token_id, row.visible
    )
    prefix, spans = len(ids), []
    segments, targets = [0] * prefix, [-100] * prefix
    for number, (lead, response) in enumerate(row.branches, 1):
        length = len(lead) + len(response) - 1
        # In a response, which a policy may sample, a placeholder is a token like any other.
        check(
            config.image_token_id not in lead,
            "a picture placeholder stands behind the pictures' own text; remove <image> from it",
        )
        check(
            start + length <= config.text.max_position_embeddings,
            f"pictures and prompt are {start + len(lead)} tokens and the response {len(response)}, "
            f"together more than the model's context of {config.text.max_position_embeddings}; shorten the text (picture vectors are never cut)",
        )
        spans.append((len(ids), len(ids) + length))
        ids += lead + response[:-1] if response else lead[:-1]
        positions += range(start, start + length)
        is_vector += [False] * length
        segments += [number] * length
        scored = row.scored_ids[number - 1] if row.scored_ids else response
        targets += ([-100] * (len(lead) - 1) + scored)[:length] if response else [-100] * length
    return ids, positions, is_vector, segments, targets, prefix, start, spans
