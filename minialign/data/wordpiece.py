"""Read a tokenizer.json of the WordPiece kind, and turn text into the ids of a sentence encoder."""

import re
import unicodedata
from pathlib import Path

from minialign.data.added_tokens import read_added_tokens
from minialign.data.pre_tokenizer import flatten_steps
from minialign.data.tokenizer import check_unicode
from minialign.data.unicode_patterns import WHITE, category_ranges
from minialign.utils.files import friendly_errors, read_json, read_optional_json

# The characters that `tokenizers` calls Chinese. Like it, this leaves U+2B820 to U+2B91F out.
CJK = re.compile(
    "(["
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f"
    "])"
)
# The categories of characters that cleaning removes: control, format, private use, surrogate.
DROPPED = ("Cc", "Cf", "Co", "Cs")
# BERT takes these symbols for punctuation, although Unicode does not.
ASCII_SYMBOLS = "$+<=>^`|~"
# The options of tokenizer_config.json that override a field of the normalizer in tokenizer.json.
OPTIONS = {
    "do_lower_case": "lowercase",
    "strip_accents": "strip_accents",
    "tokenize_chinese_chars": "handle_chinese_chars",
}


class WordPiece:
    """A WordPiece tokenizer of BERT's kind with the results of the package `tokenizers`.

    They differ only for characters that are newer than its Unicode 8 tables.

    size: one more than the largest id.
    """

    @classmethod
    def load(cls, directory) -> "WordPiece":
        """Read the tokenizer of a directory. Raises InputError for what is not supported."""
        path = Path(directory) / "tokenizer.json"
        options = read_optional_json(path.with_name("tokenizer_config.json"))
        families = "BERT, MiniLM and MPNet"
        with friendly_errors(path, f"supported are WordPiece tokenizers like those of {families}"):
            return cls(read_json(path), options)

    def __init__(self, spec, options):
        """Build a tokenizer from a parsed tokenizer.json and a parsed tokenizer_config.json.

        Raises ValueError for what is not supported.
        """
        # 1. Refuse other kinds of tokenizers.
        model = spec["model"]
        steps = flatten_steps(spec["normalizer"]) + flatten_steps(spec["pre_tokenizer"])
        step_types = [model.get("type", "WordPiece")]
        step_types += [step["type"] for step in steps]
        if step_types != ["WordPiece", "BertNormalizer", "BertPreTokenizer"]:
            raise ValueError(f"a tokenizer of {', '.join(step_types)}")

        # 2. Read how a text is normalized. As in transformers, tokenizer_config.json decides.
        normalizer = dict(steps[0])
        for option, field in OPTIONS.items():
            if option in options:
                normalizer[field] = options[option]
        self.cleans_text = normalizer["clean_text"]
        self.separates_chinese = normalizer["handle_chinese_chars"]
        self.lowers_case = normalizer["lowercase"]
        self.strips_accents = normalizer["strip_accents"]
        if self.strips_accents is None:  # then, as in BERT, case and accents go together
            self.strips_accents = self.lowers_case

        # 3. A punctuation mark is a word of its own. Other words are what lies between them.
        punctuation = category_ranges("P") + re.escape(ASCII_SYMBOLS)
        self.word_pattern = re.compile(f"[{punctuation}]|[^{punctuation}{WHITE}]+")

        # 4. Read the vocabulary and the added tokens.
        self.vocab = model["vocab"]
        self.unknown_id = self.vocab[model["unk_token"]]
        self.continuation_prefix = model["continuing_subword_prefix"]
        self.max_word_length = model["max_input_chars_per_word"]
        added_tokens = spec.get("added_tokens") or []
        self.raw_added, self.normalized_added = read_added_tokens(added_tokens, self._normalize)
        all_ids = set(self.vocab.values())
        all_ids.update(token["id"] for token in added_tokens)
        self.size = 1 + max(all_ids)
        self.ids_before, self.ids_after = _read_special_ids(spec["post_processor"])

    def encode(self, text, max_length) -> list[int]:
        """Return the ids of a text between the special tokens, cut to `max_length` ids in all."""
        # 1. Find the added tokens in the text, and turn the text between them into ids.
        check_unicode(text)
        ids = []
        for part in self.raw_added.split(text):
            if isinstance(part, int):
                ids.append(part)
                continue
            for piece in self.normalized_added.split(self._normalize(part)):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids.extend(self._encode_piece(piece))

        # 2. Cut the end of the text, never the special tokens.
        max_text_ids = max_length - len(self.ids_before) - len(self.ids_after)
        return self.ids_before + ids[:max_text_ids] + self.ids_after

    def _normalize(self, text):
        """Normalize a text, by the steps of BERT in its order."""
        # 1. Remove control characters and the like.
        if self.cleans_text:
            text = "".join(character for character in text if _is_kept(character))

        # 2. Make every Chinese character a word.
        if self.separates_chinese:
            text = CJK.sub(r" \1 ", text)

        # 3. Remove accents. NFD writes "é" as "e" and an accent, which is a character of its own.
        if self.strips_accents:
            decomposed = unicodedata.normalize("NFD", text)
            text = "".join(c for c in decomposed if unicodedata.category(c) != "Mn")

        # 4. Lower the case of each character on its own. In a whole word Python would write the
        # last sigma differently.
        if self.lowers_case:
            text = "".join(character.lower() for character in text)
        return text

    def _encode_piece(self, text):
        """Return the ids of normalized text without added tokens."""
        ids = []
        for word in self.word_pattern.findall(text):
            ids.extend(self._encode_word(word))
        return ids

    def _encode_word(self, word):
        """Return the ids of a word: of its longest beginning in the vocabulary, then of the rest.

        Entries that do not begin a word carry a prefix, "##" in BERT. A word that is too long or
        cannot be composed becomes the unknown token.
        """
        if len(word) > self.max_word_length:
            return [self.unknown_id]
        ids = []
        start = 0
        while start < len(word):
            prefix = self.continuation_prefix if start > 0 else ""
            end = len(word)
            while end > start and prefix + word[start:end] not in self.vocab:
                end -= 1
            if end == start:
                return [self.unknown_id]
            ids.append(self.vocab[prefix + word[start:end]])
            start = end
        return ids


def _is_kept(character):
    """Return whether cleaning keeps a character."""
    if character in "\t\n\r":
        return True
    return character != "\ufffd" and unicodedata.category(character) not in DROPPED


def _read_special_ids(post_processor):
    """Return the ids of the special tokens that stand before a text, and of those after it."""
    if post_processor["type"] in ("BertProcessing", "RobertaProcessing"):
        _, cls_id = post_processor["cls"]
        _, sep_id = post_processor["sep"]
        return [cls_id], [sep_id]
    if post_processor["type"] != "TemplateProcessing":
        raise ValueError(f"post-processor {post_processor['type']}")

    ids_before = []
    ids_after = []
    ids = ids_before
    for part in post_processor["single"]:
        if "SpecialToken" in part:
            token = part["SpecialToken"]["id"]
            ids.extend(post_processor["special_tokens"][token]["ids"])
        else:  # the text itself
            ids = ids_after
    return ids_before, ids_after
