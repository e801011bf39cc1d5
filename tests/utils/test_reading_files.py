"""Files of records are read by what they hold, whatever their name ends in."""

import errno
import gzip
import io
import json
import os
import zipfile

import pytest

from minialign.utils.files import InputError, read_json, read_json_records

RECORDS = [{"id": 1, "text": "é\u2028"}, {"id": 2, "text": "["}]
COMPACT = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
INDENTED = [json.dumps(record, indent=1) for record in RECORDS]


def write(folder, content, name="data.json"):
    """Write a text or bytes to a file and return its path."""
    path = folder / name
    if isinstance(content, str):
        content = content.encode()
    path.write_bytes(content)
    return path


def error_of(path):
    """Return the message with which a file of records is refused, one line that names it."""
    with pytest.raises(InputError) as error:
        read_json_records(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.txt", "data"])
@pytest.mark.parametrize("byte_order_mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2),
        "\n".join(COMPACT),
        "\n\n" + "\r\n".join(COMPACT) + "\r\n\n",
        "\n".join(INDENTED),
        "\n\ufeff".join(COMPACT),  # two files with a byte order mark, joined
        json.dumps({"data": RECORDS}),
    ],
)
def test_lists_and_lines_are_told_apart_by_their_content(tmp_path, content, byte_order_mark, name):
    path = write(tmp_path, byte_order_mark + content, name)
    assert read_json_records(path) == RECORDS


@pytest.mark.parametrize("content", [COMPACT[0], INDENTED[0], COMPACT[0] + "\n"])
def test_a_single_object_is_a_single_record(tmp_path, content):
    assert read_json_records(write(tmp_path, content)) == RECORDS[:1]


def test_a_list_among_other_fields_is_not_taken_out(tmp_path):
    """No other field is dropped without a word, and a conversation is not a list of records."""
    message = error_of(write(tmp_path, json.dumps({"version": 1, "data": RECORDS})))
    assert "'data'" in message
    for value in (
        {"messages": RECORDS, "image": "a.png"},
        {"messages": RECORDS},
        {"data": "x"},
        {},
    ):
        assert read_json_records(write(tmp_path, json.dumps(value))) == [value]


@pytest.mark.parametrize(
    "content", ["", " \n", "[]", "\ufeff", "3", '"x"', "null", '{"data": []}', "a,b"]
)
def test_a_file_without_records_is_refused(tmp_path, content):
    assert "holds no records" in error_of(write(tmp_path, content))


@pytest.mark.parametrize(
    "content, place",
    [
        ('[{"id": 1},\n{"id": 2}', "line 2"),
        ('{"id": 1}\n\n{"id": 2', "line 3"),
        ('{"id": 1},\n{"id": 2}', "line 1, column 10"),
        ("id,image\n1,a.png", "begins with 'id,image"),
        ('[{"id": Infinity}]', "Infinity"),
        ("[" * 99999, "cannot be read"),
        ("[" + "9" * 9999 + "]", "cannot be read"),
        (b'{"id": 1}\n{"id": "\xe9"}', "not UTF-8 text at line 2"),
    ],
)
def test_broken_files_name_the_line(tmp_path, content, place):
    assert place in error_of(write(tmp_path, content))


