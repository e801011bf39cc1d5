"""The options that name benchmarks: their files, images, answers and how they are asked."""

import argparse

from minialign.evaluation.benchmarks import BENCHMARKS
from minialign.utils.cli import flag, number_type

# Options that say how a benchmark is asked, as NAME=value.
ASKING_OPTIONS = ("max_new_tokens", "prompt")
# All options beside --benchmark that name a benchmark, as NAME=value.
NAMING_OPTIONS = ("images", "answers", *ASKING_OPTIONS)
# Options that have an effect only with --benchmark.
BENCHMARK_OPTIONS = (*ASKING_OPTIONS, "coco_list", "resume")
# Options that have no effect if no model is asked. --device is not among them, because its default
# hides whether it was given.
MODEL_OPTIONS = ("model", "adapter", "contrast", "template", "system", "dtype", "resume")


def add_benchmark_options(parser):
    """Add --benchmark, --answers, --max-new-tokens, --prompt, --coco-list and --resume."""
    lengths = [f"{name} {spec.max_new_tokens}" for name, spec in BENCHMARKS.items()]
    prompts = [f"{name} {spec.prompt.strip() or 'none'}" for name, spec in BENCHMARKS.items()]
    group = parser.add_argument_group("public benchmarks")
    group.add_argument(
        "--benchmark",
        nargs="+",
        action="extend",
        type=named,
        default=[],
        metavar="NAME=PATH",
        help=f"published file of a benchmark, or its folder; NAME is {', '.join(BENCHMARKS)}",
    )
    group.add_argument(
        "--answers",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=FILE|PATH",
        help="score the answers in this file instead of asking the model; needs neither the model "
        "nor the images. Without --benchmark PATH is a file of kept answers, or the folder of a "
        "run; with --model the answers are first asked and written there",
    )
    group.add_argument(
        "--max-new-tokens",
        nargs="+",
        action="extend",
        type=named_length,
        default=[],
        metavar="NAME=N",
        help=f"most tokens of an answer (default: the published number: {', '.join(lengths)})",
    )
    group.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        type=named,
        default=[],
        metavar="NAME=TEXT",
        help="text behind each question, or for coco the question itself (default: the published "
        f"one: {'; '.join(prompts)})",
    )
    group.add_argument(
        "--coco-list",
        metavar="FILE",
        help="for coco: ids or file names of the images to ask about (default: all in --images)",
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="keep the answers that --out has, and ask only the rest",
    )


def named(text) -> tuple[str, str]:
    """Return the (NAME, value) of an argument NAME=value, where NAME is a benchmark."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    if name not in BENCHMARKS:
        raise argparse.ArgumentTypeError(
            f"{name!r} is no benchmark; there are {', '.join(BENCHMARKS)}"
        )
    return name, value


def named_length(text) -> tuple[str, int]:
    """Return the (NAME, N) of an argument NAME=N, where N is a number of tokens."""
    name, value = named(text)
    return name, number_type(int, 1, 1 << 16)(value)


def check_benchmark_options(parser, options):
    """Check the options of benchmarks. Exit with one line if they do not fit together.

    Each option of (NAME, value) pairs becomes a dict by name, and `images` becomes {name: folder}.
    """
    # 1. Each option names a benchmark at most once, and only those of --benchmark.
    if options.pope or options.captions:
        parser.error("--benchmark does not go with --pope and --captions; give one of the two")
    options.answers = answers_of_benchmarks(parser, options.answers)
    options.images = folders_of_benchmarks(parser, options)
    put_by_name(parser, options)

    # 2. How a benchmark is asked has no effect if its answers are given.
    asked = [name for name in options.benchmark if name not in options.answers]
    refuse_asking_options(parser, options, asked)

    # 3. What is asked needs a model, images and a folder for the answers.
    if asked:
        check_asking_options(parser, options, asked)
    else:
        refuse_options(parser, options, MODEL_OPTIONS, "has no effect, as all answers are given")


def answers_of_benchmarks(parser, arguments) -> list[tuple[str, str]]:
    """Return the (NAME, FILE) pairs of --answers. Exit with one line if one is none."""
    try:
        return [named(argument) for argument in arguments]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --answers: {error}")


def put_by_name(parser, options):
    """Replace the (NAME, value) pairs of each option by a dict. Exit if one does not fit."""
    for option in ("benchmark", *NAMING_OPTIONS):
        by_name = unique_names(parser, option, getattr(options, option))
        setattr(options, option, by_name)
        for name, value in by_name.items():
            if value == "" and option != "prompt":
                parser.error(f"{flag(option)} {name}= has no value; give one")
            if name not in options.benchmark:
                parser.error(f"{flag(option)} {name}=... needs --benchmark {name}=PATH")


def unique_names(parser, option, pairs) -> dict:
    """Return the pairs of an option by name. Exit with one line if a name occurs twice."""
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        parser.error(f"{flag(option)} names a benchmark twice; leave one out")
    return by_name


def refuse_asking_options(parser, options, asked):
    """Exit with one line if an option says how to ask a benchmark whose answers are given."""
    for option in ASKING_OPTIONS:
        for name in getattr(options, option):
            if name not in asked:
                parser.error(
                    f"{flag(option)} {name}=... has no effect, as the answers of {name} are given; "
                    "leave it out"
                )
    if options.coco_list and "coco" not in asked:
        parser.error("--coco-list has no effect, as coco is not asked; leave it out")


def check_asking_options(parser, options, asked):
    """Exit with one line if something is missing for the benchmarks that are asked."""
    if not options.model:
        parser.error(f"give --model DIR, or --answers {asked[0]}=FILE to score answers")
    if not options.out:
        parser.error("give --out DIR, the folder of the answers")
    for name in asked:
        if name not in options.images:
            parser.error(f"give --images {name}=DIR, the folder of its images")


def folders_of_benchmarks(parser, options):
    """Return --images as (name, folder) pairs.

    A folder without a name is that of all benchmarks that are asked and have none of their own.
    """
    pairs = []
    shared_folders = []
    for argument in options.images:
        name, separator, folder = argument.partition("=")
        if separator and name in BENCHMARKS:
            pairs.append((name, folder))
        else:
            shared_folders.append(argument)
    if len(shared_folders) > 1:
        parser.error("--images names several folders without a benchmark; give NAME=DIR")

    # The benchmarks that are asked and have no folder of their own.
    names_with_folder = [name for name, _ in pairs]
    names_without_folder = []
    for name, _ in options.benchmark:
        if name not in names_with_folder and name not in dict(options.answers):
            names_without_folder.append(name)
    for folder in shared_folders:
        if not names_without_folder:
            parser.error(f"--images {folder} has no effect, as no benchmark needs it; leave it out")
        pairs += [(name, folder) for name in names_without_folder]
    return pairs


def refuse_benchmark_options(parser, options):
    """Exit with one line if an option of benchmarks was given without --benchmark."""
    refuse_options(parser, options, BENCHMARK_OPTIONS, "is for --benchmark NAME=PATH")
    for argument in options.answers:
        name, separator, _ = argument.partition("=")
        if separator and name in BENCHMARKS:
            parser.error(f"--answers {argument} is for --benchmark {name}=PATH; leave it out")
    if len(options.answers) > 1:
        parser.error("--answers names several files; give the folder of a run, or one file")


def refuse_options(parser, options, names, reason):
    """Exit with one line if one of the options was given."""
    for name in names:
        if getattr(options, name):
            parser.error(f"{flag(name)} {reason}; leave it out")
