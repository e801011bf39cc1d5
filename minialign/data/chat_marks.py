"""Find the marks that show that a text of the data is written in a chat format already."""

import functools

from minialign.data.templates import IMAGE_PLACEHOLDER, TEMPLATES, find_template

# BOS tokens, and marks of chat formats that are not built in: those at the beginning of a prompt,
# and those at its end.
OTHER_BEGINNINGS = ("<s>", "<|begin_of_text|>", "### Human:", "###Human:", "<|user|>")
OTHER_ENDINGS = ("### Assistant:", "###Assistant:", "<|assistant|>")


def find_template_mark(question, template=None, bos_text=None) -> str | None:
    """Return the text that shows that a question is written in a chat format already, or None.

    The formats are those of all built-in templates, that of `template`, and a few others. The model
    has never seen a prompt that is in a format twice.
    """
    beginnings, endings = _marks_of_questions(template, bos_text)
    text = question.replace(IMAGE_PLACEHOLDER, "").strip()
    found = _find_beginning(text, beginnings)
    for ending in endings:
        if found is None and ending and text.endswith(ending):
            found = ending
    return found


@functools.cache  # a file has thousands of questions, which are compared with the same marks
def _marks_of_questions(template, bos_text):
    """Return the marks at the beginning of a question, and those at its end."""
    chat_formats = list(TEMPLATES.values())
    if template is not None:
        chat_formats.append(find_template(template))
    beginnings = [*OTHER_BEGINNINGS, bos_text]
    endings = [*OTHER_ENDINGS]
    for chat_format in chat_formats:
        _, _, after = chat_format.user_turn.partition("{}")
        beginnings += [*_turn_beginnings(chat_format), chat_format.system.strip()]
        endings.append(after.strip())
    return beginnings, endings


def find_system_mark(system) -> str | None:
    """Return the text that shows that a system text is written in a chat format already, or None.

    The system text that a template writes by itself is no such mark: a record may spell it out.
    """
    beginnings = [*OTHER_BEGINNINGS]
    for chat_format in TEMPLATES.values():
        beginnings += _turn_beginnings(chat_format)
    return _find_beginning(system.strip(), beginnings)


def _turn_beginnings(chat_format):
    """Return what the user's turns of a chat format begin with, and what its system texts do."""
    beginnings = []
    for turn in (chat_format.user_turn, chat_format.system_turn, chat_format.system_in_question):
        if turn is not None:
            before, _, _ = turn.partition("{}")
            beginnings.append(before.strip())
    return beginnings


def _find_beginning(text, beginnings):
    """Return the first of the beginnings that a text has, or None. Empty ones do not count."""
    for beginning in beginnings:
        if beginning and text.startswith(beginning):
            return beginning
    return None
