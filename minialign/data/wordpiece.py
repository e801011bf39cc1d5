"""WordPiece: text to ids for sentence encoders of BERT's kind, from tokenizer.json."""

import re
import unicodedata
from pathlib import Path

from minialign.data.tokenizer import WHITE, Tokenizer, category_ranges, flatten_steps
from minialign.utils.files import friendly_errors, read_json

# What `tokenizers` calls Chinese: like it, without U+2B820 to U+2B91F.
CJK = re.compile(
    "([\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f])"
)
DROPPED = ("Cc", "Cf", "Co", "Cs")  # categories that cleaning takes out, as it does "\ufffd"
OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class WordPiece(Tokenizer):
    """A WordPiece tokenizer of BERT's kind; what is done about added tokens it shares with the byte-pair kinds.
    Equal to the package `tokenizers`, but for characters newer than its Unicode 8 tables.
    """

    @classmethod
    def load(cls, directory):
        """Read `directory`/tokenizer.json; what tokenizer_config.json says of case, accents and CJK counts over it, as in transformers. Raises BadInput."""
        path, beside = Path(directory) / "tokenizer.json", Path(directory) / "tokenizer_config.json"
        options = read_json(beside, dict) if beside.exists() else {}
        with friendly_errors(
            path, "supported are WordPiece tokenizers like those of BERT, MiniLM and MPNet"
        ):
            return cls(read_json(path), options)

    def __init__(self, spec, options):
        """From the parsed tokenizer.json and tokenizer_config.json. Raises ValueError for what is not supported."""
        model, steps = (
            spec["model"],
            flatten_steps(spec["normalizer"]) + flatten_steps(spec["pre_tokenizer"]),
        )
        kinds = [model.get("type", "WordPiece"), *(step["type"] for step in steps)]
        if kinds != ["WordPiece", "BertNormalizer", "BertPreTokenizer"]:
            raise ValueError(f"a tokenizer of {', '.join(kinds)}")
        normalizer = steps[0] | {
            ours: options[theirs] for theirs, ours in OPTIONS.items() if theirs in options
        }
        self.clean, self.cjk, self.lower = (
            normalizer[name] for name in ("clean_text", "handle_chinese_chars", "lowercase")
        )
        self.strip = (
            self.lower if normalizer["strip_accents"] is None else normalizer["strip_accents"]
        )
        self.vocab, self.unknown = model["vocab"], model["vocab"][model["unk_token"]]
        self.prefix, self.longest = (
            model["continuing_subword_prefix"],
            model["max_input_chars_per_word"],
        )
        marks = category_ranges("P") + re.escape(
            "$+<=>^`|~"
        )  # BERT counts all of ASCII's symbols as punctuation
        self.words = re.compile(f"[{marks}]|[^{marks}{WHITE}]+")
        self._read_added(spec.get("added_tokens") or [])
        self.front, self.back = self._ends(spec["post_processor"])

    def _ends(self, step):
        """Ids of the special tokens before and after a text."""
        if step["type"] in ("BertProcessing", "RobertaProcessing"):
            return [step["cls"][1]], [step["sep"][1]]
        if step["type"] != "TemplateProcessing":
            raise ValueError(f"post-processor {step['type']}")
        ids = [
            step["special_tokens"][one["SpecialToken"]["id"]]["ids"]
            if "SpecialToken" in one
            else None
            for one in step["single"]
        ]
        return sum(ids[: ids.index(None)], []), sum(ids[ids.index(None) + 1 :], [])

    def encode(self, text, limit):
        """Ids of `text` between the special tokens, cut at its end to at most `limit` ids in all."""
        return self.front + super().encode(text)[: limit - len(self.front + self.back)] + self.back

    def _chunk_ids(self, chunk, after):
        return [id for word in self.words.findall(chunk) for id in self._pieces(word)]

    def _normalize(self, text, prepend=True):
        if self.clean:
            text = "".join(
                c
                for c in text
                if c in "\t\n\r" or c != "\ufffd" and unicodedata.category(c) not in DROPPED
            )
        if self.cjk:
            text = CJK.sub(r" \1 ", text)
        if self.strip:
            text = "".join(
                c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn"
            )
        return (
            "".join(c.lower() for c in text) if self.lower else text
        )  # one by one: no final sigma

    def _pieces(self, word):
        """The longest entry that begins the word, then the longest that goes on, and so on; the unknown token where there is none."""
        ids, start = [], 0
        while start < len(word) <= self.longest:
            mark = self.prefix * (start > 0)
            end = next(
                (
                    end
                    for end in range(len(word), start, -1)
                    if mark + word[start:end] in self.vocab
                ),
                None,
            )
            if end is None:
                break
            ids.append(self.vocab[mark + word[start:end]])
            start = end
        return ids if start == len(word) else [self.unknown]
