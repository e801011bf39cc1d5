"""Find the fields of a record that mean something, but that the reader of its format ignores.

A reader that ignores such a field misunderstands the record. `rejected_images` says that the worse
answer was written about another image, and `kto_tag` that the only answer may be a bad one.
"""

import re

from minialign.data.fields import IMAGE, SYSTEM, as_list, find_field, get_images, is_blank
from minialign.data.formats import FORMATS
from minialign.utils.files import check

# Words that tell one of several answers from the others.
RANKED = (
    r"(chosen|reject|rejected|negative|positive|preferred|dispreferred|winner|loser|worse|better"
    r"|output|completion|candidate)s?"
)
# What an answer is called.
ANSWER = r"(conversation|message|response|answer|text|output|completion|caption)s?"
# What an answer is about besides the text of the question.
MEDIUM = r"(image|img|video|audio)s?(_?path)?s?"
# The names of fields that say what is learned, or what the model is given.
MEANINGFUL_NAME = re.compile(
    # An answer of two or more, or what it is about: "chosen", "rejected_2", "negative_images".
    rf"{RANKED}(_?(\d|{ANSWER}|{MEDIUM}))*"
    rf"|({ANSWER}|{MEDIUM})_{RANKED}"
    rf"|(response|answer)_?\d+"
    # What is asked, and what belongs to the question.
    r"|conversations?|messages|prompt|question|instruction|query|history|tools"
    r"|sys(tem)?(_?(prompt|message|text|instruction)s?)?"
    rf"|{MEDIUM}(_?\d+)?"
    # Which answer is better, or whether the only one is good.
    r"|preference|label|kto_?(tag|label)"
)


def find_unread_fields(raw, format) -> list:
    """Return the names of a record's meaningful fields that the format does not read.

    raw: the record as the file has it.
    format: a key of FORMATS.
    """
    names_read = {*IMAGE, SYSTEM, *FORMATS[format].also_reads}
    for names in FORMATS[format].fields:
        names_read.add(find_field(raw, names))
    unread = []
    for name, value in raw.items():
        is_meaningful = MEANINGFUL_NAME.fullmatch(_plain(name)) and not is_blank(value)
        if is_meaningful and name not in names_read and not _repeats_images(raw, name):
            unread.append(name)
    return unread


def check_same_images(unread_fields):
    """Raise InputError if an unread field gives one of the answers of a pair other images.

    unread_fields: names that `find_unread_fields` has returned.
    """
    for name in unread_fields:
        plain = _plain(name)
        names_images_of_an_answer = re.search(RANKED, plain) and re.search(MEDIUM, plain)
        check(
            not names_images_of_an_answer,
            f"{name!r} names other images for one of the answers, but both answers of a pair must "
            "be about the same images",
        )


def _plain(name):
    """Return the name of a field in lower case, with underscores in place of hyphens."""
    return name.lower().replace("-", "_")


def _repeats_images(raw, name):
    """Return whether a field names the images of the record once more.

    ms-swift writes `rejected_images` also where both answers are about the same images.
    """
    images = get_images(raw)
    return images is not None and as_list(raw[name]) == as_list(images)
