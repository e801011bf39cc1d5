"""The key-value cache: storing keys and values, forking the cache, and dropping rows."""

from types import SimpleNamespace

import pytest
import torch

from minialign.models.kv_cache import KVCache, gather_cache_positions, view_as_words

NUM_LAYERS = 2
NUM_KV_HEADS = 3


def numbered_cache(num_rows, num_positions, head_dim, dtype=torch.float32):
    """Make a cache whose keys are numbered, and whose values are the negative of its keys."""
    config = SimpleNamespace(num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=head_dim)
    like = torch.zeros(0, dtype=dtype)
    cache = KVCache.empty(config, num_rows, num_positions=num_positions, like=like)
    # Whole numbers up to 250 are exact in bfloat16.
    numbers = torch.arange(cache.keys.numel()) % 251
    cache.keys.copy_(numbers.view_as(cache.keys))
    cache.values.copy_(-cache.keys)
    return cache


def test_update_stores_one_layer_at_the_given_positions():
    """Row 0 stores its two keys at positions 3 and 1, row 1 at 0 and 4. Nothing else changes."""
    cache = numbered_cache(num_rows=2, num_positions=5, head_dim=4)
    keys_before = cache.keys.clone()
    cache_positions = torch.tensor([[3, 1], [0, 4]])
    k = torch.full((2, NUM_KV_HEADS, 2, 4), 1000.0)
    k[:, :, 1] = 2000.0

    keys, values = cache.update(1, cache_positions, k, -k)

    expected = keys_before[1]
    expected[0, :, 3] = 1000.0
    expected[0, :, 1] = 2000.0
    expected[1, :, 0] = 1000.0
    expected[1, :, 4] = 2000.0
    assert torch.equal(keys, expected)
    assert torch.equal(values, -expected)
    assert torch.equal(cache.keys[1], expected)
    assert torch.equal(cache.keys[0], keys_before[0])


@pytest.mark.parametrize(
    "dtype, head_dim", [(torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 6)]
)
def test_a_fork_holds_the_chosen_positions_and_empty_ones(dtype, head_dim):
    """Rows 2, 0 and 2 with three positions each and two empty ones, after a row was dropped.

    A head of 6 bfloat16 numbers does not fill words of 8 bytes.
    """
    cache = numbered_cache(num_rows=4, num_positions=5, head_dim=head_dim, dtype=dtype)
    cache.keep_rows(torch.tensor([3, 1, 0]))
    rows = torch.tensor([2, 0, 2])
    cache_positions = torch.tensor([[0, 1, 2], [4, 0, 3], [2, 2, 1]])

    forked = cache.fork(rows, cache_positions, 2)

    for old, new in ((cache.keys, forked.keys), (cache.values, forked.values)):
        assert new.shape == (NUM_LAYERS, 3, NUM_KV_HEADS, 5, head_dim)
        assert new.dtype == dtype
        assert not new[:, :, :, 3:].any()
        for b in range(3):
            expected = old[:, rows[b]][:, :, cache_positions[b]]  # (L, K, 3, d)
            assert torch.equal(new[:, b, :, :3], expected)


def test_added_positions_are_empty_and_behind_the_others():
    cache = numbered_cache(num_rows=2, num_positions=3, head_dim=4)
    keys_before = cache.keys.clone()

    cache.add_empty_positions(2)

    assert cache.num_positions == 5
    for buffer, expected in ((cache.keys, keys_before), (cache.values, -keys_before)):
        assert torch.equal(buffer[:, :, :, :3], expected)
        assert not buffer[:, :, :, 3:].any()


def test_a_change_of_a_fork_leaves_the_cache_as_it_was():
    cache = numbered_cache(num_rows=2, num_positions=5, head_dim=4)
    keys_before = cache.keys.clone()

    forked = cache.fork(torch.tensor([0, 1]), torch.tensor([[0, 1], [2, 3]]), 1)
    forked.keys.zero_()

    assert torch.equal(cache.keys, keys_before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_copy_in_words_equals_a_copy_of_numbers(dtype):
    cache = numbered_cache(num_rows=3, num_positions=5, head_dim=8, dtype=dtype)
    rows = torch.tensor([2, 0])
    cache_positions = torch.tensor([[0, 4], [1, 1]])

    words = view_as_words(cache.keys)
    copied = gather_cache_positions(words, rows, cache_positions).view(dtype)

    assert words.dtype == torch.int64
    assert torch.equal(copied, gather_cache_positions(cache.keys, rows, cache_positions))
