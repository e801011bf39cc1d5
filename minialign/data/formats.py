"""Read the published formats of preference and instruction data, one function per format.

Each reader takes one record of a file, the JSON object `raw`, and returns a RawExample. It returns
None for a tie: two responses of which neither is better. It raises InputError if a field is missing
or of another type. Its docstring shows the fields of a record. FORMATS, below, lists all readers.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import itemgetter

from minialign.data.conversations import (
    check_same_prompt,
    read_answer,
    read_conversation,
    read_messages,
    read_prompt,
)
from minialign.data.fields import (
    CONVERSATION,
    IMAGE,
    REJECTED,
    REJECTED_CONVERSATION,
    find_field,
    get_field,
    get_images,
)
from minialign.utils.files import InputError, check


@dataclass
class RawExample:
    """What a record says, under the same names for all formats. Only the types are checked.

    image: a file name, or a list of them, None for a record without an image.
    turns: question, answer, ..., question. The last question is the one that is answered.
    chosen: the answer, or the better of two.
    rejected: the worse answer, None for supervised data.
    """

    image: str | list | None
    turns: list
    chosen: str
    rejected: str | None = None


# The fields that say how a rejected response was sampled. A pair of `sample.py pairs` has one.
SAMPLER_FIELDS = {"rounds", "noise", "corrupted"}


def _pair(raw, turns, chosen_field="chosen", rejected_field="rejected"):
    """Return the RawExample of a record that has a field for each of its two answers."""
    chosen = read_answer(get_field(raw, chosen_field), chosen_field, turns)
    rejected = read_answer(get_field(raw, rejected_field), rejected_field, turns)
    return RawExample(image=get_images(raw), turns=turns, chosen=chosen, rejected=rejected)


def read_llava(raw):
    """Read LLaVA-Instruct. It is supervised data, and the last answer is the chosen one.

    {id, image, conversations: [{from: "human" | "gpt", value}, ...]}
    LLaMA-Factory and others write {images: [...], messages: [{role, content}, ...]}.
    """
    name = find_field(raw, CONVERSATION)
    turns, answer = read_conversation(get_field(raw, name, list), name)
    return RawExample(image=get_images(raw), turns=turns, chosen=answer)


def read_llava_pair(raw):
    """Read LLaVA-Instruct with a worse answer, which is rejected for the last one.

    {id, image, conversations: [...], rejected: text}, where `rejected` may also be a message
    ms-swift writes {images: [...], messages: [...], rejected_response: text}.
    """
    example = read_llava(raw)
    name = find_field(raw, REJECTED)
    example.rejected = read_answer(get_field(raw, name), name, example.turns)
    return example


def read_povid(raw):
    """Read POVID: LLaVA-Instruct with a second conversation that differs in its last answer.

    {id, image, conversations: [...], rejected_conversations: [...]}
    """
    example = read_llava(raw)
    name = find_field(raw, REJECTED_CONVERSATION)
    rejected_turns, example.rejected = read_conversation(get_field(raw, name, list), name)
    check_same_prompt(example.turns, rejected_turns)
    return example


def read_llama_factory(raw):
    """Read the preferences of LLaMA-Factory. The conversation ends with the question.

    {images: [...], conversations: [...], chosen: {from, value}, rejected: {from, value}}
    """
    name = find_field(raw, CONVERSATION)
    turns = read_messages(get_field(raw, name, list), name)
    check(
        len(turns) % 2 == 1,
        f"{name!r} must end with the question that 'chosen' and 'rejected' answer, "
        f"it has {len(turns)} turns",
    )
    return _pair(raw, turns)


def read_llava_rlhf(raw):
    """Read the preferences of LLaVA-RLHF.

    {image, conversations, output_1: {value}, output_2: {value}, preference: 1 | 2}
    """
    name = find_field(raw, CONVERSATION)
    turns = read_messages(get_field(raw, name, list), name)
    if len(turns) % 2 == 0:
        turns = turns[:-1]  # a last gpt turn only marks the place of the two outputs
    preference = str(raw.get("preference")).removesuffix(".0")  # pandas writes 1.0
    check(preference in ("1", "2"), "field 'preference' is neither 1 nor 2")
    if preference == "1":
        return _pair(raw, turns, chosen_field="output_1", rejected_field="output_2")
    return _pair(raw, turns, chosen_field="output_2", rejected_field="output_1")


def read_question_pair(raw):
    """Read RLAIF-V, InternVL's MMPR, and RLHF-V as it is exported today.

    RLAIF-V: {idx, image_path, question, chosen, rejected}
    InternVL: {image, question, chosen, rejected}, where image is a name or a list of names
    """
    return _pair(raw, turns=[get_field(raw, "question", str)])


def read_rlhf_v(raw):
    """Read RLHF-V, whose field `text` is itself JSON: {question, chosen, rejected}.

    {idx, image_path, text}
    """
    comparison = get_field(raw, "text")
    if isinstance(comparison, str):
        try:
            comparison = json.loads(comparison)
        except (ValueError, RecursionError):
            comparison = None
    check(
        isinstance(comparison, dict),
        "field 'text' is not the JSON of question, chosen and rejected",
    )
    return read_question_pair({**comparison, "image_path": get_images(raw)})


def read_vlfeedback(raw):
    """Read VLFeedback, and compare the response of the best mean rating with that of the worst.

    {id, img_path, prompt, completions: [{response, annotations: {aspect: {Rating}, ...}}, ...]},
    where a rating is "1" to "5" or "N/A"
    The completions may also be a JSON object of two lists, {response: [...], annotations: [...]}.
    """
    # 1. The mean rating of each response that has ratings.
    prompt = get_field(raw, "prompt", str)
    rated_responses = []
    for response, annotation in _completions(raw):
        ratings = _ratings(annotation)
        if ratings:
            mean_rating = sum(ratings) / len(ratings)
            rated_responses.append((mean_rating, response))
    if not rated_responses:
        return None

    # 2. Best against worst. Of equal ratings max and min take the first. So if all are equal, both
    #    are the same response, and the record is a tie.
    _, best = max(rated_responses, key=itemgetter(0))
    _, worst = min(rated_responses, key=itemgetter(0))
    if best.strip() == worst.strip():
        return None
    return RawExample(image=get_images(raw), turns=[prompt], chosen=best, rejected=worst)


def read_trl(raw):
    """Read TRL's vision records.

    {images: [...], prompt: [message, ...], chosen: [message], rejected: [message]}, where a message
    is {role, content} and its content a text or [{type: "image"}, {type: "text", text}, ...]
    """
    return _pair(raw, turns=read_prompt(get_field(raw, "prompt"), "prompt"))


def read_trl_implicit(raw):
    """Read TRL's records without a prompt, whose two answers come with the whole conversation.

    {images: [...], chosen: [message, ..., message], rejected: [message, ..., message]}
    """
    turns, _ = read_conversation(get_field(raw, "chosen", list), "chosen")
    return _pair(raw, turns)


def read_pairs(raw):
    """Read the pairs that `sample.py pairs` writes. A prompt of several turns is a list.

    {id, image, prompt, chosen, rejected, rounds | noise | corrupted: ...}
    """
    example = read_trl(raw)
    # `sample.py pairs` writes every record. Where it found no other response, the pair is a tie.
    is_sampled = not SAMPLER_FIELDS.isdisjoint(raw)
    if is_sampled and example.rejected.strip() in ("", example.chosen.strip()):
        return None
    return example


def _completions(raw):
    """Return VLFeedback's responses with the annotation of each."""
    # 1. Both in one list, or in a list each.
    completions = get_field(raw, "completions", (list, dict))
    if isinstance(completions, list):
        responses = [get_field(completion, "response") for completion in completions]
        annotations = [get_field(completion, "annotations") for completion in completions]
    else:
        responses = get_field(completions, "response", list)
        annotations = get_field(completions, "annotations", list)

    # 2. They belong together.
    message = "'completions' must hold an annotation for each response"
    check(len(annotations) == len(responses), message)
    for annotation, response in zip(annotations, responses, strict=True):
        check(isinstance(annotation, dict) and isinstance(response, str), message)
    return zip(responses, annotations, strict=True)


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
    """A data format: its reader, and the fields that the reader looks at.

    fields: those that tell the format. Of "a or b" a record has one.
    also_reads: the others. Those of IMAGE are left out, because every reader looks at them.
    """

    fields: tuple
    read: Callable
    also_reads: tuple = ()


