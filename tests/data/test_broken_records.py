"""Whatever is wrong with a record is one line with the file, the record and the problem."""

import copy
import json

import pytest
from data_folder import EXAMPLES, DataFolder, changed, conversation, llava

from minialign.data.records import read_records
from minialign.utils.files import InputError


@pytest.fixture()
def folder(tmp_path):
    return DataFolder(tmp_path)


@pytest.mark.parametrize("format", [format for format in EXAMPLES if format != "llava"])
def test_equal_responses_are_refused(folder, format):
    """A text compared with itself is an error, spaces around it apart. VLFeedback's is a tie."""
    text = json.dumps(EXAMPLES[format])
    same = json.loads(text.replace("A dog.", " A cup. "))
    same.pop("rounds", None)

    if format == "vlfeedback":
        assert len(folder.read(EXAMPLES[format], same)) == 1
        return
    message = folder.error_of(EXAMPLES[format], same)
    assert "record 2 (id 7)" in message
    assert "are the same" in message


@pytest.mark.parametrize(
    "format, changes, problem",
    [
        ("llava", {"conversations": None}, "conversations"),
        ("llava", {"image": None}, "names an image"),
        ("llava", {"image": 3}, "image"),
        ("llava", {"conversations": []}, "pairs of human and gpt"),
        ("llava", {"conversations": "text"}, "not a list"),
        ("llava", {"conversations": conversation("What?", "A cup.", "And?")}, "has 3"),
        ("llava", {"conversations": conversation("What?", "A cup.")[::-1]}, "turn 1"),
        (
            "llava",
            {"conversations": [*conversation("What?"), {"from": "gpt", "value": None}]},
            "turn 2",
        ),
        ("llava", {"conversations": [*conversation("What?"), "A cup."]}, "turn 2"),
        ("llava", {"conversations": conversation("What?", "  ")}, "chosen response is empty"),
        ("llava", {"image": "missing.png"}, "missing.png"),
        ("llava", {"image": "https://example.org/a.png"}, "is an address"),
        ("llava", {"image": "data:image/png;base64,iVBORw0KGgo="}, "the image itself"),
        (
            "povid",
            {"rejected_conversations": conversation("What is it?", "")},
            "rejected response is empty",
        ),
        ("povid", {"rejected_conversations": conversation("What?")}, "has 1"),
        ("povid", {"rejected_conversations": None}, "rejected_conversations"),
        ("llava-rlhf", {"preference": None}, "preference"),
        ("llava-rlhf", {"output_2": {}}, "value"),
        ("rlhf-v", {"text": "{'question': 3}"}, "not the JSON"),
        ("rlhf-v", {"text": '{"question": "What?"}'}, "chosen"),
        ("rlaif-v", {"rejected": None}, "rejected"),
        ("internvl", {"image": []}, "image"),
        ("vlfeedback", {"img_path": None}, "img_path"),
        ("trl", {"chosen": []}, "one message"),
        ("pairs", {"rejected": None}, "rejected"),
        ("pairs", {"chosen": 3}, "chosen"),
    ],
)
def test_bad_records_are_named(folder, format, changes, problem):
    """The second record is bad: the message has the file, number and id, and what is wrong."""
    message = folder.error_of(EXAMPLES[format], changed(EXAMPLES[format], **changes))
    assert "record 2 (id 7)" in message
    assert problem in message


WRONG_VALUES = [
    None,
    True,
    3,
    "",
    "x",
    "\ud800",
    "<image>",
    [],
    [3],
    {},
    {"type": "text"},
    "[" * 9999,
]


def broken_copies(value):
    """Yield copies of a JSON value with one thing in it dropped or replaced, at every depth."""
    for wrong_value in WRONG_VALUES:
        yield copy.deepcopy(wrong_value)
    keys = []
    if isinstance(value, dict):
        keys = list(value)
    if isinstance(value, list):
        keys = range(len(value))
    for key in keys:
        without_key = copy.copy(value)
        del without_key[key]
        yield without_key
        for broken_entry in broken_copies(value[key]):
            with_broken_entry = copy.copy(value)
            with_broken_entry[key] = broken_entry
            yield with_broken_entry


def assert_usable(record, format):
    """Assert that a record which was read can be trained on."""
    texts = [record.id, *record.turns, record.chosen]
    if format != "llava":
        texts.append(record.rejected)
    for text in texts:
        assert isinstance(text, str)
        assert text.encode()
    for text in texts[1:]:
        assert text.strip()
    assert record.chosen != record.rejected
    assert len(record.turns) % 2 == 1
    assert "".join(record.turns).count("<image>") == len(record.paths) == 1


@pytest.mark.parametrize("format", EXAMPLES)
def test_a_broken_record_gives_an_error_or_a_record(folder, format, monkeypatch):
    """Whatever is dropped or replaced: a usable record, or one line that names file and record.

    The reading of the file is replaced, because thousands of files would take their time.
    """
    path = folder.path / "data.json"
    raw_records = [EXAMPLES[format], None]
    monkeypatch.setattr("minialign.data.records.read_json_records", lambda path: raw_records)
    num_errors = 0
    num_read = 0
    for broken in broken_copies(EXAMPLES[format]):
        raw_records[1] = broken
        for named_format in (None, format):
            try:
                records = read_records([path], None, format=named_format)
            except InputError as error:
                message = str(error)
                assert len(message.splitlines()) == 1
                assert f"{path}, record 2" in message
                assert len(message) < 900
                num_errors += 1
            else:
                for record in records[1:]:
                    assert_usable(record, format)
                num_read += 1
    assert num_errors > 50
    assert num_read > 0


@pytest.mark.parametrize(
    "record",
    [
        llava(id={"a": 1}),
        llava(id="two\nlines", image="missing.png"),
        llava(image="missing\u2028.png"),
        llava(image="a" * 5000),
        llava(image="a\0.png"),
        llava(id="\ud800"),
        changed(EXAMPLES["rlhf-v"], text="9" * 9999),
        changed(EXAMPLES["llava-rlhf"], preference=0),
        changed(EXAMPLES["llava-rlhf"], preference=True),
        changed(EXAMPLES["vlfeedback"], completions={"annotations": [{}], "response": []}),
    ],
)
def test_odd_values_are_an_error_of_one_line(folder, record):
    folder.error_of(record)
