"""Command lines: one-line errors, checked numbers, and the exit status of a script.

Bad input ends a script with one line on standard error and exit status 2. So do a full disk and too
little memory. A signal ends it with 128 plus its number: Ctrl-C with 130.
"""

import argparse
import contextlib
import errno
import math
import os
import re
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from minialign.utils.distributed import LaunchError, LostProcessError, print_error
from minialign.utils.files import REMEDIES, InputError, WriteError, check, write_errors
from minialign.utils.interrupts import (
    ignore_signal,
    raise_interrupted,
    silence,
    stop_signals_handled_by,
)
from minialign.utils.locks import file_lock
from minialign.utils.memory import keep_freed_memory
from minialign.utils.messages import printable

# The options of a script that lower the memory it needs. Not every method or command reads --group
# and --max-new-tokens.
MEMORY_REMEDIES = {
    "train.py": "lower --tokens-per-microbatch, --keep-features or, if the method reads them, "
    "--group and --max-new-tokens, or give --checkpoint-layers or --dtype bfloat16",
    "sample.py": "give --dtype bfloat16 or, if the command reads them, lower --group and "
    "--max-new-tokens",
    "merge.py": "the decoder of the result has to fit in memory",
}
# Parts of the messages by which torch says that memory is short. They come from its CPU allocator,
# C++, cuBLAS and cuDNN.
MEMORY_SIGNS = ("can't allocate memory", "bad_alloc", "ALLOC_FAILED", "out of memory")

