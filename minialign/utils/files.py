"""Files in and out: JSON whose errors name the file and the record, and results written beside and renamed."""

import contextlib
import json
import os
import re
from pathlib import Path

from minialign.utils.distributed import is_main_process


class InputError(Exception):
    """What a user can mend: its text is one line that names the file, the record and the remedy. Scripts exit with 2."""


def check(fits, problem):
    """Raise BadInput, which says what the `problem` is, unless it `fits`."""
    if not fits:
        raise InputError(problem)


@contextlib.contextmanager
def friendly_errors(path, remedy):
    """Within, what JSON of another shape raises (a text for a number, a list for an object) becomes BadInput that names the file and the `remedy`."""
    try:
        yield
    except (
        ValueError,
        re.error,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        ZeroDivisionError,
    ) as error:
        problem = (
            error
            if isinstance(error, (ValueError, re.error))
            else f"not a whole {Path(path).name} ({error!r})"
        )
        raise InputError(f"{path}: {problem}; {remedy}") from None


def _text(path):
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _parsed(text, path, line=None):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: broken JSON at line {line or error.lineno}, column {error.colno} ({error.msg}); is the file complete?"
        ) from None
    except (ValueError, RecursionError) as error:  # an endless number, endless brackets
        raise InputError(f"{path}: JSON that cannot be read ({error})") from None


def read_json(path, kind=object):
    """The value in a JSON file. Raises BadInput when the file is missing, unreadable or broken, or the value is not of `kind` (dict, list)."""
    value = _parsed(_text(path), path)
    check(
        isinstance(value, kind),
        f"{path}: {'holds no JSON object' if kind is dict else 'not a JSON list'}; take the file that it came with",
    )
    return value


def read_jsonl(path):
    """The values of a JSON-lines file, in order; blank lines are passed over. Raises BadInput with the line's number."""
    # Not splitlines(): a JSON string may hold U+2028 and its like as they are.
    return [
        _parsed(line, path, number)
        for number, line in enumerate(_text(path).split("\n"), 1)
        if line.strip()
    ]


@contextlib.contextmanager
def atomic_write(path):
    """A path beside `path` to write to; renamed onto it when the block ends well, removed when it does not.

    Of several processes only the first one's is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # safetensors writes files that their owner alone may read
        if is_main_process():
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path, values):
    """Write one JSON value a line, whole or not at all."""
    with atomic_write(path) as beside:
        beside.write_text(
            "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values),
            encoding="utf-8",
        )
