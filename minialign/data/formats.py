"""Read the published formats of preference and instruction data, one function per format.

Each reader takes one record of a file, a JSON object, and returns a RawExample. It returns None for
a tie, whose responses nobody ranked. It raises InputError if a field is missing or of another type.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from minialign.utils.files import InputError, check


@dataclass
class RawExample:
    """What a record says, under the same names for all formats. Only the types are checked.

    image: a file name, or a list of them.
    turns: question, answer, ..., question. The last question is the one that is answered.
    chosen: the answer, or the better of two.
    rejected: the worse answer, None for supervised data.
    """

    image: str | list
    turns: list
    chosen: str
    rejected: str | None = None


# The fields of which a pair has at least one if a sampler wrote it.
SAMPLER_FIELDS = {"rounds", "noise", "corrupted"}

# What error messages call the types of JSON fields.
TYPE_NAMES = {str: "a text", list: "a list", dict: "a JSON object", (str, list): "a text or a list"}


def get_field(raw, name, expected_type=str):
    """Return a field of a JSON object. Raise InputError unless it has the `expected_type`."""
    check(isinstance(raw, dict), f"{json.dumps(raw)[:40]} is not a JSON object")
    value = raw.get(name)
    check(value is not None, f"no field {name!r}")
    check(isinstance(value, expected_type), f"field {name!r} is not {TYPE_NAMES[expected_type]}")
    return value


def read_llava(raw):
    """Read LLaVA-Instruct. It is supervised data, and the last answer is the chosen one.

    {id, image, conversations: [{from: "human" | "gpt", value}, ...]}
    """
    turns, answer = _conversation(raw, "conversations")
    return RawExample(image=_image(raw), turns=turns, chosen=answer)


def read_povid(raw):
    """Read POVID: LLaVA-Instruct with a second conversation that differs in its last answer.

    {id, image, conversations: [...], rejected_conversations: [...]}
    """
    turns, chosen = _conversation(raw, "conversations")
    rejected_turns, rejected = _conversation(raw, "rejected_conversations")
    check(
        _without_placeholders(turns) == _without_placeholders(rejected_turns),
        "the two conversations differ before their last answers, so these answer different prompts",
    )
    return RawExample(image=_image(raw), turns=turns, chosen=chosen, rejected=rejected)


def read_llava_rlhf(raw):
    """Read the preferences of LLaVA-RLHF.

    {image, conversations, output_1: {value}, output_2: {value}, preference: 1 | 2}
    """
    turns = _llava_messages(raw, "conversations")
    if len(turns) % 2 == 0:
        turns = turns[:-1]  # a last gpt turn only marks the place of the two outputs
    output_1 = get_field(get_field(raw, "output_1", dict), "value")
    output_2 = get_field(get_field(raw, "output_2", dict), "value")
    preference = str(raw.get("preference"))
    check(preference in ("1", "2"), "field 'preference' is neither 1 nor 2")
    if preference == "1":
        return RawExample(image=_image(raw), turns=turns, chosen=output_1, rejected=output_2)
    return RawExample(image=_image(raw), turns=turns, chosen=output_2, rejected=output_1)


def read_rlaif_v(raw):
    """Read RLAIF-V, and RLHF-V as it is exported today.

    {idx, image_path, question, chosen, rejected}
    """
    return RawExample(
        image=get_field(raw, "image_path"),
        turns=[get_field(raw, "question")],
        chosen=get_field(raw, "chosen"),
        rejected=get_field(raw, "rejected"),
    )


def read_rlhf_v(raw):
    """Read RLHF-V, whose field `text` is itself JSON: {question, chosen, rejected}.

    {idx, image_path, text}
    """
    text = get_field(raw, "text")
    try:
        comparison = json.loads(text)
    except (ValueError, RecursionError):
        comparison = None
    check(
        isinstance(comparison, dict),
        "field 'text' is not the JSON of question, chosen and rejected",
    )
    return read_rlaif_v({**comparison, "image_path": get_field(raw, "image_path")})


def read_internvl(raw):
    """Read InternVL's MMPR.

    {image, question, chosen, rejected}, where image is a name or a list of names
    """
    return RawExample(
        image=_image(raw),
        turns=[get_field(raw, "question")],
        chosen=get_field(raw, "chosen"),
        rejected=get_field(raw, "rejected"),
    )


def read_vlfeedback(raw):
    """Read VLFeedback, and compare the response of the best mean rating with that of the worst.

    {id, img_path, prompt, completions: {annotations: [{aspect: {Rating}, ...}, ...],
    response: [...]}}, where a rating is "1" to "5" or "N/A"
    """
    # 1. The responses, with one annotation each.
    image = get_field(raw, "img_path")
    prompt = get_field(raw, "prompt")
    completions = get_field(raw, "completions", dict)
    annotations = get_field(completions, "annotations", list)
    responses = get_field(completions, "response", list)
    message = "'completions' must hold an annotation for each response"
    check(len(annotations) == len(responses), message)
    for annotation, response in zip(annotations, responses, strict=True):
        check(isinstance(annotation, dict) and isinstance(response, str), message)

    # 2. The mean rating of each response that has ratings.
    rated_responses = []
    for annotation, response in zip(annotations, responses, strict=True):
        ratings = _ratings(annotation)
        if ratings:
            mean_rating = sum(ratings) / len(ratings)
            rated_responses.append((mean_rating, response))
    if not rated_responses:
        return None

    # 3. Best against worst. Of equals the first counts, so both are the same if all are equal.
    _, best = max(rated_responses, key=itemgetter(0))
    _, worst = min(rated_responses, key=itemgetter(0))
    if best.strip() == worst.strip():
        return None
    return RawExample(image=image, turns=[prompt], chosen=best, rejected=worst)


def read_trl(raw):
    """Read TRL's vision records.

    {images: [...], prompt: [message, ...], chosen: [message], rejected: [message]}, where a message
    is {role, content} and its content a text or [{type: "image"}, {type: "text", text}, ...]
    """
    turns = _trl_messages(raw, "prompt", speakers=("user", "assistant"))
    chosen = _trl_messages(raw, "chosen", speakers=("assistant",))
    rejected = _trl_messages(raw, "rejected", speakers=("assistant",))
    check(
        len(chosen) == 1 and len(rejected) == 1,
        "'chosen' and 'rejected' must be one message each, "
        f"they are {len(chosen)} and {len(rejected)}",
    )
    images = get_field(raw, "images", list)
    return RawExample(image=images, turns=turns, chosen=chosen[0], rejected=rejected[0])


def read_pairs(raw):
    """Read the pairs that `sample.py pairs` writes. A prompt of several turns is a list.

    {id, image, prompt, chosen, rejected, rounds | noise | corrupted: ...}
    """
    prompt = get_field(raw, "prompt", (str, list))
    chosen = get_field(raw, "chosen")
    rejected = get_field(raw, "rejected")
    # A sampler writes a pair for every record, also where it found no other response: a tie.
    is_sampled = not SAMPLER_FIELDS.isdisjoint(raw)
    if is_sampled and rejected.strip() in ("", chosen.strip()):
        return None
    turns = prompt
    if isinstance(prompt, str):
        turns = [prompt]
    return RawExample(image=_image(raw), turns=turns, chosen=chosen, rejected=rejected)


def _image(raw):
    """Return the field `image`, a file name or a list of them."""
    return get_field(raw, "image", (str, list))


def _conversation(raw, name):
    """Return (turns up to the last question, last answer) of a LLaVA conversation."""
    texts = _llava_messages(raw, name)
    check(
        texts and len(texts) % 2 == 0,
        f"{name!r} must be pairs of human and gpt turns, it has {len(texts)}",
    )
    return texts[:-1], texts[-1]


def _llava_messages(raw, name):
    """Return the texts of a list of messages {from: "human" | "gpt", value}."""
    return _messages(
        get_field(raw, name, list),
        name,
        speakers=("human", "gpt"),
        speaker_key="from",
        content_key="value",
    )


def _trl_messages(raw, name, speakers):
    """Return the texts of a list of messages {role, content}."""
    return _messages(
        get_field(raw, name, list),
        name,
        speakers=speakers,
        speaker_key="role",
        content_key="content",
    )


def _messages(messages, name, *, speakers, speaker_key, content_key):
    """Return the texts of messages, whose speakers must take turns. `name` is for the errors."""
    texts = []
    for i, message in enumerate(messages):
        speaker = speakers[i % len(speakers)]
        form = f'{{"{speaker_key}": "{speaker}", "{content_key}": text}}'
        problem = f"turn {i + 1} of {name!r} is not {form}"
        check(isinstance(message, dict) and message.get(speaker_key) == speaker, problem)
        content = message.get(content_key)
        check(isinstance(content, (str, list)), problem)
        texts.append(_message_text(content))
    return texts


def _message_text(content):
    """Return a message's content as one text. An image among its parts becomes <image>."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if get_field(part, "type") == "image":
            texts.append("<image>")
        else:
            texts.append(get_field(part, "text"))
    return "\n".join(texts)


