"""Read a tokenizer.json of the byte-pair kind, and turn text into ids and back.

Text becomes ids in four steps, which have these names in tokenizer.json:

    text              Two cats<image>
    added_tokens      Two cats | <image>      special tokens are cut out first (added_tokens.py)
    normalizer        ▁Two▁cats | <image>     Llama writes a space as ▁, and puts one in front
    pre_tokenizer     ▁Two | ▁cats | <image>  words, each of which is merged on its own
    model             ▁Two | ▁cat s | <image> characters merged pair by pair (bpe.py)

Two families are supported. The Llama kind has tokens such as <0x0A> for the bytes of characters
that are not in its vocabulary. Some of its members leave the work on spaces to a pre-tokenizer
called Metaspace. The byte-level kind (Qwen2, Llama 3) writes every byte as one of 256 characters.
"""

import json
import re
import unicodedata
from pathlib import Path

from minialign.data.added_tokens import read_added_tokens
from minialign.data.bpe import BYTE_OF, SPACE, BytePairModel, spell_bytes
from minialign.data.stream_decoder import StreamDecoder
from minialign.data.unicode_patterns import python_pattern
from minialign.utils.files import check, friendly_errors, read_json, read_optional_json

LONE_SURROGATE = re.compile("[\ud800-\udfff]")
BYTE_TOKEN = re.compile("<0x([0-9A-Fa-f]{2})>")
# The files beside tokenizer.json that may name the special tokens.
COMPANION_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
# When Metaspace puts a "▁" before a text: the values of `after` (see Tokenizer.encode) for which
# each of its schemes does so.
PREPEND_SCHEMES = {"first": (None,), "always": (None, "token"), "never": ()}
WHOLE_TEXT = "(?s:.+)"  # a pattern of words that takes a text as one word
MAX_CACHED_WORDS = 1 << 16


def flatten_steps(step) -> list[dict]:
    """Return the steps of a part of tokenizer.json, such as its decoder, as one flat list.

    A part is null, a single step, or a Sequence of parts.
    """
    if not step:
        return []
    if step["type"] != "Sequence":
        return [step]
    steps = []
    for value in step.values():  # the key of the list differs: "normalizers", "decoders", ...
        if isinstance(value, list):
            for nested_step in value:
                steps.extend(flatten_steps(nested_step))
    return steps


def check_unicode(text):
    """Raise InputError if a text holds half a surrogate pair, which UTF-8 cannot express.

    A text has one when an emoji, which UTF-16 writes in two parts, was cut in the middle.
    """
    check(
        not LONE_SURROGATE.search(text),
        f"a text contains a lone surrogate, which is half of a character: {text[:60]!r}",
    )


