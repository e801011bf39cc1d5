"""Records and their readers: pictures, a prompt, a chosen response and perhaps a rejected one, from the formats that are published."""

import json
import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from .files import BadInput, read_json, read_jsonl, require

KINDS = {str: "a text", list: "a list", dict: "a JSON object", (str, list): "a text or a list"}
HALF = re.compile(
    "[\ud800-\udfff]"
)  # what is left of an emoji cut in two; no tokenizer or file takes it


@dataclass(frozen=True)
class Record:
    """`image` as the file names it (a name, or a list of them), `paths` where they lie; `turns`: question, answer, ..., question, with "<image>" where a picture
    belongs; `rejected` None for supervised data."""

    id: str
    image: str | list
    paths: tuple
    turns: tuple
    chosen: str
    rejected: str | None = None


def _field(raw, name, kind=str):
    """What a JSON object holds under `name`, its type checked."""
    require(isinstance(raw, dict), f"{json.dumps(raw)[:40]} is not a JSON object")
    require(raw.get(name) is not None, f"no field {name!r}")
    require(isinstance(raw[name], kind), f"field {name!r} is not {KINDS[kind]}")
    return raw[name]


def _spoken(raw, name, who="from", what="value", speakers=("human", "gpt")):
    """The texts of a list of messages whose speakers take turns; a text in parts is joined by line breaks, a picture is its <image>."""
    texts = []
    for number, message in enumerate(_field(raw, name, list)):
        speaker = speakers[number % len(speakers)]
        if (
            not isinstance(message, dict)
            or message.get(who) != speaker
            or not isinstance(message.get(what), (str, list))
        ):
            raise BadInput(
                f'turn {number + 1} of {name!r} is not {{"{who}": "{speaker}", "{what}": text}}'
            )
        parts = (
            message[what]
            if isinstance(message[what], list)
            else [{"type": "text", "text": message[what]}]
        )
        texts.append(
            "\n".join(
                "<image>" if _field(part, "type") == "image" else _field(part, "text")
                for part in parts
            )
        )
    return texts


def _conversation(raw, name):
    """(turns up to the last question, last answer) of a LLaVA conversation."""
    texts = _spoken(raw, name)
    require(
        texts and len(texts) % 2 == 0,
        f"{name!r} must be pairs of human and gpt turns, it has {len(texts)}",
    )
    return texts[:-1], texts[-1]


def _compared(raw, image="image_path", kind=str):
    """RLAIF-V and newer RLHF-V: {idx, image_path, question, chosen, rejected}."""
    return (
        _field(raw, image, kind),
        [_field(raw, "question")],
        _field(raw, "chosen"),
        _field(raw, "rejected"),
    )


def _llava(raw):
    """LLaVA-Instruct: {id, image, conversations: [{from: "human" | "gpt", value}, ...]}; of several turns the last answer is the response."""
    return _field(raw, "image", (str, list)), *_conversation(raw, "conversations"), None


def _povid(raw):
    """POVID: LLaVA-Instruct and `rejected_conversations` of the same shape, which must differ in the last answer alone."""
    image, turns, chosen, _ = _llava(raw)
    others, rejected = _conversation(raw, "rejected_conversations")
    if [turn.replace("<image>", "").strip() for turn in others] != [
        turn.replace("<image>", "").strip() for turn in turns
    ]:
        raise BadInput(
            "the two conversations differ before their last answers, which then follow different prompts"
        )
    return image, turns, chosen, rejected


def _llava_rlhf(raw):
    """LLaVA-RLHF: {image, conversations, output_1: {value}, output_2: {value}, preference: 1 | 2}; a last gpt turn is where the outputs go."""
    turns, outputs = (
        _spoken(raw, "conversations"),
        [_field(_field(raw, name, dict), "value") for name in ("output_1", "output_2")],
    )
    require(str(raw.get("preference")) in ("1", "2"), "field 'preference' is neither 1 nor 2")
    chosen, rejected = outputs if str(raw["preference"]) == "1" else outputs[::-1]
    return (
        _field(raw, "image", (str, list)),
        turns if len(turns) % 2 else turns[:-1],
        chosen,
        rejected,
    )


def _rlhf_v(raw):
    """RLHF-V: {idx, image_path, text}, where text is itself JSON: {question, chosen, rejected}."""
    try:
        return _compared(
            json.loads(_field(raw, "text")) | {"image_path": _field(raw, "image_path")}
        )
    except (ValueError, TypeError, RecursionError):
        raise BadInput("field 'text' is not the JSON of question, chosen and rejected") from None


def _vlfeedback(raw):
    """VLFeedback: {id, img_path, prompt, completions: {annotations: [{aspect: {Rating: "1" to "5" or "N/A"}}], response: [...]}}: best mean rating against worst."""
    image, prompt, completions = (
        _field(raw, "img_path"),
        _field(raw, "prompt"),
        _field(raw, "completions", dict),
    )
    annotations, responses = (
        _field(completions, "annotations", list),
        _field(completions, "response", list),
    )
    if (
        len(annotations) != len(responses)
        or not all(isinstance(one, dict) for one in annotations)
        or not all(isinstance(one, str) for one in responses)
    ):
        raise BadInput("'completions' must hold an annotation for each response")
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
    require(
        len(chosen) == len(rejected) == 1,
        f"'chosen' and 'rejected' must be one message each, they are {len(chosen)} and {len(rejected)}",
    )
    return _field(raw, "images", list), prompt, *chosen, *rejected


