"""Decoding in which the image is contrasted with its absence."""

from dataclasses import replace

import pytest
import torch
from decoding_helpers import (
    MODELS,
    NEW_TOKENS,
    QUESTIONS,
    SAMPLING,
    Question,
    generate_rows,
    prompts_of,
    with_model,
)

from minialign import reference
from minialign.generation import decoding
from minialign.generation.cache_limits import CacheLimits
from minialign.generation.decoding import (
    branch_requests,
    decode,
    generate_continuations,
    prefill,
    share_prefix,
)


@pytest.fixture(params=MODELS)
def any_vlm(request, vlm):
    """Return a VLM with each of the models in turn."""
    return with_model(vlm, request.param)


def questions_to_contrast(vlm, records):
    """Return (rows, questions): two prompts on one image, and three images with a prompt each."""
    long_and_short = prompts_of(vlm, QUESTIONS)
    other = prompts_of(vlm, ["Where is the dog?"])
    prompts_of_rows = [long_and_short, long_and_short[:1], long_and_short[1:], other]
    rows, questions = [], []
    for prompts, record in zip(prompts_of_rows, records[:4], strict=True):
        features = vlm.encode_images(record.paths)
        row = share_prefix(prompts, features)
        rows.append(row)
        for prompt_ids in prompts:
            questions.append(Question(prompt_ids, features, row))
    return rows, questions


@torch.no_grad()
def recomputed_with_contrast(vlm, question, contrast):
    """Return the greedy tokens of (1 + a) log p(.|image) - a log p(.|image masked)."""
    tokens = []
    while len(tokens) < NEW_TOKENS and vlm.tokenizer.eos not in tokens:
        log_probs = []
        for visible in (None, []):
            logits = reference.next_token_logits(
                vlm.model, question.prompt_ids, question.features, tokens, visible
            )
            log_probs.append(torch.log_softmax(logits[-1].double(), -1))
        with_image, without_image = log_probs
        contrasted = (1 + contrast) * with_image - contrast * without_image
        tokens.append(int(contrasted.argmax()))
    return tokens


@pytest.mark.parametrize("contrast", [0.25, 1.0])
def test_contrasted_answers_equal_recomputation(any_vlm, records, contrast):
    """Rows that end at different steps, each contrasted with its own image masked."""
    rows, questions = questions_to_contrast(any_vlm, records)

    responses = generate_rows(any_vlm, rows, replace(SAMPLING, contrast=contrast))

    expected = [recomputed_with_contrast(any_vlm, question, contrast) for question in questions]
    assert responses == expected
    if contrast == 1.0:
        assert responses != generate_rows(any_vlm, rows)


def test_no_contrast_is_the_ordinary_answer(vlm, records):
    """A contrast of exactly 0, and one too small to change any choice."""
    rows, _ = questions_to_contrast(vlm, records)
    greedy = generate_rows(vlm, rows)

    assert len({len(response) for response in greedy}) > 1
    for contrast in (0.0, 1e-9):
        assert generate_rows(vlm, rows, replace(SAMPLING, contrast=contrast)) == greedy


def paired_requests(vlm, rows):
    """Return (cache, requests): each request is followed by the same with the image masked."""
    masked_rows = [replace(row, visible=[]) for row in rows]
    cache, batch = prefill(vlm.model, rows + masked_rows)
    requests = branch_requests(batch, rows + masked_rows, None, stop_ids={vlm.tokenizer.eos})
    half = len(requests) // 2
    paired = []
    for i in range(half):
        paired += [requests[i], requests[half + i]]
    return cache, paired


def test_pairs_stay_together_in_every_batch_and_end_together(vlm, records, monkeypatch):
    """However small the batches, both requests of a pair give the same tokens as in one batch."""
    sampling = replace(SAMPLING, contrast=1.0)
    rows, _ = questions_to_contrast(vlm, records)
    cache, requests = paired_requests(vlm, rows)
    expected = generate_rows(vlm, rows, sampling)
    assert len({len(response) for response in expected}) > 1
    batch_sizes = []

    def recording_decode(model, cache, requests, sampling):
        batch_sizes.append(len(requests))
        return decode(model, cache, requests, sampling)

    monkeypatch.setattr(decoding, "decode", recording_decode)
    lengths = [len(request.cache_positions) + len(request.input_ids) for request in requests]
    longest = NEW_TOKENS + max(lengths)
    for num_fitting, sizes in (
        (1, [2, 2, 2, 2, 2]),
        (3, [2, 2, 2, 2, 2]),
        (5, [4, 4, 2]),
        (7, [6, 4]),
        (100, [10]),
    ):
        batch_sizes.clear()
        limits = CacheLimits(forked=num_fitting * longest)
        monkeypatch.setattr(decoding, "cache_limits", lambda model, limits=limits: limits)
        responses = generate_continuations(vlm.model, cache, requests, sampling)
        assert responses[::2] == responses[1::2] == expected
        assert batch_sizes == sizes


def test_pairs_leave_the_batch_together(vlm, records):
    """When finished rows are dropped, a pair is dropped as a whole."""
    rows, _ = questions_to_contrast(vlm, records)
    cache, requests = paired_requests(vlm, rows)
    batch_sizes = []
    forward = vlm.model.language_model.forward

    def recording_forward(x, *args, **kwargs):
        batch_sizes.append(len(x))
        return forward(x, *args, **kwargs)

    vlm.model.language_model.forward = recording_forward

    steps = list(decode(vlm.model, cache, requests, replace(SAMPLING, contrast=1.0)))

    for step in steps:
        active = {i for i, _ in step}
        assert all(i ^ 1 in active for i in active)
    assert batch_sizes[0] == 10
    assert batch_sizes[-1] == len(steps[-1]) < 10
    assert not any(size % 2 for size in batch_sizes)
