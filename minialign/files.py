"""Files in and out: JSON whose errors name the file and the record, and results written beside and renamed."""
import contextlib
import json
import os
from pathlib import Path


class BadInput(Exception):
    """What a user can mend: its text is one line that names the file, the record and the remedy. Scripts exit with 2."""


def read_json(path):
    """The value in a JSON file. Raises BadInput when the file is missing, unreadable or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadInput(f"{path}: broken JSON at line {error.lineno}, column {error.colno} ({error.msg}); is the file complete?") from None


def read_jsonl(path):
    """The values of a JSON-lines file, in order; blank lines are passed over. Raises BadInput with the line's number."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines() would also cut at U+2028 within a text
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read as UTF-8 text ({error})") from None
    values = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise BadInput(f"{path}: broken JSON in line {number} ({error.msg}); is the file complete?") from None
    return values


@contextlib.contextmanager
def replacing(path):
    """A path beside `path` to write to; renamed onto it when the block ends well, removed when it does not."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield beside
        mask = os.umask(0)
        os.umask(mask)
        beside.chmod(0o666 & ~mask)  # safetensors writes files that their owner alone may read
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path, value):
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_jsonl(path, values):
    """Write one JSON value a line, whole or not at all."""
    with replacing(path) as beside:
        beside.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