def _pairs(raw):
    """Our own, of `sample.py pairs`: {image, prompt, chosen, rejected}; a prompt of several turns is a list. Where sampling found no other answer, a tie."""
    prompt, chosen, rejected = (
        _field(raw, "prompt", (str, list)),
        _field(raw, "chosen"),
        _field(raw, "rejected"),
    )
    if {"rounds", "noise", "corrupted"} & set(raw) and rejected.strip() in ("", chosen.strip()):
        return None
    return (
        _field(raw, "image", (str, list)),
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


def _record(image, turns, chosen, rejected, id, folder):
    """The Record of what a reader found in a JSON object."""
    images = image if isinstance(image, list) else [image]
    require(
        images and all(isinstance(one, str) and one.strip() for one in images),
        "the image is not a file name, nor a list of them",
    )
    asked = len(turns) % 2 and all(
        isinstance(turn, str) and turn.replace("<image>", "").strip() for turn in turns
    )
    require(asked, "the prompt is not question, answer, ..., question, each with a text")
    if not any("<image>" in turn for turn in turns):
        turns = ["<image>\n" * len(images) + turns[0], *turns[1:]]
    answers = {"chosen": chosen} if rejected is None else {"chosen": chosen, "rejected": rejected}
    placed = sum(turn.count("<image>") for turn in turns[::2]) == len(images) and not any(
        "<image>" in text for text in (*turns[1::2], *answers.values())
    )
    require(
        placed,
        f"<image> must stand in the questions once for each picture, {len(images)} in all, and never in an answer",
    )
    for what, text in answers.items():
        require(text.strip(), f"the {what} response is empty")
    whole = not any(HALF.search(text) for text in (id, *images, *turns, *answers.values()))
    require(
        whole,
        "a text has half a character in it (a lone \\ud800 to \\udfff, of an emoji cut in two)",
    )
    require(
        rejected is None or chosen.strip() != rejected.strip(),
        "chosen and rejected are the same, so neither can be preferred",
    )
    paths = tuple(str(Path(folder) / one) for one in images)
    for path in paths:
        require(
            os.path.isfile(path), f"no picture {path[:400]}; --images gives the folder"
        )  # Path.is_file raises for a name that is too long
    return Record(id, image, paths, tuple(turns), chosen.strip(), rejected and rejected.strip())


def _read_file(path, images, format):
    """The Records of one file, None for each tie."""
    everything = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    require(
        isinstance(everything, list) and everything,
        f"{path}: holds no records; JSON is one list of them, JSONL has one on each line",
    )
    folder, records, expected = Path(images) if images else path.parent / "images", [], format
    for number, raw in enumerate(everything, 1):
        where = f"{path}, record {number}"
        try:
            require(isinstance(raw, dict), "not a JSON object")
            id = next(
                (raw[name] for name in ("id", "idx") if raw.get(name) not in (None, "")), None
            )
            where += f" (id {str(id)[:80]})" if id is not None else ""
            found = format or next(
                (
                    name
                    for name, (fields, _) in FORMATS.items()
                    if all(raw.get(field) is not None for field in fields)
                ),
                None,
            )
            expected = expected or found
            if found is None or found != expected:
                known = "; ".join(
                    f"{name} ({', '.join(fields)})"
                    for name, (fields, _) in FORMATS.items()
                    if expected in (name, None)
                )
                raise BadInput(
                    f"{f'looks like {found}' if found else 'has the fields of no known format'}, expected {known}"
                    f"{' like the first record' if number > 1 else ''}; a file has one format, --format names it"
                )
            where += f", read as {found}"
            require(
                isinstance(id, (str, int, float, type(None))),
                "the id is neither a text nor a number",
            )
            parts = FORMATS[found][1](raw)
            records.append(
                parts
                and _record(*parts, f"{path.name}:{number}" if id is None else str(id), folder)
            )
        except BadInput as error:
            raise BadInput(
                " ".join(f"{where}: {error}; mend or remove the record".splitlines())
            ) from None
    return records


def read_records(
    paths, images, limit=None, seed=0, format=None, tell=lambda note: print(note, file=sys.stderr)
):
    """Records of JSON or JSONL files joined; `limit` takes a seeded random subset, in file order. Pictures must exist, they are not opened.

    `images` is the folder that pictures are relative to; None: `images/` beside each file. `format`: a key of FORMATS; None: each file's first record tells it.
    `tell` is given a line on ties that were left out, and one on records whose pictures and prompt an earlier one has. Raises BadInput with file and record.
    """
    require(
        format in (None, *FORMATS),
        f"format {format!r} is unknown; choose from {', '.join(FORMATS)}",
    )
    records = []
    for path in map(Path, paths):
        read = _read_file(path, images, format)
        records += [record for record in read if record is not None]
        if None in read:
            tell(
                f"{path}: {read.count(None)} of {len(read)} records left out, their responses are tied, the same or unrated"
            )
    require(
        records, f"{', '.join(map(str, paths))}: no record is left, all are ties; give other data"
    )
    if limit is not None and limit < len(records):
        records = [
            records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))
        ]
    repeated = len(records) - len({(record.paths, record.turns) for record in records})
    if repeated:
        tell(
            f"{repeated} of {len(records)} records have the pictures and the prompt of an earlier one"
        )
    return records