ANSWERS = ("chosen", "rejected")
# A record has the first of these formats all of whose fields it has, so the order matters.
FORMATS = {
    "povid": Format(fields=(CONVERSATION, REJECTED_CONVERSATION), read=read_povid),
    "llava-rlhf": Format(
        fields=(CONVERSATION, "output_1"),
        read=read_llava_rlhf,
        also_reads=("output_2", "preference"),
    ),
    "llama-factory": Format(
        fields=(CONVERSATION, "chosen"), read=read_llama_factory, also_reads=ANSWERS
    ),
    "llava-pair": Format(fields=(CONVERSATION, REJECTED), read=read_llava_pair),
    "llava": Format(fields=(CONVERSATION,), read=read_llava),
    "rlhf-v": Format(fields=("image_path", "text"), read=read_rlhf_v),
    "rlaif-v": Format(
        fields=("image_path", "question"), read=read_question_pair, also_reads=ANSWERS
    ),
    "internvl": Format(fields=("question",), read=read_question_pair, also_reads=ANSWERS),
    "vlfeedback": Format(fields=("prompt", "completions"), read=read_vlfeedback),
    "trl": Format(fields=("prompt", "images"), read=read_trl, also_reads=ANSWERS),
    "pairs": Format(fields=("prompt",), read=read_pairs, also_reads=ANSWERS),
    "trl-implicit": Format(fields=ANSWERS, read=read_trl_implicit),
}


