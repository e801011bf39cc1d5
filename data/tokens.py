"""The tiny model's tokenizer: byte-pair merges learnt from the world's texts, written as a Llama tokenizer's files.

The merges are learnt inside words alone, so none of them crosses the start of a word or joins a punctuation mark.
"""

import re
import string
from collections import Counter

from world import COLOURS, OBJECTS, PLURALS, THEMES, scene_texts

from minialign.utils.files import write_json

SPACE = "▁"
FIRST, LAST = ("<unk>", "<s>", "</s>"), ("<image>", "<pad>")  # ids from 0, and the last two
ENTRIES = 640  # 284 merges: at 644 every word of the world is one entry and there is nothing left to merge
CHARACTERS = SPACE + string.ascii_letters + string.digits + string.punctuation

# vicuna_v1's system text: the model never learns it, but it should not cost more tokens than the picture.
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def world_texts(rng):
    """What the tokenizer learns from, cut as it will be encoded: the prompt before and after `<image>`, the answer, single words."""
    texts = [f"{SYSTEM} USER: "] * 100
    for question, answer in scene_texts(4000, rng):
        texts += ["USER: ", f"\n{question} ASSISTANT:", answer]
    words = [*OBJECTS, *COLOURS, *THEMES, *(PLURALS.get(name, name + "s") for name in OBJECTS)]
    return texts + words * 10


def learn_merges(texts, number):
    """Up to `number` merges, each the most frequent neighbours of the words as split so far (ties: alphabetical)."""
    words = Counter(
        word
        for text in texts
        for word in re.findall(rf"{SPACE}?\w+", SPACE + text.replace(" ", SPACE))
    )
    split = {word: list(word) for word in words}
    merges = []
    while len(merges) < number:
        pairs = Counter()
        for word, pieces in split.items():
            for pair in zip(pieces, pieces[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for pieces in split.values():
            for index in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[index : index + 2]) == best:
                    pieces[index : index + 2] = ["".join(best)]
    return merges


def train_tokenizer(texts, size):
    """The value of a tokenizer.json with at most `size` entries: 3 special, 256 bytes, characters, merges, 2 special.

    Texts use plain spaces and newlines; a newline has no character and falls back to its byte, as in Llama's own.
    """
    pieces = [*FIRST, *(f"<0x{byte:02X}>" for byte in range(256)), *CHARACTERS]
    merges = learn_merges(texts, size - len(pieces) - len(LAST))
    pieces += list(dict.fromkeys("".join(pair) for pair in merges)) + list(LAST)
    ids = {piece: index for index, piece in enumerate(pieces)}
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], "content": token, **flags} for token in FIRST + LAST],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [ids["<s>"]], "tokens": ["<s>"]}},
        },
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
            "vocab": {piece: index for piece, index in ids.items() if piece not in LAST},
            "merges": [" ".join(pair) for pair in merges],
        },
    }


def write_tokenizer(folder, tokenizer, positions):
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json as a LLaVA-1.5 checkpoint has them, for a model
    of so many positions. Under the name LlamaTokenizer, transformers 5 would rebuild the tokenizer and put no "▁" after
    `<image>`; the generic class takes tokenizer.json as it is."""
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "added_tokens_decoder": {
                str(token["id"]): {key: value for key, value in token.items() if key != "id"}
                for token in tokenizer["added_tokens"]
            },
            **special,
            "clean_up_tokenization_spaces": False,
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "model_max_length": positions,
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(folder / "special_tokens_map.json", special)
