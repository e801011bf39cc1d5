"""What the decoder leaves out or computes twice changes nothing.

It computes the last layer at the positions that are needed, checkpointed layers twice, and the
prefix of all rows without a mask.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import token_logps_per_response
from model_helpers import fill_adapters, flatten, gradients_of, pack_records, relative_distance
from torch.nn import functional as F

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PAD_SEGMENT, PackedExample, attention_mask_from_segments, pack
from minialign.logprobs import response_logps, token_logps
from minialign.models.decoder import (
    MLP,
    attention,
    attention_plain,
    gather_positions,
    repeat_kv,
    rope_frequencies,
)
from minialign.models.kv_cache import KVCache
from minialign.models.llava import embed_batch, hidden_states
from minialign.models.policy import Policy


@pytest.fixture()
def rows(vlm, records):
    """Five rows of unequal length, two responses each."""
    return pack_records(vlm, records[:5], "A red cup is here.")


# --- the parts of a layer ---


def test_attention_by_hand():
    """One head of width 1. A query of 1 and keys 0 and log 3 give weights 1/4 and 3/4.

    The values are 4 and 8, so the result is 7. With the second key masked it is 4.
    """
    q = torch.tensor([[[[1.0]]]])
    k = torch.tensor([[[[0.0], [math.log(3)]]]])
    v = torch.tensor([[[[4.0], [8.0]]]])
    no_mask = torch.tensor([[[[0.0, 0.0]]]])
    mask = torch.tensor([[[[0.0, -math.inf]]]])

    unmasked = attention_plain(q, k, v, no_mask)
    masked = attention_plain(q, k, v, mask)

    assert unmasked.item() == pytest.approx(7.0)
    assert masked.item() == pytest.approx(4.0)


@pytest.mark.parametrize("num_masked", [2, 7])
def test_attention_equals_its_plain_form(num_masked):
    """Outputs and gradients, with a mask for all 7 queries or for the last 2 only."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, 7, 4)  # (B, H, T, d)
    q, k, v = torch.randn(3, *shape, generator=generator, dtype=torch.float64).unbind()
    sources = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()]
    grad_y = torch.randn(2, 7, 12, generator=generator, dtype=torch.float64)
    # Every query sees all keys up to its own. The last 2 see only some of them.
    visible = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    visible[0, :, 5:, 1:4] = False
    visible[1, :, 6, 5] = False
    full_mask = torch.zeros(visible.shape, dtype=torch.float64).masked_fill(~visible, -math.inf)

    pieces = attention(q, k, v, full_mask[:, :, -num_masked:])
    y = torch.cat(pieces, dim=1)
    gradients = torch.autograd.grad(y, sources, grad_y)

    expected = attention_plain(q, k, v, full_mask)
    expected_gradients = torch.autograd.grad(expected, sources, grad_y)
    assert len(pieces) == (1 if num_masked == 7 else 2)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_query_heads_share_key_value_heads_in_order():
    """With 2 key-value heads and 6 query heads, the first three queries read the first head."""
    kv = torch.tensor([10.0, 20.0]).view(1, 2, 1, 1)
    assert repeat_kv(kv, 3).flatten().tolist() == [10, 10, 10, 20, 20, 20]
    assert repeat_kv(kv, 1) is kv


def test_gather_positions_by_hand():
    x = torch.arange(12.0).view(2, 3, 2)
    positions = torch.tensor([[2, 0], [1, 1]])
    assert gather_positions(x, positions).tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


def test_the_mlp_is_a_gated_product():
    """It computes down(silu(gate) * up), with every layer applied to the normed input."""
    config = SimpleNamespace(hidden_size=6, intermediate_size=9)
    torch.manual_seed(0)
    mlp = MLP(config)
    norm = torch.nn.RMSNorm(6, 1e-6)
    x = torch.randn(2, 5, 6)

    output = mlp(x, norm)

    normed = norm(x)
    product = F.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed)
    torch.testing.assert_close(output, mlp.down_proj(product))


def test_llama3_scaling_leaves_fast_rotations_and_divides_slow_ones():
    """Theta 1e4 and d = 8 give frequencies 1, 0.1, 0.01 and 0.001.

    Over 2,000 pi positions these make 1,000, 100, 10 and 1 turns. More than 40 turns are fast and
    stay, fewer than 4 are slow and are divided by 8. Of 10 turns the blend is (10 - 4) / 36 = 1/6,
    so its frequency is 0.01 * (1/6 + 5/6 / 8).
    """
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 4.0,
        "high_freq_factor": 40.0,
        "original_max_position_embeddings": 2000 * math.pi,
    }
    config = SimpleNamespace(head_dim=8, rope_theta=1e4, rope_scaling=None)
    scaled_config = SimpleNamespace(head_dim=8, rope_theta=1e4, rope_scaling=scaling)

    plain = torch.tensor([1.0, 0.1, 0.01, 0.001])
    scaled = torch.tensor([1.0, 0.1, 0.01 * (1 / 6 + 5 / 48), 0.001 / 8])
    torch.testing.assert_close(rope_frequencies(config), plain)
    torch.testing.assert_close(rope_frequencies(scaled_config), scaled)


