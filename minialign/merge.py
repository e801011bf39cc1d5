"""Average models or adapters that come from one base, and write the result (arXiv 2402.12750).

python -m minialign.merge --models DIR DIR... [--weights X X...] [--vision-of DIR] --out DIR
"""

import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.models.merging import merge_adapters, merge_checkpoints
from minialign.utils.cli import Parser, check_new, number_type, run_script
from minialign.utils.files import check
from minialign.utils.messages import print_message


def build_parser():
    """Build the parser of the command line."""
    parser = Parser(prog="python -m minialign.merge", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        required=True,
        metavar="DIR",
        help="checkpoints, or adapters, that come from one base: two or more",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=number_type(float, 0, 1e6, above=True),
        metavar="X",
        help="weight of each model in the mean, divided by their sum; if not given, all the same",
    )
    parser.add_argument(
        "--vision-of",
        metavar="DIR",
        help="the one of --models whose vision tower and projector are kept; if not given, the "
        "first",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the result")
    return parser


def parse_options(argv):
    """Return the options. Exit with one line if they do not fit together."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if len(options.models) < 2:
        parser.error("--models: one model is its own mean; give two or more")
    if options.weights is None:
        options.weights = [1.0] * len(options.models)
    if len(options.weights) != len(options.models):
        parser.error(
            f"--weights: {len(options.weights)} weights for {len(options.models)} models; give one "
            "for each"
        )
    if options.vision_of is None:
        options.vision_of = options.models[0]
    if options.vision_of not in options.models:
        parser.error(f"--vision-of {options.vision_of}: name one of --models, as it is named there")
    return options


def holds_adapter(directory) -> bool:
    """Return whether a folder holds an adapter, rather than a whole model."""
    return (Path(directory) / "adapter_config.json").exists()


def check_same_kind(directories):
    """Raise InputError if some folders hold adapters, and others whole models."""
    first = directories[0]
    for directory in directories[1:]:
        check(
            holds_adapter(directory) == holds_adapter(first),
            f"--models: of {first} and {directory} only one is an adapter; merge adapters with "
            "adapters, and models with models",
        )


def main():
    """Merge the models, write the result, and say in one line what it is."""
    # 1. All are adapters, or all are whole models.
    options = parse_options(sys.argv[1:])
    check_new(options.out)
    check_same_kind(options.models)
    if holds_adapter(options.models[0]):
        kind = "adapters"
        merge = merge_adapters
    else:
        kind = "models"
        merge = merge_checkpoints

    # 2. Merge them. A result that is not complete is removed, also after Ctrl-C.
    is_complete = False
    try:
        merge(options.models, options.weights, vision_of=options.vision_of, out=options.out)
        is_complete = True
    finally:
        if not is_complete:
            shutil.rmtree(options.out, ignore_errors=True)

    # 3. Say what the result is.
    weights = ", ".join(f"{weight:g}" for weight in options.weights)
    print_message(
        f"{options.out}: the mean of {len(options.models)} {kind}, weights {weights}, with the "
        f"projector of {options.vision_of}"
    )


if __name__ == "__main__":
    sys.exit(run_script(main))
