"""Makes tests/golden/tokenizer/: small tokenizer.json files of every supported kind and what `tokenizers` does with them.

Run by hand with tokenizers and transformers installed, from the project's root: `python tests/golden/make_tokenizer.py`.
Written as tokenizers 0.23 does it, but for what that gets wrong: lines whose NFC it lags behind on are left out, and so are decodings with
a normalized added token, which it prints as its normalized form ("▁</s>") and never skips (0.21 did neither). Text and samples come from
a fixed seed and from Python's own documentation and Unicode tables, so that a run repeats itself on one Python version.
"""

import collections
import copy
import json
import lzma
import random
import sys
import unicodedata
from pathlib import Path
from pydoc_data import topics

import tokenizers
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

OUT = Path(__file__).parent / "tokenizer"
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHAT = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

# The same conversations as one literal string each; turns, answer and template give the same ids in minialign.
Q1, A1, Q2, A2 = "<image>\nWhat is this?", "A cat's  bed.", "And {now}?\n", "Two dogs, 12345 birds."
SYSTEM = "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions."
LITERAL = {
    "vicuna": f"USER: {Q1} ASSISTANT: {A1}</s>USER: {Q2} ASSISTANT: {A2}</s>",
    "vicuna_v1": f"{SYSTEM} USER: {Q1} ASSISTANT: {A1}</s>USER: {Q2} ASSISTANT: {A2}</s>",
    "mistral": f"[INST] {Q1} [/INST] {A1}</s>[INST] {Q2} [/INST] {A2}</s>",
    "chatml": "<|im_start|>system\nAnswer the questions.<|im_end|>"
    f"<|im_start|>user\n{Q1}<|im_end|><|im_start|>assistant\n{A1}<|im_end|><|im_start|>user\n{Q2}<|im_end|><|im_start|>assistant\n{A2}<|im_end|>",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    f"<|im_start|>user\n{Q1}<|im_end|>\n<|im_start|>assistant\n{A1}<|im_end|>\n<|im_start|>user\n{Q2}<|im_end|>\n<|im_start|>assistant\n{A2}<|im_end|>",
    "llama3": "<|start_header_id|>system<|end_header_id|>\n\nYou are a helpful language and vision assistant. You are able to understand the visual content "
    "that the user provides, and assist the user with a variety of tasks using natural language.<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{Q1}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{A1}<|eot_id|>"
    f"<|start_header_id|>user<|end_header_id|>\n\n{Q2}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n{A2}<|eot_id|>",
}


def training_text():
    """English with a few other scripts; rare characters are left out here, as the trainer's own limit breaks ties at random."""
    lines = [line for name in sorted(topics.topics) for line in topics.topics[name].splitlines()][
        :6000
    ]
    lines += [
        "What is in the picture? The assistant answers the user's question. Die Straße, el niño, 中文的图片 和 日本語のテキスト."
    ] * 40
    counts = collections.Counter("".join(lines))
    return ["".join(character for character in line if counts[character] >= 30) for line in lines]


