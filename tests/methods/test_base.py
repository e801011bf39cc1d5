"""What is wrong with a record is reported with its file, its number and its id.

Two files may have records of the same id, so the id alone does not find the record.
"""

import json
from dataclasses import replace

import pytest

from minialign.methods.base import encode_example
from minialign.pairs.pair_files import check_pairs
from minialign.pairs.reward_model import pack_responses
from minialign.utils.files import InputError

OTHER_TEMPLATE = json.dumps({"user_turn": "Question: {} Answer:"})
IN_CHAT_FORMAT = ("<image>\nQuestion: What is it?",)


@pytest.fixture()
def record(records):
    """Return a record whose place names its file."""
    assert "instruct.json, record 1 (id" in records[0].place
    return records[0]


def assert_names_record(error, record, problem):
    """Assert that an error is one line that begins with the place of a record."""
    message = str(error.value)
    assert message.startswith(f"{record.place}: ")
    assert problem in message
    assert "\n" not in message


def test_a_record_that_is_too_long(vlm, record):
    text = replace(vlm.model.config.text, max_position_embeddings=70)
    vlm.model.config = replace(vlm.model.config, text=text)
    with pytest.raises(InputError) as error:
        encode_example(vlm, record, ["A cup."])
    assert_names_record(error, record, "64 image tokens, the prompt and")


def test_a_question_that_is_written_in_a_chat_format(vlm, record):
    vlm.template = OTHER_TEMPLATE
    record = replace(record, turns=IN_CHAT_FORMAT)
    for encode in (encode_example, pack_responses):
        with pytest.raises(InputError) as error:
            encode(vlm, record, ["A cup."])
        assert_names_record(error, record, "in a chat format already, it has 'Question:'")


def test_an_answer_with_an_image(vlm, record):
    with pytest.raises(InputError) as error:
        encode_example(vlm, record, ["A <image>."])
    assert_names_record(error, record, "an answer has <image> in it")


def test_a_system_text_without_a_place_in_the_template(vlm, record):
    vlm.template = OTHER_TEMPLATE
    with pytest.raises(InputError) as error:
        encode_example(vlm, replace(record, system="Be brief."), ["A cup."])
    assert_names_record(error, record, "has no place for the system text 'Be brief.'")


def test_a_record_without_a_rejected_response(record):
    with pytest.raises(InputError) as error:
        check_pairs([record], "score")
    assert_names_record(error, record, "has no rejected response; score needs pairs")


def test_a_record_that_was_not_read_from_a_file_is_named_by_its_id(record):
    with pytest.raises(InputError, match=f"^record {record.id}: has no rejected response"):
        check_pairs([replace(record, place="")])
