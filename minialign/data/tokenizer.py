"""tokenizer.json: text to ids and back, for byte-pair encodings of the Llama kind (▁, byte tokens) and the byte-level kind (GPT-2's alphabet)."""

import codecs
import functools
import heapq
import itertools
import json
import re
import unicodedata
from pathlib import Path

from minialign.utils.files import check, friendly_errors, read_json

SPACE = "▁"
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # Unicode's White_Space; Python's \s would add \x1c-\x1f
WHITE_RUN, SURROGATE, BYTE_TOKEN = (
    re.compile(f"[{WHITE}]*"),
    re.compile("[\ud800-\udfff]"),
    re.compile("<0x([0-9A-Fa-f]{2})>"),
)
# GPT-2's alphabet, byte to character: printable Latin-1 stands for itself, the other 68 bytes for chr(256) onwards.
PRINTABLE, OTHERS = {*range(33, 127), *range(161, 173), *range(174, 256)}, itertools.count(256)
ALPHABET = [chr(byte if byte in PRINTABLE else next(OTHERS)) for byte in range(256)]
BYTE_OF = {character: byte for byte, character in enumerate(ALPHABET)}


@functools.lru_cache
def category_ranges(name):
    """The inside of a character class that holds every character whose Unicode category starts with `name` ("L", "Nd")."""
    held = (code for code in range(0x110000) if unicodedata.category(chr(code)).startswith(name))
    runs = (
        [code for _, code in run]
        for _, run in itertools.groupby(enumerate(held), lambda pair: pair[1] - pair[0])
    )
    return "".join(rf"\U{run[0]:08x}-\U{run[-1]:08x}" for run in runs)


def python_pattern(pattern):
    r"""A regex of tokenizer.json for Python's re, which lacks \p{..} and takes \s otherwise. Raises ValueError."""
    out, inside = [], False
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        inside = token == "[" or inside and token != "]"
        if token[:2] in (r"\s", r"\S", r"\p", r"\P"):
            members = WHITE if token[1] in "sS" else category_ranges(token[3:-1])
            negated = token[1].isupper()
            if not members or negated and inside:
                raise ValueError(f"pre-tokenizer regex with {token}" + " inside [...]" * inside)
            token = members if inside else f"[{'^' * negated}{members}]"
        out.append(token)
    return "".join(out)


def flatten_steps(step):
    """The steps of a normalizer, pre-tokenizer, post-processor or decoder: Sequences opened, null is none."""
    if step is None or step["type"] != "Sequence":
        return [step] if step else []
    return [
        one
        for parts in step.values()
        if isinstance(parts, list)
        for part in parts
        for one in flatten_steps(part)
    ]


def apply_merges(ids, merges):
    """Byte-pair merging: the adjacent pair of lowest rank first, the leftmost of equals, until no pair has a merge.
    The symbols are a linked list; a queue entry whose pair has changed since is stale and passed over: O(n log n).
    """
    left, right = list(range(-1, len(ids))), list(range(1, len(ids) + 1))
    ids = [
        *ids,
        None,
    ]  # None merges with nothing: the sentinel, and symbols that have gone into their left neighbour
    queue = sorted(
        (merges[pair][0], start)
        for start, pair in enumerate(zip(ids, ids[1:], strict=False))
        if pair in merges
    )  # sorted is a heap
    while queue:
        rank, start = heapq.heappop(queue)
        gone = right[start]
        found = merges.get((ids[start], ids[gone]))
        if found is None or found[0] != rank:
            continue
        ids[start], ids[gone] = found[1], None
        right[start] = right[gone]
        left[right[gone]] = start
        for first in (left[start], start):
            if first >= 0 and (pair := merges.get((ids[first], ids[right[first]]))):
                heapq.heappush(queue, (pair[0], first))
    return [id for id in ids if id is not None]