def learned(splitter, size, alphabet=()):
    """Vocabulary (in order) and merges learnt on words cut by `splitter`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, initial_alphabet=list(alphabet)
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), model["merges"]


def added(
    content, id, special=True, normalized=False, lstrip=False, rstrip=False, single_word=False
):
    return {
        "id": id,
        "content": content,
        "single_word": single_word,
        "lstrip": lstrip,
        "rstrip": rstrip,
        "normalized": normalized,
        "special": special,
    }


def template(token, id):
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": token, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    }


def spec(vocab, merges, added_tokens, **parts):
    model = {
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
    model |= parts.pop("model", {})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added_tokens,
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": model,
    } | parts


def llama_kinds():
    """Llama's kind as it is found: legacy normalizer, its variants, and Metaspace as transformers v5 writes it."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    legacy = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    decoder = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    whole = copy.deepcopy(decoder)
    whole["decoders"].pop()  # Yi puts no space in front, so it strips none
    words, merges = learned(pre_tokenizers.Metaspace(), 420)
    start = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocab = {token: id for id, token in enumerate(start + words)}
    size = len(vocab)
    extra = [
        added(token, size + offset) for offset, token in enumerate(["<image>", "<pad>", *CHAT])
    ]
    plain = [added(token, id) for id, token in enumerate(start[:3])] + extra
    odd = (
        [added(token, id, normalized=True) for id, token in enumerate(start[:3])]
        + extra
        + [
            added("<mask>", size + 7, lstrip=True),
            added("<sep>", size + 8, rstrip=True, special=False),
            added("cat", size + 9, special=False, single_word=True),
            added("big dog", size + 10, special=False, normalized=True),
            added("  ", size + 11, special=False),
        ]
    )
    model = {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    bos = template("<s>", 1)

    def metaspace(scheme, split):
        return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}

    long_words, long_merges = learned(
        pre_tokenizers.Split(tokenizers.Regex(r".{1,12}"), "isolated"), 300
    )
    long_words = [word.replace(" ", "▁") for word in long_words]
    long_merges = [[part.replace(" ", "▁") for part in pair] for pair in long_merges]
    small = {token: id for id, token in enumerate(["<unk>", "<s>", "</s>", *words])}
    return {
        "llama": spec(
            vocab,
            merges,
            plain,
            normalizer=legacy,
            post_processor=bos,
            decoder=decoder,
            model=model,
        ),
        "odd_added": spec(
            vocab,
            [" ".join(pair) for pair in merges],
            odd,
            normalizer=legacy,
            post_processor=bos,
            decoder=decoder,
            model=model,
        ),
        "yi": spec(vocab, merges, plain, normalizer=replace, decoder=whole, model=model),
        "first": spec(
            vocab,
            merges,
            plain,
            pre_tokenizer=metaspace("first", False),
            post_processor=bos,
            decoder=decoder,
            model=model,
        ),
        "always": spec(
            vocab,
            merges,
            plain,
            pre_tokenizer=metaspace("always", True),
            post_processor=bos,
            decoder=decoder,
            model=model | {"ignore_merges": True},
        ),
        "never": spec(
            vocab, merges, odd, pre_tokenizer=metaspace("never", False), decoder=whole, model=model
        ),
        "across": spec(
            {token: id for id, token in enumerate(start + long_words)},
            long_merges,
            plain[:3],
            normalizer=legacy,
            decoder=decoder,
            model=model,
        ),
        "unknown": spec(small, merges, plain[:3], normalizer=legacy, decoder=decoder, model=model),
    }


def byte_kinds():
    def split(pattern):
        return {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": False,
                    "use_regex": False,
                },
            ],
        }

    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(QWEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words, merges = learned(splitter, 600, pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: id for id, token in enumerate(words)}
    size = len(vocab)
    names = ["<|endoftext|>", "<image>", *CHAT, "<|begin_of_text|>", "</s>"]
    tokens = [added(token, size + offset) for offset, token in enumerate(names)]
    return {
        "qwen2": spec(
            vocab,
            merges,
            tokens,
            normalizer={"type": "NFC"},
            pre_tokenizer=split(QWEN),
            decoder=level,
            model={"continuing_subword_prefix": "", "end_of_word_suffix": ""},
        ),
        "llama3": spec(
            vocab,
            merges,
            tokens,
            pre_tokenizer=split(LLAMA3),
            decoder=level,
            model={"ignore_merges": True},
            post_processor={
                "type": "Sequence",
                "processors": [
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": True,
                        "trim_offsets": False,
                        "use_regex": True,
                    },
                    template("<|begin_of_text|>", size + names.index("<|begin_of_text|>")),
                ],
            },
        ),
    }


