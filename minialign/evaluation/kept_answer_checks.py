"""Check the lines of files with kept answers, which may come from elsewhere."""

from minialign.evaluation.evaluation_sets import has_texts
from minialign.utils.files import check

REMEDY = "restore it, or measure again"
MENTION_FORM = '{"start": number, "end": number, "object": text, "present": true|false}'
CAPTION_FORM = (
    '{"set": text, "image": text, "prompt": text, "objects": [text], "answers": {model: {"text": '
    'text, "mentions": [mention]}}}'
)
QUESTION_FORM = (
    '{"set": text, "split": text, "image": text, "question": text, "truth": "yes"|"no", '
    '"answers": {model: text}}'
)


def check_caption_line(line, where):
    """Raise InputError that begins with `where` unless a line of captions.jsonl can be used."""
    has_form = (
        has_texts(line, ("set", "image", "prompt"))
        and is_list_of_texts(line["objects"])
        and isinstance(line.get("folder", ""), str)
        and isinstance(line.get("answers"), dict)
    )
    check(has_form, f"{where}: not of the form {CAPTION_FORM}; {REMEDY}")
    objects = set(line["objects"])
    check(len(objects) == len(line["objects"]), f"{where}: an object is listed twice; {REMEDY}")
    for model_name, answer in line["answers"].items():
        check_caption(answer, objects, f"{where}, the caption of {model_name!r}")


def check_caption(answer, objects, where):
    """Raise InputError unless a caption has a text, and mentions with their right verdicts."""
    has_form = (
        has_texts(answer, ("text",))
        and isinstance(answer.get("mentions"), list)
        and is_list_of_texts(answer.get("missed", []))
    )
    check(has_form, f'{where}: has no "text" or no "mentions"; {REMEDY}')
    end_of_last = 0
    for mention in answer["mentions"]:
        check(
            is_mention(mention), f"{where}: a mention is not of the form {MENTION_FORM}; {REMEDY}"
        )
        start = mention["start"]
        end = mention["end"]
        name = mention["object"]
        check(
            end_of_last <= start < end <= len(answer["text"]),
            f"{where}: the mention of {name!r} is not behind the one before it, or not in the "
            f"text; {REMEDY}",
        )
        check(
            mention["present"] == (name in objects),
            f'{where}: whether {name!r} is "present" contradicts the list of objects; {REMEDY}',
        )
        end_of_last = end


def is_mention(value) -> bool:
    """Return whether a JSON value has the fields of a mention, each of its type."""
    if not has_texts(value, ("object",)):
        return False
    return (
        type(value.get("start")) is int
        and type(value.get("end")) is int
        and type(value.get("present")) is bool
        and isinstance(value.get("colour"), str | None)
        and isinstance(value.get("right_colour"), bool | None)
    )


def is_list_of_texts(value) -> bool:
    """Return whether a JSON value is a list of texts."""
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def check_question_line(line, where):
    """Raise InputError that begins with `where` unless a line of answers.jsonl can be used."""
    has_form = (
        has_texts(line, ("set", "split", "image", "question"))
        and line.get("truth") in ("yes", "no")
        and isinstance(line.get("folder", ""), str)
        and isinstance(line.get("answers"), dict)
        and is_list_of_texts(list(line["answers"].values()))
    )
    check(has_form, f"{where}: not of the form {QUESTION_FORM}; {REMEDY}")
