r"""Translate the regular expressions of tokenizer.json for Python's re module.

They are written for a regex engine that knows Unicode categories, as in \p{L}, and takes \s for
Unicode's white space.
"""

import functools
import re
import unicodedata

# The inside of a character class: the characters with Unicode's property White_Space. Python's \s
# would add the separators \x1c to \x1f.
WHITE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"


@functools.lru_cache
def category_ranges(name) -> str:
    """Return the inside of a character class with all characters of a Unicode category.

    `name` is a category such as "Nd", or only its first letter: "L" stands for every letter.
    """
    ranges = []
    for code_point in range(0x110000):
        if not unicodedata.category(chr(code_point)).startswith(name):
            continue
        if ranges and ranges[-1][1] == code_point - 1:
            ranges[-1][1] = code_point
        else:
            ranges.append([code_point, code_point])
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


def python_pattern(pattern) -> str:
    r"""Translate a regex of tokenizer.json. Raises ValueError where that cannot be done.

    \s, \S, \p{..} and \P{..} become character classes, or parts of the class that they stand in.
    """
    translated = []
    in_class = False  # whether the position is between [ and ]
    for token in re.findall(r"\\[pP]\{\w+\}|\\.|.", pattern, re.DOTALL):
        if token in ("[", "]"):
            in_class = token == "["
        elif token[:2] in (r"\s", r"\S", r"\p", r"\P"):
            token = _character_class(token, in_class)
        translated.append(token)
    return "".join(translated)


def _character_class(token, in_class):
    r"""Return the characters that \s, \S, \p{..} or \P{..} stands for."""
    letter = token[1]
    if letter in "sS":
        members = WHITE
    else:
        members = category_ranges(token[3:-1])
    is_negated = letter.isupper()
    # A class can be negated as a whole only. An empty class is no valid pattern.
    if not members or (is_negated and in_class):
        location = " inside [...]" if in_class else ""
        raise ValueError(f"pre-tokenizer regex with {token}{location}")
    if in_class:
        return members
    if is_negated:
        return f"[^{members}]"
    return f"[{members}]"
