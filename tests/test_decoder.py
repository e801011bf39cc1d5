"""What the decoder leaves out or computes twice changes nothing: the last layer where it is read, checkpointed layers, the masked half of the prefix."""

import math
from types import SimpleNamespace

import pytest
import torch
from conftest import each_token
from torch.nn import functional as F

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PAD_SEGMENT, PackedExample, attention_mask_from_segments, pack
from minialign.logprobs import response_logps, token_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models.decoder import MLP
from minialign.models.fused_ops import Rope
from minialign.models.kv_cache import KVCache
from minialign.models.llava import embed_batch, hidden_states
from minialign.models.policy import Policy


@pytest.fixture()
def rows(vlm, records):
    """Five rows of unequal length, two responses each."""
    return pack_examples(
        vlm,
        [
            encode_example(vlm, record, [record.chosen, "A red cup is here."])
            for record in records[:5]
        ],
    )


def test_the_last_layer_computed_where_it_is_read_equals_the_whole_one(vlm, rows):
    """At any positions behind what all rows have as prefix, in any order, repeated ones included: states and gradients are those of the full computation."""
    policy, found = Policy(vlm.model, 4, 8), []
    batch = pack(vlm.model, rows)
    B, T = batch.ids.shape
    first = min(batch.prefix_lengths)
    read = torch.stack(
        [
            first + torch.randperm(T - first, generator=torch.Generator().manual_seed(row))[:7]
            for row in range(B)
        ]
    )
    read[:, 3] = read[:, 0]
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    for states in (
        hidden_states(vlm.model, batch)[torch.arange(B)[:, None], read],
        hidden_states(vlm.model, pack(vlm.model, rows), query_positions=read),
    ):
        (states**2).sum().backward()
        found.append(
            (states.detach(), torch.cat([p.grad.flatten() for p in policy.parameters().values()]))
        )
        for p in policy.parameters().values():
            p.grad = None
    (whole, gradient), (part, other) = found
    assert (
        part.shape == (B, 7, whole.shape[-1])
        and (part - whole).abs().max() < 2e-5
        and (gradient - other).norm() / gradient.norm() < 1e-5
    )


def test_nothing_of_the_last_layer_is_computed_where_it_is_not_read(vlm, rows):
    """The last layer's MLP meets as many positions as the row with the most response tokens has; the others meet all."""
    seen = []
    for layer in vlm.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    response_logps(vlm.model, rows)
    T = pack(vlm.model, rows).ids.shape[1]
    longest = max(sum(len(response) for _, response in row.branches) for row in rows)
    assert seen == [T] * (len(seen) - 1) + [longest] and longest < T


def test_log_probs_are_those_of_all_positions(vlm, rows):
    """`response_logps` against the head on every position's state, picked afterwards."""
    batch = pack(vlm.model, rows)
    scored = batch.targets != -100
    slow = token_logps(
        hidden_states(vlm.model, batch)[scored], vlm.model.vocab_head, batch.targets[scored]
    )
    fast = torch.cat(each_token(vlm.model, rows))
    assert (slow - fast).abs().max() < 2e-5


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_layers_give_the_same_gradient_and_are_run_twice(vlm, rows, rank):
    policy, found, runs = Policy(vlm.model, rank, 8), [], []
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    vlm.model.language_model.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for vlm.model.language_model.checkpointing in (False, True):
        runs.clear()
        response_logps(vlm.model, rows)[0].sum().backward()
        found.append(
            (torch.cat([p.grad.flatten() for p in policy.parameters().values()]), len(runs))
        )
        for p in policy.parameters().values():
            p.grad = None
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6) and [
        n for _, n in found
    ] == [1, 2]
    with torch.no_grad():
        runs.clear()
        response_logps(vlm.model, rows)
    assert len(runs) == 1  # without a gradient there is nothing to compute again


# --- the MLP's product, whose backward pass is written by hand ---


def gated(gate, up):
    """What an MLP makes of the outputs of its gate and up projections; the projections themselves are left out."""
    return MLP.forward(
        SimpleNamespace(gate_proj=lambda x: gate, up_proj=lambda x: up, down_proj=lambda y: y),
        torch.zeros(()),
        lambda x: x,
    )


