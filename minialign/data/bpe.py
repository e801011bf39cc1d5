"""Byte-pair encoding: turn the characters of a word into tokens by merging adjacent pairs.

The file goes from simple to real: merging by the definition, the same merging in less time, the
alphabet in which vocabularies write bytes, and the model of a tokenizer.json.
"""

import heapq
from itertools import pairwise

SPACE = "▁"  # how vocabularies of the Llama kind write a space
UNSUPPORTED_OPTIONS = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")


def apply_merges_plain(ids, merges):
    """Merge adjacent pairs of `ids` until no pair has a merge, by the definition of the method.

    merges: (left id, right id) -> (rank, id of the merged token). The pair of the lowest rank is
    merged first, and the leftmost one if it occurs more than once.
    """
    ids = list(ids)
    while True:
        # 1. Find the pair to merge.
        candidates = []
        for i, pair in enumerate(pairwise(ids)):
            if pair in merges:
                rank, merged_id = merges[pair]
                candidates.append((rank, i, merged_id))
        if not candidates:
            return ids

        # 2. Put the merged token in its place.
        _, i, merged_id = min(candidates)
        ids[i : i + 2] = [merged_id]


def apply_merges(ids, merges):
    """Compute the same result as apply_merges_plain in O(n log n) steps instead of O(n²).

    Two things save the time. The symbols form a linked list, so that a merge changes a few links
    and moves nothing. The pairs wait in a heap, so that nobody searches for the lowest rank.
    """
    # 1. Link each symbol i to its neighbors left[i] and right[i]. The None at the end has no merge
    # with anything, so the last symbol needs no special treatment. Nor does the first: its left
    # neighbor has index -1, which in Python is the None too.
    num_symbols = len(ids)
    symbols = [*ids, None]
    left = list(range(-1, num_symbols))
    right = list(range(1, num_symbols + 1))

    # 2. Collect the pairs that have a merge, as (rank, index of the left symbol).
    heap = []

    def push_pair(i):
        """Add symbol i and its right neighbor to the heap if the two have a merge."""
        merge = merges.get((symbols[i], symbols[right[i]]))
        if merge is not None:
            rank, _ = merge
            heapq.heappush(heap, (rank, i))

    for i in range(num_symbols):
        push_pair(i)

    # 3. Merge the lowest rank first, and the leftmost pair of that rank.
    while heap:
        rank, i = heapq.heappop(heap)
        j = right[i]
        merge = merges.get((symbols[i], symbols[j]))
        # An earlier merge may have changed a symbol of this pair. Then the entry is out of date.
        if merge is None or merge[0] != rank:
            continue
        _, symbols[i] = merge
        symbols[j] = None
        right[i] = right[j]
        left[right[j]] = i

        # 4. The merged symbol makes a new pair with each of its neighbors.
        push_pair(left[i])
        push_pair(i)
    return [symbol for symbol in symbols if symbol is not None]


def _byte_alphabet():
    """Return the characters that stand for the bytes 0 to 255 in the vocabularies of GPT-2's kind.

    Printable Latin-1 characters stand for themselves. The other 68 bytes get the characters from
    chr(256) on, so that no entry of a vocabulary holds a space or a control character.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet = []
    next_code_point = 256
    for byte in range(256):
        if byte in printable:
            alphabet.append(chr(byte))
        else:
            alphabet.append(chr(next_code_point))
            next_code_point += 1
    return alphabet


ALPHABET = _byte_alphabet()
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


def spell_bytes(text) -> str:
    """Write the UTF-8 bytes of a text in the byte alphabet: "a b" becomes "aĠb"."""
    return "".join(ALPHABET[byte] for byte in text.encode())


class BytePairModel:
    """The vocabulary and the merges of a tokenizer.json.

    vocab: token -> id.
    merges: as apply_merges takes them.
    joins_words: whether a merge joins a character to a "▁" behind it, and so two words.
    """

    def __init__(self, spec):
        """Read the "model" of a tokenizer.json. Raises ValueError for what is not supported."""
        options = [option for option in UNSUPPORTED_OPTIONS if spec.get(option)]
        if spec.get("type", "BPE") != "BPE" or "merges" not in spec or options:
            raise ValueError(" with ".join([f"model of type {spec.get('type')}", *options]))
        self.vocab = spec["vocab"]
        self._read_merges(spec["merges"])
        # With ignore_merges (Llama 3) a word that is in the vocabulary is a token as it is, even if
        # the merges would not produce it.
        self.ignore_merges = spec.get("ignore_merges", False)

        # What stands for a character that the vocabulary lacks: its bytes, or else one token.
        self.byte_ids = self._read_byte_ids(spec)
        unknown_token = spec.get("unk_token")
        if unknown_token is not None and unknown_token not in self.vocab:
            raise ValueError(f"unk_token {unknown_token!r} is not in the vocabulary")
        self.unknown_id = self.vocab.get(unknown_token)
        self.fuse_unknown = spec.get("fuse_unk", False)

    def _read_merges(self, merges):
        """Read the merges. Their order in the file is their rank."""
        self.merges = {}
        self.joins_words = False
        for rank, merge in enumerate(merges):
            # Older files write a merge as "left right", newer ones as ["left", "right"].
            parts = merge.split(" ") if isinstance(merge, str) else merge
            if len(parts) != 2 or not all(parts):
                raise ValueError(f"merge {rank} is not a pair of tokens: {merge!r}")
            left, right = parts
            for token in (left, right, left + right):
                if token not in self.vocab:
                    raise ValueError(
                        f"merge {rank} ({merge!r}): no token {token!r} in the vocabulary"
                    )
            pair = (self.vocab[left], self.vocab[right])
            merged_id = self.vocab[left + right]
            self.merges[pair] = (rank, merged_id)
            if right[0] == SPACE and left[-1] != SPACE:
                self.joins_words = True

    def _read_byte_ids(self, spec):
        """Return the ids of the tokens "<0x00>" to "<0xFF>", or nothing if they are not used."""
        if not spec.get("byte_fallback"):
            return []
        byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
        byte_ids = [self.vocab[token] for token in byte_tokens if token in self.vocab]
        if len(byte_ids) not in (0, 256):
            raise ValueError(f"byte_fallback with {len(byte_ids)} of the 256 byte tokens")
        return byte_ids

    def encode(self, word) -> list[int]:
        """Return the ids of a word, spelled as the vocabulary spells it."""
        if self.ignore_merges and word in self.vocab:
            return [self.vocab[word]]
        return apply_merges(self._character_ids(word), self.merges)

    def _character_ids(self, word):
        """Return the ids of the characters of a word, before any merge.

        A character that the vocabulary lacks becomes its bytes, or else the unknown token, or else
        nothing. With `fuse_unknown` a run of such characters becomes one unknown token.
        """
        ids = []
        previous_is_unknown = False
        for character in word:
            is_unknown = character not in self.vocab
            if not is_unknown:
                ids.append(self.vocab[character])
            elif self.byte_ids:
                ids.extend(self.byte_ids[byte] for byte in character.encode())
            elif self.unknown_id is not None:
                if not (self.fuse_unknown and previous_is_unknown):
                    ids.append(self.unknown_id)
            previous_is_unknown = is_unknown
        return ids
