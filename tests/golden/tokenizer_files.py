"""The tokenizer.json files of the golden tokenizers, which learn their tokens from small texts."""

import json
from dataclasses import dataclass

import tokenizers
from tokenizer_texts import training_text
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
LLAMA3_PATTERN = QWEN2_PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")  # digits by threes
CHAT_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]


def learn_tokens(splitter, size, alphabet=()):
    """Return the vocabulary, in order, and the merges of BPE on words cut by `splitter`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=list(alphabet)
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def numbered(tokens):
    """Return {token: id}."""
    return {token: token_id for token_id, token in enumerate(tokens)}


def added_token(content, token_id, **changes):
    """Return an entry of added_tokens, by default a special token that matches exactly."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
        **changes,
    }


def bos_template(token, token_id):
    """Return the post-processor that puts a BOS token in front of a text."""
    bos = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def tokenizer_json(vocab, merges, added_tokens, *, model=None, **parts):
    """Return a tokenizer.json of BPE. `model` changes its model, `parts` set its other fields."""
    bpe = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocab,
        "merges": merges,
    }
    if model is not None:
        bpe.update(model)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": bpe,
        **parts,
    }


# Parts of Llama's tokenizers.
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
LEGACY_NORMALIZER = {
    "type": "Sequence",
    "normalizers": [{"type": "Prepend", "prepend": "▁"}, SPACES],
}
DECODERS = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
]
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
DECODER = {"type": "Sequence", "decoders": [*DECODERS, STRIP]}
# Yi's puts no space in front of a text, so it strips none.
YI_DECODER = {"type": "Sequence", "decoders": DECODERS}
LLAMA_MODEL = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
LLAMA_SPECIALS = ["<unk>", "<s>", "</s>"]


def metaspace(prepend_scheme, split):
    """Return the pre-tokenizer that transformers 5 writes in place of the legacy normalizer."""
    return {
        "type": "Metaspace",
        "replacement": "▁",
        "prepend_scheme": prepend_scheme,
        "split": split,
    }


@dataclass
class LlamaTokens:
    """What Llama's tokenizers share. The lists hold entries of added_tokens.

    specials: <unk>, <s> and </s> alone.
    plain: with <image>, <pad> and the tokens of chats.
    odd: with the normalized specials, and tokens with every option.
    """

    words: list
    merges: list
    byte_tokens: list
    specials: list
    plain: list
    odd: list

    @property
    def vocab(self):
        """Return {token: id} of all tokens that are not added."""
        return numbered([*LLAMA_SPECIALS, *self.byte_tokens, *self.words])


def learn_llama_tokens():
    """Learn Llama's vocabulary, and put added tokens behind it."""
    words, merges = learn_tokens(pre_tokenizers.Metaspace(), 420)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    size = len(LLAMA_SPECIALS) + len(byte_tokens) + len(words)
    specials = []
    normalized_specials = []
    for token_id, token in enumerate(LLAMA_SPECIALS):
        specials.append(added_token(token, token_id))
        normalized_specials.append(added_token(token, token_id, normalized=True))
    extra = []
    for offset, token in enumerate(["<image>", "<pad>", *CHAT_TOKENS]):
        extra.append(added_token(token, size + offset))
    with_options = [
        added_token("<mask>", size + 7, lstrip=True),
        added_token("<sep>", size + 8, rstrip=True, special=False),
        added_token("cat", size + 9, special=False, single_word=True),
        added_token("big dog", size + 10, special=False, normalized=True),
        added_token("  ", size + 11, special=False),
    ]
    return LlamaTokens(
        words=words,
        merges=merges,
        byte_tokens=byte_tokens,
        specials=specials,
        plain=specials + extra,
        odd=normalized_specials + extra + with_options,
    )


def llama_tokenizers():
    """Return Llama's tokenizer.json in every form in which it is found."""
    tokens = learn_llama_tokens()
    return {
        **legacy_tokenizers(tokens),
        **metaspace_tokenizers(tokens),
        **odd_vocabularies(tokens),
    }


def legacy_tokenizers(tokens):
    """Return the files with the legacy normalizer, and Yi's, whose normalizer only maps spaces."""
    return {
        "llama": tokenizer_json(
            tokens.vocab,
            tokens.merges,
            tokens.plain,
            normalizer=LEGACY_NORMALIZER,
            post_processor=bos_template("<s>", 1),
            decoder=DECODER,
            model=LLAMA_MODEL,
        ),
        "odd_added": tokenizer_json(
            tokens.vocab,
            [" ".join(pair) for pair in tokens.merges],
            tokens.odd,
            normalizer=LEGACY_NORMALIZER,
            post_processor=bos_template("<s>", 1),
            decoder=DECODER,
            model=LLAMA_MODEL,
        ),
        "yi": tokenizer_json(
            tokens.vocab,
            tokens.merges,
            tokens.plain,
            normalizer=SPACES,
            decoder=YI_DECODER,
            model=LLAMA_MODEL,
        ),
    }