def sample_lines(rng):
    """At least 2,000 lines: every category of assigned code points, and what goes wrong between words, tokens and pictures."""
    by_category = {}
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        if category not in ("Cn", "Cs", "Co"):
            by_category.setdefault(category, []).append(chr(code))
    by_category["Co"] = ["\ue000", "\uf8ff", "\U000f0000"]
    lines = []
    for category in sorted(by_category):
        for _ in range(24):
            letters = rng.sample(by_category[category], min(6, len(by_category[category])))
            lines += ["".join(letters), rng.choice(["a", " ", "1", "ß ", "中"]).join(letters[:4])]
    everything = [
        character for category in sorted(by_category) for character in by_category[category]
    ]
    lines += ["".join(rng.choices(everything, k=8)) for _ in range(150)]
    pieces = [
        "cat",
        " cat",
        "cats",
        "big dog",
        " the",
        "The",
        "'s",
        "'S",
        "'ll",
        "'\u017f",
        "naïve",
        "e\u0301",
        "ﬁ",
        "Å",
        "한국어",
        "각",
        "中文",
        "。",
        "日本",
        "العربية",
        "עִבְרִית",
        "हिन्दी",
        "👩‍👩‍👧‍👦",
        "🇩🇪",
        "👍🏽",
        "☕️",
        "123",
        "4567890",
        "½",
        "Ⅷ",
        "٣",
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        "\u00a0",
        "\u2003",
        "\u200b",
        "\x1c",
        "\x85",
        "\x00",
        "\x7f",
        "<image>",
        "<image>\n",
        "\n<image>",
        " <image> ",
        "<s>",
        "</s>",
        " </s>",
        "<unk>",
        "<pad>",
        "<mask>",
        " <mask> ",
        "<sep>",
        "<sep>  ",
        "<|im_start|>",
        "<|im_end|>\n",
        "<|eot_id|>",
        "<imag",
        "<0x41>",
        "▁",
        "▁▁",
        "▁a",
        "a▁b",
        "Ġ",
        "Ċ",
        ".",
        "...",
        "!?",
        "_",
        "-",
        "def f(x):",
        "https://a.b/c?d=e",
        "aaaaaaa",
        "https",
        "antidisestablishmentarianism",
        "ſ",
        "İ",
        "ǅ",
        "\ufeff",
        "\ufffd",
    ]
    lines += ["".join(rng.choices(pieces, k=rng.randint(1, 7))) for _ in range(900)]
    lines += pieces + [
        "",
        "a" * 300,
        " " * 100 + "x",
        "ab" * 100,
        "é" * 50,
        "<image>" * 20,
        "\n" * 30,
        "  \n  \n\t x",
    ]
    return list(dict.fromkeys(lines))


def expectation(tokenizer, made, lines, rng):
    """Ids of every line, their decoding where it is not the line, and the decoding of random ids (among them broken UTF-8 and ids out of range)."""
    stray = {one["id"] for one in made["added_tokens"] if one["normalized"] and made["normalizer"]}
    ids = [tokenizer.encode(line, add_special_tokens=False).ids for line in lines]
    decoded = [
        False if stray & {*row} else tokenizer.decode(row, skip_special_tokens=False) for row in ids
    ]
    size = max(tokenizer.get_vocab().values()) + 3
    rows = [
        rng.choices(range(min(size, rng.choice([270, size]))), k=rng.randint(1, 12))
        for _ in range(200)
    ]
    return {
        "ids": ids,
        "decoded": [
            None if text == line else text for line, text in zip(lines, decoded, strict=True)
        ],
        "random": [
            [row, *(tokenizer.decode(row, skip_special_tokens=skip) for skip in (True, False))]
            for row in rows
            if not stray & {*row}
        ],
        "bos": tokenizer.encode("", add_special_tokens=True).ids,
        "conversations": {
            name: tokenizer.encode(text, add_special_tokens=True).ids
            for name, text in LITERAL.items()
        },
    }


def main():
    lines = sample_lines(random.Random(0))
    count, nfc = len(lines), normalizers.NFC()
    lines = [
        line for line in lines if nfc.normalize_str(line) == unicodedata.normalize("NFC", line)
    ]
    print(count - len(lines), "lines left out for their NFC")
    golden = {
        "versions": {
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
            "unicode": unicodedata.unidata_version,
        },
        "lines": lines,
        "turns": [Q1, A1, Q2],
        "answer": A2,
        "literal": LITERAL,
        "kinds": {},
    }
    OUT.mkdir(exist_ok=True)
    for name, made in (llama_kinds() | byte_kinds()).items():
        (OUT / f"{name}.json").write_text(
            json.dumps(made, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
        )
        golden["kinds"][name] = expectation(
            Tokenizer.from_file(str(OUT / f"{name}.json")), made, lines, random.Random(1)
        )
    (OUT / "expected.json.xz").write_bytes(
        lzma.compress(json.dumps(golden, separators=(",", ":")).encode(), preset=9)
    )
    print(len(lines), "lines;", {path.name: path.stat().st_size for path in sorted(OUT.iterdir())})


if __name__ == "__main__":
    main()
