"""The grammar of the tiny world's captions: read a caption back into what it says.

It is the inverse of texts.py. It tells whether a model's answer is a caption that the world could
have written, whatever the image shows.
"""

import functools
import re

from tiny_world.scenes import COLORS, NUMBERS, OBJECTS, PLACES, THEMES, Item, Scene
from tiny_world.texts import WORDINGS, describe, with_article

Statement = tuple[str, str, int]  # color, name and cell of an object


def read_caption(caption: str, request: str) -> list[Statement] | None:
    """Return what each sentence of a caption says.

    Returns None if a sentence is not in the wording that the request settles, or if the request is
    none of the world's.
    """
    wording = find_wording(request)
    if wording is None:
        return None
    statement_of = sentences_of(wording)
    statements = []
    for sentence in re.split(r"(?<=\.) ", caption):
        if sentence not in statement_of:
            return None
        statements.append(statement_of[sentence])
    return statements


def is_well_formed(caption: str, request: str) -> bool:
    """Return whether the world could have written a caption as the answer to a request.

    Every sentence follows the wording. There are two to four of them, about different objects, in
    different places that are named row by row.
    """
    statements = read_caption(caption, request)
    if statements is None:
        return False
    names = {name for _, name, _ in statements}
    cells = [cell for _, _, cell in statements]
    in_order = sorted(set(cells)) == cells
    return len(statements) in NUMBERS and len(names) == len(statements) and in_order


def find_wording(request: str) -> str | None:
    """Return the wording of the captions that a request asks for, or None."""
    for template, wording in WORDINGS:
        requests = [template.format(theme=with_article(theme)) for theme in THEMES]
        if request in requests:
            return wording
    return None


@functools.cache
def sentences_of(wording: str) -> dict[str, Statement]:
    """Return all sentences in a wording, with what each says."""
    statement_of = {}
    for color in COLORS:
        for name in OBJECTS:
            for cell in range(len(PLACES)):
                item = Item(name, color, cell, size=0, offset=(0, 0))
                sentence = describe(Scene(theme="", items=[item]), wording)
                statement_of[sentence] = (color, name, cell)
    return statement_of
