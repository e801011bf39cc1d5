"""Run models on the golden prompts, and compare with the numbers of transformers."""

import numpy as np
import torch
from golden.models import cases

from minialign.data.anyres import grid_shape
from minialign.data.packing import PackedExample, pack
from minialign.models.llava import hidden_states

PROMPTS = [prompt_ids for prompt_ids, _ in cases.PROMPTS]


def assert_close(actual, expected, tolerance=1e-4):
    """Fail unless all numbers agree within the tolerance."""
    torch.testing.assert_close(
        torch.as_tensor(actual), torch.as_tensor(expected), rtol=0, atol=tolerance
    )


@torch.no_grad()
def prompt_logits(model, prompts, image_features):
    """Return the logits (T, V) of each prompt, image tokens included. All prompts form one batch.

    image_features: for each prompt the ImageFeatures of its images.
    """
    examples = []
    for prompt_ids, features in zip(prompts, image_features, strict=True):
        examples.append(PackedExample(prompt_ids, features, branches=[]))
    batch = pack(model, examples)
    logits = hidden_states(model, batch) @ model.vocab_head.T  # (B, T, V)
    return [row[:length] for row, length in zip(logits, batch.prefix_lengths, strict=True)]


def encode_golden_images(model):
    """Return the ImageFeatures of the images of each golden prompt, all encoded in one batch."""
    # 1. The pixels of an image depend on its size alone. AnyRes adds tiles to the first one.
    config = model.config
    tile_size = config.vision.image_size
    tiles_of = {}
    for _, sizes in cases.PROMPTS:
        for size in sizes:
            num_tiles = 1
            if config.image_grid_pinpoints:
                num_tiles += np.prod(grid_shape(size, config.image_grid_pinpoints, tile_size))
            tiles_of[size] = torch.from_numpy(cases.pixels(size, num_tiles, tile_size))

    # 2. Encode them, and hand them out to the prompts.
    images = [(tiles, size) for size, tiles in tiles_of.items()]
    features_of = dict(zip(tiles_of, model.encode_images(images), strict=True))
    image_features = []
    for _, sizes in cases.PROMPTS:
        image_features.append([features_of[size] for size in sizes])
    return image_features


def last_logits(model):
    """Return the logits (prompts, V) behind the last token of every golden prompt."""
    all_logits = prompt_logits(model, PROMPTS, encode_golden_images(model))
    return torch.stack([logits[-1] for logits in all_logits])


def assert_same_tensors(actual, expected):
    """Fail unless two mappings hold the same tensors, to the bit."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
