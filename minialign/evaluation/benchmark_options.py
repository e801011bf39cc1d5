"""The options that name benchmarks: their files, images, answers and how they are asked."""

import argparse

from minialign.evaluation.benchmarks import BENCHMARKS
from minialign.utils.cli import number_type

# Options that name a benchmark, as NAME=value. The last two say how it is asked.
NAMING_OPTIONS = ("images", "answers", "max_new_tokens", "prompt")
ASKING_OPTIONS = ("max_new_tokens", "prompt")
# Options that only --benchmark reads.
BENCHMARK_OPTIONS = ("answers", "max_new_tokens", "prompt", "coco_list", "resume")
# Options that have no effect if nothing is asked.
MODEL_OPTIONS = ("model", "adapter", "contrast", "template", "dtype", "resume")


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
        type=named,
        default=[],
        metavar="NAME=FILE",
        help="score this answer file, and do not ask the model; needs neither model nor images",
    )
    group.add_argument(
        "--max-new-tokens",
        nargs="+",
        action="extend",
        type=named_length,
        default=[],
        metavar="NAME=N",
        help=f"longest answer, in place of the published length: {', '.join(lengths)}",
    )
    group.add_argument(
        "--prompt",
        nargs="+",
        action="extend",
        type=named,
        default=[],
        metavar="NAME=TEXT",
        help="text behind each question (coco: the question), in place of the published one: "
        f"{'; '.join(prompts)}",
    )
    group.add_argument(
        "--coco-list",
        metavar="FILE",
        help="coco: which images to ask about, ids or file names; if not given, all in --images",
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the answers of --out, ask only the rest"
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
    """Replace the lists of pairs by dicts. Exit with one line if the options do not fit together.

    `images` becomes a dict of the folder of each benchmark that has one.
    """
    # 1. Each option names a benchmark once, and only those that are measured.
    if options.pope or options.captions:
        parser.error("--benchmark does not go with --pope and --captions; give one of the two")
    options.images = folders_of_benchmarks(parser, options)
    for option in ("benchmark", *NAMING_OPTIONS):
        by_name = unique_names(parser, option, getattr(options, option))
        setattr(options, option, by_name)
    for option in NAMING_OPTIONS:
        unknown = [name for name in getattr(options, option) if name not in options.benchmark]
        if unknown:
            parser.error(f"{flag(option)} {unknown[0]}=... needs --benchmark {unknown[0]}=PATH")

    # 2. What is asked needs a model, images and a folder for the answers.
    asked = [name for name in options.benchmark if name not in options.answers]
    if options.coco_list and "coco" not in asked:
        parser.error("--coco-list is for --benchmark coco=PATH, to be asked; leave it out")
    if asked:
        check_asking_options(parser, options, asked)
    else:
        refuse_options(parser, options, MODEL_OPTIONS, "has no effect, as all answers are there")


def unique_names(parser, option, pairs) -> dict:
    """Return the pairs of an option by name. Exit with one line if a name occurs twice."""
    by_name = dict(pairs)
    if len(by_name) < len(pairs):
        parser.error(f"{flag(option)} names a benchmark twice; leave one out")
    return by_name


def check_asking_options(parser, options, asked):
    """Exit with one line if something is missing for the benchmarks that are asked."""
    if not options.model:
        parser.error(f"give --model DIR, or --answers {asked[0]}=FILE to score answers")
    if not options.out:
        parser.error("give --out DIR, the folder of the answers")
    for name in asked:
        if name not in options.images:
            parser.error(f"give --images {name}=DIR, the folder of its images")
    for option in ASKING_OPTIONS:
        for name in getattr(options, option):
            if name not in asked:
                parser.error(f"{flag(option)} {name}=... has no effect, as its answers are there")


def folders_of_benchmarks(parser, options):
    """Return (name, folder) pairs of --images. A folder alone is that of the other benchmarks."""
    pairs = []
    shared_folders = []
    for word in options.images:
        name, separator, folder = word.partition("=")
        if separator and name in BENCHMARKS:
            pairs.append((name, folder))
        else:
            shared_folders.append(word)
    if len(shared_folders) > 1:
        parser.error("--images names several folders without a benchmark; give NAME=DIR")
    named_ones = [name for name, _ in pairs]
    for folder in shared_folders:
        for name, _ in options.benchmark:
            if name not in named_ones and name not in dict(options.answers):
                pairs.append((name, folder))
    return pairs


def refuse_benchmark_options(parser, options):
    """Exit with one line if an option was given that only --benchmark reads, or no model."""
    refuse_options(parser, options, BENCHMARK_OPTIONS, "is for --benchmark NAME=PATH")
    if not options.model:
        parser.error("give --model DIR, the model to measure")


def refuse_options(parser, options, names, reason):
    """Exit with one line if one of the options was given."""
    for name in names:
        if getattr(options, name):
            parser.error(f"{flag(name)} {reason}; leave it out")


def flag(name) -> str:
    """Return an option as it is typed: "max_new_tokens" is --max-new-tokens."""
    return f"--{name.replace('_', '-')}"
