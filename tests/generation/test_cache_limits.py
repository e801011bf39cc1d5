"""How many cache positions a device holds, by hand, and decoding in caches that are small."""

import os
from dataclasses import replace

import pytest
import torch
from conftest import set_device_memory
from decoding_helpers import NEW_TOKENS, QUESTIONS, SAMPLING, prompts_of, questions_of

from minialign.generation import cache_limits as limits_module
from minialign.generation import decoding
from minialign.generation.cache_limits import (
    CacheLimits,
    cache_limits,
    limits_that_fit,
    physical_memory,
    requests_that_fit,
    rows_that_fit,
    total_memory,
)
from minialign.generation.decoding import (
    DecodeRequest,
    branch_requests,
    decode,
    fork_cache,
    generate_continuations,
    packed_length,
    prefill,
    share_prefix,
)
from minialign.models.memory import kv_cache_bytes, module_bytes

WEIGHTS_OF_7B = 14_126_854_144  # bytes in bfloat16
POSITION_OF_7B = 524_288  # 2 (keys, values) x 32 layers x 32 heads x 128 numbers x 2 bytes


@pytest.fixture()
def text_of_7b(vlm):
    """Return a decoder whose keys and values have the sizes of a 7B."""
    return replace(vlm.model.config.text, num_layers=32, num_kv_heads=32, head_dim=128)


def limits_of_7b(text, device_memory):
    """Return the limits of a 7B in bfloat16 on a device of so many bytes."""
    return limits_that_fit(
        text, torch.bfloat16, weight_bytes=WEIGHTS_OF_7B, device_memory=device_memory
    )


# --- the limits ---


def test_a_third_and_a_fifth_of_what_the_weights_leave(text_of_7b):
    """Beside the weights 15,000 positions: 5,000 for forks, 3,000 for prompts."""
    device_memory = WEIGHTS_OF_7B + 15_000 * POSITION_OF_7B

    limits = limits_of_7b(text_of_7b, device_memory)

    assert kv_cache_bytes(text_of_7b, 1, 1, torch.bfloat16) == POSITION_OF_7B
    assert limits == CacheLimits(forked=5000, prefilled=3000, with_responses=3000)
    # One byte less, and both have a position less.
    assert limits_of_7b(text_of_7b, device_memory - 1) == CacheLimits(4999, 2999, 2999)


def test_half_of_the_heads_give_twice_the_positions(text_of_7b):
    """A process of --split 2 holds half of the key-value heads."""
    half = replace(text_of_7b, num_kv_heads=16)
    device_memory = WEIGHTS_OF_7B + 15_000 * POSITION_OF_7B

    assert limits_of_7b(half, device_memory).forked == 2 * 5000


def test_a_large_device_has_the_largest_caches(text_of_7b):
    """An H200 has 150e9 bytes. An H100 has 85e9, and reads 32 records of 720 positions together."""
    large = limits_of_7b(text_of_7b, int(150e9))
    middle = limits_of_7b(text_of_7b, int(85e9))

    assert limits_of_7b(text_of_7b, None) == CacheLimits()
    assert limits_of_7b(text_of_7b, 10**15) == CacheLimits()
    assert (large.forked, large.with_responses) == (1 << 16, 1 << 15)
    assert middle.forked >= 32 * 720
    assert middle.prefilled >= 32 * 720


def test_more_memory_never_gives_smaller_caches(text_of_7b):
    all_limits = [limits_of_7b(text_of_7b, size * 10**9) for size in range(0, 200, 4)]

    for smaller, larger in zip(all_limits, all_limits[1:], strict=False):
        assert smaller.forked <= larger.forked
        assert smaller.prefilled <= larger.prefilled
        assert smaller.with_responses <= larger.with_responses


