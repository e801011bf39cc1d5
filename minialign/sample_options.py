"""The command line of sample.py, which has three commands: pairs, answer and score."""

import argparse

from minialign.data.placeholders import place_images
from minialign.data.templates import IMAGE_PLACEHOLDER
from minialign.options import (
    BDHS_CONDITIONS,
    TINY_WORLD,
    Condition,
    add_data_options,
    add_model_options,
    add_sampling_options,
    note_paper_defaults,
    refuse_switched_off_options,
    refuse_unread_options,
    typed_options,
)
from minialign.pairs.contact_sheet import DEFAULT_ROWS
from minialign.pairs.curation import POLICY, REWARD_PREFIX
from minialign.utils.cli import Parser, flag, number_type
from minialign.utils.files import InputError, check, read_json

MAX_SHEET = 200  # pairs on a contact sheet, which takes a megabyte of memory for each
# The settings of recipe.json that concern the sampling of pairs.
RECIPE_OPTIONS = ("rho", "rounds", "epsilon", "max_new_tokens", "group")
# The options of `pairs` that only some ways of sampling read. All others are read by every way.
BDHS_OPTIONS = (
    "rounds",
    "epsilon",
    "similarity",
    "unguided",
    "temperature",
    "top_p",
    "max_new_tokens",
    "explain",
)
OPTIONS_OF_WAYS = {
    "attention": ("rho", *BDHS_OPTIONS),
    "noise": ("noise_steps", *BDHS_OPTIONS),
    "distortion": ("noise_steps",),
    "corrupt": ("corrupter", "max_new_tokens"),
    "data": (),
}


def rewrites_greedily(options):
    """Return whether a model rewrites the chosen responses, which needs no random numbers."""
    return options.by == "corrupt" and options.corrupter != "truth"


def writes_text(options):
    """Return whether a model writes text. The rule that corrupts exchanges words instead."""
    return options.by != "corrupt" or rewrites_greedily(options)


def draws_at_random(options):
    """Return whether the seed decides anything.

    It decides which records are taken, what is sampled, or which of the pairs with equal scores are
    kept.
    """
    draws_pairs = options.by != "data" and not rewrites_greedily(options)
    return draws_pairs or options.limit is not None or options.keep is not None


def samples_tokens(options):
    """Return whether tokens are drawn. At temperature 0 the likeliest is taken."""
    return options.temperature > 0


# For each command the options that the value of another option switches off.
CONDITIONS = {
    "pairs": (
        *BDHS_CONDITIONS,
        Condition(("max_new_tokens",), writes_text, "--corrupter DIR"),
        Condition(("top_p",), samples_tokens, "--temperature above 0"),
        Condition(("seed",), draws_at_random, "--limit or --keep, or another --by"),
    ),
    "answer": (Condition(("seed",), samples_tokens, "--temperature above 0"),),
    "score": (),
}


def parse_options(argv) -> argparse.Namespace:
    """Return the options. Without a command it is `pairs`."""
    parser = Parser(
        prog="sample.py",
        description="Sample from a multimodal language model: preference pairs, an answer, "
        "or log-probs.",
        epilog="Without a command: pairs. COMMAND --help shows the options of a command.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    pairs_parser = add_pairs_command(commands)
    add_answer_command(commands)
    add_score_command(commands)

    # The shipped model has 64 image tokens and not 576, so the share to mask is another one.
    typed = {word.split("=")[0] for word in argv}
    if "--model" not in typed:
        recipe = read_json(TINY_WORLD / "recipe.json")
        pairs_parser.set_defaults(**{name: recipe[name] for name in RECIPE_OPTIONS})

    asks_for_help = argv and argv[0] in ("-h", "--help")
    names_no_command = not argv or argv[0].startswith("-")
    if names_no_command and not asks_for_help:
        argv = ["pairs", *argv]
    options = parser.parse_args(argv)
    check_options(parser, options, typed_options(argv, options))
    return options


def check_options(parser, options, typed):
    """Exit with one line if a typed option has no effect."""
    # 1. Options that the way of sampling, which --by names, does not read.
    if options.command == "pairs":
        refuse_unread_options(parser, typed, "--by", chosen=options.by, table=OPTIONS_OF_WAYS)
        note_paper_defaults(options, typed)
        if options.explain is not None:
            refuse_output_options(parser, typed)
        check_curation(parser, options)

    # 2. Options that the value of another option switches off.
    conditions = CONDITIONS[options.command]
    refuse_switched_off_options(parser, options, typed, conditions=conditions)


def refuse_output_options(parser, typed):
    """Exit with one line if an option on output files was typed, since --explain writes none."""
    for name in ("out", "resume", "sheet", "keep", "by_score"):
        if name in typed:
            parser.error(f"--explain prints one pair and writes no files; leave {flag(name)} out")


def check_curation(parser, options):
    """Exit with one line if pairs cannot be chosen as the options say."""
    if options.keep is not None and options.by_score is None:
        parser.error("--keep needs --by-score, which says who scores the pairs: reward:DIR, policy")
    if options.by_score is not None and options.keep is None:
        parser.error("--by-score needs --keep, the share of the pairs to keep; 1 only scores them")


def read_scorer(text):
    """Return the name of a scorer. Raise ArgumentTypeError if it is none."""
    folder = text.removeprefix(REWARD_PREFIX)
    names_folder = text.startswith(REWARD_PREFIX) and folder.strip()
    if text != POLICY and not names_folder:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither {POLICY} nor {REWARD_PREFIX}DIR, the folder of a reward model"
        )
    return text