@pytest.mark.parametrize("trained", [(0, 1), (0,), (1,)])
def test_the_gated_product_and_its_gradients_are_autograds(trained):
    """Ordinary values and ones where silu is flat, for both factors and for each alone."""
    generator, found = torch.Generator().manual_seed(0), []
    factors = [torch.randn(2, 5, 9, generator=generator) * 3 for _ in range(2)]
    factors[0][0, 0, :3] = torch.tensor([0.0, 90.0, -90.0])
    slope = torch.randn(2, 5, 9, generator=generator)
    for product in (gated, lambda gate, up: F.silu(gate) * up):
        own = [
            factor.clone().requires_grad_(place in trained) for place, factor in enumerate(factors)
        ]
        y = product(*own)
        (y * slope).sum().backward()
        found.append((y.detach(), [factor.grad for factor in own]))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert torch.equal(ours, theirs)
    for place, (mine, reference) in enumerate(zip(our_gradients, their_gradients)):
        assert (mine is not None) == (reference is not None) == (place in trained)
        if mine is not None:
            torch.testing.assert_close(mine, reference, rtol=1e-6, atol=1e-6)


def test_the_gated_products_gradient_is_its_slope():
    """Finite differences in float64, which know neither silu's formula nor the library's derivative of it."""
    generator = torch.Generator().manual_seed(1)
    factors = [
        torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(2)
    ]
    assert torch.autograd.gradcheck(gated, factors)


# --- RoPE, whose backward pass rotates back ---


def test_rotation_by_hand_and_its_gradient():
    """Channels 0 and 2 are one pair, 1 and 3 the other, each turned by its own angle: (1, 0) by 90 degrees is (0, 1), (3, 4) by 180 is (-3, -4)."""
    angles = torch.tensor([math.pi / 2, math.pi], dtype=torch.float64).view(1, 1, 1, 2)
    x = torch.tensor([1.0, 3.0, 0.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)
    torch.testing.assert_close(
        Rope.apply(x, angles.cos(), angles.sin()).flatten(),
        torch.tensor([0.0, -3.0, 1.0, -4.0], dtype=torch.float64),
        rtol=0,
        atol=1e-12,
    )
    generator = torch.Generator().manual_seed(0)
    x, angles = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 2, 6), (2, 3, 1, 3))
    )
    assert torch.autograd.gradcheck(
        lambda x: Rope.apply(x, angles.cos(), angles.sin()), x.requires_grad_()
    )


def test_angles_lie_where_the_model_lies(vlm, rows):
    """They are worked out once, and again when the model has moved: those of a device where nothing can be computed are not used."""
    with torch.no_grad():
        before = response_logps(vlm.model, rows)[0]
        own = vlm.model.language_model.frequencies
        vlm.model.language_model.frequencies = torch.ones(len(own), device="meta")
        assert torch.equal(response_logps(vlm.model, rows)[0], before) and torch.equal(
            vlm.model.language_model.frequencies, own
        )


# --- a cache forks ---


@pytest.mark.parametrize("dtype, d", [(torch.float32, 4), (torch.bfloat16, 4), (torch.bfloat16, 6)])
def test_a_fork_holds_what_it_is_asked_for_and_empty_room(dtype, d):
    """Rows 2, 0, 2 with three slots of each and two empty ones behind, the same after some rows were dropped."""
    cache = KVCache.empty(
        SimpleNamespace(num_layers=2, num_kv_heads=3, head_dim=d),
        4,
        num_positions=5,
        like=torch.zeros(0, dtype=dtype),
    )
    cache.keys.copy_(torch.arange(cache.keys.numel()).view_as(cache.keys) % 251)
    cache.values.copy_(-cache.keys)
    cache.keep_rows(torch.tensor([3, 1, 0]))
    rows, slots = torch.tensor([2, 0, 2]), torch.tensor([[0, 1, 2], [4, 0, 3], [2, 2, 1]])
    forked = cache.fork(rows, slots, 2)
    for old, new in ((cache.keys, forked.keys), (cache.values, forked.values)):
        assert new.shape == (2, 3, 3, 5, d) and new.dtype == dtype and not new[:, :, :, 3:].any()
        for b, (row, own) in enumerate(zip(rows, slots)):
            assert torch.equal(new[:, b, :, :3], old[:, row][:, :, own])


