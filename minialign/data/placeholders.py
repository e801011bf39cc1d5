"""Put the <image> of each image where the model expects it in the questions of a record."""

import re

from minialign.data.chat_marks import find_template_mark
from minialign.utils.files import InputError, check

# How other programs write the place of an image: <ImageHere>, <image_1>, <|image_pad|>. HTML's
# <img> is none of them, because a question may be about HTML.
FOREIGN_PLACEHOLDER = re.compile(
    r"<image([ _-]?(here|pad|placeholder|token|soft_token|\d+))?>"
    r"|<\|(image|img|vision)[ \w]*\|>"
    r"|<img_context>|<start_of_image>|<im_(patch|start|end)>",
    re.IGNORECASE,
)


def place_images(turns, num_images):
    """Return the turns with one <image> per image. Raise InputError if they are not valid.

    A single <image> comes to the front of its question, with a line break behind it, wherever it
    stood. LLaVA's training code and the chat templates of the Hugging Face hub put it there too, so
    the models were trained with it in no other place. Without any <image>, all images come in front
    of the first question. Several <image> keep their places.
    """
    # 1. Every turn is a text, and the last one is a question.
    message = "the prompt is not question, answer, ..., question, each with a text"
    check(len(turns) % 2 == 1, message)
    for turn in turns:
        check(isinstance(turn, str), message)
        check(turn.replace("<image>", "").strip(), message)

    # 2. No question is in the form of another program.
    for question in turns[::2]:
        _check_plain(question)

    # 3. The questions have an <image> for each image, or none at all.
    num_placeholders = sum(question.count("<image>") for question in turns[::2])
    check(
        not any("<image>" in answer for answer in turns[1::2]),
        "an earlier answer contains <image>, which belongs in the questions",
    )
    check(
        num_placeholders in (0, num_images),
        f"the questions contain <image> {num_placeholders} times; it must stand in them once for "
        f"each image, {num_images} in all",
    )

    # 4. Put the placeholders where the images belong.
    if num_placeholders == 0:
        return ["<image>\n" * num_images + turns[0].strip(), *turns[1:]]
    if num_placeholders == 1:
        return [_image_in_front(turn) for turn in turns]
    return turns


def _check_plain(question):
    """Raise InputError for a chat format or for the placeholder of another program."""
    mark = find_template_mark(question)
    check(
        mark is None,
        f"a question is written in a chat format already, it has {mark!r}; "
        "give the question alone, the template is added here",
    )
    other_text = question.replace("<image>", "")  # the pattern matches our own placeholder too
    placeholder = FOREIGN_PLACEHOLDER.search(other_text)
    if placeholder is not None:
        raise InputError(
            f"a question has {placeholder[0]!r}, another program's placeholder of an image; "
            "write <image>"
        )


def _image_in_front(turn):
    """Return a turn with its <image>, if it has one, in front of the text."""
    if "<image>" not in turn:
        return turn
    return "<image>\n" + turn.replace("<image>", "").strip()
