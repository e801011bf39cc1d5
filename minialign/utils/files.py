"""Read files with errors that name the file, and write files all at once or not at all.

Everything that a user can get wrong ends in an InputError, whose text is one line.
"""

import contextlib
import json
import os
import re
from pathlib import Path

from minialign.utils.distributed import is_main_process

JSON_TYPES = {dict: "a JSON object", list: "a JSON list"}


class InputError(Exception):
    """An error that the user can fix.

    Its text is one line with the file, the record and the remedy. Scripts print it and exit with 2.
    """


def check(condition, message):
    """Raise InputError with this message unless the condition holds."""
    if not condition:
        raise InputError(message)


@contextlib.contextmanager
def friendly_errors(path, remedy):
    """Turn the errors of code that reads a file of unexpected content into an InputError.

    JSON of another shape (a text in place of a number, a missing key) raises errors of many types.
    Within this context they become one line that names the file and the `remedy`.
    """
    try:
        yield
    except (ValueError, re.error) as error:
        raise InputError(f"{path}: {error}; {remedy}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        name = Path(path).name
        raise InputError(f"{path}: not a complete {name} ({error!r}); {remedy}") from None


def _read_text(path):
    """Return the text of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text (byte {error.start})") from None


def _parse_json(text, path, first_line=1):
    """Return the JSON value of a text that begins at line `first_line` of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{path}: broken JSON at line {line}, column {error.colno} "
            f"({error.msg}); is the file complete?"
        ) from None
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise InputError(f"{path}: JSON that cannot be read ({error})") from None


def read_json(path, expected_type=object):
    """Return the value in a JSON file. Raise InputError unless it has the `expected_type`."""
    value = _parse_json(_read_text(path), path)
    if not isinstance(value, expected_type):
        name = JSON_TYPES[expected_type]
        raise InputError(f"{path}: not {name}; restore the original file")
    return value


def read_optional_json(path) -> dict:
    """Return the JSON object in a file, or an empty one if there is no such file."""
    if not Path(path).exists():
        return {}
    return read_json(path, dict)


def read_jsonl(path):
    """Return the values of a JSON-lines file in order. Blank lines are skipped."""
    values = []
    # Not str.splitlines(): a JSON string may contain U+2028 and other line separators unescaped.
    for line_number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            values.append(_parse_json(line, path, line_number))
    return values


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path, and rename it to `path` if the block ends without an error.

    A reader of `path` sees the old file or the new one, never half a file. If the block fails, the
    temporary file is removed. Of several processes only the main one's file is kept.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        # safetensors creates files that only their owner may read: give them the usual permissions.
        umask = os.umask(0)  # the only way to read the umask is to set it
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        if is_main_process():
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, value):
    """Write a value as indented JSON, all of it or nothing."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def write_jsonl(path, values):
    """Write one JSON value per line, all of them or nothing."""
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
