"""Read files of preference or instruction data into Records, and validate every one of them."""

import os
import random
import sys
from dataclasses import dataclass
from pathlib import Path

from minialign.data.formats import FORMATS, detect_format
from minialign.data.tokenizer import check_unicode
from minialign.utils.files import InputError, check, read_json, read_jsonl


@dataclass(frozen=True)
class Record:
    """One example of the data: images, a conversation, and its answer or two ranked answers.

    image: as the file names it, one name or a list of names.
    paths: where the images are.
    turns: question, answer, ..., question, with one <image> per image.
    rejected: None for supervised data.
    """

    id: str
    image: str | list
    paths: tuple
    turns: tuple
    chosen: str
    rejected: str | None = None

    @property
    def question(self) -> str:
        """Return the text of the last question, without <image>."""
        return self.turns[-1].replace("<image>", "").strip()


def read_records(paths, image_folder, limit=None, seed=0, format=None):
    """Return the Records of JSON or JSONL files, in order. Image files must exist.

    `image_folder` is what image names are relative to, None for `images/` next to each file.
    `limit` takes a random subset of that size, seeded, in file order. `format` is a key of FORMATS.
    None detects each file's format. Two notes go to standard error: how many ties were left out,
    and how many records repeat the images and the prompt of an earlier one.

    Raises InputError, which names the file and the record.
    """
    check(
        format is None or format in FORMATS,
        f"format {format!r} is unknown; choose from {', '.join(FORMATS)}",
    )

    # 1. Read all files, and leave out ties.
    records = []
    for path in paths:
        file_records = _read_file(Path(path), image_folder, format)
        ranked_records = [record for record in file_records if record is not None]
        records += ranked_records
        num_ties = len(file_records) - len(ranked_records)
        if num_ties > 0:
            _print_note(
                f"{path}: {num_ties} of {len(file_records)} records left out, "
                "their responses are tied, the same or unrated"
            )
    file_names = ", ".join(str(path) for path in paths)
    check(records, f"{file_names}: no record is left, all are ties; give other data")

    # 2. Take a subset.
    if limit is not None and limit < len(records):
        indices = random.Random(seed).sample(range(len(records)), limit)
        records = [records[i] for i in sorted(indices)]

    # 3. Count repeated prompts.
    prompts = {(record.paths, record.turns) for record in records}
    num_repeated = len(records) - len(prompts)
    if num_repeated > 0:
        _print_note(
            f"{num_repeated} of {len(records)} records have the images and the prompt "
            "of an earlier one"
        )
    return records


def _print_note(note):
    """Print a note to standard error."""
    print(note, file=sys.stderr)


def _read_file(path, image_folder, format):
    """Return the Records of one file, with None for each tie."""
    # 1. Parse the file.
    if path.suffix == ".jsonl":
        raw_records = read_jsonl(path)
    else:
        raw_records = read_json(path)
    check(
        isinstance(raw_records, list) and raw_records,
        f"{path}: holds no records; JSON is one list of them, JSONL has one on each line",
    )
    if image_folder is None:
        image_folder = path.parent / "images"

    # 2. Read its records. Where no format is named, the first record decides for all.
    records = []
    file_format = format
    for record_number, raw in enumerate(raw_records, start=1):
        location = f"{path}, record {record_number}"
        try:
            check(isinstance(raw, dict), "not a JSON object")
            record_id = _find_id(raw)
            if record_id is not None:
                location += f" (id {str(record_id)[:80]})"
            if format is None:
                file_format = detect_format(raw, first_format=file_format)
            location += f", read as {file_format}"
            if record_id is None:
                record_id = f"{path.name}:{record_number}"
            records.append(_read_record(raw, record_id, file_format, Path(image_folder)))
        except InputError as error:
            message = f"{location}: {error}; fix or remove this record"
            one_line = " ".join(message.splitlines())
            raise InputError(one_line) from None
    return records


def _find_id(raw):
    """Return the id of a JSON object, or None if it has none."""
    for name in ("id", "idx"):
        if raw.get(name) not in (None, ""):
            return raw[name]
    return None


def _read_record(raw, record_id, format, image_folder):
    """Return the Record of a JSON object, or None for a tie. Raise InputError if it is invalid."""
    # 1. Take the fields of the format.
    check(isinstance(record_id, (str, int, float)), "the id is neither a text nor a number")
    record_id = str(record_id)
    example = FORMATS[format].read(raw)
    if example is None:
        return None

    # 2. Check the images and the questions about them.
    images = _check_image_names(example.image)
    turns = _check_turns(example.turns, num_images=len(images))

    # 3. Check the answers.
    answers = {"chosen": example.chosen.strip()}
    if example.rejected is not None:
        answers["rejected"] = example.rejected.strip()
    for name, answer in answers.items():
        check(answer, f"the {name} response is empty")
        check("<image>" not in answer, f"the {name} response contains <image>")
    for text in (record_id, *images, *turns, *answers.values()):
        check_unicode(text)
    chosen = answers["chosen"]
    rejected = answers.get("rejected")
    check(chosen != rejected, "chosen and rejected are the same, so neither can be preferred")

    # 4. Check that the image files exist.
    paths = [str(image_folder / name) for name in images]
    for path in paths:
        # os.path.isfile and not Path.is_file, which raises an error for a name that is too long.
        check(os.path.isfile(path), f"no image {path[:400]}; --images gives the folder")
    return Record(
        id=record_id,
        image=example.image,
        paths=tuple(paths),
        turns=tuple(turns),
        chosen=chosen,
        rejected=rejected,
    )


def _check_image_names(image):
    """Return the names of a record's images as a list. Raise InputError unless they are texts."""
    images = image
    if not isinstance(image, list):
        images = [image]
    message = "the image is not a file name, nor a list of them"
    check(len(images) > 0, message)
    for name in images:
        check(isinstance(name, str) and name.strip(), message)
    return images


def _check_turns(turns, num_images):
    """Return the turns with one <image> per image. Raise InputError if they are not valid."""
    # 1. Every turn is a text, and the last one is a question.
    message = "the prompt is not question, answer, ..., question, each with a text"
    check(len(turns) % 2 == 1, message)
    for turn in turns:
        check(isinstance(turn, str), message)
        check(turn.replace("<image>", "").strip(), message)

    # 2. Without any <image>, all images come first.
    questions = turns[::2]
    answers = turns[1::2]
    num_placeholders = sum(question.count("<image>") for question in questions)
    check(
        not any("<image>" in answer for answer in answers),
        "an earlier answer contains <image>, which belongs in the questions",
    )
    if num_placeholders == 0:
        return ["<image>\n" * num_images + turns[0], *turns[1:]]

    # 3. Otherwise the questions say where each image belongs.
    check(
        num_placeholders == num_images,
        f"the questions contain <image> {num_placeholders} times; it must stand in them once for "
        f"each image, {num_images} in all",
    )
    return turns
