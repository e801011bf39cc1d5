r"""Split a text into words, each of which byte-pair encoding then merges on its own.

The patterns of words are regular expressions in tokenizer.json. An expression of a file may take
forever on some text, or may mean something else to Python's re module. So no expression of a file
is run: it must be one of KNOWN_PATTERNS, letter for letter.
"""

import json
import re

from minialign.data.bpe import SPACE
from minialign.data.unicode_patterns import python_pattern

# The words of GPT-2: contractions, letters, digits, other signs (each with a space before it), and
# white space. Of several spaces the last one belongs to the word that follows.
GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Qwen2's digits are words of their own. Line breaks stay with the signs before them.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3 takes up to three digits as a word.
LLAMA3_WORDS = QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
KNOWN_PATTERNS = {GPT2_WORDS: "GPT-2", QWEN2_WORDS: "Qwen2", LLAMA3_WORDS: "Llama 3"}

# What Digits cuts out of a text: each digit, or each run of digits.
ONE_DIGIT = r"\p{N}"
DIGITS = r"\p{N}+"

# When Metaspace puts a "▁" before a text: {scheme: the values of `after` for which it does}. What a
# text follows is None (nothing) or "token", see Tokenizer.encode.
PREPEND_SCHEMES = {"first": (None,), "always": (None, "token"), "never": ()}
METASPACE_WORDS = f"{SPACE}[^{SPACE}]*|[^{SPACE}]+"
WHOLE_TEXT = "(?s:.+)"  # a pattern of words that takes a text as one word


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


class PreTokenizer:
    """The pre-tokenizer of a tokenizer.json.

    byte_level: whether words are spelled in bytes.
    splitters: patterns of words. Each of them splits what the one before it left.
    prepend_scheme: when Metaspace puts a "▁" before a text, a key of PREPEND_SCHEMES. None
        without Metaspace.
    """

    def __init__(self, spec, bpe):
        """Read the "pre_tokenizer" of a tokenizer.json. `bpe` is its BytePairModel.

        Raises ValueError for what is not supported.
        """
        steps = flatten_steps(spec)
        step_types = [step["type"] for step in steps]
        self.byte_level = "ByteLevel" in step_types
        self.prepend_scheme = None

        if not steps:
            patterns = [_exact_word_pattern(bpe)]
        elif step_types == ["Metaspace"] and _is_plain_metaspace(steps[0]):
            self.prepend_scheme = steps[0]["prepend_scheme"]
            splits = steps[0].get("split", True)
            patterns = [METASPACE_WORDS if splits else _exact_word_pattern(bpe)]
        elif step_types[-1] == "ByteLevel" and len(steps) <= 2:
            patterns = _byte_level_patterns(steps)
        else:
            patterns = []
        if not patterns:
            raise ValueError(f"pre-tokenizer {_shown(spec)}")

        # The parentheses make `split` return the words, not only the text between them.
        self.splitters = [re.compile(f"({python_pattern(pattern)})") for pattern in patterns]

    def split(self, text, after) -> list[str]:
        """Return the words of a text. `after` is as in Tokenizer.encode."""
        # 1. Metaspace writes spaces as "▁", and may put a "▁" in front.
        if self.prepend_scheme is not None:
            text = text.replace(" ", SPACE)
            prepends_space = after in PREPEND_SCHEMES[self.prepend_scheme]
            if prepends_space and not text.startswith(SPACE):
                text = SPACE + text

        # 2. What no pattern matches is a word too. Between two matches it is often empty.
        words = [text]
        for splitter in self.splitters:
            smaller_words = []
            for word in words:
                smaller_words.extend(splitter.split(word))
            words = smaller_words
        return [word for word in words if word]


def _exact_word_pattern(bpe):
    """Return a pattern of words for a tokenizer that takes a text as a single word.

    If no merge joins two words, merging them one by one gives the same ids as merging the text at
    once. Words can be cached, whole texts cannot.
    """
    if bpe.joins_words or bpe.ignore_merges or SPACE not in bpe.vocab:
        return WHOLE_TEXT
    return f"{SPACE}*[^{SPACE}]+|{SPACE}+"


def _byte_level_patterns(steps):
    """Return the patterns of a ByteLevel step with at most one step before it.

    Returns an empty list for what is not supported. Raises ValueError for an unknown regex.
    """
    byte_level = steps[-1]
    if byte_level["add_prefix_space"]:
        return []

    # 1. The step before it: Split (Qwen2, Llama 3) or Digits (SmolLM2).
    patterns = []
    if len(steps) == 2 and steps[0]["type"] == "Split":
        patterns.append(_known_pattern(steps[0]))
    elif len(steps) == 2 and steps[0]["type"] == "Digits":
        patterns.append(ONE_DIGIT if steps[0]["individual_digits"] else DIGITS)
    elif len(steps) == 2:
        return []

    # 2. ByteLevel itself splits as GPT-2 does, unless use_regex switches that off.
    if byte_level.get("use_regex", True):
        patterns.append(GPT2_WORDS)
    return patterns


def _known_pattern(split):
    """Return the pattern of a Split step. Raises ValueError unless it is one that is known."""
    pattern = split["pattern"].get("Regex")
    is_known = isinstance(pattern, str) and pattern in KNOWN_PATTERNS
    if not is_known or split["behavior"] != "Isolated" or split["invert"]:
        names = ", ".join(KNOWN_PATTERNS.values())
        raise ValueError(
            f"pre-tokenizer {_shown(split)}: its pattern is none of those known here, and patterns "
            f"of files are not run (known: {names})"
        )
    return pattern


def _is_plain_metaspace(metaspace):
    """Return whether a Metaspace step uses "▁" and a scheme that is supported."""
    scheme = metaspace.get("prepend_scheme")
    return metaspace["replacement"] == SPACE and scheme in PREPEND_SCHEMES


def _shown(spec):
    """Return a part of tokenizer.json as JSON, cut to the length of an error message."""
    text = json.dumps(spec, ensure_ascii=False)
    return text if len(text) <= 300 else text[:300] + "..."
