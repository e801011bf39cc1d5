"""Cut the added tokens, such as "</s>" or "<image>", out of a text before the rest is tokenized."""

import re

from minialign.data.unicode_patterns import WHITE

WHITE_RUN = re.compile(f"[{WHITE}]*")
FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")  # that every entry has


class AddedTokens:
    """A set of added tokens to search for in a text.

    The leftmost token counts, and the longest one if several begin at the same position.
    tokens: the text to search for -> the token's entry in tokenizer.json.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        # In an alternation the first match wins, so the longest text has to come first.
        longest_first = sorted(tokens, key=len, reverse=True)
        alternatives = [re.escape(text) for text in longest_first]
        nothing = "(?!)"  # a pattern that never matches
        self.pattern = re.compile("|".join(alternatives) or nothing)

    def split(self, text):
        """Yield `text` in order: an id for each added token, strings for the text between them."""
        position = 0  # the text before it has been yielded
        for match in self.pattern.finditer(text):
            token = self.tokens[match[0]]
            start, end = match.span()
            if token["single_word"] and _is_inside_word(text, start, end):
                continue

            # 1. Some tokens include the white space on their left or right.
            if token["lstrip"]:
                # Reversed, so that a match at the beginning is the run that ends at `start`.
                reversed_before = text[position:start][::-1]
                start -= WHITE_RUN.match(reversed_before).end()
            if token["rstrip"]:
                end = WHITE_RUN.match(text, end).end()

            # 2. Yield the text before the token, then the token.
            if position < start:
                yield text[position:start]
            yield token["id"]
            position = end
        if position < len(text):
            yield text[position:]


def _is_inside_word(text, start, end):
    """Return whether a letter, a digit or a "_" touches text[start:end]."""
    before = re.search(r"\w\Z", text[:start])
    after = re.match(r"\w", text[end:])
    return bool(before or after)


def read_added_tokens(entries, normalize):
    """Return the AddedTokens to search for in a text as it is, and those for the normalized text.

    entries: "added_tokens" of a tokenizer.json.
    normalize: the function that normalizes a text.
    Raises ValueError for an entry that lacks one of the FLAGS.
    """
    for entry in entries:
        for flag in FLAGS:
            if not isinstance(entry.get(flag), bool):
                raise ValueError(f"added token {entry['content']!r} needs {flag!r}, true or false")
    raw_tokens = {}
    normalized_tokens = {}
    # The first entry of a text counts, but special tokens come before all others.
    special_first = sorted(entries, key=lambda entry: not entry["special"])
    for entry in special_first:
        # In normalized text a token is searched for in its own normalized form. Where a normalizer
        # puts a "▁" before every text, "</s>" is found as "▁</s>", and so not in "end.</s>".
        if entry["normalized"]:
            normalized_tokens.setdefault(normalize(entry["content"]), entry)
        else:
            raw_tokens.setdefault(entry["content"], entry)
    return AddedTokens(raw_tokens), AddedTokens(normalized_tokens)
