"""Read the conversations of a record: lists of messages, or plain texts, in the forms in use.

A message is LLaVA's {from: "human" | "gpt", value} or that of most chat programs, {role: "user" |
"assistant", content}. Some data sets mix the two. The content is a text or a list of parts,
[{type: "image"}, {type: "text", text}, ...], whose images become "<image>". The parts of a message
are joined by line breaks.
"""

import json

from minialign.data.fields import is_blank
from minialign.utils.files import check

QUESTION_SPEAKERS = ("human", "user")
ANSWER_SPEAKERS = ("gpt", "assistant")
SYSTEM_SPEAKER = "system"
# The fields in which a part of a message may hold the image itself, or its address. They are
# refused: the files of images are named in the record's own field.
PART_IMAGE_FIELDS = ("image", "image_url", "url", "path", "base64")
# The fields in which a message may hold more than its text. They are refused for the same reason.
MEDIA_FIELDS = ("image", "images", "video", "videos", "audio", "audios")


def read_messages(messages, name) -> list:
    """Return the texts of a list of messages, in which questions and answers take turns.

    name: that of the field, for errors.
    A system message is left out: `find_system_text` reads the one that a conversation begins with.
    """
    check(isinstance(messages, list), f"field {name!r} is not a list")
    texts = []
    for i, message in enumerate(messages, start=1):
        speaker, text = read_message(message, f"turn {i} of {name!r}")
        if speaker == SYSTEM_SPEAKER:
            is_first_or_blank = i == 1 or not text.strip()
            check(
                is_first_or_blank,
                f"turn {i} of {name!r} is a system text, which may stand in the first turn alone; "
                "move it there, or write it into the question",
            )
            continue
        expected_speakers = QUESTION_SPEAKERS if len(texts) % 2 == 0 else ANSWER_SPEAKERS
        check(
            speaker in expected_speakers,
            f"turn {i} of {name!r} is by {str(speaker)[:40]!r}, it must be by "
            f"{' or '.join(expected_speakers)}; questions and answers take turns",
        )
        texts.append(text)
    return texts


def read_conversation(messages, name):
    """Return (turns up to the last question, last answer) of a list of messages."""
    texts = read_messages(messages, name)
    check(
        texts and len(texts) % 2 == 0,
        f"{name!r} must be pairs of human and gpt turns, it has {len(texts)}",
    )
    return texts[:-1], texts[-1]


def read_prompt(prompt, name) -> list:
    """Return the turns of a prompt: a text, a list of messages, or the texts of several turns."""
    if isinstance(prompt, str):
        return [prompt]
    check(isinstance(prompt, list), f"field {name!r} is not a text or a list")
    if prompt and isinstance(prompt[0], str):
        is_texts = all(isinstance(turn, str) for turn in prompt)
        check(is_texts, f"field {name!r} is not a list of texts")
        return prompt
    turns = read_messages(prompt, name)
    check(
        len(turns) % 2 == 1,
        f"{name!r} must end with a question, it has {len(turns)} turns",
    )
    return turns


def read_answer(answer, name, turns) -> str:
    """Return the text of an answer to a conversation.

    answer: the text, a message, a list of one message, or the conversation again with the answer at
        its end. The conversation must then be the same.
    turns: the conversation up to its last question.
    """
    # 1. A text, and a single message.
    if isinstance(answer, str):
        return answer
    messages = answer
    if isinstance(answer, dict):
        messages = [answer]
    check(
        isinstance(messages, list) and messages,
        f"field {name!r} must be a text, one message, or the conversation with the answer",
    )
    if len(messages) == 1:
        speaker, text = read_message(messages[0], f"field {name!r}")
        # Not only ANSWER_SPEAKERS: LLaVA-RLHF writes the name of a model.
        check(
            speaker not in (*QUESTION_SPEAKERS, SYSTEM_SPEAKER),
            f"field {name!r} is a message by {speaker!r}, it must be an answer",
        )
        return text

    # 2. The conversation again.
    answer_turns, text = read_conversation(messages, name)
    check_same_prompt(turns, answer_turns)
    return text


def check_same_prompt(turns, other_turns):
    """Raise InputError unless two conversations are the same, apart from "<image>"."""
    check(
        without_placeholders(turns) == without_placeholders(other_turns),
        "the two conversations differ before their last answers, so these answer different prompts",
    )


def without_placeholders(turns) -> list:
    """Return turns without <image>, and without the spaces around it."""
    return [turn.replace("<image>", "").strip() for turn in turns]


def read_message(message, place):
    """Return (speaker in lower case, text) of a message. The speaker is None if it names none.

    place: where the message is in the record, for errors.
    """
    form = '{"from": "human" or "gpt", "value": text} or {"role": ..., "content": text}'
    problem = f"{place} is not a message {form}"
    check(isinstance(message, dict), problem)
    speaker = message.get("from", message.get("role"))
    content = message.get("value", message.get("content"))
    check(isinstance(speaker, str | None), problem)
    check(isinstance(content, str | list), problem)
    written_fields = [name for name in message if not is_blank(message[name])]
    media_fields = [name for name in written_fields if name in MEDIA_FIELDS]
    check(
        not media_fields,
        f"{place} has a field {' and '.join(map(repr, media_fields))} of its own; "
        "name the files of images in the record's field 'images'",
    )
    if speaker is not None:
        speaker = speaker.strip().lower()
    return speaker, _message_text(content, place)


def _message_text(content, place):
    """Return a message's content as one text. An image among its parts becomes <image>.

    A line break comes between two parts, although nobody wrote it: data in this form does not say
    what stands there. Behind an image, LLaVA's own data has one.
    """
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        check(isinstance(part, dict), f"{json.dumps(part)[:40]} is not a JSON object")
        part_type = part.get("type")
        text = part.get("text")
        if part_type == "image":
            inline_fields = [name for name in PART_IMAGE_FIELDS if part.get(name) is not None]
            check(
                not inline_fields,
                f"{place} holds an image in {', '.join(map(repr, inline_fields))}; "
                "name its file in the field 'images'",
            )
            texts.append("<image>")
            continue
        check(
            part_type == "text" and isinstance(text, str),
            f"{place} has a part that is neither an image nor a text: {json.dumps(part)[:80]}",
        )
        texts.append(text)
    return "\n".join(texts)