def metaspace_tokenizers(tokens):
    """Return the files with a Metaspace pre-tokenizer, one for each of its schemes."""
    return {
        "first": tokenizer_json(
            tokens.vocab,
            tokens.merges,
            tokens.plain,
            pre_tokenizer=metaspace("first", False),
            post_processor=bos_template("<s>", 1),
            decoder=DECODER,
            model=LLAMA_MODEL,
        ),
        "always": tokenizer_json(
            tokens.vocab,
            tokens.merges,
            tokens.plain,
            pre_tokenizer=metaspace("always", True),
            post_processor=bos_template("<s>", 1),
            decoder=DECODER,
            model={**LLAMA_MODEL, "ignore_merges": True},
        ),
        "never": tokenizer_json(
            tokens.vocab,
            tokens.merges,
            tokens.odd,
            pre_tokenizer=metaspace("never", False),
            decoder=YI_DECODER,
            model=LLAMA_MODEL,
        ),
    }


def odd_vocabularies(tokens):
    """Return a file whose tokens span several words, and one without tokens for bytes."""
    twelve_characters = pre_tokenizers.Split(tokenizers.Regex(r".{1,12}"), "isolated")
    long_tokens, long_merges = learn_tokens(twelve_characters, 300)
    long_tokens = [token.replace(" ", "▁") for token in long_tokens]
    long_merges = [[left.replace(" ", "▁"), right.replace(" ", "▁")] for left, right in long_merges]
    return {
        "across": tokenizer_json(
            numbered([*LLAMA_SPECIALS, *tokens.byte_tokens, *long_tokens]),
            long_merges,
            tokens.specials,
            normalizer=LEGACY_NORMALIZER,
            decoder=DECODER,
            model=LLAMA_MODEL,
        ),
        "unknown": tokenizer_json(
            numbered([*LLAMA_SPECIALS, *tokens.words]),
            tokens.merges,
            tokens.specials,
            normalizer=LEGACY_NORMALIZER,
            decoder=DECODER,
            model=LLAMA_MODEL,
        ),
    }


def byte_level(*, add_prefix_space, trim_offsets, use_regex):
    """Return a ByteLevel part."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": trim_offsets,
        "use_regex": use_regex,
    }


def split_by(pattern):
    """Return the pre-tokenizer that splits by a pattern and then maps bytes to characters."""
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    to_bytes = byte_level(add_prefix_space=False, trim_offsets=False, use_regex=False)
    return {"type": "Sequence", "pretokenizers": [split, to_bytes]}


def digit_tokenizer():
    """Return the tokenizer.json of SmolLM2: digits are cut out, then the words are GPT-2's."""
    splitter = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    words, merges = learn_tokens(splitter, 600, pre_tokenizers.ByteLevel.alphabet())
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "</s>"]
    added_tokens = []
    for token_id, token in enumerate(names):  # in front of the vocabulary, as in SmolLM2
        added_tokens.append(added_token(token, token_id))
    to_bytes = byte_level(add_prefix_space=False, trim_offsets=True, use_regex=True)
    return tokenizer_json(
        numbered([*names, *words]),
        [" ".join(pair) for pair in merges],
        added_tokens,
        pre_tokenizer={
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, to_bytes],
        },
        decoder=byte_level(add_prefix_space=True, trim_offsets=True, use_regex=True),
        model={"unk_token": "<|endoftext|>"},
    )


def byte_level_tokenizers():
    """Return the tokenizer.json of Qwen2, of Llama 3 and of SmolLM2."""
    # 1. The vocabulary and the added tokens behind it.
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN2_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words, merges = learn_tokens(splitter, 600, pre_tokenizers.ByteLevel.alphabet())
    vocab = numbered(words)
    names = ["<|endoftext|>", "<image>", *CHAT_TOKENS, "<|begin_of_text|>", "</s>"]
    added_tokens = []
    for offset, token in enumerate(names):
        added_tokens.append(added_token(token, len(vocab) + offset))
    bos_id = len(vocab) + names.index("<|begin_of_text|>")

    # 2. The files.
    decoder = byte_level(add_prefix_space=True, trim_offsets=True, use_regex=True)
    return {
        "qwen2": tokenizer_json(
            vocab,
            merges,
            added_tokens,
            normalizer={"type": "NFC"},
            pre_tokenizer=split_by(QWEN2_PATTERN),
            decoder=decoder,
            model={"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        ),
        "llama3": tokenizer_json(
            vocab,
            merges,
            added_tokens,
            pre_tokenizer=split_by(LLAMA3_PATTERN),
            decoder=decoder,
            model={"ignore_merges": True},
            post_processor={
                "type": "Sequence",
                "processors": [
                    byte_level(add_prefix_space=True, trim_offsets=False, use_regex=True),
                    bos_template("<|begin_of_text|>", bos_id),
                ],
            },
        ),
        "smollm2": digit_tokenizer(),
    }