def test_rope_frequencies_follow_the_model_to_its_device(vlm, rows):
    """They are computed once, and again if the model has moved.

    The stored ones lie on a device where nothing can be computed, so they are not used.
    """
    decoder = vlm.model.language_model
    with torch.no_grad():
        logps_before, _ = response_logps(vlm.model, rows)
        frequencies = decoder.frequencies
        decoder.frequencies = torch.ones(len(frequencies), device="meta")

        logps, _ = response_logps(vlm.model, rows)

    assert torch.equal(logps, logps_before)
    assert torch.equal(decoder.frequencies, frequencies)


# --- the last layer, at the positions that are needed ---


def test_the_last_layer_at_some_positions_equals_the_whole_layer(vlm, rows):
    """States and gradients at positions behind the shortest prefix.

    The positions are in random order, and one of them is repeated.
    """
    policy = Policy(vlm.model, 4, 8)
    fill_adapters(policy)
    batch = pack(vlm.model, rows)
    num_rows, num_positions = batch.ids.shape
    prefix_length = min(batch.prefix_lengths)
    query_positions = []
    for row in range(num_rows):
        generator = torch.Generator().manual_seed(row)
        offsets = torch.randperm(num_positions - prefix_length, generator=generator)
        query_positions.append(prefix_length + offsets[:7])
    query_positions = torch.stack(query_positions)  # (B, 7)
    query_positions[:, 3] = query_positions[:, 0]

    states = hidden_states(vlm.model, batch, query_positions=query_positions)
    gradients = gradients_of(policy, (states**2).sum())

    batch = pack(vlm.model, rows)  # the image tokens anew, since their graph was used up
    all_states = hidden_states(vlm.model, batch)
    expected_states = gather_positions(all_states, query_positions)
    expected_gradients = gradients_of(policy, (expected_states**2).sum())
    assert states.shape == (num_rows, 7, all_states.shape[-1])
    assert (states - expected_states).abs().max() < 2e-5
    assert relative_distance(flatten(gradients), flatten(expected_gradients)) < 1e-5


def test_the_last_layer_skips_positions_that_are_not_scored(vlm, rows):
    """Its MLP runs at as many positions as the row with the most response tokens has."""
    lengths = []

    def remember_length(module, inputs, output):
        lengths.append(output.shape[1])

    for layer in vlm.model.language_model.layers:
        layer.mlp.register_forward_hook(remember_length)

    response_logps(vlm.model, rows)

    num_positions = pack(vlm.model, rows).ids.shape[1]
    num_scored = []
    for row in rows:
        num_scored.append(sum(len(response) for _, response in row.branches))
    most_scored = max(num_scored)
    assert lengths == [num_positions] * (len(lengths) - 1) + [most_scored]
    assert most_scored < num_positions


def test_log_probs_equal_those_computed_at_all_positions(vlm, rows):
    """`response_logps` against the vocabulary head on every position's state."""
    logps = torch.cat(token_logps_per_response(vlm.model, rows))

    batch = pack(vlm.model, rows)
    is_scored = batch.targets != -100
    states = hidden_states(vlm.model, batch)[is_scored]
    expected_logps = token_logps(states, vlm.model.vocab_head, batch.targets[is_scored])
    assert (logps - expected_logps).abs().max() < 2e-5


# --- checkpointed layers ---


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_layers_run_twice_and_give_the_same_gradient(vlm, rows, rank):
    """Without a gradient there is nothing to compute again, and they run once."""
    policy = Policy(vlm.model, rank, 8)
    fill_adapters(policy)
    decoder = vlm.model.language_model
    runs = []
    decoder.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    logps, _ = response_logps(vlm.model, rows)
    expected_gradients = gradients_of(policy, logps.sum())
    assert len(runs) == 1

    decoder.checkpointing = True
    runs.clear()
    logps, _ = response_logps(vlm.model, rows)
    gradients = gradients_of(policy, logps.sum())

    assert len(runs) == 2
    assert torch.allclose(flatten(gradients), flatten(expected_gradients), rtol=1e-5, atol=1e-6)
    runs.clear()
    with torch.no_grad():
        response_logps(vlm.model, rows)
    assert len(runs) == 1


# --- the prefix of all rows, without a mask ---


