"""Check the lines of files with kept answers, which may come from elsewhere."""

from types import NoneType

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

# The kinds of JSON values, by their types in Python.
TEXT = (str,)
NUMBER = (int,)
TRUTH_VALUE = (bool,)
LIST = (list,)
OBJECT = (dict,)
TEXT_OR_NULL = (str, NoneType)
TRUTH_VALUE_OR_NULL = (bool, NoneType)

# The fields of the JSON objects of a line, and the kinds of their values. Files that were not
# written by `KeptAnswers` may lack those that are named OPTIONAL here.
CAPTION_FIELDS = {"set": TEXT, "image": TEXT, "prompt": TEXT, "objects": LIST, "answers": OBJECT}
QUESTION_FIELDS = {
    "set": TEXT,
    "split": TEXT,
    "image": TEXT,
    "question": TEXT,
    "truth": TEXT,
    "answers": OBJECT,
}
OPTIONAL_LINE_FIELDS = {"folder": TEXT}
ANSWER_FIELDS = {"text": TEXT, "mentions": LIST}
OPTIONAL_ANSWER_FIELDS = {"missed": LIST}
MENTION_FIELDS = {"start": NUMBER, "end": NUMBER, "object": TEXT, "present": TRUTH_VALUE}
OPTIONAL_MENTION_FIELDS = {"colour": TEXT_OR_NULL, "right_colour": TRUTH_VALUE_OR_NULL}


def check_caption_line(line, where):
    """Raise InputError that begins with `where` unless a line of captions.jsonl can be used."""
    message = f"{where}: not of the form {CAPTION_FORM}; {REMEDY}"
    check(has_fields(line, CAPTION_FIELDS, OPTIONAL_LINE_FIELDS), message)
    check(are_texts(line["objects"]), message)
    objects = set(line["objects"])
    check(len(objects) == len(line["objects"]), f"{where}: an object is listed twice; {REMEDY}")
    for model_name, answer in line["answers"].items():
        check_caption(answer, objects, f"{where}, the caption of {model_name!r}")


def check_caption(answer, objects, where):
    """Raise InputError unless a caption has a text, and mentions with their right verdicts."""
    message = f'{where}: has no "text" or no "mentions"; {REMEDY}'
    check(has_fields(answer, ANSWER_FIELDS, OPTIONAL_ANSWER_FIELDS), message)
    check(are_texts(answer.get("missed", [])), message)
    end_of_last = 0
    for mention in answer["mentions"]:
        check_mention(mention, objects, where)
        name = mention["object"]
        check(
            end_of_last <= mention["start"] < mention["end"] <= len(answer["text"]),
            f"{where}: the mention of {name!r} is not behind the one before it, or not in the "
            f"text; {REMEDY}",
        )
        end_of_last = mention["end"]


def check_mention(mention, objects, where):
    """Raise InputError unless a mention has all its fields, and the verdict that fits `objects`."""
    check(
        has_fields(mention, MENTION_FIELDS, OPTIONAL_MENTION_FIELDS),
        f"{where}: a mention is not of the form {MENTION_FORM}; {REMEDY}",
    )
    name = mention["object"]
    is_present = name in objects
    check(
        mention["present"] == is_present,
        f'{where}: whether {name!r} is "present" contradicts the list of objects; {REMEDY}',
    )


def check_question_line(line, where):
    """Raise InputError that begins with `where` unless a line of answers.jsonl can be used."""
    message = f"{where}: not of the form {QUESTION_FORM}; {REMEDY}"
    check(has_fields(line, QUESTION_FIELDS, OPTIONAL_LINE_FIELDS), message)
    check(line["truth"] in ("yes", "no"), message)
    check(are_texts(line["answers"].values()), message)


def check_models(model_names, first_names, set_name, where):
    """Raise InputError unless a line has answers of the same models as the first of its set."""
    check(
        model_names and model_names == first_names,
        f"{where}: has answers of {describe(model_names)}, but the first one of the set "
        f"{set_name!r} has those of {describe(first_names)}; {REMEDY}",
    )


def describe(model_names):
    """Return the names of models as an error shows them."""
    return ", ".join(model_names) or "no model"


def has_fields(value, fields, optional_fields) -> bool:
    """Return whether a JSON value is an object with these fields, whose values are of their kinds.

    It may lack optional fields, and have others. A kind names exact types, because for Python True
    is a number, too.
    """
    if type(value) is not dict or not fields.keys() <= value.keys():
        return False
    kinds = fields | optional_fields
    known_fields = kinds.keys() & value.keys()
    return all(type(value[name]) in kinds[name] for name in known_fields)


def are_texts(values) -> bool:
    """Return whether all of some JSON values are texts."""
    return all(isinstance(value, str) for value in values)
