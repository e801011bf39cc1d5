"""Read files with errors that name the file, and write files all at once or not at all.

Everything that a user can get wrong ends in an InputError, whose text is one line.
"""

import contextlib
import errno
import glob
import json
import os
import platform
import re
from pathlib import Path

from safetensors import SafetensorError

from minialign.utils.distributed import is_main_process
from minialign.utils.unreadable import (
    CONVERT,
    SAVE_AS_UTF8,
    describe_read_error,
    json_remedy,
    kind_and_remedy,
)

JSON_TYPES = {dict: "a JSON object", list: "a JSON list"}

# If a file of records is one object with one field, these are the names that the field may have.
WRAPPERS = (
    "data",
    "records",
    "examples",
    "instances",
    "samples",
    "items",
    "rows",
    "train",
    "questions",
)


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

    JSON of another shape (a text in place of a number, a missing key) makes such code raise errors
    of many types. They become one line that names the file and the `remedy`.
    """
    try:
        yield
    except (ValueError, re.error, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: {error}; {remedy}") from None
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
        name = Path(path).name
        raise InputError(f"{path}: not a complete {name} ({error!r}); {remedy}") from None


def read_text(path) -> str:
    """Return the text of a UTF-8 file, without a byte order mark.

    Raises InputError for a file that is missing, or of another kind, such as parquet or UTF-16.
    """
    # 1. Read the bytes.
    with read_errors(path):
        content = Path(path).read_bytes()

    # 2. Refuse files of other kinds by how they begin.
    check_beginning(path, content)
    is_utf8 = json.detect_encoding(content).startswith("utf-8")
    check(is_utf8, f"{path}: is UTF-16 or UTF-32 text; {SAVE_AS_UTF8}")

    # 3. Decode them.
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = 1 + content.count(b"\n", 0, error.start)
        raise InputError(
            f"{path}: not UTF-8 text at line {line} (byte {error.start}); {SAVE_AS_UTF8}"
        ) from None


@contextlib.contextmanager
def read_errors(path):
    """Turn the errors of code that opens a file to read it into an InputError with the remedy."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise InputError(describe_read_error(path, error)) from None


def check_beginning(path, content, convert_remedy=CONVERT):
    """Raise InputError if the content of a file begins like that of another kind of file.

    convert_remedy: what to do about parquet and Arrow files.
    """
    problem = kind_and_remedy(content, convert_remedy)
    check(problem is None, f"{path}: is {problem}")


def _parse_json(text, path, first_line=1, object_hook=None):
    """Return the JSON value of a text that begins at line `first_line` of the file."""
    with _json_errors(path, first_line):
        return json.loads(text, object_hook=object_hook)


@contextlib.contextmanager
def _json_errors(path, first_line=1):
    """Turn the errors of parsing JSON into an InputError that names the file and the line."""
    try:
        yield
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"{path}: broken JSON at line {line}, column {error.colno} "
            f"({error.msg}); {json_remedy(error)}"
        ) from None
    except (ValueError, RecursionError) as error:  # thousands of digits, thousands of brackets
        raise InputError(f"{path}: JSON that cannot be read ({error})") from None


def read_json(path, expected_type=object, object_hook=None):
    """Return the value in a JSON file. Raise InputError unless it has the `expected_type`.

    object_hook: function of `json.loads` whose value replaces each object, as soon as it is read.
    """
    value = _parse_json(read_text(path), path, object_hook=object_hook)
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
    for line_number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            values.append(_parse_json(line, path, line_number))
    return values


def read_json_records(path) -> list:
    """Return the values of a file of records in order: a JSON list, or JSON Lines.

    The content decides, not the ending of the file's name. Both may be indented. A single object is
    one record, unless its only field is one of WRAPPERS and holds the list.

    Raises InputError that names the file, and the line where JSON is broken. The values may be of
    any type.
    """
    # 1. Parse the JSON values that follow each other. JSON Lines has several, a JSON list is one.
    text = read_text(path)
    remedy = "give a JSON list of records, or JSON Lines with one record on each line"
    position = _skip_space(text, 0)
    check(position < len(text), f"{path}: holds no records; {remedy}")
    start = text[position : position + 20]
    check(start[0] in "[{", f"{path}: holds no records, it begins with {start!r}; {remedy}")
    values = _parse_values(text, position, path)

    # 2. Take the list out of the file's only value.
    if len(values) > 1:
        return values
    records = values[0]
    if isinstance(records, dict):
        records = _unwrap(records, path)
    check(records, f"{path}: holds no records; {remedy}")
    return records


