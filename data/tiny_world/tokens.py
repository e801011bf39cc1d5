"""The tiny model's tokenizer: byte-pair merges, learned from the world's texts.

It is written as the files of a Llama tokenizer. Merges are learned inside words alone. So no token
crosses the start of a word or contains a punctuation mark and a letter.
"""

import random
import re
import string
from collections import Counter
from pathlib import Path

from minialign.utils.files import write_json
from tiny_world.scenes import COLORS, OBJECTS, THEMES
from tiny_world.texts import draw_text_turns, plural

SPACE = "▁"
FIRST_TOKENS = ("<unk>", "<s>", "</s>")  # ids from 0
LAST_TOKENS = ("<image>", "<pad>")  # the last two ids
# 284 merges. With 644 entries every word of the world has one, and nothing is left to merge.
VOCAB_SIZE = 640
CHARACTERS = SPACE + string.ascii_letters + string.digits + string.punctuation

# The system text of the template vicuna_v1. The model never learns it, but it should not cost more
# tokens than an image.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def draw_tokenizer_texts(rng: random.Random) -> list[str]:
    """Draw the texts to learn from, cut as they will be encoded: at `<image>` and at the answer."""
    texts = [f"{SYSTEM} USER: "] * 100
    for turn in draw_text_turns(4000, rng):
        texts += ["USER: ", f"\n{turn.question} ASSISTANT:", turn.answer]
    words = [*OBJECTS, *COLORS, *THEMES]
    words += [plural(name) for name in OBJECTS]
    return texts + words * 10


def learn_merges(texts: list[str], max_merges: int) -> list[tuple[str, str]]:
    """Learn byte-pair merges: again and again, merge the most frequent pair of neighbors.

    Of equally frequent pairs the first in the alphabet is merged.
    """
    # 1. Count the words. A word has the space before it, if there is one.
    word_counts = Counter()
    for text in texts:
        marked = SPACE + text.replace(" ", SPACE)
        word_counts.update(re.findall(rf"{SPACE}?\w+", marked))
    pieces_of = {word: list(word) for word in word_counts}

    merges = []
    while len(merges) < max_merges:
        # 2. Count the pairs of neighboring pieces.
        pair_counts = Counter()
        for word, pieces in pieces_of.items():
            for pair in zip(pieces, pieces[1:], strict=False):
                pair_counts[pair] += word_counts[word]
        if not pair_counts:
            break

        # 3. Merge the most frequent one in all words.
        highest = max(pair_counts.values())
        best = min(pair for pair, count in pair_counts.items() if count == highest)
        merges.append(best)
        for pieces in pieces_of.values():
            _merge_pair(pieces, best)
    return merges


def _merge_pair(pieces, pair):
    """Merge every occurrence of a pair in a list of pieces, in place, from right to left."""
    for i in range(len(pieces) - 2, -1, -1):
        if tuple(pieces[i : i + 2]) == pair:
            pieces[i : i + 2] = ["".join(pair)]


def train_tokenizer(texts: list[str], vocab_size: int) -> dict:
    """Train a tokenizer and return the value of its tokenizer.json.

    Its entries are 3 special tokens, 256 bytes, the characters, the merges and 2 special tokens. A
    newline has no character. It becomes its byte, as in Llama's own tokenizer.
    """
    # 1. The entries, in the order of their ids.
    entries = list(FIRST_TOKENS)
    entries += [f"<0x{byte:02X}>" for byte in range(256)]
    entries += list(CHARACTERS)
    merges = learn_merges(texts, vocab_size - len(entries) - len(LAST_TOKENS))
    merged = ["".join(pair) for pair in merges]
    entries += dict.fromkeys(merged)  # two merges may give the same entry
    entries += LAST_TOKENS
    ids = {entry: i for i, entry in enumerate(entries)}

    # 2. The JSON value, as Hugging Face's tokenizers write it.
    added_tokens = [_added_token(ids, token) for token in FIRST_TOKENS + LAST_TOKENS]
    vocab = {entry: i for entry, i in ids.items() if entry not in LAST_TOKENS}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": _post_processor(ids),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def _added_token(ids, token):
    """Return the entry of a special token in tokenizer.json."""
    return {
        "id": ids[token],
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _post_processor(ids):
    """Return the post-processor, which puts <s> in front of a text."""
    first_start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    first_text = {"Sequence": {"id": "A", "type_id": 0}}
    second_start = {"SpecialToken": {"id": "<s>", "type_id": 1}}
    second_text = {"Sequence": {"id": "B", "type_id": 1}}
    return {
        "type": "TemplateProcessing",
        "single": [first_start, first_text],
        "pair": [first_start, first_text, second_start, second_text],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
    }


def write_tokenizer(folder: Path, tokenizer: dict, max_positions: int):
    """Write a tokenizer's files as a LLaVA-1.5 checkpoint has them.

    Under the name LlamaTokenizer, transformers 5 would rebuild the tokenizer and put no "▁" after
    `<image>`. The generic class takes tokenizer.json as it is.
    """
    special_tokens = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
    }
    decoder = {}
    for token in tokenizer["added_tokens"]:
        flags = dict(token)
        token_id = flags.pop("id")
        decoder[str(token_id)] = flags
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": decoder,
        **special_tokens,
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "model_max_length": max_positions,
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "special_tokens_map.json", special_tokens)
