"""Decoding while ids arrive: the same text as decoding at once, and never half a character."""

import random

import pytest
from golden_tokenizers import NAMES, golden_results, golden_tokenizer

from minialign.data.stream_decoder import StreamDecoder


def stream(tokenizer, ids):
    """Return the text that a StreamDecoder shows of `ids`, in pieces."""
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids]
    return [*pieces, decoder.flush()]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_join_to_the_decoded_text(name):
    """This holds for the ids of 300 golden lines, and for random ids with broken UTF-8."""
    tokenizer = golden_tokenizer(name)
    results = golden_results()["kinds"][name]
    rows = random.Random(2).sample(results["ids"], 300)
    for random_ids, _, _ in results["random"]:
        rows.append(random_ids)

    for ids in rows:
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)

    # An emoji and its skin color are eight bytes. They are whole before the stream ends.
    if name != "unknown":  # it has no tokens for them
        ids = tokenizer.encode("x👍🏽y", after="text")
        *pieces, rest = stream(tokenizer, ids)
        assert "".join(pieces) == "x👍🏽y"
        assert len(ids) > 8
        assert rest == ""


def test_incomplete_characters_are_held_back():
    """The first bytes of a character wait for the others. At the end they become "\\ufffd"."""
    tokenizer = golden_tokenizer("llama3")
    ids = tokenizer.encode("👍")

    assert stream(tokenizer, ids) == [""] * (len(ids) - 1) + ["👍", ""]
    assert stream(tokenizer, ids[:1]) == ["", "\ufffd"]
