"""The options that several commands share: the model, the data, and how BDHS samples."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from minialign.data.formats import FORMATS
from minialign.data.records import Record, read_records
from minialign.data.system_texts import check_system_text
from minialign.data.templates import TEMPLATES, read_template
from minialign.utils.cli import flag, number_type
from minialign.utils.files import check
from minialign.utils.messages import print_message

# The shipped world: a tiny LLaVA, its data, and the settings for them (recipe.json).
TINY_WORLD = Path(__file__).resolve().parent.parent / "data" / "tiny"

# How BDHS samples in the paper. The comment is the tiny world's value, where it has its own.
PAPER_SAMPLING = {
    "rho": 0.99,  # tiny: 0.97
    "rounds": 5,  # tiny: 5
    "epsilon": 0.97,  # tiny: 0.97
    "noise_steps": 500,
    "group": 32,  # tiny: 100
}


def typed_options(argv, options) -> list[str]:
    """Return the names of the options that were typed and that ask for something.

    `--no-control` or an empty `--eval` asks for nothing, so neither can be without effect.
    """
    names = []
    for word in argv:
        name = word.split("=")[0].removeprefix("--").replace("-", "_")
        value = getattr(options, name, None)
        asks_for_nothing = value is None or value is False or value == []
        if word.startswith("--") and not asks_for_nothing:
            names.append(name)
    return names


def refuse_unread_options(parser, typed, selector, *, chosen, table):
    """Exit with one line if an option was typed that the chosen method, or the like, does not read.

    selector: the option that chooses, such as "--method".
    table: for each choice the options that it reads. An option that it names nowhere is read by
        all.
    """
    for name in typed:
        readers = [choice for choice, options in table.items() if name in options]
        if readers and chosen not in readers:
            parser.error(
                f"{flag(name)} is for {selector} {', '.join(readers)}; "
                f"{chosen} does not use it, so leave it out"
            )


@dataclass(frozen=True)
class Condition:
    """Options that have an effect only if other options have certain values."""

    options: tuple[str, ...]
    holds: Callable[[argparse.Namespace], bool]
    in_words: str  # what `holds` asks for, as the error message says it


def refuse_switched_off_options(parser, options, typed, *, conditions):
    """Exit with one line if an option was typed that the value of another one switches off."""
    for condition in conditions:
        without_effect = [name for name in condition.options if name in typed]
        if without_effect and not condition.holds(options):
            parser.error(
                f"{flag(without_effect[0])} has no effect here: it is for {condition.in_words}; "
                "leave it out"
            )


def is_tiny_model(model) -> bool:
    """Return whether a directory is that of the shipped tiny model."""
    return Path(model).resolve() == TINY_WORLD / "model"


def may_draw_again(options):
    """Return whether BDHS has a second round, in which it draws again for a record."""
    return options.rounds > 1


# Conditions of both scripts that run BDHS.
BDHS_CONDITIONS = (Condition(("epsilon",), may_draw_again, "--rounds above 1"),)


def note_paper_defaults(options, typed):
    """Say which defaults hold if the shipped model was named, which has defaults of its own."""
    if "model" in typed and is_tiny_model(options.model):
        print_message(
            "--model was given, so the defaults are the paper's; "
            "leave it out for those of the tiny world (data/tiny/recipe.json)",
        )


def add_model_options(parser, **model_arguments):
    """Add --model, --template, --system, --dtype, --device and --split.

    model_arguments: further arguments of argparse for --model, such as `default` or `required`.
    """
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="DIR", help="directory of a LLaVA checkpoint", **model_arguments
    )
    group.add_argument(
        "--template",
        type=read_template,
        metavar="NAME|FILE",
        help=f"chat template: {', '.join(sorted(TEMPLATES))}, or a JSON file with its fields; "
        "if not given, the one that the checkpoint names",
    )
    group.add_argument(
        "--system",
        type=system_text,
        metavar="TEXT",
        help="system text of every prompt, in the place of the template's; a record with a system "
        "text of its own keeps it",
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="data type of weights and activations; if not given, that of the checkpoint",
    )
    group.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="device to run on")
    group.add_argument(
        "--split",
        type=number_type(int, 1),
        default=1,
        metavar="N",
        help="how many processes hold one model together, under torchrun: the smallest number with "
        "which it fits",
    )


def add_data_options(parser, data_help, **data_arguments):
    """Add --data, --format, --images and --skip-text-only.

    data_help: what the files of --data hold.
    data_arguments: further arguments of argparse for --data, such as `default` or `required`.
    """
    group = parser.add_argument_group("data")
    group.add_argument("--data", nargs="+", metavar="FILE", help=data_help, **data_arguments)
    group.add_argument(
        "--format",
        choices=sorted(FORMATS),
        help="format of --data; if not given, it is inferred from the fields",
    )
    group.add_argument(
        "--images",
        metavar="DIR",
        help="folder of the images; if not given, the folder images/ beside each file of --data",
    )
    group.add_argument(
        "--skip-text-only",
        action="store_true",
        help="leave out the records of --data that name no image, instead of refusing them",
    )


def system_text(text) -> str:
    """Return the text of --system. Raises InputError for one that cannot be a system text."""
    check_system_text(text, "--system")
    return text


def read_data(options) -> list[Record]:
    """Read the records that the options name, or a random subset of them (--limit, --seed)."""
    records = read_records(
        options.data,
        image_folder=options.images,
        limit=options.limit,
        seed=options.seed,
        format=options.format,
        skip_text_only=options.skip_text_only,
    )
    return with_default_system(records, options)


def with_default_system(records, options) -> list[Record]:
    """Return the records, those without a system text with that of --system.

    Raises InputError if --system is without effect: all records have one, and nothing is measured.
    """
    if options.system is None:
        return records
    num_with_text = sum(record.system is not None for record in records)
    asks_questions = bool(getattr(options, "eval", None))
    check(
        num_with_text < len(records) or asks_questions,
        f"--system has no effect: each of the {len(records)} records has a system text of its own; "
        "leave it out",
    )
    if num_with_text > 0:
        print_message(
            f"{num_with_text} of {len(records)} records keep a system text of their own; "
            "the others get that of --system"
        )
    completed = []
    for record in records:
        if record.system is None:
            record = replace(record, system=options.system)
        completed.append(record)
    return completed


def add_sampling_options(parser):
    """Add --rho, --rounds, --epsilon and what else BDHS needs to sample rejected responses."""
    group = parser.add_argument_group("sampling of rejected responses (BDHS)")
    group.add_argument(
        "--rho",
        type=number_type(float, 0, 1),
        help="chance that an image token is masked (rho_th)",
    )
    group.add_argument(
        "--rounds",
        type=number_type(int, 1),
        help="how often to sample at most for a record (N_BDHS)",
    )
    group.add_argument(
        "--epsilon",
        type=number_type(float, -1, 2),
        help="sample again if the cosine similarity to the chosen response reaches this (eps_s)",
    )
    group.add_argument(
        "--similarity",
        metavar="DIR",
        help="sentence encoder (MPNet or BERT) for the similarity; "
        "if not given, the token embeddings of the model",
    )
    group.add_argument(
        "--noise-steps",
        type=number_type(int, 1, 999),
        help="steps of forward diffusion on the image, for noise and distortion (N)",
    )
    group.add_argument(
        "--unguided",
        action="store_true",
        help="sample whole responses in every round, instead of the ends of sentences",
    )
    group.add_argument(
        "--group", type=number_type(int, 1), help="number of records to sample together"
    )
    parser.set_defaults(**PAPER_SAMPLING)
