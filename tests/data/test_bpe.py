"""Byte-pair merging: an example by hand, the definition against the heap, and its cost."""

import copy
import random

import pytest
from golden_tokenizers import golden_tokenizer

from minialign.data.bpe import ALPHABET, BYTE_OF, apply_merges, apply_merges_plain, spell_bytes


class CountingDict(dict):
    """A dict that counts how often `get` is called."""

    num_lookups = 0

    def get(self, key, default=None):
        self.num_lookups += 1
        return super().get(key, default)


def random_merges(rng):
    """Return merges of 12 symbols that compete and overlap.

    As in a vocabulary, each merge gives a symbol that no other merge gives.
    """
    merges = {}
    all_pairs = [(left, right) for left in range(12) for right in range(12)]
    for rank, pair in enumerate(rng.sample(all_pairs, 30)):
        merges[pair] = (rank, 12 + rank)
    for rank, right in enumerate(rng.choices(range(12), k=20)):
        merges[12 + rank, right] = (40 + rank, 60 + rank)
    return merges


@pytest.mark.parametrize("merge_function", [apply_merges_plain, apply_merges])
def test_merging_by_hand(merge_function):
    """The example of Wikipedia's article: aaabdaaabac with aa -> Z, ab -> Y, ZY -> X."""
    merges = {("a", "a"): (0, "Z"), ("a", "b"): (1, "Y"), ("Z", "Y"): (2, "X")}

    assert merge_function(list("aaabdaaabac"), merges) == list("XdXac")
    assert merge_function(list("aaaa"), merges) == list("ZZ")
    assert merge_function(list("aab"), merges) == list("Zb")
    assert merge_function([], merges) == []


def test_merging_with_a_heap_equals_the_definition():
    """The two agree on 300 random words, also where merges compete and overlap."""
    rng = random.Random(3)
    for _ in range(300):
        merges = random_merges(rng)
        ids = rng.choices(range(12), k=rng.randint(0, 40))

        assert apply_merges(ids, merges) == apply_merges_plain(ids, merges)


def test_byte_alphabet_is_gpt2s():
    """A space is Ġ, a line break Ċ, a letter itself, and no two bytes share a character."""
    assert spell_bytes("a b\n") == "aĠbĊ"
    assert len(set(ALPHABET)) == 256
    assert [BYTE_OF[character] for character in ALPHABET] == list(range(256))


@pytest.mark.parametrize("name", ["llama", "across", "always", "qwen2"])
def test_long_lines_take_linear_time(name):
    """20,000 characters take a few look-ups a byte, never their square, and come back."""
    texts = ["a" * 20_000, " " * 20_000, "ab" * 10_000, "é" * 10_000, "the cat " * 2_500]
    for text in texts:
        tokenizer = copy.copy(golden_tokenizer(name))
        tokenizer.word_cache = {}
        tokenizer.bpe = copy.copy(tokenizer.bpe)
        tokenizer.bpe.merges = CountingDict(tokenizer.bpe.merges)

        ids = tokenizer.encode(text, after="text")

        assert tokenizer.bpe.merges.num_lookups < 8 * len(text.encode())
        assert tokenizer.decode(ids, strip_prefix="") == text
