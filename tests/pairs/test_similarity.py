"""The similarity by the policy's token embeddings: what it notices, and what leaves it alone."""

import pytest

from minialign.pairs.similarity import ModelEmbeddings

TEXT = "There is a red cup at the top."


def test_embeddings_notice_words_and_their_order(vlm):
    encoder = ModelEmbeddings(vlm.model, vlm.tokenizer)

    same = encoder.cosine(TEXT, TEXT)
    other_word = encoder.cosine(TEXT, "There is a red dog at the top.")
    other_order = encoder.cosine(TEXT, "There is a top at the red cup.")
    swapped = encoder.cosine("There is a red dog at the top.", TEXT)

    assert same == pytest.approx(1, abs=1e-6)
    assert other_word < 1 - 1e-3
    assert other_order < 1 - 1e-3
    assert swapped == pytest.approx(other_word, abs=1e-6)
    assert -1 <= encoder.cosine(TEXT, "") <= 1


def test_a_pair_of_neighbors_and_its_reverse_differ(vlm, monkeypatch):
    """Two texts with the same neighbors, each pair the other way round."""
    encoder = ModelEmbeddings(vlm.model, vlm.tokenizer)
    first, second = vlm.tokenizer.encode(TEXT)[:2]
    eos = vlm.tokenizer.eos
    ids = {"forward": [first, second, eos], "backward": [second, first, eos]}
    monkeypatch.setattr(vlm.tokenizer, "encode", ids.get)

    assert encoder.cosine("forward", "backward") < 1 - 1e-3


def test_training_does_not_change_the_similarity(vlm):
    """The table is a copy, so that another set of weights measures the same."""
    encoder = ModelEmbeddings(vlm.model, vlm.tokenizer)
    other = "There is a red dog at the top."
    before = encoder.cosine(TEXT, other)

    vlm.model.language_model.embed_tokens.weight.data.mul_(-2).add_(1)

    assert encoder.cosine(TEXT, other) == before