def _parse_values(text, position, path):
    """Return the JSON values that follow each other in a text, from a position on."""
    decoder = json.JSONDecoder(parse_constant=_read_constant)
    values = []
    with _json_errors(path):
        while position < len(text):
            value, position = decoder.raw_decode(text, position)
            values.append(value)
            position = _skip_space(text, position)
    return values


def _unwrap(value, path):
    """Return the list of records in a file's only object, or else the object in a list."""
    for name in WRAPPERS:
        if isinstance(value.get(name), list):
            check(
                len(value) == 1,
                f"{path}: is one JSON object, whose field {name!r} holds a list among other "
                "fields; write that list alone to a file",
            )
            return value[name]
    return [value]


def _read_constant(name):
    """Return null for NaN, which pandas writes for a missing field. Refuse other constants."""
    if name == "NaN":
        return None
    raise ValueError(f"{name} is not JSON")


def _skip_space(text, position):
    """Return the first position that holds no white space of JSON, nor a byte order mark."""
    return re.compile(r"[ \t\r\n\ufeff]*").match(text, position).end()


# --- writing

# The remedies for errors of the operating system. For all others it is another --out.
REMEDIES = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: "was its folder removed?",
}


class WriteError(InputError):
    """A file cannot be written. What was done before is complete, so the work can be resumed."""


@contextlib.contextmanager
def write_errors(path):
    """Turn the errors of code that writes a file into a WriteError that names the file."""
    try:
        yield
    except OSError as error:
        raise WriteError(_describe_write_error(path, error.errno, error.strerror)) from None
    except SafetensorError as error:
        # Its text ends like "I/O error: No space left on device (os error 28)".
        match = re.search(r"os error (\d+)", str(error))
        number = int(match[1]) if match else None
        reason = os.strerror(number) if match else str(error)
        raise WriteError(_describe_write_error(path, number, reason)) from None


def _describe_write_error(path, number, reason):
    """Return one line: the file, the reason that the operating system gives, and the remedy."""
    remedy = REMEDIES.get(number, "give another --out")
    return f"{path}: cannot be written ({reason}); {remedy}"


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path, and rename it to `path` if the block ends without an error.

    A reader of `path` sees the old file or the new one, never half a file. If the block fails, the
    temporary file is removed. Under torchrun every process writes a temporary file of its own, and
    only the main process renames it.
    Raises WriteError if the file cannot be written.
    """
    path = Path(path)
    # Machines that share the file system may give one number to two processes.
    writer = f"{os.getpid()}@{platform.node()}"
    temporary = path.with_name(f".{path.name}.{writer}.tmp")
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_dead_temporaries(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))
        try:
            yield temporary
            # safetensors creates files that only their owner may read: give them the usual
            # permissions.
            umask = os.umask(0)  # the only way to read the umask is to set it
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            if is_main_process():
                os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def remove_dead_temporaries(paths):
    """Remove the temporary files of `atomic_write` whose processes on this machine were killed.

    Those of other machines stay, because their processes cannot be looked up here.
    """
    this_machine = re.escape(platform.node())
    for path in paths:
        match = re.fullmatch(rf"\..+\.(\d+)@{this_machine}\.tmp", path.name)
        if match and not is_running(int(match[1])):
            path.unlink(missing_ok=True)


def is_running(process_id):
    """Return whether a process with this number runs on this machine."""
    try:
        os.kill(process_id, 0)  # signal 0 is not sent, only the process is looked up
    except PermissionError:
        return True  # it runs, for another user
    except (ProcessLookupError, OverflowError):
        return False
    return True


def append_jsonl(path, values):
    """Append one JSON value per line to a file that exists. Only the main process writes.

    The file is closed at once, so that a full disk is noticed here, where the file can be named.
    """
    if not is_main_process():
        return
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    check(Path(path).exists(), f"{path}: was removed while it was being written; start again")
    with write_errors(path):
        append_text(path, "".join(lines))


def append_text(path, text):
    """Append a text to a file and close it."""
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(text)


def write_json(path, value):
    """Write a value as indented JSON, all of it or nothing."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path, text):
    """Write a text, all of it or nothing."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_jsonl(path, values):
    """Write one JSON value per line, all of them or nothing."""
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    with atomic_write(path) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