# --- the prefix of all rows, attended to causally instead of through a mask ---


def mixed_rows(vlm, records, case):
    """Rows whose prefixes differ in length, two or three responses each; `case` says what else."""
    questions = [
        "What is it?",
        "Describe the picture. Where is the cup, and what colour has it?",
        "Where is the dog?",
    ]
    hidden = {
        "questions": [None] * 3,
        "hidden": [None, [], [5, 9, 63]],
        "no prefix": [None, []],
        "all hidden": [[], [], []],
    }[case]
    rows = []
    for number, (visible, record) in enumerate(zip(hidden, records)):
        prompt = encode_prompt(vlm.tokenizer, vlm.template, [f"<image>\n{questions[number]}"])
        texts = [record.chosen, "A red cup is here.", "No."][: 2 + number % 2]
        rows.append(
            PackedExample.of(
                prompt,
                vlm.encode_images(record.paths),
                [encode_response(vlm.tokenizer, vlm.template, text) for text in texts],
                visible,
            )
        )
    return rows + [PackedExample([], [], [([1, 7, 9], [12, 30, 2]), ([1], [8, 2])])] * (
        case == "no prefix"
    )


CASES = {
    "questions": (60, 130),
    "hidden": (3, 130),
    "no prefix": (0, 1),
    "all hidden": (3, 30),
}  # where the shortest prefix lies, at least and below


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_what_is_prefix_in_every_row_needs_no_mask(vlm, records, case, cached):
    """Against the mask for all queries, padding included: states, every adapter's gradient, and a cache's keys and values."""
    policy, found, rows = Policy(vlm.model, 4, 8), [], mixed_rows(vlm, records, case)
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    slope = None
    for whole in (False, True):
        batch = pack(vlm.model, rows)
        assert (
            CASES[case][0] <= min(batch.prefix_lengths) < CASES[case][1]
            and len(set(batch.prefix_lengths)) > 1
        )
        cache = (
            KVCache.empty(
                vlm.model.config.text,
                len(batch.ids),
                num_positions=batch.ids.shape[1],
                like=vlm.model.vocab_head,
            )
            if cached
            else None
        )
        slots = torch.arange(batch.ids.shape[1]).expand_as(batch.ids)
        with torch.set_grad_enabled(not cached):
            states = (
                vlm.model.language_model(
                    embed_batch(vlm.model, batch),
                    batch.positions,
                    attention_mask_from_segments(batch.segments),
                    cache,
                    slots,
                )
                if whole
                else hidden_states(vlm.model, batch, cache)
            )
        if cached:
            found.append((states, cache.keys, cache.values))
            continue
        slope = (
            torch.randn(states.shape, generator=torch.Generator().manual_seed(2))
            if slope is None
            else slope
        )
        (states * slope).sum().backward()
        found.append((states.detach(), *(p.grad for p in policy.parameters().values())))
        for p in policy.parameters().values():
            p.grad = None
    for number, (ours, theirs) in enumerate(zip(*found)):
        assert theirs.any() or case == "all hidden"  # where nothing is read of the projector
        if number and not cached:
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_visibility_from_a_query_on_is_the_rest_of_the_whole():
    """Prefix, branches and padding of three rows; from any query, the last and none at all included."""
    segments = torch.tensor(
        [
            [0, 0, 0, 1, 1, 2, 2, PAD_SEGMENT],
            [0, 1, 2, 2, 3, PAD_SEGMENT, PAD_SEGMENT, PAD_SEGMENT],
            [0, 0, 0, 0, 0, 0, 1, 2],
        ]
    )
    whole = attention_mask_from_segments(segments)
    assert whole.shape == (3, 1, 8, 8)
    for first in range(9):
        part = attention_mask_from_segments(segments, first)
        assert part.shape == (3, 1, 8 - first, 8) and torch.equal(part, whole[:, :, first:])


def test_rotations_second_gradient_is_not_silently_wrong():
    x, cos, sin = (
        torch.randn(1, 2, 1, 4, requires_grad=True),
        torch.rand(1, 2, 1, 2),
        torch.rand(1, 2, 1, 2),
    )
    (grad,) = torch.autograd.grad((Rope.apply(x, cos, sin) ** 2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