def test_a_mask_from_some_query_on_is_the_end_of_the_whole_mask():
    """Prefix, branches and padding of three rows, for each first query, none left included."""
    segments = torch.tensor(
        [
            [0, 0, 0, 1, 1, 2, 2, PAD_SEGMENT],
            [0, 1, 2, 2, 3, PAD_SEGMENT, PAD_SEGMENT, PAD_SEGMENT],
            [0, 0, 0, 0, 0, 0, 1, 2],
        ]
    )
    whole_mask = attention_mask_from_segments(segments)
    assert whole_mask.shape == (3, 1, 8, 8)
    for first in range(9):
        mask = attention_mask_from_segments(segments, first)
        assert mask.shape == (3, 1, 8 - first, 8)
        assert torch.equal(mask, whole_mask[:, :, first:])


QUESTIONS = [
    "What is it?",
    "Describe the picture. Where is the cup, and what colour has it?",
    "Where is the dog?",
]
# What the rows of a case have: the image tokens that stay (None: all) of each, and the range in
# which the length of the shortest prefix lies.
CASES = {
    "questions": ([None, None, None], range(60, 130)),
    "masked images": ([None, [], [5, 9, 63]], range(3, 130)),
    "a row without prefix": ([None, []], range(1)),
    "all images masked": ([[], [], []], range(3, 30)),
}


def rows_of_case(vlm, records, case):
    """Make rows whose prefixes differ in length, with two or three responses each."""
    visible_of_rows, _ = CASES[case]
    rows = []
    for i, visible in enumerate(visible_of_rows):
        record = records[i]
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, [f"<image>\n{QUESTIONS[i]}"])
        texts = [record.chosen, "A red cup is here."]
        if i == 1:
            texts.append("No.")
        responses = [encode_response(vlm.tokenizer, vlm.template, text) for text in texts]
        features = vlm.encode_images(record.paths)
        rows.append(PackedExample.of(prompt_ids, features, responses, visible))
    if case == "a row without prefix":
        branches = [([1, 7, 9], [12, 30, 2]), ([1], [8, 2])]
        rows.append(PackedExample(prefix=[], image_features=[], branches=branches))
    return rows


def states_with_whole_mask(model, batch, kv_cache=None):
    """Return hidden states as `hidden_states` does, but with a mask that covers all queries."""
    return model.language_model(
        embed_batch(model, batch),
        batch.positions,
        attention_mask_from_segments(batch.segments),
        kv_cache=kv_cache,
        cache_positions=torch.arange(batch.ids.shape[1]).expand_as(batch.ids),
    )


def pack_case(vlm, records, case):
    """Pack the rows of a case, and check that it is the case that its name says."""
    batch = pack(vlm.model, rows_of_case(vlm, records, case))
    _, shortest_prefix = CASES[case]
    assert min(batch.prefix_lengths) in shortest_prefix
    assert len(set(batch.prefix_lengths)) > 1
    return batch


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_without_mask_gives_the_same_gradients(vlm, records, case):
    """States, padding included, and the gradient of every adapter and of the projector."""
    policy = Policy(vlm.model, 4, 8)
    fill_adapters(policy)

    states = hidden_states(vlm.model, pack_case(vlm, records, case))
    generator = torch.Generator().manual_seed(2)
    grad_states = torch.randn(states.shape, generator=generator)
    gradients = gradients_of(policy, (states * grad_states).sum())

    expected_states = states_with_whole_mask(vlm.model, pack_case(vlm, records, case))
    expected_gradients = gradients_of(policy, (expected_states * grad_states).sum())
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=2e-5)
    for name, expected in expected_gradients.items():
        # Where all images are masked, nothing of the projector is read.
        assert expected.any() or case == "all images masked", name
        assert (gradients[name] - expected).norm() <= 1e-4 * expected.norm(), name


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_prefix_without_mask_gives_the_same_cache(vlm, records, case):
    """States, padding included, and the keys and values that are stored."""
    batch = pack_case(vlm, records, case)
    num_rows, num_positions = batch.ids.shape
    caches = []
    for _ in range(2):
        caches.append(
            KVCache.empty(
                vlm.model.config.text,
                num_rows,
                num_positions=num_positions,
                like=vlm.model.vocab_head,
            )
        )
    cache, expected_cache = caches

    states = hidden_states(vlm.model, batch, cache)

    expected_states = states_with_whole_mask(vlm.model, batch, expected_cache)
    torch.testing.assert_close(states, expected_states, rtol=1e-4, atol=2e-5)
    for tensor, expected in (
        (cache.keys, expected_cache.keys),
        (cache.values, expected_cache.values),
    ):
        assert expected.any()
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-5)