def detect_format(raw, first_format=None):
    """Return the name of a record's format. Raise InputError unless it is `first_format`.

    first_format: the format of the file's first record, None while that is being read.
    """
    # 1. A record without an image may lack the fields of images, which help to tell the format.
    if first_format is not None and get_images(raw) is None and _has_fields(raw, first_format):
        return first_format

    # 2. Find the first format whose fields the record has.
    first_match = _first_match(raw)
    if first_match is not None and first_format in (None, first_match):
        return first_match

    # 3. Say what is wrong, and what was expected instead.
    if first_match is not None:
        problem = f"looks like {first_match}"
    else:
        problem = f"has the fields of no known format ({', '.join(map(str, raw))[:200]})"
    if first_format is not None:
        expected = f"{_describe(first_format)} like the first record"
    else:
        expected = "; ".join(_describe(name) for name in FORMATS)
    raise InputError(f"{problem}, expected {expected}; a file has one format, --format names it")


def _first_match(raw):
    """Return the name of the first format whose fields a record has, or None."""
    for name in FORMATS:
        if _has_fields(raw, name, with_images=True):
            return name
    return None


def _has_fields(raw, format, with_images=False):
    """Return whether a record has the fields that identify a format.

    with_images: whether those of images must be there too. They may be null.
    """
    for names in FORMATS[format].fields:
        if names in IMAGE:
            is_there = names in raw or not with_images
        else:
            is_there = raw.get(find_field(raw, names)) is not None
        if not is_there:
            return False
    return True


def _describe(name):
    """Return a format's name and the fields that identify it."""
    return f"{name} ({', '.join(FORMATS[name].fields)})"
