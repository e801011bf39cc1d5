"""Read files of preference or instruction data into Records, and validate every one of them."""

import contextlib
import random
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

from minialign.data.chat_templates import without_end_text
from minialign.data.fields import NO_IMAGE, as_list, get_images
from minialign.data.formats import FORMATS, detect_format
from minialign.data.images import check_image_file, check_images
from minialign.data.placeholders import place_images
from minialign.data.system_texts import find_system_text
from minialign.data.tokenizer import check_unicode
from minialign.data.unread_fields import check_same_images, find_unread_fields
from minialign.utils.files import InputError, check, read_json_records
from minialign.utils.messages import print_message

# How an image begins that is given by its address on the web, or inside of the record.
ADDRESS = re.compile(r"(https?|file|s3|gs)://|data:image/", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """One example of the data: images, a conversation, and its answer or two ranked answers.

    image: as the file names it, one name or a list of names.
    paths: where the images are.
    turns: question, answer, ..., question, with one <image> per image.
    rejected: None for supervised data.
    system: the system text that the conversation begins with, None for that of the template.
    place: the file, the number and the id of the record, for errors.
    """

    id: str
    image: str | list
    paths: tuple
    turns: tuple
    chosen: str
    rejected: str | None = None
    system: str | None = None
    place: str = field(default="", compare=False)

    @property
    def prompt(self) -> tuple:
        """Return all that an answer depends on: the images, the system text and the turns."""
        return self.paths, self.system, self.turns

    @property
    def question(self) -> str:
        """Return the text of the last question, without <image>."""
        return self.turns[-1].replace("<image>", "").strip()

    @property
    def location(self) -> str:
        """Return where the record is, for errors: its id alone if it was not read from a file."""
        return self.place or f"record {self.id}"


@contextlib.contextmanager
def errors_name_record(record):
    """Put the location of a record in front of the message of an InputError.

    Several files may have records of the same id. So the message also needs the file and the
    number.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"{record.location}: {error}") from None


def read_records(
    paths, image_folder, limit=None, seed=0, *, format=None, skip_text_only=False
) -> list[Record]:
    """Return the Records of JSON or JSON Lines files, in order. Image files must exist.

    Args:
        paths: the files. Their content tells JSON from JSON Lines, whatever their names end in.
        image_folder: what image names are relative to, None for `images/` next to each file.
        limit: the size of a random subset, seeded, in file order. None takes all records.
        seed: the seed of the subset.
        format: a key of FORMATS, None to detect each file's format from its fields.
        skip_text_only: leave out records that name no image, instead of refusing them.

    What is left out is counted on standard error: ties, records without an image, and fields that
    the `format` given does not read. Records that repeat the prompt or the id of an earlier one are
    counted there too, but kept.

    Raises InputError, which names the file and the record.
    """
    check(
        format is None or format in FORMATS,
        f"format {format!r} is unknown; choose from {', '.join(FORMATS)}",
    )

    # 1. Read all files.
    records = []
    for path in paths:
        records += _read_file(
            Path(path), image_folder, format=format, skip_text_only=skip_text_only
        )
    file_names = ", ".join(str(path) for path in paths)
    check(records, f"{file_names}: no record is left, all are left out; give other data")

    # 2. Take a subset.
    if limit is not None and limit < len(records):
        indices = random.Random(seed).sample(range(len(records)), limit)
        records = [records[i] for i in sorted(indices)]

    # 3. Count repeated prompts and ids.
    prompts = {record.prompt for record in records}
    num_repeated = len(records) - len(prompts)
    if num_repeated > 0:
        print_message(
            f"{num_repeated} of {len(records)} records have the images and the prompt "
            "of an earlier one"
        )
    # The random numbers of a sampled response depend on the id of its record. So different prompts
    # should have different ids. Records that repeat the prompt were counted above.
    prompts_and_ids = {(record.prompt, record.id) for record in records}
    num_shared_ids = len(prompts_and_ids) - len({record.id for record in records})
    if num_shared_ids > 0:
        print_message(
            f"{num_shared_ids} of {len(records)} records have the id of an earlier one with "
            "another prompt; responses to them are sampled with the same random numbers"
        )
    return records


def check_record_images(records):
    """Raise InputError, which names the record, unless every image of the records can be opened."""
    images = []
    for record in records:
        images += [(path, record.location) for path in record.paths]
    check_images(images)


def _read_file(path, image_folder, *, format, skip_text_only):
    """Return the Records of one file, without those that are left out, which are counted."""
    raw_records = read_json_records(path)
    if image_folder is None:
        image_folder = path.parent / "images"
    reader = _FileReader(path, Path(image_folder), named_format=format)
    for record_number, raw in enumerate(raw_records, start=1):
        reader.read(raw, record_number)
    reader.report(len(raw_records), skip_text_only)
    return reader.records


class _FileReader:
    """Reads the records of one file one after the other, and counts what it leaves out.

    In its methods, `raw` is a record as the file has it, and `format` a key of FORMATS.
    """

    def __init__(self, path, image_folder, named_format):
        self.path = path
        self.image_folder = image_folder
        self.named_format = named_format
        self.first_format = None  # that of the first record with an image, see find_format
        self.records = []
        self.num_ties = 0
        self.text_only_locations = []  # of the records without an image
        self.unread_fields = Counter()

    def read(self, raw, record_number):
        """Read the record with this number in the file. Raise InputError that says where it is."""
        # For errors. The id and the format are added as soon as they are known.
        location = f"{self.path}, record {record_number}"
        try:
            # 1. Find its id and its format.
            check(isinstance(raw, dict), "not a JSON object")
            record_id = _find_id(raw)
            if record_id is None:
                record_id = f"{self.path.name}:{record_number}"
            else:
                shown_id = " ".join(str(record_id)[:80].splitlines())
                location += f" (id {shown_id})"
            format = self.find_format(raw)
            location += f", read as {format}"
            unread_fields = self.check_unread_fields(raw, format)

            # 2. Read it, or leave it out.
            check(isinstance(record_id, str | int | float), "the id is neither a text nor a number")
            raw_example = FORMATS[format].read(raw)
            if raw_example is None:
                self.num_ties += 1
            elif raw_example.image is None:
                _check_text_only(raw_example)
                self.text_only_locations.append(location)
            else:
                if raw_example.rejected is not None:
                    check_same_images(unread_fields)
                record = _make_record(raw_example, str(record_id), self.image_folder)
                system = find_system_text(raw, unread_fields)
                self.records.append(replace(record, system=system, place=location))
        except InputError as error:
            message = f"{location}: {error}; fix or remove this record"
            one_line = " ".join(message.splitlines())
            raise InputError(one_line) from None

    def find_format(self, raw):
        """Return the format of a record: the named one, or that of the file's first record.

        A record without an image does not decide, because the fields of images help to tell formats
        apart.
        """
        if self.named_format is not None:
            return self.named_format
        format = detect_format(raw, self.first_format)
        if self.first_format is None and get_images(raw) is not None:
            self.first_format = format
        return format

    def check_unread_fields(self, raw, format) -> list[str]:
        """Raise InputError for a field that means something and that the format does not read.

        If the user named the format, such fields are counted instead, and their names returned.
        """
        unread_fields = find_unread_fields(raw, format)
        self.unread_fields.update(unread_fields)
        if not unread_fields or self.named_format is not None:
            return unread_fields

        # --format helps only if the format reads all the rest.
        problem = f"{format} does not read {', '.join(map(repr, unread_fields))}"
        try:
            FORMATS[format].read(raw)
        except InputError as error:
            raise InputError(f"{problem}, and {error}") from None
        raise InputError(f"{problem}; --format {format} leaves out such fields")

    def report(self, num_records, skip_text_only):
        """Print what was left out. Raise InputError for records without an image.

        skip_text_only: leave these out too, instead of refusing them.
        """
        num_text_only = len(self.text_only_locations)
        if num_text_only > 0:
            check(
                skip_text_only,
                f"{self.text_only_locations[0]}: {NO_IMAGE}; this holds for {num_text_only} of "
                f"{num_records} records, --skip-text-only leaves them out",
            )
            print_message(
                f"{self.path}: {num_text_only} of {num_records} records left out, "
                "they name no image"
            )
        if self.num_ties > 0:
            print_message(
                f"{self.path}: {self.num_ties} of {num_records} records left out, "
                "their responses are tied, the same or unrated"
            )
        for name, count in self.unread_fields.items():
            print_message(
                f"{self.path}: field {name!r} of {count} of {num_records} records left out, "
                f"--format {self.named_format} does not read it"
            )


def _find_id(raw):
    """Return the id of a JSON object, or None if it has none."""
    for name in ("id", "idx"):
        if raw.get(name) not in (None, ""):
            return raw[name]
    return None


def _check_text_only(raw_example):
    """Raise InputError if a record without an image has <image> in its prompt.

    It has lost its image. It is not a text-only record, which may be left out.
    """
    has_placeholder = any("<image>" in str(turn) for turn in raw_example.turns)
    check(not has_placeholder, f"{NO_IMAGE} for the <image> of the prompt")


def _make_record(raw_example, record_id, image_folder):
    """Return the Record of a RawExample. Raise InputError if it is invalid."""
    # 1. Check the images and the questions about them.
    images = _check_image_names(raw_example.image)
    turns = place_images(raw_example.turns, num_images=len(images))

    # 2. Clean and check the answers.
    turns = _clean_earlier_answers(turns)
    answers = {"chosen": without_end_text(raw_example.chosen)}
    if raw_example.rejected is not None:
        answers["rejected"] = without_end_text(raw_example.rejected)
    for name, answer in answers.items():
        check(answer, f"the {name} response is empty")
        check("<image>" not in answer, f"the {name} response contains <image>")
    for text in (record_id, *images, *turns, *answers.values()):
        check_unicode(text)
    chosen = answers["chosen"]
    rejected = answers.get("rejected")
    check(chosen != rejected, "chosen and rejected are the same, so neither can be preferred")

    # 3. Check that the image files exist.
    paths = [str(image_folder / name) for name in images]
    for path in paths:
        check_image_file(path, remedy="--images gives the folder")
    return Record(
        id=record_id,
        image=raw_example.image,
        paths=tuple(paths),
        turns=tuple(turns),
        chosen=chosen,
        rejected=rejected,
    )


def _clean_earlier_answers(turns):
    """Clean earlier answers as the last one is cleaned, so that equal texts get equal token ids."""
    cleaned_turns = []
    for i, text in enumerate(turns):
        if i % 2 == 1:
            text = without_end_text(text)
            check(text, "an earlier answer is empty")
        cleaned_turns.append(text)
    return cleaned_turns


def _check_image_names(image):
    """Return the names of a record's images as a list. Raise InputError unless they are texts."""
    images = as_list(image)
    for name in images:
        check(
            isinstance(name, str) and name.strip(),
            "the image is not a file name, nor a list of them; "
            "write images to files first, as data/README.md shows",
        )
        check(
            not ADDRESS.match(name),
            f"the image {name[:60]!r} is an address or the image itself, not a file name; "
            "write images to files first, as data/README.md shows",
        )
    return images
