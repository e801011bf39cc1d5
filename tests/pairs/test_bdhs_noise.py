"""BDHS-noise: noise on the image takes the place of the mask."""

from dataclasses import replace

import pytest
import torch
from bdhs_helpers import (
    NOISE,
    NUM_IMAGE_TOKENS,
    GivenCosines,
    drawn_choices,
    make_sampler,
    noisy_features,
    sample_pairs,
    unusual_records,
)

from minialign import reference_bdhs
from minialign.pairs import bdhs
from minialign.pairs.bdhs import split_sentences
from minialign.pairs.distortion import noisy_image_features
from minialign.pairs.pair_files import sample_pair_file
from minialign.pairs.similarity import ModelEmbeddings

ONE_NOISY_ROUND = replace(NOISE, rounds=1)


def reference_rejected(vlm, record, round_number):
    """Return the response of a guided round of the slow reference, all image tokens visible."""
    features = noisy_features(vlm, record, 500, 0, record.id, round_number, "noise")
    drawn = drawn_choices(record, NOISE, round_number)
    drawn = replace(drawn, visible=range(NUM_IMAGE_TOKENS))
    return reference_bdhs.guided_rejected(vlm, record, features, drawn)


@pytest.fixture
def encoded_tiles(monkeypatch):
    """Return a list to which every encoding of a noisy image appends its tile features."""
    tiles = []

    def recording(*args):
        features = noisy_image_features(*args)
        tiles.extend(image.tiles for image in features)
        return features

    monkeypatch.setattr(bdhs, "noisy_image_features", recording)
    return tiles


def test_a_noisy_round_equals_the_reference(vlm, records):
    """The noise is that of (seed, record id, round, "noise"), and nothing is masked."""
    some_records = unusual_records(records)[2:6]

    pairs = sample_pairs(vlm, some_records, ONE_NOISY_ROUND)

    for record, pair in zip(some_records, pairs, strict=True):
        assert pair["rejected"] == reference_rejected(vlm, record, 1)
        assert pair["noise"] == 500
        assert "visible" not in pair
        assert len(pair["cuts"]) == len(split_sentences(record.chosen))


def test_a_new_round_draws_new_noise(vlm, records, encoded_tiles):
    """The pair is that of the round in which it was finished. The last round has new noise too."""
    record = records[0]

    (pair,) = sample_pairs(vlm, [record], NOISE, GivenCosines(1.0, 0.0))
    sample_pairs(vlm, [record], NOISE, GivenCosines(1.0))

    assert pair["rounds"] == 2
    assert pair["rejected"] == reference_rejected(vlm, record, 2)
    rounds = (1, 2, 1, 2, 3)
    for tiles, round_number in zip(encoded_tiles, rounds, strict=True):
        (expected,) = noisy_features(vlm, record, 500, 0, record.id, round_number, "noise")
        assert torch.equal(tiles, expected.tiles)


def test_online_noise_is_new_in_every_step(vlm, records, encoded_tiles):
    """It depends on (seed, step) in the place of the seed."""
    record = records[0]

    for step in (4, 4, 5):
        make_sampler(vlm, ONE_NOISY_ROUND).pairs([record], step)

    first, again, other = encoded_tiles
    (expected,) = noisy_features(vlm, record, 500, (0, 4), record.id, 1, "noise")
    assert torch.equal(first, expected.tiles)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_noisy_pairs_do_not_depend_on_the_group(vlm, records, tmp_path):
    """Images are encoded one by one, so that groups of 1 and of 4 write the same bytes."""
    similarity = ModelEmbeddings(vlm.model, vlm.tokenizer)
    paths = [tmp_path / "1.jsonl", tmp_path / "4.jsonl"]

    for path, group_size in zip(paths, (1, 4), strict=True):
        sampler = make_sampler(vlm, NOISE, similarity)
        sample_pair_file(sampler, records[:6], path, group_size=group_size)

    assert paths[0].read_bytes() == paths[1].read_bytes()
