"""Test the cache of image features: what is encoded, what is dropped, what is kept apart."""

import pytest
import torch

from minialign.data.image_processor import preprocess
from minialign.data.images import open_image


class CountingEncoder:
    """An image encoder that notes how many images each call encodes."""

    def __init__(self, encode_images):
        self.encode_images = encode_images
        self.batch_sizes = []

    def __call__(self, images):
        self.batch_sizes.append(len(images))
        return self.encode_images(images)


def count_encoded(monkeypatch, vlm):
    """Return the list to which every call of the vision tower adds its number of images."""
    encoder = CountingEncoder(vlm.model.encode_images)
    monkeypatch.setattr(vlm.model, "encode_images", encoder)
    return encoder.batch_sizes


@pytest.mark.parametrize("num_kept, num_encoded_again", [(0, 2), (2, 1), (99, 0)])
def test_an_image_is_encoded_once_within_the_byte_budget(
    vlm, records, monkeypatch, num_kept, num_encoded_again
):
    """The cache holds the features of `num_kept` images. The oldest are dropped first.

    An image that is asked for twice in one call is encoded once, even without a cache.
    """
    paths = [record.paths[0] for record in records[:3]]
    image = preprocess(open_image(paths[0]), vlm.image_processor)
    fresh_tiles = vlm.model.encode_images([image])[0].tiles
    vlm.feature_cache_bytes = num_kept * fresh_tiles.numel() * fresh_tiles.element_size()
    batch_sizes = count_encoded(monkeypatch, vlm)

    for path in paths:
        features, same_features = vlm.encode_images([path, path])
        assert features is same_features

    assert batch_sizes == [1, 1, 1]
    first_kept = max(0, 3 - num_kept)
    cached_paths = [path for path, _ in vlm.feature_cache]
    assert cached_paths == [str(path) for path in paths[first_kept:]]

    vlm.encode_images([paths[2]])
    (first_features,) = vlm.encode_images([paths[0]])
    assert len(batch_sizes) == 3 + num_encoded_again
    assert torch.equal(first_features.tiles, fresh_tiles)


def test_features_of_a_batch_are_kept_apart(vlm, records, monkeypatch):
    """Features that were computed in a batch differ in the last bits from those computed alone.

    An evaluation encodes batches of the training images. Training must not get those: without the
    evaluation, after a restart for example, it would compute its own.
    """
    paths = [record.paths[0] for record in records[:3]]
    batch_sizes = count_encoded(monkeypatch, vlm)

    in_batch = vlm.encode_images(paths, batch_size=32)
    alone = vlm.encode_images(paths)

    assert batch_sizes == [3, 1, 1, 1]
    for features, features_alone in zip(in_batch, alone, strict=True):
        assert features is not features_alone
    assert vlm.encode_images(paths, batch_size=32) == in_batch
    assert vlm.encode_images(paths[::-1]) == alone[::-1]
    assert len(batch_sizes) == 4
