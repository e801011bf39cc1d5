"""Write tests/golden/tokenizer/: small tokenizer.json files, and what `tokenizers` does with them.

Run it by hand with tokenizers and transformers, from the project's root:
`python tests/golden/make_tokenizer.py`.

The golden file follows tokenizers 0.23, but for two things that it gets wrong. Its NFC lags behind
Unicode, so lines on which it differs from Python's are left out. It decodes a normalized added
token to its normalized form ("▁</s>") and never skips it, which 0.21 did not do. Such decodings are
left out as well.
"""

import json
import lzma
import random
import unicodedata
from pathlib import Path

import tokenizers
import transformers
from tokenizer_files import byte_level_tokenizers, llama_tokenizers
from tokenizer_texts import (
    ANSWER_1,
    ANSWER_2,
    CONVERSATIONS,
    QUESTION_1,
    QUESTION_2,
    sample_lines,
)
from tokenizers import Tokenizer, normalizers

OUT = Path(__file__).parent / "tokenizer"


def golden_of(tokenizer, settings, lines):
    """Return what `tokenizers` makes of all lines and conversations with one tokenizer.json.

    ids: of every line.
    decoded: of every line, None where it is the line again, False where it is left out.
    random: random ids, with and without special tokens, with broken UTF-8 and unknown ids among
        them.
    """
    # 1. The added tokens that are decoded wrongly.
    left_out = set()
    for token in settings["added_tokens"]:
        if token["normalized"] and settings["normalizer"]:
            left_out.add(token["id"])

    # 2. The lines, and back.
    all_ids = []
    decoded = []
    for line in lines:
        ids = tokenizer.encode(line, add_special_tokens=False).ids
        text = tokenizer.decode(ids, skip_special_tokens=False)
        all_ids.append(ids)
        if not left_out.isdisjoint(ids):
            decoded.append(False)
        elif text == line:
            decoded.append(None)
        else:
            decoded.append(text)

    # 3. Random ids.
    rng = random.Random(1)
    size = max(tokenizer.get_vocab().values()) + 3
    random_ids = []
    for _ in range(200):
        limit = min(size, rng.choice([270, size]))
        count = rng.randint(1, 12)
        ids = rng.choices(range(limit), k=count)
        if left_out.isdisjoint(ids):
            without_specials = tokenizer.decode(ids, skip_special_tokens=True)
            with_specials = tokenizer.decode(ids, skip_special_tokens=False)
            random_ids.append([ids, without_specials, with_specials])

    # 4. Conversations, with a BOS token where there is one.
    conversations = {}
    for name, text in CONVERSATIONS.items():
        conversations[name] = tokenizer.encode(text, add_special_tokens=True).ids
    return {
        "ids": all_ids,
        "decoded": decoded,
        "random": random_ids,
        "bos": tokenizer.encode("", add_special_tokens=True).ids,
        "conversations": conversations,
    }


def main():
    # 1. The lines on which Python and `tokenizers` agree about NFC.
    all_lines = sample_lines(random.Random(0))
    nfc = normalizers.NFC()
    lines = []
    for line in all_lines:
        if nfc.normalize_str(line) == unicodedata.normalize("NFC", line):
            lines.append(line)
    print(f"{len(lines)} lines, {len(all_lines) - len(lines)} more left out for their NFC")

    # 2. The tokenizers and what they do with the lines.
    OUT.mkdir(exist_ok=True)
    kinds = {}
    for name, settings in {**llama_tokenizers(), **byte_level_tokenizers()}.items():
        path = OUT / f"{name}.json"
        text = json.dumps(settings, ensure_ascii=False, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")
        kinds[name] = golden_of(Tokenizer.from_file(str(path)), settings, lines)

    # 3. The golden file.
    golden = {
        "versions": {
            "tokenizers": tokenizers.__version__,
            "transformers": transformers.__version__,
            "unicode": unicodedata.unidata_version,
        },
        "lines": lines,
        "turns": [QUESTION_1, ANSWER_1, QUESTION_2],
        "answer": ANSWER_2,
        "literal": CONVERSATIONS,
        "kinds": kinds,
    }
    text = json.dumps(golden, separators=(",", ":"))
    (OUT / "expected.json.xz").write_bytes(lzma.compress(text.encode(), preset=9))


if __name__ == "__main__":
    main()