class AddedTokens:
    """Added tokens, cut out of the text before BPE: leftmost first, then longest."""

    def __init__(self, tokens):
        self.tokens = tokens  # text to look for -> its entry in tokenizer.json
        self.finder = re.compile(
            "|".join(re.escape(text) for text in sorted(tokens, key=len, reverse=True)) or "(?!)"
        )

    def cut(self, text):
        """`text` in order as strings and, for the added tokens in it, ids; lstrip and rstrip take the white space beside a token along."""
        done = 0
        for match in self.finder.finditer(text):
            token, (start, stop) = self.tokens[match[0]], match.span()
            if token["single_word"] and (
                re.search(r"\w\Z", text[:start]) or re.match(r"\w", text[stop:])
            ):
                continue
            if token["lstrip"]:
                start -= WHITE_RUN.match(text[done:start][::-1]).end()
            if token["rstrip"]:
                stop = WHITE_RUN.match(text, stop).end()
            if done < start:
                yield text[done:start]
            yield token["id"]
            done = stop
        if done < len(text):
            yield text[done:]


class Tokenizer:
    """A byte-pair tokenizer. `bos`, `eos`, `pad` are ids (bos and pad may be None), `size` is one more than the largest id.
    Equal to the package `tokenizers`, but for the order of some combining marks that its older NFC tables do not know.
    """

    @classmethod
    def load(cls, directory):
        """Read `directory`/tokenizer.json and, for the ids of bos, eos and pad, the JSON files beside it. Raises BadInput."""
        path = Path(directory) / "tokenizer.json"
        names = (
            "tokenizer_config.json",
            "special_tokens_map.json",
            "generation_config.json",
            "config.json",
        )
        beside = [
            read_json(path.with_name(name)) if path.with_name(name).exists() else {}
            for name in names
        ]
        with friendly_errors(
            path,
            "supported are BPE tokenizers like those of Llama, Vicuna, Yi, Mistral, Qwen2 and Llama 3",
        ):
            return cls(read_json(path), beside)

    def __init__(self, spec, beside):
        """From the parsed tokenizer.json and the four files beside it. Raises ValueError for what is not supported."""
        self._read_model(spec["model"])
        self.normalizer = flatten_steps(spec.get("normalizer"))
        for step in self.normalizer:
            if step["type"] not in ("Prepend", "Replace", "NFC") or "Regex" in step.get(
                "pattern", ()
            ):
                raise ValueError(
                    f"normalizer {step['type']}" + " by a regex" * (step["type"] == "Replace")
                )
        self._read_pre_tokenizer(spec.get("pre_tokenizer"))
        self._read_decoder(spec.get("decoder"))
        self._read_added(spec.get("added_tokens") or [])
        self.cache = {}
        self.bos = self._read_bos(beside, spec.get("post_processor"))
        self.eos, self.pad = self._named_id(beside, "eos"), self._named_id(beside, "pad")
        if self.eos is None:
            raise ValueError(
                "no end token: give eos_token in tokenizer_config.json or eos_token_id in generation_config.json"
            )

    def _read_model(self, model):
        unusual = [
            option
            for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if model.get(option)
        ]
        if model.get("type", "BPE") != "BPE" or "merges" not in model or unusual:
            raise ValueError(" with ".join([f"model of type {model.get('type')}", *unusual]))
        self.vocab, self.merges = (
            model["vocab"],
            {},
        )  # merges: (left id, right id) -> (rank, id of the two joined)
        self.joins_words = False  # whether any merge joins across "x▁"
        for rank, merge in enumerate(model["merges"]):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self.merges[self.vocab[left], self.vocab[right]] = rank, self.vocab[left + right]
            self.joins_words |= right[0] == SPACE and left[-1] != SPACE
        self.ignore_merges, self.fuse_unknown = (
            model.get("ignore_merges", False),
            model.get("fuse_unk", False),
        )
        self.unknown = (
            self.vocab[model["unk_token"]] if model.get("unk_token") is not None else None
        )
        names = map("<0x{:02X}>".format, range(256 if model.get("byte_fallback") else 0))
        self.byte_ids = [self.vocab[name] for name in names if name in self.vocab]
        if len(self.byte_ids) not in (0, 256):
            raise ValueError(f"byte_fallback with {len(self.byte_ids)} of the 256 byte tokens")

    def _read_pre_tokenizer(self, spec):
        """Sets what splits a chunk into words, and Metaspace's prepend scheme (None: there is no Metaspace)."""
        steps = flatten_steps(spec)
        kinds, first = [step["type"] for step in steps], steps[0] if steps else {}
        self.byte_level, self.prepend_scheme = "ByteLevel" in kinds, first.get("prepend_scheme")
        # Without a splitting pre-tokenizer a chunk is one word; where no merge joins across "x▁", cutting there changes nothing and lets words be cached.
        pattern = (
            None
            if self.joins_words or self.ignore_merges or SPACE not in self.vocab
            else f"{SPACE}*[^{SPACE}]+|{SPACE}+"
        )
        fits = not kinds
        if kinds == ["Split", "ByteLevel"]:
            fits = first["behavior"] == "Isolated" and not (
                first["invert"] or steps[1]["add_prefix_space"] or steps[1].get("use_regex", True)
            )
            pattern = python_pattern(first["pattern"]["Regex"])
        elif kinds == ["Metaspace"]:
            fits = first["replacement"] == SPACE and self.prepend_scheme in (
                "first",
                "always",
                "never",
            )
            pattern = f"{SPACE}[^{SPACE}]*|[^{SPACE}]+" if first.get("split", True) else pattern
        if not fits:
            raise ValueError(f"pre-tokenizer {json.dumps(spec, ensure_ascii=False)}")
        self.splitter = re.compile(f"({pattern})") if pattern else None

    def _read_decoder(self, spec):
        steps = flatten_steps(spec)
        strip = steps.pop() if steps and steps[-1]["type"] == "Strip" else None
        wanted = ["ByteLevel"] if self.byte_level else ["Replace", "ByteFallback", "Fuse"]
        if (
            [step["type"] for step in steps] != wanted
            or strip
            and (strip["content"], strip["start"], strip["stop"]) != (" ", 1, 0)
        ):
            raise ValueError(f"decoder {json.dumps(spec, ensure_ascii=False)}")
        self.strip_prefix = " " if strip else ""  # what decode drops from the front of a text

    def _read_added(self, specs):
        # A normalized token is looked for in normalized text in its own normalized form: under Prepend "▁</s>", so not in "end.</s>".
        specs = sorted(
            specs, key=lambda one: not one["special"]
        )  # special tokens win where two have one form
        self.raw_added = AddedTokens(
            {one["content"]: one for one in reversed(specs) if not one["normalized"]}
        )
        self.normalized_added = AddedTokens(
            {self._normalize(one["content"]): one for one in reversed(specs) if one["normalized"]}
        )
        self.ids = self.vocab | {one["content"]: one["id"] for one in specs}
        self.tokens = {id: token for token, id in self.ids.items()}
        self.special = {one["id"] for one in specs if one["special"]}
        self.size = max(self.tokens) + 1

    def _named_id(self, beside, kind):
        """The id of the "bos", "eos" or "pad" token: named by the tokenizer's files, else numbered by the model's; None if by neither."""
        names = [source.get(f"{kind}_token") for source in beside[:2]]
        numbers = [
            source.get(f"{kind}_token_id")
            for source in (*beside[2:], beside[3].get("text_config") or {})
        ]
        ids = [self.id_of(name["content"] if isinstance(name, dict) else name) for name in names]
        ids += [number[0] if isinstance(number, list) else number for number in numbers]
        return next((id for id in ids if id is not None), None)

    def _read_bos(self, beside, post_processor):
        """The BOS that a text gets: add_bos_token of tokenizer_config.json decides if it is there (as in transformers), else the template."""
        if beside[0].get("add_bos_token") is not None:
            return self._named_id(beside, "bos") if beside[0]["add_bos_token"] else None
        template = next(
            (
                step["single"]
                for step in flatten_steps(post_processor)
                if step["type"] == "TemplateProcessing"
            ),
            [{}],
        )
        return self.id_of(template[0].get("SpecialToken", {}).get("id"))

    def id_of(self, token):
        """The id of a token by its name in the vocabulary, or None."""
        return self.ids.get(token)

    def encode(self, text, bos=False, after=None):
        """Ids of `text`, added tokens recognised; the BOS in front when asked for and the tokenizer has one.
        `after` says what the text follows: None (nothing), "token" (an added token) or "text" (text: then it gets no ▁ of its own).
        Raises BadInput for text that is not Unicode.
        """
        check(not SURROGATE.search(text), f"text with half a surrogate pair: {text[:60]!r}")
        ids = [self.bos] if bos and self.bos is not None else []
        for part in self.raw_added.cut(text):
            pieces = (
                [part]
                if isinstance(part, int)
                else self.normalized_added.cut(self._normalize(part, prepend=after != "text"))
            )
            for piece in pieces:
                ids.extend([piece] if isinstance(piece, int) else self._chunk_ids(piece, after))
                after = "token"
        return ids

    def _normalize(self, text, prepend=True):
        for step in self.normalizer:
            if step["type"] == "NFC":
                text = unicodedata.normalize("NFC", text)
            elif step["type"] == "Replace":
                text = text.replace(step["pattern"]["String"], step["content"])
            elif prepend and text:
                text = step["prepend"] + text
        return text

    def _chunk_ids(self, chunk, after):
        if self.prepend_scheme:
            chunk = chunk.replace(" ", SPACE)
            prepends = (
                after is None
                and self.prepend_scheme == "first"
                or after != "text"
                and self.prepend_scheme == "always"
            )
            chunk = SPACE * (prepends and not chunk.startswith(SPACE)) + chunk
        words = filter(None, self.splitter.split(chunk)) if self.splitter else [chunk]
        return [id for word in words for id in self.cache.get(word) or self._word_ids(word)]

    def _word_ids(self, word):
        spelled = "".join(ALPHABET[byte] for byte in word.encode()) if self.byte_level else word
        whole = self.vocab.get(spelled) if self.ignore_merges else None
        ids = apply_merges(self._symbols(spelled), self.merges) if whole is None else [whole]
        if len(self.cache) >= 1 << 16:
            self.cache.clear()
        self.cache[word] = ids
        return ids

    def _symbols(self, word):
        """One id a character; where the vocabulary lacks it, its bytes, or the unknown token (runs of it fused), or nothing."""
        ids, fusing = [], False
        for character in word:
            id = self.vocab.get(character)
            if id is not None:
                ids.append(id)
            elif self.byte_ids:
                ids.extend(self.byte_ids[byte] for byte in character.encode())
            elif self.unknown is not None and not fusing:
                ids.append(self.unknown)
            fusing = id is None and self.fuse_unknown
        return ids

    def decode(self, ids, skip_special=True, strip_prefix=None):
        """The text of `ids`; ids outside the vocabulary say nothing, broken UTF-8 becomes "\\ufffd".
        `strip_prefix` is dropped from the front of the text if it is there: by default what the tokenizer's own decoder drops, a space or nothing.
        """
        stream = StreamDecoder(self, skip_special, strip_prefix)
        return "".join([*map(stream.push, ids), stream.flush()])

    def piece(self, id):
        """What one token stands for: bytes (byte-level kind, byte tokens of the Llama kind), else text, ▁ as a space."""
        token = self.tokens[id]
        if self.byte_level:
            values = [BYTE_OF.get(character) for character in token]
            return token.encode() if None in values else bytes(values)
        match = BYTE_TOKEN.fullmatch(token)
        return bytes([int(match[1], 16)]) if match else token.replace(SPACE, " ")

    def token_text(self, id):
        """The plain text one token stands for, ▁ as a space; a byte that is no whole character is "\\ufffd", an id out of range ""."""
        return self.decode([id], skip_special=False, strip_prefix="")


