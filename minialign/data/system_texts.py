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


def check_system_text(system, place="the prompt"):
    """Raise InputError unless a value is a text that may stand in the place of a system text.

    place: where it comes from, for errors.
    """
    check(isinstance(system, str), f"{place}: the system text is not a text: {str(system)[:60]}")
    check_unicode(system)
    mark = find_system_mark(system)
    problems = (
        (not system.strip(), "is empty; leave it out, or write something into it"),
        (IMAGE_PLACEHOLDER in system, f"has {IMAGE_PLACEHOLDER} in it; write that into a question"),
        (mark, f"is in a chat format already, it has {mark!r}; give the text alone"),
    )
    for is_wrong, problem in problems:
        check(not is_wrong, f"{place}: the system text {system[:60]!r} {problem}")


def find_system_text(raw) -> str | None:
    """Return the system text of a record, the JSON object `raw`. None if it has none.

    A blank one says nothing, and is none. Raises InputError for one that is not a text, and for
    two that differ.
    """
    # 1. The first messages of its conversations, which must be the same prompt. Here one without a
    #    system text differs from one that has it.
    texts = {}
    for name in (*CONVERSATION_FIELDS, *ANSWER_FIELDS):
        if _is_conversation(raw, name):
            texts[name] = _first_system_text(raw[name], name)
    _check_same_text(texts)
    texts = {name: text for name, text in texts.items() if text is not None}

    # 2. The field `system`, which may stand beside conversations without a system text.
    value = raw.get(SYSTEM)
    is_text = isinstance(value, str)
    check(is_text or is_blank(value), f"field {SYSTEM!r} is not a text; write one, or leave it out")
    if is_text and value.strip():
        texts[SYSTEM] = value
    _check_same_text(texts)

    # 3. All that are left agree, so the first is the text. Errors name the field of each.
    for name, text in texts.items():
        check_system_text(text, f"field {name!r}")
    return next(iter(texts.values()), None)


def _is_conversation(raw, name):
    """Return whether a field of a record holds a list of messages with a prompt in it."""
    messages = raw.get(name)
    if not isinstance(messages, list) or not all(isinstance(item, dict) for item in messages):
        return False
    is_answer_alone = name in ANSWER_FIELDS and len(messages) == 1
    return len(messages) > 0 and not is_answer_alone


def _first_system_text(messages, name):
    """Return the system text that a conversation begins with, None if it says nothing."""
    speaker, text = read_message(messages[0], f"turn 1 of {name!r}")
    if speaker != SYSTEM_SPEAKER or not text.strip():
        return None
    return text


def _check_same_text(texts):
    """Raise InputError unless all system texts, by the names of their fields, are the same."""
    names = list(texts)
    for name in names[1:]:
        check(
            texts[name] == texts[names[0]],
            f"fields {names[0]!r} and {name!r} have different system texts "
            f"({texts[names[0]]!r:.60} and {texts[name]!r:.60}), so they are different prompts; "
            "give one text",
        )
