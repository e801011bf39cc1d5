"""System texts: where a record says under which instruction it is answered, and what is refused.

A record has a field `system`, or its conversation begins with a message of the speaker "system".
"""

from minialign.data.chat_marks import find_system_mark
from minialign.data.conversations import SYSTEM_SPEAKER, read_message
from minialign.data.fields import SYSTEM, is_blank
from minialign.data.templates import IMAGE_PLACEHOLDER
from minialign.data.tokenizer import check_unicode
from minialign.utils.files import check

# The fields that may hold a conversation, as a list of messages.
CONVERSATION_FIELDS = ("conversations", "messages", "prompt")
# The fields that may hold one too, or an answer alone: a text, a message, or a list of one message.
ANSWER_FIELDS = ("rejected_conversations", "rejected_messages", "chosen", "rejected")


def check_system_text(system, place=None):
    """Raise InputError unless a value is a text that may stand in the place of a system text.

    place: what holds the value, such as a field or an option, for errors.
    """
    prefix = f"{place}: " if place else ""
    check(isinstance(system, str), f"{prefix}the system text is not a text: {str(system)[:60]}")
    check_unicode(system)
    text_start = f"{prefix}the system text {system[:60]!r}"
    check(system.strip(), f"{text_start} is empty; leave it out, or write something into it")
    check(
        IMAGE_PLACEHOLDER not in system,
        f"{text_start} has {IMAGE_PLACEHOLDER} in it; write that into a question",
    )
    mark = find_system_mark(system)
    check(
        mark is None,
        f"{text_start} is in a chat format already, it has {mark!r}; give the text alone",
    )


def find_system_text(raw, unread_fields=()) -> str | None:
    """Return the system text of a record, the JSON object `raw`, or None if it has none.

    unread_fields: names of fields that the record's format does not read, so they are left out.

    A blank text says nothing, and counts as none. Raises InputError for a system text that is not
    a text or may not be one, and for two that differ.
    """
    # 1. The conversations: {name of a field: its system text, or None}. All of them must have the
    #    same prompt. So one without a system text does not agree with one that has it.
    texts = {}
    for name in (*CONVERSATION_FIELDS, *ANSWER_FIELDS):
        if name not in unread_fields and _is_conversation(raw, name):
            texts[name] = _first_system_text(raw[name], name)
    _check_same_text(texts)
    texts = {name: text for name, text in texts.items() if text is not None}

    # 2. The field `system`. The conversations beside it may have no system text.
    value = raw.get(SYSTEM)
    is_text = isinstance(value, str)
    check(is_text or is_blank(value), f"field {SYSTEM!r} is not a text; write one, or leave it out")
    if is_text and value.strip():
        texts[SYSTEM] = value
    _check_same_text(texts)

    # 3. The texts that are left are all the same. Any of them is that of the record.
    if not texts:
        return None
    name, system = next(iter(texts.items()))
    check_system_text(system, f"field {name!r}")
    return system


def _is_conversation(raw, name):
    """Return whether a field of a record holds a list of messages with a prompt in it."""
    messages = raw.get(name)
    if not isinstance(messages, list) or len(messages) == 0:
        return False
    if name in ANSWER_FIELDS and len(messages) == 1:  # an answer alone
        return False
    return all(isinstance(message, dict) for message in messages)


def _first_system_text(messages, name):
    """Return the system text that a conversation begins with, None if it says nothing."""
    speaker, text = read_message(messages[0], f"turn 1 of {name!r}")
    if speaker != SYSTEM_SPEAKER or not text.strip():
        return None
    return text


def _check_same_text(texts):
    """Raise InputError unless all system texts are the same: {name of a field: text or None}."""
    if not texts:
        return
    first_name, first_text = next(iter(texts.items()))
    for name, text in texts.items():
        check(
            text == first_text,
            f"fields {first_name!r} and {name!r} have different system texts "
            f"({first_text!r:.60} and {text!r:.60}), so they are different prompts; give one text",
        )