def test_a_device_without_space_has_one_request_or_one_pair(text_of_7b):
    limits = limits_of_7b(text_of_7b, WEIGHTS_OF_7B // 2)

    assert limits == CacheLimits(0, 0, 0)
    assert rows_that_fit(limits.prefilled, 100) == 1
    assert requests_that_fit(limits.forked, 100) == 1
    assert requests_that_fit(limits.forked, 100, are_pairs=True) == 2


def test_requests_come_in_even_numbers_once_two_fit():
    assert [requests_that_fit(100 * n, 100) for n in (1, 2, 3, 7)] == [1, 2, 2, 6]
    assert [requests_that_fit(100 * n, 100, are_pairs=True) for n in (1, 2, 3, 7)] == [2, 2, 2, 6]
    assert rows_that_fit(799, 100) == 7


def test_the_limits_of_a_model_are_those_of_its_weights_and_its_device(vlm, monkeypatch):
    """A position of the tiny model takes 2 x 4 layers x 128 numbers x 4 bytes."""
    position = 2 * 4 * 128 * 4
    set_device_memory(monkeypatch, module_bytes(vlm.model) + 150 * position)

    assert cache_limits(vlm.model) == CacheLimits(50, 30, 30)


# --- the memory of a device ---


def test_a_system_that_does_not_tell_its_memory_sets_no_limit(monkeypatch):
    assert total_memory(torch.device("cpu")) == physical_memory() > 1 << 20

    def refuse(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "sysconf", refuse)

    assert total_memory(torch.device("cpu")) is None


def test_all_processes_of_a_split_model_take_the_fewest_bytes(monkeypatch):
    """Otherwise their batches would differ, and they would wait for each other forever."""
    monkeypatch.setattr(limits_module, "num_parts", lambda: 2)
    monkeypatch.setattr(limits_module, "physical_memory", lambda: 50)

    def gather(num_bytes):
        """Return what both processes have: the other one has less."""
        return [num_bytes, num_bytes - 20]

    monkeypatch.setattr(limits_module, "gather_parts", gather)

    assert total_memory(torch.device("cpu")) == 30


# --- decoding in them ---


def test_requests_that_are_decoded_one_by_one_give_the_same_tokens(vlm, records, monkeypatch):
    """A device without space for two requests decodes each alone."""
    rows = [question.row for question in questions_of(vlm, records[:3])]
    cache, batch = prefill(vlm.model, rows)
    requests = branch_requests(batch, rows, None, stop_ids=set())
    together = generate_continuations(vlm.model, cache, requests, SAMPLING)
    batch_sizes = []

    def recording_decode(model, cache, requests, sampling):
        batch_sizes.append(len(requests))
        return decode(model, cache, requests, sampling)

    monkeypatch.setattr(decoding, "decode", recording_decode)
    set_device_memory(monkeypatch, 0)
    alone = generate_continuations(vlm.model, cache, requests, SAMPLING)

    assert alone == together
    assert batch_sizes == [1, 1, 1]
    assert {len(tokens) for tokens in alone} == {NEW_TOKENS}


def test_requests_that_read_several_tokens_first_are_padded_within_the_limit(vlm, monkeypatch):
    """One request has 9 positions and reads 1 token, the other has 2 and reads 8.

    Each needs 10 positions alone. Together both rows have 9 + 8, which is more than 2 x 10.
    """
    prompt = list(range(20, 32))
    cache, _ = prefill(vlm.model, [share_prefix([prompt], [])])
    requests = []
    for num_cached, input_ids in ((9, [40]), (2, [41] * 8)):
        request = DecodeRequest(
            row=0,
            cache_positions=range(num_cached),
            input_ids=input_ids,
            position=num_cached,
            uniforms=None,
            stop_ids=set(),
        )
        requests.append(request)
    cache_sizes = []

    def recording_fork(*args):
        forked = fork_cache(*args)
        _, num_rows, _, num_positions, _ = forked.keys.shape
        cache_sizes.append(num_rows * num_positions)
        return forked

    monkeypatch.setattr(decoding, "fork_cache", recording_fork)
    for forked, expected in (
        (2 * (9 + 8 + NEW_TOKENS), [2 * (9 + 8 + NEW_TOKENS)]),
        (2 * (10 + NEW_TOKENS), [10 + NEW_TOKENS, 10 + NEW_TOKENS]),
    ):
        cache_sizes.clear()
        limits = CacheLimits(forked=forked)
        monkeypatch.setattr(decoding, "cache_limits", lambda model, limits=limits: limits)
        generate_continuations(vlm.model, cache, requests, SAMPLING)
        assert cache_sizes == expected


def test_the_length_of_a_row_is_that_of_its_prefill(vlm, records):
    """Two questions about an image, with a placeholder that becomes 64 image tokens."""
    features = vlm.encode_images(records[0].paths)
    example = share_prefix(prompts_of(vlm, QUESTIONS), features)
    masked = replace(example, visible=[3, 5, 8])

    for row, num_image_tokens in ((example, 64), (masked, 3)):
        cache, _ = prefill(vlm.model, [row])
        assert packed_length(vlm.model, row, num_image_tokens) == cache.num_positions
