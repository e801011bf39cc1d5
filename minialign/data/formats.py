"""Records and their readers: pictures, a prompt, a chosen response and perhaps a rejected one, from the formats that are published."""

import json
import re

from minialign.utils.files import InputError, check

TYPE_NAMES = {str: "a text", list: "a list", dict: "a JSON object", (str, list): "a text or a list"}


def get_field(raw, name, kind=str):
    """What a JSON object holds under `name`, its type checked."""
    check(isinstance(raw, dict), f"{json.dumps(raw)[:40]} is not a JSON object")
    check(raw.get(name) is not None, f"no field {name!r}")
    check(isinstance(raw[name], kind), f"field {name!r} is not {TYPE_NAMES[kind]}")
    return raw[name]


def _spoken(raw, name, who="from", what="value", speakers=("human", "gpt")):
    """The texts of a list of messages whose speakers take turns; a text in parts is joined by line breaks, a picture is its <image>."""
    texts = []
    for number, message in enumerate(get_field(raw, name, list)):
        speaker = speakers[number % len(speakers)]
        if (
            not isinstance(message, dict)
            or message.get(who) != speaker
            or not isinstance(message.get(what), (str, list))
        ):
            raise InputError(
                f'turn {number + 1} of {name!r} is not {{"{who}": "{speaker}", "{what}": text}}'
            )
        parts = (
            message[what]
            if isinstance(message[what], list)
            else [{"type": "text", "text": message[what]}]
        )
        texts.append(
            "\n".join(
                "<image>" if get_field(part, "type") == "image" else get_field(part, "text")
                for part in parts
            )
        )
    return texts


def _conversation(raw, name):
    """(turns up to the last question, last answer) of a LLaVA conversation."""
    texts = _spoken(raw, name)
    check(
        texts and len(texts) % 2 == 0,
        f"{name!r} must be pairs of human and gpt turns, it has {len(texts)}",
    )
    return texts[:-1], texts[-1]


def _compared(raw, image="image_path", kind=str):
    """RLAIF-V and newer RLHF-V: {idx, image_path, question, chosen, rejected}."""
    return (
        get_field(raw, image, kind),
        [get_field(raw, "question")],
        get_field(raw, "chosen"),
        get_field(raw, "rejected"),
    )


def _llava(raw):
    """LLaVA-Instruct: {id, image, conversations: [{from: "human" | "gpt", value}, ...]}; of several turns the last answer is the response."""
    return get_field(raw, "image", (str, list)), *_conversation(raw, "conversations"), None


def _povid(raw):
    """POVID: LLaVA-Instruct and `rejected_conversations` of the same shape, which must differ in the last answer alone."""
    image, turns, chosen, _ = _llava(raw)
    others, rejected = _conversation(raw, "rejected_conversations")
    if [turn.replace("<image>", "").strip() for turn in others] != [
        turn.replace("<image>", "").strip() for turn in turns
    ]:
        raise InputError(
            "the two conversations differ before their last answers, which then follow different prompts"
        )
    return image, turns, chosen, rejected


def _llava_rlhf(raw):
    """LLaVA-RLHF: {image, conversations, output_1: {value}, output_2: {value}, preference: 1 | 2}; a last gpt turn is where the outputs go."""
    turns, outputs = (
        _spoken(raw, "conversations"),
        [get_field(get_field(raw, name, dict), "value") for name in ("output_1", "output_2")],
    )
    check(str(raw.get("preference")) in ("1", "2"), "field 'preference' is neither 1 nor 2")
    chosen, rejected = outputs if str(raw["preference"]) == "1" else outputs[::-1]
    return (
        get_field(raw, "image", (str, list)),
        turns if len(turns) % 2 else turns[:-1],
        chosen,
        rejected,
    )


def _rlhf_v(raw):
    """RLHF-V: {idx, image_path, text}, where text is itself JSON: {question, chosen, rejected}."""
    try:
        return _compared(
            json.loads(get_field(raw, "text")) | {"image_path": get_field(raw, "image_path")}
        )
    except (ValueError, TypeError, RecursionError):
        raise InputError("field 'text' is not the JSON of question, chosen and rejected") from None


def _vlfeedback(raw):
    """VLFeedback: {id, img_path, prompt, completions: {annotations: [{aspect: {Rating: "1" to "5" or "N/A"}}], response: [...]}}: best mean rating against worst."""
    image, prompt, completions = (
        get_field(raw, "img_path"),
        get_field(raw, "prompt"),
        get_field(raw, "completions", dict),
    )
    annotations, responses = (
        get_field(completions, "annotations", list),
        get_field(completions, "response", list),
    )
    if (
        len(annotations) != len(responses)
        or not all(isinstance(one, dict) for one in annotations)
        or not all(isinstance(one, str) for one in responses)
    ):
        raise InputError("'completions' must hold an annotation for each response")
    rated = []
    for annotation, response in zip(annotations, responses):
        ratings = [
            str(aspect.get("Rating")).strip()
            for aspect in annotation.values()
            if isinstance(aspect, dict)
        ]
        numbers = [float(rating) for rating in ratings if re.fullmatch(r"\d+(\.\d+)?", rating)]
        rated += [(sum(numbers) / len(numbers), response)] if numbers else []
    best, worst = (
        pick(rated, key=lambda one: one[0], default=(0, ""))[1] for pick in (max, min)
    )  # the first of equals, so one and the same where all are
    return None if best.strip() == worst.strip() else (image, [prompt], best, worst)


def _internvl(raw):
    """InternVL's MMPR: {image, question, chosen, rejected}, image a name or a list of them."""
    return _compared(raw, "image", (str, list))


def _trl(raw):
    """TRL's vision records: {images: [...], prompt, chosen, rejected}, each a list of {role, content}, content a text or [{type: "image"}, {type: "text", text}]."""
    prompt = _spoken(raw, "prompt", "role", "content", ("user", "assistant"))
    chosen, rejected = (
        _spoken(raw, name, "role", "content", ("assistant",)) for name in ("chosen", "rejected")
    )
    check(
        len(chosen) == len(rejected) == 1,
        f"'chosen' and 'rejected' must be one message each, they are {len(chosen)} and {len(rejected)}",
    )
    return get_field(raw, "images", list), prompt, *chosen, *rejected


def _pairs(raw):
    """Our own, of `sample.py pairs`: {image, prompt, chosen, rejected}; a prompt of several turns is a list. Where sampling found no other answer, a tie."""
    prompt, chosen, rejected = (
        get_field(raw, "prompt", (str, list)),
        get_field(raw, "chosen"),
        get_field(raw, "rejected"),
    )
    if {"rounds", "noise", "corrupted"} & set(raw) and rejected.strip() in ("", chosen.strip()):
        return None
    return (
        get_field(raw, "image", (str, list)),
        prompt if isinstance(prompt, list) else [prompt],
        chosen,
        rejected,
    )


# Name: the fields that tell a record of it, and its reader. The first whose fields are all there is taken, so the order matters.
FORMATS = {
    "povid": (("conversations", "rejected_conversations"), _povid),
    "llava-rlhf": (("conversations", "output_1"), _llava_rlhf),
    "llava": (("conversations",), _llava),
    "rlhf-v": (("image_path", "text"), _rlhf_v),
    "rlaif-v": (("image_path", "question"), _compared),
    "internvl": (("question",), _internvl),
    "vlfeedback": (("prompt", "completions"), _vlfeedback),
    "trl": (("prompt", "images"), _trl),
    "pairs": (("prompt",), _pairs),
}
