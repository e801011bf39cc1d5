"""What the command lines share: bad input ends with one line and exit status 2, an interrupt with 130."""

import argparse
import sys
from pathlib import Path

from .data import FORMATS
from .files import BadInput, require
from .prompts import TEMPLATES


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; what is no Unicode, which no result could name, is refused."""
        try:
            "".join(sys.argv[1:] if args is None else args).encode()
        except UnicodeEncodeError:
            self.error("an argument is not UTF-8; rename the file or folder")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def number(kind, low, high=float("inf"), above=False):
    """An argparse type: a number of `kind` within [low, high], or (low, high] with `above`."""

    def read(text):
        """The number that `text` says."""
        try:
            value = kind(text)
        except ValueError:
            value = None
        if (
            value is None
            or not low <= value <= high
            or abs(value) == float("inf")
            or (above and value == low)
        ):
            what = "a whole number" if kind is int else "a number"
            bounds = f"{'above' if above else 'from'} {low}" + (
                f" to {high}" if high < float("inf") else "" if above else " up"
            )
            raise argparse.ArgumentTypeError(f"{text!r} is not {what} {bounds}")
        return value

    return read


def add_model_options(parser, **more):
    """--model --template --dtype --device; `more`: argparse's default or required, of --model."""
    parser.add_argument("--model", metavar="DIR", help="LLaVA checkpoint directory", **more)
    parser.add_argument(
        "--template", choices=sorted(TEMPLATES), help="prompt template; none: the checkpoint's own"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of weights and activations; none: the checkpoint's own",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where to compute")


def add_data_options(parser, what, **more):
    """--data --format --images; `what` the files hold; `more`: argparse's default or required, of --data."""
    parser.add_argument("--data", nargs="+", metavar="FILE", help=what, **more)
    parser.add_argument(
        "--format", choices=sorted(FORMATS), help="of --data; none: told from the fields"
    )
    parser.add_argument(
        "--images", metavar="DIR", help="folder of their pictures; none: images/ beside each file"
    )


def add_sampling_options(parser):
    """--rho --rounds --epsilon and how BDHS writes."""
    parser.add_argument(
        "--rho",
        type=number(float, 0, 1),
        default=0.99,
        help="share of picture vectors hidden (rho_th)",
    )
    parser.add_argument(
        "--rounds", type=number(int, 1), default=5, help="draws at most for a record (N_BDHS)"
    )
    parser.add_argument(
        "--epsilon",
        type=number(float, -1, 2),
        default=0.97,
        help="cosine at which a draw is too like the chosen response (eps_s)",
    )
    parser.add_argument(
        "--similarity",
        metavar="DIR",
        help="sentence encoder (MPNet, BERT) for the check; none: the policy's own embeddings",
    )
    parser.add_argument(
        "--noise-steps",
        type=number(int, 1, 999),
        default=500,
        help="forward diffusion of the picture, for noise and distortion (N)",
    )
    parser.add_argument(
        "--unguided",
        action="store_true",
        help="write whole responses in every round, not the ends of sentences",
    )
    parser.add_argument("--group", type=number(int, 1), default=32, help="records sampled together")


def fresh(path):
    """Raise BadInput where a path to write to holds something already: a result, or one of the inputs."""
    require(not Path(path).exists(), f"{path}: exists already; give another --out")


def new_folder():
    """The next free numbered folder under runs/; whoever writes into it makes it."""
    taken = [int(path.name) for path in Path("runs").glob("[0-9]*") if path.name.isdigit()]
    return Path("runs") / f"{max(taken, default=0) + 1:04}"


def run(main):
    """Run a script's main() and give its exit status."""
    try:
        return main() or 0
    except (BadInput, OSError) as error:
        if isinstance(error, OSError):  # a place that cannot be written to, a full disk
            error = f"{error.filename or 'a file'}: {error.strerror or error}; give another place with --out"
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; what was saved, if anything, goes on with the same options, the --out that was named above, and --resume",
            file=sys.stderr,
        )
        return 130
