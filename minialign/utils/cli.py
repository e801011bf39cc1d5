"""Command lines: one-line errors, checked numbers, and the exit status of a script.

Bad input ends a script with one line on standard error and exit status 2. Ctrl-C ends it with 130.
"""

import argparse
import math
import sys
from pathlib import Path

from minialign.utils.files import InputError, check


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action):
        """Return the help text of an option, and its default unless that is None or False."""
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and which accepts no abbreviated options."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, but refuse an argument that is not valid UTF-8."""
        words = sys.argv[1:] if args is None else args
        try:
            "".join(words).encode()
        except UnicodeEncodeError:  # no result file could hold such a name
            self.error("an argument is not UTF-8; rename the file or folder")
        return super().parse_known_args(args, namespace)

    def error(self, message):
        """Print the message as one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; --help lists the options\n")


def number_type(number_class, low, high=math.inf, above=False):
    """Return an argparse type that accepts numbers from `low` to `high`.

    number_class: int or float.
    above: exclude `low` itself.
    """

    expected = _describe_numbers(number_class, low, high, above)

    def parse_number(text):
        """Return the number that `text` spells. Raise ArgumentTypeError if it is out of bounds."""
        try:
            value = number_class(text)
        except ValueError:
            value = math.nan  # no comparison with it is true
        is_high_enough = value > low if above else value >= low
        is_low_enough = value <= high and value < math.inf
        if not (is_high_enough and is_low_enough):
            raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")
        return value

    return parse_number


def _describe_numbers(number_class, low, high, above):
    """Return in words which numbers are accepted, such as "a whole number of at least 1"."""
    what = "a whole number" if number_class is int else "a number"
    if high == math.inf:
        return f"{what} above {low}" if above else f"{what} of at least {low}"
    if above:
        return f"{what} above {low} and up to {high}"
    return f"{what} from {low} to {high}"


def check_new(path):
    """Raise InputError if `path` exists, so that no earlier result and no input is overwritten."""
    check(not Path(path).exists(), f"{path}: exists already; give another --out")


def new_folder():
    """Return the next free numbered folder under runs/, without creating it."""
    numbers = [0]
    for path in Path("runs").glob("[0-9]*"):
        if path.name.isdigit():
            numbers.append(int(path.name))
    return Path("runs") / f"{max(numbers) + 1:04}"


def run_script(main):
    """Call the `main` function of a script and return the exit status of the process."""
    script = Path(sys.argv[0]).name
    try:
        return main() or 0
    except InputError as error:
        print(f"{script}: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, or a folder that cannot be written to
        file = error.filename or "a file"
        reason = error.strerror or error
        print(f"{script}: {file}: {reason}; give another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; to resume, give the same options, the --out named above, and --resume",
            file=sys.stderr,
        )
        return 130