def _without_placeholders(turns):
    """Return turns without <image>, and without the spaces around it."""
    return [turn.replace("<image>", "").strip() for turn in turns]


def _ratings(annotation):
    """Return the ratings of VLFeedback's aspects that are numbers."""
    ratings = []
    for aspect in annotation.values():
        if isinstance(aspect, dict):
            rating = str(aspect.get("Rating")).strip()
            if re.fullmatch(r"\d+(\.\d+)?", rating):  # not "N/A", "nan" or "inf"
                ratings.append(float(rating))
    return ratings


@dataclass(frozen=True)
class Format:
    """A data format: the fields that identify its records, and its reader."""

    fields: tuple
    read: Callable


# A record has the first of these formats whose fields it has all, so the order matters.
FORMATS = {
    "povid": Format(fields=("conversations", "rejected_conversations"), read=read_povid),
    "llava-rlhf": Format(fields=("conversations", "output_1"), read=read_llava_rlhf),
    "llava": Format(fields=("conversations",), read=read_llava),
    "rlhf-v": Format(fields=("image_path", "text"), read=read_rlhf_v),
    "rlaif-v": Format(fields=("image_path", "question"), read=read_rlaif_v),
    "internvl": Format(fields=("question",), read=read_internvl),
    "vlfeedback": Format(fields=("prompt", "completions"), read=read_vlfeedback),
    "trl": Format(fields=("prompt", "images"), read=read_trl),
    "pairs": Format(fields=("prompt",), read=read_pairs),
}


def detect_format(raw, first_format=None):
    """Return the name of a record's format, which must be that of the file's first record."""
    # 1. Find the first format whose fields the record has.
    problem = "has the fields of no known format"
    for name, format in FORMATS.items():
        if all(raw.get(field) is not None for field in format.fields):
            if first_format in (None, name):
                return name
            problem = f"looks like {name}"
            break

    # 2. Say what was expected instead.
    if first_format is not None:
        expected = f"{_describe(first_format)} like the first record"
    else:
        expected = "; ".join(_describe(name) for name in FORMATS)
    raise InputError(f"{problem}, expected {expected}; a file has one format, --format names it")


def _describe(name):
    """Return a format's name and the fields that identify it."""
    return f"{name} ({', '.join(FORMATS[name].fields)})"