def zip_file():
    """Return the bytes of a zip archive with a JSON file in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("data.json", "[]")
    return stream.getvalue()


@pytest.mark.parametrize(
    "content, kind, remedy",
    [
        (b"PAR1\x15\x04", "parquet", "README"),
        (b"ARROW1\0\0", "Arrow", "README"),
        (gzip.compress(b"[]"), "gzip", "gunzip"),
        (zip_file(), "zip", "unzip"),
        (b"\n<!DOCTYPE html><html>", "HTML", "download"),
        (b"<HTML><HEAD>", "HTML", "download"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS", "git lfs pull"),
        ("[1]".encode("utf-16"), "UTF-16", "UTF-8"),
        ("[1]".encode("utf-16-le"), "UTF-16", "UTF-8"),
        ("[1]".encode("utf-16-be"), "UTF-16", "UTF-8"),
        ("[1]".encode("utf-32"), "UTF-32", "UTF-8"),
    ],
)
def test_files_of_other_kinds_are_refused_with_a_remedy(tmp_path, content, kind, remedy):
    """What a file is shows in its first bytes, also where its name says JSON."""
    message = error_of(write(tmp_path, content))
    assert kind in message
    assert remedy in message


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such file" in error_of(tmp_path / "none.json")
    assert "cannot be read" in error_of(tmp_path)
    assert "cannot be read" in error_of(tmp_path / "a\0.json")


def test_a_single_json_value_may_have_a_byte_order_mark(tmp_path):
    assert read_json(write(tmp_path, '\ufeff{"a": 1}'), dict) == {"a": 1}


# --- what cannot be read, and broken JSON: the remedy fits the mistake


def test_a_folder_and_a_file_without_permission(tmp_path, monkeypatch):
    """The superuser may read every file, so the refusal of the system is made up."""
    assert error_of(tmp_path).endswith(
        "cannot be read (Is a directory); name a file in this folder"
    )

    def refuse(path):
        """Fail as a file does that belongs to somebody else."""
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    path = write(tmp_path, COMPACT[0])
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert error_of(path).endswith("(Permission denied); change its permissions (chmod)")


@pytest.mark.parametrize(
    "content, remedy",
    [
        ('[{"id": 1}, {"id"', "is the file complete?"),
        ('[{"id": "a', "is the file complete?"),
        ('{"id": 1}\n{"id": ', "is the file complete?"),
        ('[{"id": 1},]', "comma"),
        ('[{"id": 1,}]', "comma"),
        ('{"id": 1},\n{"id": 2}\n', "remove this comma"),
        ("[{'id': 1}]", "put texts into double quotes"),
        ("[{\"id\": 'a'}]", "put texts into double quotes"),
        ('[{"id": None}]', "write null in place of None"),
        ('[{"id": True}]', "write true in lower case"),
        ('[{"id": 1}, // the first\n{"id": 2}]', "remove this comment"),
        ('[{"id": "a "cup"."}]', "a backslash before a quotation mark in a text?"),
        ('[{"id": 1} {"id": 2}]', "is a comma missing before it"),
        ('[{"image": "C:\\images\\1.png"}]', "write \\\\ for a backslash in a text, or /"),
        ('[{"image": "C:\\users"}]', "write \\\\ for a backslash in a text, or /"),
        ('[{"text": "A cup.\nA dog."}]', "write \\n for a line break in a text, and \\t for a tab"),
        ('[{"text": "A\tcup."}]', "write \\n for a line break in a text, and \\t for a tab"),
        ('[{"id" 1}]', "is a colon missing before it?"),
        ('[{"id", 1}]', "is a colon missing before it?"),
        ("[{id: 1}]", "put the names of fields into double quotes"),
        ("[{\u201cid\u201d: 1}]", 'write straight double quotes (")'),
        ('[{"id": \u201ca\u201d}]', 'write straight double quotes (")'),
        ('[{"id": a}]', "write a text in double quotes, a number, true"),
    ],
)
def test_broken_json_has_a_remedy(tmp_path, content, remedy):
    """Whether the last comma of a list is blamed, or what follows, depends on Python's version."""
    message = error_of(write(tmp_path, content))
    assert "broken JSON at line " in message
    assert remedy in message.rpartition("; ")[2]


@pytest.mark.parametrize(
    "content, remedy",
    [
        ("id,image\n1,a.png\n", "is this another file?"),
        ('"id","image"\n"1","a.png"\n', "is this another file?"),
        ("steps: 20\n", "is this another file?"),
        ("1,a.png\n", "is this another file?"),
        ('{"id": 1}\n{"id": 2}\n', "remove what follows"),
        ('{"id": 1},\n', "remove this comma"),
        ("", "is the file complete?"),
    ],
)
def test_a_file_without_json_has_a_remedy(tmp_path, content, remedy):
    """Files of settings hold one object, so that nothing before has looked at how they begin."""
    with pytest.raises(InputError, match="broken JSON at line ") as error:
        read_json(write(tmp_path, content), dict)
    assert str(error.value).endswith(remedy) or f"; {remedy}" in str(error.value)