class StreamDecoder:
    """Decoding one id at a time: what `push` returns, and `flush` at the end, joins to what `Tokenizer.decode` gives for all ids."""

    def __init__(self, tokenizer, skip_special=True, strip_prefix=None):
        self.tokenizer, self.skipped = tokenizer, tokenizer.special if skip_special else ()
        self.strip_prefix = tokenizer.strip_prefix if strip_prefix is None else strip_prefix
        self.partial = codecs.getincrementaldecoder("utf-8")("replace")
        self.run = b""  # byte tokens of the Llama kind: one wrong byte spoils its whole run, so none is certain before the run ends

    def push(self, id):
        """The text that has become certain with this id: never half a character."""
        if id not in self.tokenizer.tokens or id in self.skipped:
            return ""
        piece = self.tokenizer.piece(id)
        if isinstance(piece, str):
            return self._led(self._end_run() + piece)
        if self.tokenizer.byte_level:
            return self._led(self.partial.decode(piece))
        self.run += piece
        return ""

    def flush(self):
        """The text still held back at the end."""
        return self._led(self._end_run() + self.partial.decode(b"", final=True))

    def _end_run(self):
        run, self.run = self.run, b""
        try:
            return run.decode()
        except UnicodeDecodeError:
            return "\ufffd" * len(run)

    def _led(self, text):
        if text:
            text, self.strip_prefix = text.removeprefix(self.strip_prefix), ""
        return text
