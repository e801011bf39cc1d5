"""Records and their readers: pictures, a prompt, a chosen response and perhaps a rejected one, from the formats that are published."""

import os
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from minialign.data.formats import FORMATS
from minialign.utils.files import InputError, check, read_json, read_jsonl

LONE_SURROGATE = re.compile(
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


def _record(image, turns, chosen, rejected, id, folder):
    """The Record of what a reader found in a JSON object."""
    images = image if isinstance(image, list) else [image]
    check(
        images and all(isinstance(one, str) and one.strip() for one in images),
        "the image is not a file name, nor a list of them",
    )
    asked = len(turns) % 2 and all(
        isinstance(turn, str) and turn.replace("<image>", "").strip() for turn in turns
    )
    check(asked, "the prompt is not question, answer, ..., question, each with a text")
    if not any("<image>" in turn for turn in turns):
        turns = ["<image>\n" * len(images) + turns[0], *turns[1:]]
    answers = {"chosen": chosen} if rejected is None else {"chosen": chosen, "rejected": rejected}
    placed = sum(turn.count("<image>") for turn in turns[::2]) == len(images) and not any(
        "<image>" in text for text in (*turns[1::2], *answers.values())
    )
    check(
        placed,
        f"<image> must stand in the questions once for each picture, {len(images)} in all, and never in an answer",
    )
    for what, text in answers.items():
        check(text.strip(), f"the {what} response is empty")
    whole = not any(
        LONE_SURROGATE.search(text) for text in (id, *images, *turns, *answers.values())
    )
    check(
        whole,
        "a text has half a character in it (a lone \\ud800 to \\udfff, of an emoji cut in two)",
    )
    check(
        rejected is None or chosen.strip() != rejected.strip(),
        "chosen and rejected are the same, so neither can be preferred",
    )
    paths = tuple(str(Path(folder) / one) for one in images)
    for path in paths:
        check(
            os.path.isfile(path), f"no picture {path[:400]}; --images gives the folder"
        )  # Path.is_file raises for a name that is too long
    return Record(id, image, paths, tuple(turns), chosen.strip(), rejected and rejected.strip())


def _read_file(path, images, format):
    """The Records of one file, None for each tie."""
    everything = read_jsonl(path) if path.suffix == ".jsonl" else read_json(path)
    check(
        isinstance(everything, list) and everything,
        f"{path}: holds no records; JSON is one list of them, JSONL has one on each line",
    )
    folder, records, expected = Path(images) if images else path.parent / "images", [], format
    for number, raw in enumerate(everything, 1):
        where = f"{path}, record {number}"
        try:
            check(isinstance(raw, dict), "not a JSON object")
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
                raise InputError(
                    f"{f'looks like {found}' if found else 'has the fields of no known format'}, expected {known}"
                    f"{' like the first record' if number > 1 else ''}; a file has one format, --format names it"
                )
            where += f", read as {found}"
            check(
                isinstance(id, (str, int, float, type(None))),
                "the id is neither a text nor a number",
            )
            parts = FORMATS[found][1](raw)
            records.append(
                parts
                and _record(*parts, f"{path.name}:{number}" if id is None else str(id), folder)
            )
        except InputError as error:
            raise InputError(
                " ".join(f"{where}: {error}; mend or remove the record".splitlines())
            ) from None
    return records


def read_records(paths, images, limit=None, seed=0, format=None):
    """Records of JSON or JSONL files joined; `limit` takes a seeded random subset, in file order. Pictures must exist, they are not opened.

    `images` is the folder that pictures are relative to; None: `images/` beside each file. `format`: a key of FORMATS; None: each file's first record tells it.
    A line on standard error counts the ties that were left out, and one the records whose pictures and prompt an earlier one has.
    Raises InputError with file and record.
    """
    check(
        format in (None, *FORMATS),
        f"format {format!r} is unknown; choose from {', '.join(FORMATS)}",
    )
    records = []
    for path in map(Path, paths):
        read = _read_file(path, images, format)
        records += [record for record in read if record is not None]
        if None in read:
            print(
                f"{path}: {read.count(None)} of {len(read)} records left out, their responses are tied, the same or unrated",
                file=sys.stderr,
            )
    check(
        records, f"{', '.join(map(str, paths))}: no record is left, all are ties; give other data"
    )
    if limit is not None and limit < len(records):
        records = [
            records[i] for i in sorted(random.Random(seed).sample(range(len(records)), limit))
        ]
    repeated = len(records) - len({(record.paths, record.turns) for record in records})
    if repeated:
        print(
            f"{repeated} of {len(records)} records have the pictures and the prompt of an earlier one",
            file=sys.stderr,
        )
    return records
