"""The count of a model's arithmetic: by hand, and by torch's own counter of the tiny model."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minialign.data.packing import PackedExample, attention_mask_from_segments, pack
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models import arithmetic, decoder
from minialign.models.arithmetic import (
    RowLengths,
    count_multiplications,
    learn_flops,
    measure_peak,
    read_flops,
    tower_flops,
)
from minialign.models.config import LlavaConfig, TextConfig, VisionConfig
from minialign.models.policy import Policy
from minialign.training.progress import row_lengths

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.convolution)


def small_config(**text_sizes):
    """Return a config whose sizes are small enough to count with a pencil."""
    text = TextConfig(
        vocab_size=10,
        hidden_size=4,
        intermediate_size=5,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=2,
        norm_eps=1e-5,
        max_position_embeddings=64,
        rope_theta=1e4,
        rope_scaling=None,
        qkv_bias=False,
        out_bias=False,
        tie_word_embeddings=False,
    )
    vision = VisionConfig(
        family="clip",
        hidden_size=3,
        intermediate_size=6,
        num_layers=3,
        num_heads=1,
        image_size=4,
        patch_size=2,
        norm_eps=1e-5,
        activation="gelu",
    )
    return LlavaConfig(
        text=replace(text, **text_sizes),
        vision=vision,
        image_token_id=9,
        vision_feature_layer=-2,
        drop_class_token=True,
        projector_activation="gelu",
        projector_bias=True,
        image_grid_pinpoints=None,
    )


ROW = RowLengths(prefix=6, responses=[2, 3], num_image_tokens=4)  # 11 tokens, 5 are predicted


def test_multiplications_of_a_row_by_hand():
    """Two layers of width 4, with two heads of width 2 and one key-value head.

    A layer has 2 * 4 * 2 = 16 weights of k and v, and 2 * 4 * 4 + 3 * 4 * 5 = 92 others. All 11
    tokens meet the first layer, and the keys and values of the second. Its other weights meet the 5
    that are predicted: 2 * 11 * 16 + (11 + 5) * 92 = 1824. Adapters of rank 3 have 2 * 3 * (4 + 2)
    = 36 and 2 * 3 * (4 + 4) + 3 * 3 * (4 + 5) = 129 weights: 2 * 11 * 36 + 16 * 129 = 2856.

    The prefix sees 1 + ... + 6 = 21 positions, the responses 2 * 6 + 3 and 3 * 6 + 6, so 39. The
    first layer needs both and the second layer the 39: 99 pairs, each with a product for the key
    and one for the value over 4 channels: 792.

    The projector has 3 * 4 + 4 * 4 weights for 4 image tokens, the vocabulary head 4 * 10 for 5.
    """
    forward = count_multiplications(small_config(), [ROW], rank=3)

    assert forward.decoder == 1824
    assert forward.adapters == 2856
    assert forward.attention == 792
    assert forward.projector == 112
    assert forward.vocab_head == 200


def test_operations_of_the_passes_by_hand():
    """A multiplication and its addition are two operations.

    Reading: 2 * (1824 + 792 + 112 + 200) = 5856. LoRA: frozen weights twice, all else three times:
    2 * (2 * (1824 + 200) + 3 * (2856 + 792 + 112)) = 30656. Full: three times everything, which is
    17568.
    """
    config = small_config()

    assert read_flops(config, [ROW]) == 5856
    assert learn_flops(config, [ROW], rank=3) == 30656
    assert learn_flops(config, [ROW], rank=0) == 17568
    assert read_flops(config, [ROW, ROW]) == 2 * 5856


def test_operations_of_the_tower_by_hand():
    """A tile of 4 x 4 pixels has 4 patches of 12 numbers, so 4 * 12 * 3 = 144 multiplications.

    Two layers are used. Each has 4 * 9 + 2 * 3 * 6 = 72 weights for 5 features (the class token is
    one), and 5 * 5 pairs with two products over 3 channels: 5 * 72 + 150 = 510. Together 144 + 2 *
    510 = 1164 multiplications a tile, 2328 operations.
    """
    assert tower_flops(small_config(), num_tiles=1) == 2328
    assert tower_flops(small_config(), num_tiles=3) == 3 * 2328


# --- torch's own counter ---


@pytest.fixture()
def example(vlm, records):
    """Return an example with two responses of different length."""
    return encode_example(vlm, records[0], [records[0].chosen, "A red cup is here."])


def count_products(function, *arguments):
    """Return the operations of the matrix products of a call, as torch counts them.

    The attention kernel of a CPU is none of the operations that torch counts.
    """
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    counts = counter.get_flop_counts()["Global"]
    assert set(counts) <= set(PRODUCTS)
    return sum(counts.values())


def test_reading_takes_what_torch_counts(vlm, example):
    """All products with weights are counted, and no other."""
    config = vlm.model.config
    row = row_lengths(example)
    attention = 2 * count_multiplications(config, [row], rank=0).attention
    policy = Policy(vlm.model, 4, 8)
    rows = pack_examples(vlm, [example])

    with policy.reference() as reference_model:
        counted = count_products(response_logps, reference_model, rows)

    assert counted == read_flops(config, [row]) - attention


@pytest.mark.parametrize("rank", [0, 4])
def test_learning_takes_what_torch_counts(vlm, example, rank, monkeypatch):
    """Two terms are known to differ, and are computed here by hand.

    The projector's first layer needs no gradient of the image features: 64 tokens x 128 x 128 less.
    With rank 0 the backward pass computes the logits again, to save memory: 40 predicted tokens x
    128 x 640 more. LoRA takes its plain form, because torch does not count products that are added
    in place.
    """
    # Arrange
    monkeypatch.setattr(decoder, "lora_linears", lambda x, layers, **_: [f(x) for f in layers])
    policy = Policy(vlm.model, rank, 8)
    rows = pack_examples(vlm, [example])
    row = row_lengths(example)
    config = vlm.model.config
    attention = 3 * 2 * count_multiplications(config, [row], rank).attention
    known_difference = -2 * 64 * 128 * 128
    if rank == 0:
        known_difference += 2 * 40 * 128 * 640

    # Act
    def learn():
        logps, _ = response_logps(policy.model, rows)
        logps.sum().backward()

    counted = count_products(learn)

    # Assert
    assert counted == learn_flops(config, [row], rank) - attention + known_difference


def test_the_tower_takes_what_torch_counts(vlm, records):
    """The tiny tower has 4 layers of width 128 that are used, and 65 features."""
    attention = 4 * 4 * 65 * 65 * 128

    counted = count_products(vlm.encode_images, records[0].paths)

    assert counted == tower_flops(vlm.model.config, num_tiles=1) - attention


def test_the_positions_that_tokens_see_are_those_of_the_mask(vlm, records):
    """The mask of a packed row has a True wherever a token sees another."""
    features = vlm.encode_images(records[0].paths)
    example = PackedExample.of([1, 638, 5, 6], features, [[7, 8, 2], [9, 2]])
    batch = pack(vlm.model, [example])
    row = RowLengths(prefix=66, responses=[3, 2], num_image_tokens=64)

    seen = arithmetic.count_causal(row.prefix) + arithmetic.count_seen_by_responses(row)

    assert seen == attention_mask_from_segments(batch.segments).sum()


# --- the peak ---


def test_the_peak_is_operations_over_seconds():
    """Five products of 64 x 64 matrices are 5 * 2 * 64^3 operations. The clock says 2 seconds."""
    times = iter([10.0, 12.0])

    peak = measure_peak("cpu", torch.float32, size=64, clock=lambda: next(times))

    assert peak == 5 * 2 * 64**3 / 2


def test_the_peak_leaves_random_numbers_as_they_are():
    torch.manual_seed(0)
    expected = torch.rand(3)

    torch.manual_seed(0)
    measure_peak("cpu", torch.float32, size=8)

    assert torch.rand(3).equal(expected)