# Whatever a command prints, a file takes all of it. A pipe breaks if its reader ends early, as
# `head` does. --out is no remedy: it does not name standard output, and not every command has it.
OUTPUT_REMEDY = "read it to its end, or send it to a file with > FILE"


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of every option that has one."""

    def _get_help_string(self, action):
        """Return the help text of an option, and its default unless that is None, False or []."""
        if action.default is None or action.default is False or action.default == []:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and which accepts no abbreviated options."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """Parse, but refuse empty values, text that is not UTF-8, and a list given twice."""
        words = sys.argv[1:] if args is None else args
        self._refuse_empty_values(words)
        self._refuse_repeated_lists(words)
        try:
            "".join(words).encode()
        except UnicodeEncodeError:  # no result file could hold such a name
            self.error("an argument is not UTF-8; rename the file or folder")
        return super().parse_known_args(args, namespace)

    def _refuse_empty_values(self, words):
        """Exit with one line if an option has an empty value, which a path would take for "."."""
        option = "an argument"
        for word in words:
            if word.startswith("--"):
                option = word.split("=")[0]
            if word in ("", f"{option}="):
                self.error(f"{option} is empty; give a value, or leave it out")

    def _refuse_repeated_lists(self, words):
        """Exit with one line if an option that takes a list is typed twice.

        argparse would keep the last list alone. A single value may be repeated: scripts append an
        option to change an earlier one.
        """
        typed = [word.split("=")[0] for word in words]
        for action in self._actions:
            takes_list = action.nargs in (argparse.ONE_OR_MORE, argparse.ZERO_OR_MORE)
            adds_up = isinstance(action, argparse._ExtendAction)
            for option in action.option_strings:
                if takes_list and not adds_up and typed.count(option) > 1:
                    self.error(f"{option} is given twice; give all its values after one {option}")

    def error(self, message):
        """Print the message as one line and exit with status 2."""
        self.exit(2, f"{self.prog}: {printable(message)}; --help lists the options\n")


def flag(name) -> str:
    """Return an option as it is typed: "top_p" is --top-p."""
    return f"--{name.replace('_', '-')}"


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


def check_new(path, option="--out"):
    """Raise InputError if `path` exists or cannot be made.

    A command calls this before its work, so nothing is overwritten and no work is done in vain.
    `option` is the one that names the path.
    """
    path = Path(path)
    with write_errors(path):
        exists = path.exists() or path.is_symlink()
    check(not exists, f"{path}: exists already; give another {option}")
    parent = path.absolute().parent
    while not parent.exists():
        parent = parent.parent
    check(parent.is_dir(), f"{path}: {parent} is a file and no folder; give another {option}")
    can_write = os.access(parent, os.W_OK | os.X_OK)
    check(can_write, f"{path}: {parent} cannot be written to; give another {option}")


def new_folder(name):
    """Make and return the next numbered folder under runs/, such as runs/0007-bdhs.

    Several processes may ask at once. The lock gives each of them a number of its own.
    """
    runs = Path("runs")
    with file_lock(runs / ".lock", runs, wait=True):
        numbers = [0]
        for path in runs.iterdir():
            match = re.match(r"(\d+)(-|$)", path.name)
            if match:
                numbers.append(int(match[1]))
        folder = runs / f"{max(numbers) + 1:04}-{name}"
        with write_errors(folder):
            folder.mkdir()
    return folder


@contextlib.contextmanager
def resume_hint(path):
    """Add a note to errors after which the work in `path` can be resumed: how to resume it."""
    try:
        yield
    except (KeyboardInterrupt, MemoryError, RuntimeError, OSError, WriteError) as error:
        error.add_note(f"to resume, give the same options, --out {path} and --resume")
        raise


def run_script(main):
    """Call the `main` function of a script and return the exit status of the process."""
    path = Path(sys.argv[0])
    script = path.parent.name if path.name == "__main__.py" else path.name
    keep_freed_memory()
    with stop_signals_handled_by(ignore_signal):  # a second signal must not cut off the last line
        try:
            with stop_signals_handled_by(raise_interrupted):
                is_open = sys.stdout is not None  # Python sets it to None if >&- has closed it
                check(is_open, "standard output: is closed; send it to a file with > FILE")
                status = main() or 0
                sys.stdout.flush()  # here a full disk is still reported as one line
                return status
        except KeyboardInterrupt as error:
            signal_number = signal.Signals(getattr(error, "signal_number", signal.SIGINT))
            line = f"interrupted by {signal_number.name}"
            status = 128 + signal_number
            # torchrun sends SIGTERM while the loss of another process is still being handled. Then
            # the notes are those of the error that the signal interrupted.
            interrupted_error = error.__context__
            notes = getattr(error, "__notes__", getattr(interrupted_error, "__notes__", []))
        except Exception as error:
            line = describe_error(error, script)
            if line is None:  # a mistake in the program, which needs the whole traceback
                raise
            status = 2
            notes = getattr(error, "__notes__", [])
        print_error(f"{script}: {'; '.join([line, *notes])}")
        return status


def describe_error(error, script):
    """Return one line for an error that the user can do something about, and None for others."""
    if isinstance(error, InputError):
        return str(error)
    if isinstance(error, LaunchError | LostProcessError | dist.DistError):
        return str(error).splitlines()[0]
    if is_out_of_memory(error):
        # torch writes "Tried" on the GPU and "tried" on the CPU.
        size = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)", str(error))
        what = f"out of memory (tried to allocate {size[1]})" if size else "out of memory"
        return f"{what}; {MEMORY_REMEDIES.get(script, 'give --dtype bfloat16')}"
    if isinstance(error, OSError) and error.filename is None:
        # Writing to standard output failed, which has no file name.
        silence(1)  # else Python tries to write the rest when it ends, and fails again
        return _describe_os_error("standard output", error, OUTPUT_REMEDY)
    if isinstance(error, OSError):
        # The file may be one that is read, or one that is written.
        remedy = "change its permissions, or give another path"
        return _describe_os_error(error.filename, error, remedy)
    return None


def _describe_os_error(file, error, usual_remedy):
    """Return one line for an error of the operating system, with the remedy for its kind."""
    remedy = REMEDIES.get(error.errno, usual_remedy)
    return f"{file}: {error.strerror or error}; {remedy}"


def is_out_of_memory(error):
    """Return whether memory ran out, on the CPU or on the GPU."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    has_sign = any(sign in str(error) for sign in MEMORY_SIGNS)
    return isinstance(error, RuntimeError) and has_sign
