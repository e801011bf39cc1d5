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
from minialign.data.pre_tokenizer import PreTokenizer, flatten_steps
from minialign.data.stream_decoder import StreamDecoder
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
MAX_CACHED_WORDS = 1 << 16
MAX_VOCABULARY = 1 << 24  # far more than any model has


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
    end_ids: every id that ends an answer according to generation_config.json or config.json.
    size: one more than the largest id.
    ids, tokens: token -> id, and id -> token.
    special_start: a pattern for the first letters of special tokens (special_start_pattern).
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
        self.pre_tokenizer = PreTokenizer(spec.get("pre_tokenizer"), self.bpe)
        self.byte_level = self.pre_tokenizer.byte_level
        self.strip_prefix = self._read_decoder(spec.get("decoder"))
        self.word_cache = {}

        # 2. Read the added tokens, which extend the vocabulary.
        added_tokens = spec.get("added_tokens") or []
        self.ids = extend_vocabulary(self.bpe.vocab, added_tokens)
        self.raw_added, self.normalized_added = read_added_tokens(added_tokens, self._normalize)
        self.special_ids = {token["id"] for token in added_tokens if token["special"]}
        self.tokens = {token_id: token for token, token_id in self.ids.items()}
        self.special_start = special_start_pattern(self.tokens[i] for i in self.special_ids)
        self.size = max(self.tokens) + 1

        # 3. Find the special tokens.
        self.bos = self._read_bos(spec.get("post_processor"))
        self.bos_text = self.tokens.get(self.bos)
        self.end_ids = set(read_model_ids(companions, "eos"))
        self.eos = self._read_special_id(companions, "eos")
        self.pad = self._read_special_id(companions, "pad")
        if self.eos is None:
            raise ValueError(
                "no end token: give eos_token in tokenizer_config.json "
                "or eos_token_id in generation_config.json"
            )

    # --- reading tokenizer.json and the files beside it ---

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

    def _read_bos(self, post_processor):
        """Return the id of the token that begins a text, or None if there is none.

        As in transformers, the post-processor of tokenizer.json decides, and add_bos_token of
        tokenizer_config.json does not count.
        """
        names = []  # what the post-processor puts in front of a text
        for step in flatten_steps(post_processor):
            if step["type"] == "TemplateProcessing":
                *parts_before, text = step["single"]
                if "Sequence" not in text:
                    raise ValueError("post-processor that puts a token behind every text")
                names += [part["SpecialToken"]["id"] for part in parts_before]
            elif step["type"] != "ByteLevel":
                raise ValueError(f"post-processor {step['type']}")
        if not names:
            return None
        if len(names) > 1 or names[0] not in self.ids:
            raise ValueError(f"post-processor that begins a text with {', '.join(names)}")
        return self.ids[names[0]]

    def _read_special_id(self, companions, role):
        """Return the id of the "eos" or "pad" token, or None if no file gives it."""
        # 1. The files of the tokenizer name the token.
        for file in ("tokenizer_config.json", "special_tokens_map.json"):
            token = companions[file].get(f"{role}_token")
            if isinstance(token, dict):
                token = token["content"]
            token_id = self.id_of(token)
            if token_id is not None:
                return token_id

        # 2. The files of the model give its id, or a list of ids.
        token_ids = read_model_ids(companions, role)
        return token_ids[0] if token_ids else None

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

        # 1. Cut out the added tokens that are searched for in the text as it is. The pieces are
        #    texts, and the ids of these tokens.
        for raw_piece in self.raw_added.split(text):
            if isinstance(raw_piece, int):
                ids.append(raw_piece)
                after = "token"
                continue

            # 2. Normalize the text between them, and cut out the other added tokens.
            normalized_text = self._normalize(raw_piece, prepend=after != "text")
            for piece in self.normalized_added.split(normalized_text):
                if isinstance(piece, int):
                    ids.append(piece)
                else:
                    ids.extend(self._encode_piece(piece, after))
                after = "token"  # a text piece that is not the first follows a token
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
        ids = []
        for word in self.pre_tokenizer.split(text, after):
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


def extend_vocabulary(vocab, added_tokens) -> dict[str, int]:
    """Return {token: id} of a vocabulary and its added tokens.

    Raises ValueError for an id that no embedding table has, and for one that two tokens share.
    """
    ids = dict(vocab)
    for entry in added_tokens:
        token = entry["content"]
        if not isinstance(token, str) or not token:
            raise ValueError(f"added token {entry['id']!r} has no text")
        if ids.get(token, entry["id"]) != entry["id"]:
            raise ValueError(f"token {token!r} has two ids, {ids[token]} and {entry['id']}")
        ids[token] = entry["id"]

    token_of = {}
    for token, token_id in ids.items():
        if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY:
            raise ValueError(
                f"token {token!r} has the id {token_id!r}, which is no row of an embedding table"
            )
        if token_id in token_of:
            raise ValueError(f"tokens {token_of[token_id]!r} and {token!r} have one id, {token_id}")
        token_of[token_id] = token
    if not ids:
        raise ValueError("the vocabulary is empty")
    return ids


def special_start_pattern(tokens) -> re.Pattern:
    """Return a pattern for the first letter (group 2) of each token (group 1) in a text.

    The token itself is in a lookahead. So the pattern also finds tokens that overlap.
    """
    longest_first = sorted(tokens, key=len, reverse=True)
    if not longest_first:
        return re.compile("(?!)()()")  # matches nothing
    alternatives = "|".join(re.escape(token) for token in longest_first)
    first_letters = "".join(sorted({re.escape(token[0]) for token in longest_first}))
    return re.compile(f"(?=({alternatives}))([{first_letters}])")


def read_model_ids(companions, role) -> list[int]:
    """Return the ids of the "eos" or "pad" token in the files of the model.

    The first file that gives one or several counts.
    """
    config = companions["config.json"]
    text_config = config.get("text_config") or {}
    for settings in (companions["generation_config.json"], config, text_config):
        value = settings.get(f"{role}_token_id")
        if role == "pad" and value == -1:  # what Llama's config.json writes for "none"
            continue
        token_ids = value if isinstance(value, list) else [value]
        token_ids = [token_id for token_id in token_ids if token_id is not None]
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < MAX_VOCABULARY:
                raise ValueError(
                    f"{role}_token_id {value!r} in generation_config.json or config.json "
                    "is no token id, nor a list of them"
                )
        if token_ids:
            return token_ids
    return []


def _read_normalizer(spec):
    """Return the steps of a normalizer. Raises ValueError for a step that is not supported."""
    steps = flatten_steps(spec)
    for step in steps:
        if step["type"] == "Replace" and not step["pattern"].get("String"):
            raise ValueError(f"normalizer Replace of {step['pattern']}")
        if step["type"] not in ("Prepend", "Replace", "NFC"):
            raise ValueError(f"normalizer {step['type']}")
    return steps


def _is_strip_of_one_space(strip):
    """Return whether a Strip step removes one space at the front and nothing at the end."""
    return (strip["content"], strip["start"], strip["stop"]) == (" ", 1, 0)