class Tokenizer:
    """A byte-pair tokenizer with the results of the package `tokenizers`.

    They differ only in the order of some combining marks, which the older Unicode tables of
    `tokenizers` do not know.

    bos, eos, pad: the ids of the special tokens. bos and pad may be None.
    size: one more than the largest id.
    ids, tokens: token -> id, and id -> token.
    """

    @classmethod
    def load(cls, directory) -> "Tokenizer":
        """Read the tokenizer of a checkpoint directory.

        Raises InputError for a file that is missing, broken or not supported.
        """
        path = Path(directory) / "tokenizer.json"
        companions = {name: read_optional_json(path.with_name(name)) for name in COMPANION_FILES}
        families = "Llama, Vicuna, Yi, Mistral, Qwen2 and Llama 3"
        with friendly_errors(path, f"supported are BPE tokenizers like those of {families}"):
            return cls(read_json(path), companions)

    def __init__(self, spec, companions):
        """Build a tokenizer from a parsed tokenizer.json and its parsed COMPANION_FILES.

        Raises ValueError for what is not supported.
        """
        # 1. Read how a text is normalized, split into words, merged, and put together again.
        self.bpe = BytePairModel(spec["model"])
        self.normalizer_steps = _read_normalizer(spec.get("normalizer"))
        self._read_pre_tokenizer(spec.get("pre_tokenizer"))
        self.strip_prefix = self._read_decoder(spec.get("decoder"))
        self.word_cache = {}

        # 2. Read the added tokens, which extend the vocabulary.
        added_tokens = spec.get("added_tokens") or []
        self.raw_added, self.normalized_added = read_added_tokens(added_tokens, self._normalize)
        self.ids = dict(self.bpe.vocab)
        self.special_ids = set()
        for token in added_tokens:
            self.ids[token["content"]] = token["id"]
            if token["special"]:
                self.special_ids.add(token["id"])
        self.tokens = {token_id: token for token, token_id in self.ids.items()}
        self.size = max(self.tokens) + 1

        # 3. Find the special tokens.
        self.bos = self._read_bos(companions, spec.get("post_processor"))
        self.eos = self._read_special_id(companions, "eos")
        self.pad = self._read_special_id(companions, "pad")
        if self.eos is None:
            raise ValueError(
                "no end token: give eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )

    # --- reading tokenizer.json and the files beside it ---

    def _read_pre_tokenizer(self, spec):
        """Set how a text is split into words: `splitter`, `byte_level` and `prepend_scheme`.

        `splitter` is a pattern of words. `prepend_scheme` says when Metaspace puts a "▁" before a
        text, and is None without Metaspace.
        """
        steps = flatten_steps(spec)
        step_types = [step["type"] for step in steps]
        self.byte_level = "ByteLevel" in step_types
        self.prepend_scheme = None

        if not steps:
            pattern = self._exact_word_pattern()
        elif step_types == ["Split", "ByteLevel"] and _is_regex_split(*steps):
            pattern = python_pattern(steps[0]["pattern"]["Regex"])
        elif step_types == ["Metaspace"] and _is_plain_metaspace(*steps):
            self.prepend_scheme = steps[0]["prepend_scheme"]
            if steps[0].get("split", True):
                pattern = f"{SPACE}[^{SPACE}]*|[^{SPACE}]+"
            else:
                pattern = self._exact_word_pattern()
        else:
            raise ValueError(f"pre-tokenizer {json.dumps(spec, ensure_ascii=False)}")

        # The parentheses make `split` return the words, not only the text between them.
        self.splitter = re.compile(f"({pattern})")

    def _exact_word_pattern(self):
        """Return a pattern of words for a tokenizer that takes a text as a single word.

        If no merge joins two words, merging them one by one gives the same ids as merging the text
        at once. Words can be cached, whole texts cannot.
        """
        if self.bpe.joins_words or self.bpe.ignore_merges or SPACE not in self.bpe.vocab:
            return WHOLE_TEXT
        return f"{SPACE}*[^{SPACE}]+|{SPACE}+"

    def _read_decoder(self, spec):
        """Return what decoding strips from the front of a text: a space, or nothing."""
        steps = flatten_steps(spec)
        step_types = [step["type"] for step in steps]
        supported_types = ["ByteLevel"] if self.byte_level else ["Replace", "ByteFallback", "Fuse"]
        if step_types == supported_types:
            return ""
        if step_types == [*supported_types, "Strip"] and _is_strip_of_one_space(steps[-1]):
            return " "
        raise ValueError(f"decoder {json.dumps(spec, ensure_ascii=False)}")

    def _read_bos(self, companions, post_processor):
        """Return the id of the token that begins a text, or None if there is none."""
        # 1. As in transformers, add_bos_token decides, if a file has it.
        adds_bos = companions["tokenizer_config.json"].get("add_bos_token")
        if adds_bos is not None:
            return self._read_special_id(companions, "bos") if adds_bos else None

        # 2. Otherwise the post-processor says what stands before the text.
        for step in flatten_steps(post_processor):
            if step["type"] == "TemplateProcessing":
                first = step["single"][0]
                return self.id_of(first.get("SpecialToken", {}).get("id"))
        return None

    def _read_special_id(self, companions, role):
        """Return the id of the "bos", "eos" or "pad" token, or None if no file says it."""
        # 1. The files of the tokenizer name the token.
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = companions[file].get(f"{role}_token")
            if isinstance(token, dict):
                token = token["content"]
            token_id = self.id_of(token)
            if token_id is not None:
                return token_id

        # 2. The files of the model give its id, or a list of ids.
        config = companions["config.json"]
        text_config = config.get("text_config") or {}
        for settings in (companions["generation_config.json"], config, text_config):
            token_id = settings.get(f"{role}_token_id")
            if isinstance(token_id, list):
                token_id = token_id[0]
            if token_id is not None:
                return token_id
        return None

    # --- text to ids ---

    def id_of(self, token) -> int | None:
        """Return the id of a token, or None if the vocabulary lacks it."""
        return self.ids.get(token)

    def encode(self, text, bos=False, after=None) -> list[int]:
        """Return the ids of a text, in which added tokens are recognized.

        bos: put the BOS token in front, if the tokenizer has one.
        after: what the text follows: None (nothing), "token" (an added token), or "text". A text
            that follows other text gets no "▁" in front.
        Raises InputError for text that is not Unicode.
        """
        check_unicode(text)
        ids = []
        if bos and self.bos is not None:
            ids.append(self.bos)

        # 1. Cut out the added tokens that are searched for in the text as it is.
        for part in self.raw_added.split(text):
            if isinstance(part, int):
                ids.append(part)
                after = "token"
                continue

            # 2. Normalize the text between them, and cut out the other added tokens.
            normalized_text = self._normalize(part, prepend=after != "text")
            for piece in self.normalized_added.split(normalized_text):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids.extend(self._encode_piece(piece, after))
                after = "token"
        return ids

    def _normalize(self, text, prepend=True):
        """Normalize a text. `prepend` False skips the steps that put something in front of it."""
        for step in self.normalizer_steps:
            if step["type"] == "NFC":
                text = unicodedata.normalize("NFC", text)
            elif step["type"] == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])
            elif prepend and text:
                text = step["prepend"] + text
        return text

    def _encode_piece(self, text, after):
        """Return the ids of normalized text without added tokens."""
        # 1. Metaspace writes spaces as "▁", and may put a "▁" in front.
        if self.prepend_scheme is not None:
            text = text.replace(" ", SPACE)
            prepends_space = after in PREPEND_SCHEMES[self.prepend_scheme]
            if prepends_space and not text.startswith(SPACE):
                text = SPACE + text

        # 2. Merge the characters of each word. The text between two words, often empty, counts as
        # a word too.
        ids = []
        for word in self.splitter.split(text):
            if word:
                ids.extend(self._encode_word(word))
        return ids

    def _encode_word(self, word):
        """Return the ids of a word, from the cache if it has been seen before."""
        ids = self.word_cache.get(word)
        if ids is None:
            spelled_word = spell_bytes(word) if self.byte_level else word
            ids = self.bpe.encode(spelled_word)
            if len(self.word_cache) >= MAX_CACHED_WORDS:
                self.word_cache.clear()
            self.word_cache[word] = ids
        return ids

    # --- ids to text ---

    def decode(self, ids, skip_special=True, strip_prefix=None) -> str:
        """Return the text of `ids`.

        Ids outside the vocabulary are left out, and broken UTF-8 becomes "\\ufffd". `strip_prefix`
        is removed from the front of the text. None stands for what the decoder of tokenizer.json
        removes: a space, or nothing.
        """
        stream = StreamDecoder(self, skip_special=skip_special, strip_prefix=strip_prefix)
        pieces = [stream.push(token_id) for token_id in ids]
        return "".join(pieces) + stream.flush()

    def piece(self, token_id) -> bytes | str:
        """Return what a token stands for: bytes if it may hold a part of a character, else text."""
        token = self.tokens[token_id]
        if self.byte_level:
            try:
                return bytes(BYTE_OF[character] for character in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        byte_token = BYTE_TOKEN.fullmatch(token)
        if byte_token:
            return bytes([int(byte_token[1], 16)])
        return token.replace(SPACE, " ")

    def token_text(self, token_id) -> str:
        """Return the text of one token, which is "\\ufffd" for a part of a character."""
        return self.decode([token_id], skip_special=False, strip_prefix="")


def _read_normalizer(spec):
    """Return the steps of a normalizer. Raises ValueError for a step that is not supported."""
    steps = flatten_steps(spec)
    for step in steps:
        if step["type"] == "Replace" and "Regex" in step["pattern"]:
            raise ValueError("normalizer Replace by a regex")
        if step["type"] not in ("Prepend", "Replace", "NFC"):
            raise ValueError(f"normalizer {step['type']}")
    return steps


def _is_regex_split(split, byte_level):
    """Return whether a Split and a ByteLevel step do nothing but split a text by a regex."""
    is_isolated = split["behavior"] == "Isolated" and not split["invert"]
    is_plain = not byte_level["add_prefix_space"] and not byte_level.get("use_regex", True)
    return is_isolated and is_plain


def _is_strip_of_one_space(strip):
    """Return whether a Strip step removes one space at the front and nothing at the end."""
    return (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)


def _is_plain_metaspace(metaspace):
    """Return whether a Metaspace step uses "▁" and a scheme that is supported."""
    scheme = metaspace.get("prepend_scheme")
    return metaspace["replacement"] == SPACE and scheme in PREPEND_SCHEMES
