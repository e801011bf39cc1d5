"""Print messages for a person, with nothing in them that would steer the terminal.

Names of files and ids of records come from outside. One may hold control characters, which clear
the screen or forge a line, or be as long as a book.
"""

import sys

MAX_CHARACTERS = 800  # enough for an error that shows two prompts
ENDING_CHARACTERS = 300  # of these for the end of the message, which holds the remedy


def printable(text, max_characters=MAX_CHARACTERS) -> str:
    """Return a text as one line for the terminal, with escapes such as \\x1b and \\n, shortened.

    Letters of every script stay as they are. Control characters, characters that change the
    direction of the text and characters without a shape become escapes.
    """
    # 1. Shorten, in the middle.
    if len(text) > max_characters:
        start = text[: max_characters - ENDING_CHARACTERS]
        text = f"{start} ... {text[-ENDING_CHARACTERS:]}"

    # 2. Escape.
    characters = []
    for character in text:
        if not character.isprintable():
            character = character.encode("unicode_escape").decode()
        characters.append(character)
    return "".join(characters)


def print_message(text):
    """Print one line to standard error, which is where everything but results goes."""
    print(printable(text), file=sys.stderr)