def add_pairs_command(commands):
    """Add the command `pairs` and return its parser."""
    parser = commands.add_parser(
        "pairs", help="sample chosen and rejected responses as JSONL, with a contact sheet"
    )
    parser.add_argument(
        "--by",
        choices=tuple(OPTIONS_OF_WAYS),
        default="attention",
        help="BDHS with image tokens masked, BDHS on a noisy image, every token predicted under "
        "noise, the chosen response rewritten, or the rejected responses that --data has",
    )
    parser.add_argument(
        "--corrupter",
        default="truth",
        metavar="truth|DIR",
        help="who rewrites: a rule that reads captions.json next to --data, or a multimodal LLM",
    )
    add_curation_options(parser)
    parser.add_argument(
        "--limit", type=number_type(int, 1), help="take a random subset of this many records"
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="JSONL file to write, with the contact sheet next to it; "
        "if not given, in a new folder under runs/",
    )
    parser.add_argument(
        "--sheet",
        type=number_type(int, 1, MAX_SHEET),
        default=DEFAULT_ROWS,
        metavar="N",
        help="draw so many pairs on the contact sheet",
    )
    parser.add_argument("--resume", action="store_true", help="resume an unfinished --out")
    parser.add_argument(
        "--explain",
        metavar="ID",
        help="print step by step how BDHS samples the pair of the record with this id, and write "
        "no files",
    )
    add_model_options(parser, default=str(TINY_WORLD / "model"))
    add_data_options(
        parser,
        "records in one of the formats of --format; their rejected responses are read for "
        "--by data alone",
        default=[str(TINY_WORLD / "train" / "instruct.json")],
    )
    add_sampling_options(parser)
    add_generation_options(parser, temperature=1.0)
    parser.add_argument(
        "--top-p",
        type=number_type(float, 0, 1, above=True),
        default=1.0,
        help="nucleus sampling: sample from the likeliest tokens of this probability together",
    )
    return parser


def add_curation_options(parser):
    """Add --keep and --by-score, which choose among the sampled pairs."""
    parser.add_argument(
        "--keep",
        type=number_type(float, 0, 1, above=True),
        metavar="SHARE",
        help="score all pairs, and write this share of them, the best ones; the others go to a "
        "second file, OUT with .dropped before its ending",
    )
    parser.add_argument(
        "--by-score",
        type=read_scorer,
        metavar="reward:DIR|policy",
        help="who scores the pairs for --keep, by how far chosen is ahead of rejected: a reward "
        "model, or the model by its own log-probs",
    )


def read_question(text) -> str:
    """Return the question of --prompt with its <image> in front, as questions of records have it.

    Raises InputError for a text that a record may not have either.
    """
    check(text.replace(IMAGE_PLACEHOLDER, "").strip(), f"--prompt {text!r}: write a question")
    try:
        (question,) = place_images([text], num_images=1)
    except InputError as error:
        raise InputError(f"--prompt: {error}") from None
    return question


def add_answer_command(commands):
    """Add the command `answer`."""
    parser = commands.add_parser("answer", help="answer a question about an image, streaming")
    parser.add_argument("--image", required=True, metavar="F", help="the image")
    parser.add_argument(
        "--prompt", required=True, type=read_question, metavar="T", help="the question"
    )
    parser.add_argument("--adapter", metavar="DIR", help="adapter to load into the model")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="show for each word how much likelier the image makes it, and what the model would "
        "say with the image hidden",
    )
    add_model_options(parser, default=str(TINY_WORLD / "model"))
    add_generation_options(parser, temperature=0.0)


def add_score_command(commands):
    """Add the command `score`."""
    parser = commands.add_parser(
        "score", help="summed log-probs (nats, end token counted) of preference records"
    )
    add_model_options(parser, default=str(TINY_WORLD / "model"))
    add_data_options(
        parser,
        "preference records, in one of the formats of --format",
        default=[str(TINY_WORLD / "train" / "povid.json")],
    )
    parser.add_argument(
        "--out", metavar="FILE", help="JSONL file to write; if not given, standard output"
    )


def add_generation_options(parser, *, temperature):
    """Add --max-new-tokens, --temperature with this default, and --seed."""
    parser.add_argument(
        "--max-new-tokens",
        type=number_type(int, 1, 1 << 16),
        default=256,
        help="the most tokens of an answer or a completion",
    )
    parser.add_argument(
        "--temperature", type=number_type(float, 0), default=temperature, help="0 is greedy"
    )
    parser.add_argument(
        "--seed", type=number_type(int, 0, 2**32 - 1), default=0, help="seed of all random numbers"
    )
