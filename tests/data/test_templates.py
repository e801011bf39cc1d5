"""Chat formats in a JSON file: what is read, what is refused."""

import json

import pytest
from golden_tokenizers import golden_tokenizer

from minialign.data.chat_templates import decode_response, encode_prompt, encode_response
from minialign.data.templates import TEMPLATES, find_template, read_template
from minialign.utils.files import InputError

HUMAN = {
    "system": "A chat between a curious human and an assistant. ",
    "user_turn": "Human: {} Bot:",
    "response_prefix": "\n\n",
    "end_token": None,
    "turn_separator": "\n",
}


def write_template(directory, value):
    """Write a value as a JSON file, and return its path."""
    path = directory / "format.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return str(path)


def test_a_file_describes_a_chat_format(tmp_path):
    """The prompt is what the file says, and answers come back from their ids."""
    template = read_template(write_template(tmp_path, HUMAN))
    tokenizer = golden_tokenizer("yi")

    prompt_ids = encode_prompt(tokenizer, template, ["<image>\nWhy?", "So.", "{} And?"])
    answer_ids = encode_response(tokenizer, template, "\nA cup.")

    assert tokenizer.decode(prompt_ids, skip_special=False) == (
        "A chat between a curious human and an assistant. Human: <image>\nWhy? Bot:\n\nSo.</s>"
        "\nHuman: {} And? Bot:"
    )
    assert decode_response(tokenizer, template, answer_ids) == "\nA cup."


def test_what_stands_for_a_template_holds_its_fields(tmp_path):
    """A run or a reward model records it, so the file is not needed any more."""
    path = write_template(tmp_path, HUMAN)
    template = read_template(path)

    assert json.loads(template) == HUMAN
    assert find_template(template).user_turn == "Human: {} Bot:"
    assert read_template("vicuna") == "vicuna"
    mistral = {"user_turn": "[INST] {} [/INST]", "response_prefix": " "}
    assert read_template(write_template(tmp_path, mistral)) == "mistral"


@pytest.mark.parametrize(
    "value, message",
    [
        ([], "not a JSON object"),
        ("vicuna", "not a JSON object"),
        ({}, "no field 'user_turn'"),
        ({"user_turn": 3}, "'user_turn' is not a text"),
        ({"user_turn": None}, "'user_turn' is not a text"),
        ({"user_turn": "Q: {}", "sytem": ""}, "unknown field 'sytem'"),
        ({"user_turn": "Q: {}", "end_token": ""}, "'end_token' is empty"),
        ({"user_turn": "Q: {}", "end_token": ["</s>"]}, "'end_token' is not a text"),
        ({"user_turn": "Q:"}, "{} 0 times"),
        ({"user_turn": "Q: {} {}"}, "{} 2 times"),
        ({"user_turn": "Q: <image>{}"}, "contains <image>"),
        ({"user_turn": "Q: {}", "system": "<image>"}, "contains <image>"),
        ({"user_turn": "Q: {}", "system": "a\ud800"}, "surrogate"),
    ],
)
def test_files_that_are_no_chat_format_are_refused(tmp_path, value, message):
    path = write_template(tmp_path, value)
    with pytest.raises(InputError) as error:
        read_template(path)

    assert message in str(error.value)
    assert path in str(error.value)
    assert "\n" not in str(error.value)


def test_names_that_are_no_template_are_refused(tmp_path):
    with pytest.raises(InputError, match="neither a built-in template .* nor a file"):
        read_template("vicuna2")
    with pytest.raises(InputError, match="unknown; choose one of vicuna, "):
        find_template("vicuna2")
    with pytest.raises(InputError, match="template: "):
        find_template("{broken")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="broken JSON at line 1"):
        read_template(str(tmp_path / "broken.json"))
    assert len(TEMPLATES) == 6
