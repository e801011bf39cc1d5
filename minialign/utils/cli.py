"""What the command lines share: bad input ends with one line and exit status 2, an interrupt with 130."""

import argparse
import sys
from pathlib import Path

from minialign.utils.files import InputError, check


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        return (
            action.help
            if action.default is None or action.default is False
            else super()._get_help_string(action)
        )


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes no abbreviations."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """As argparse's; what is no Unicode, which no result could name, is refused."""
        try:
            "".join(sys.argv[1:] if args is None else args).encode()
        except UnicodeEncodeError:
            self.error("an argument is not UTF-8; rename the file or folder")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def number_type(kind, low, high=float("inf"), above=False):
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


def check_new(path):
    """Raise BadInput where a path to write to holds something already: a result, or one of the inputs."""
    check(not Path(path).exists(), f"{path}: exists already; give another --out")


def new_folder():
    """The next free numbered folder under runs/; whoever writes into it makes it."""
    taken = [int(path.name) for path in Path("runs").glob("[0-9]*") if path.name.isdigit()]
    return Path("runs") / f"{max(taken, default=0) + 1:04}"


def run_script(main):
    """Run a script's main() and give its exit status."""
    try:
        return main() or 0
    except (InputError, OSError) as error:
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
