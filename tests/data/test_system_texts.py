"""System texts: where records have them, how each template writes them, and what is refused."""

import json

import pytest
from conftest import ROOT
from data_folder import EXAMPLES, DataFolder, changed, conversation, llava
from golden_tokenizers import CHAT_NAMES, golden_tokenizer

from minialign.data.chat_templates import encode_prompt, render_turns
from minialign.data.templates import TEMPLATES, VICUNA, read_template
from minialign.utils.files import InputError

GOLDEN = json.loads((ROOT / "tests" / "golden" / "system_texts.json").read_text(encoding="utf-8"))
BRIEF = "Answer briefly."
LLAMA2 = {
    "user_turn": "[INST] {} [/INST]",
    "response_prefix": " ",
    "system_in_question": "<<SYS>>\n{}\n<</SYS>>\n\n",
}
FROM_SYSTEM = {"from": "system", "value": BRIEF}
ROLE_SYSTEM = {"role": "system", "content": BRIEF}
PARTS_SYSTEM = {"role": "system", "content": [{"type": "text", "text": BRIEF}]}


@pytest.fixture()
def folder(tmp_path):
    """Return a folder for records."""
    return DataFolder(tmp_path)


def rendered(template, system=None):
    """Return the prompt of one question."""
    ((text, _),) = render_turns(template, ["<image>\nWhy?"], system)
    return text


# --- how templates write them ---


@pytest.mark.parametrize("name", GOLDEN["prompts"])
def test_a_system_text_is_written_as_transformers_does(tmp_path, name):
    """The golden file has the templates of the hub, and that of Llama 2, which is a file here."""
    template = name
    if name == "llama2":
        path = tmp_path / "llama2.json"
        path.write_text(json.dumps(LLAMA2))
        template = read_template(str(path))
    prompts = GOLDEN["prompts"][name]

    assert rendered(template, GOLDEN["system"]) == prompts["with"]
    if name != "chatml":  # without a system text the hub writes none, minialign that of the 34B
        assert rendered(template) == prompts["without"]


def test_every_built_in_template_has_a_place():
    assert {*TEMPLATES} == {*GOLDEN["prompts"], "vicuna_v1"} - {"llama2"}
    assert rendered("vicuna_v1", BRIEF) == "Answer briefly. USER: <image>\nWhy? ASSISTANT:"
    assert rendered("vicuna_v1", VICUNA) == rendered("vicuna_v1")


def test_a_system_text_is_written_once():
    """A later question has no system text in front of it, and braces are letters."""
    turns = ["<image>\nWhy?", "So.", "{}?"]
    pieces = render_turns(json.dumps(LLAMA2), turns, "{} {braces}")

    assert [text for text, _ in pieces] == [
        "[INST] <<SYS>>\n{} {braces}\n<</SYS>>\n\n<image>\nWhy? [/INST]",
        "So.",
        "[INST] {}? [/INST]",
    ]


@pytest.mark.parametrize("name", CHAT_NAMES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_ids_are_those_of_the_prompt_as_one_text(name, template):
    tokenizer = golden_tokenizer(name)

    ids = encode_prompt(tokenizer, template, ["<image>\nWhy?"], system=BRIEF)

    assert ids == tokenizer.encode(rendered(template, BRIEF), bos=True)


def test_special_tokens_in_a_system_text_are_letters():
    tokenizer = golden_tokenizer("llama")

    ids = encode_prompt(tokenizer, "vicuna", ["<image>\nWhy?"], system="Say </s> twice.")

    assert tokenizer.eos not in ids
    assert "Say </s> twice. USER:" in tokenizer.decode(ids, skip_special=False)


def test_a_template_without_a_place_refuses_a_system_text():
    template = json.dumps({"user_turn": "Q: {} A:"})

    with pytest.raises(InputError, match="has no place for the system text 'Answer briefly.'"):
        encode_prompt(golden_tokenizer("llama"), template, ["Why?"], system=BRIEF)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"system_turn": 3}, "'system_turn' is not a text"),
        ({"system_turn": "no place"}, "'system_turn' contains {} 0 times"),
        ({"system_in_question": "{}{}"}, "'system_in_question' contains {} 2 times"),
        ({"system_turn": "<image>{}"}, "contains <image>"),
        ({"system_turn": "{}", "system_in_question": "{}"}, "a system text has one place"),
    ],
)
def test_files_with_an_odd_place_are_refused(tmp_path, fields, message):
    path = tmp_path / "format.json"
    path.write_text(json.dumps({"user_turn": "Q: {}", **fields}))

    with pytest.raises(InputError) as error:
        read_template(str(path))

    assert message in str(error.value)


# --- where records have them ---


@pytest.mark.parametrize("format", EXAMPLES)
def test_every_format_has_the_field(folder, format):
    (plain,) = folder.read(EXAMPLES[format])
    (record,) = folder.read({**EXAMPLES[format], "system": BRIEF})

    assert plain.system is None
    assert record.system == BRIEF
    assert record.turns == plain.turns
    assert record.place.endswith(f"read as {format}")


def with_first_messages(format, message):
    """Return an example whose conversations, in all its fields, begin with a message."""
    example = dict(EXAMPLES[format])
    for name, value in example.items():
        is_conversation = name in ("conversations", "rejected_conversations", "prompt")
        if isinstance(value, list) and (is_conversation or len(value) > 1):
            example[name] = [message, *value]
    return example


@pytest.mark.parametrize("message", [FROM_SYSTEM, ROLE_SYSTEM, PARTS_SYSTEM])
@pytest.mark.parametrize(
    "format",
    ["llava", "povid", "llava-rlhf", "llama-factory", "llava-pair", "trl", "trl-implicit"],
)
def test_a_conversation_may_begin_with_one(folder, format, message):
    """ShareGPT writes {from: "system"}, chat programs {role: "system"}. Turns stay the same."""
    (plain,) = folder.read(EXAMPLES[format])

    (record,) = folder.read(with_first_messages(format, message))

    assert record.system == BRIEF
    assert record.turns == plain.turns
    assert (record.chosen, record.rejected) == (plain.chosen, plain.rejected)


@pytest.mark.parametrize("blank", [None, "", "  ", [], {}])
def test_a_blank_one_is_none(folder, blank):
    """LLaMA-Factory writes an empty text for records without a system text."""
    (record,) = folder.read({**llava(), "system": blank})
    assert record.system is None

    blank_message = {"from": "system", "value": " "}
    (record,) = folder.read(with_first_messages("llava", blank_message) | {"system": BRIEF})
    assert record.system == BRIEF


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"system": 3}, "field 'system' is not a text"),
        ({"system": True}, "field 'system' is not a text"),
        ({"system": [BRIEF]}, "field 'system' is not a text"),
        ({"system": {"text": BRIEF}}, "field 'system' is not a text"),
        ({"system": "Look at <image>."}, "has <image> in it"),
        (
            {"system": "<|im_start|>system\nObey"},
            "chat format already, it has '<|im_start|>system'",
        ),
        ({"system": "<<SYS>>\nObey\n<</SYS>>"}, "chat format already, it has '<<SYS>>'"),
        ({"system": "a\ud800"}, "surrogate"),
        (
            {"system": "Else.", "conversations": [FROM_SYSTEM, *conversation("Why?", "So.")]},
            "fields 'conversations' and 'system' have different system texts",
        ),
        (
            {"conversations": [*conversation("Why?", "So."), FROM_SYSTEM]},
            "turn 3 of 'conversations' is a system text, which may stand in the first turn alone",
        ),
        (
            {"conversations": [{"from": "system", "value": 3}, *conversation("Why?", "So.")]},
            "turn 1 of 'conversations' is not a message",
        ),
    ],
)
def test_odd_system_texts_are_refused(folder, changes, problem):
    """One line names the file, the record and the field."""
    message = folder.error_of(llava(), {**llava(id="8"), **changes})

    assert problem in message
    assert "record 2 (id 8)" in message


def test_two_conversations_under_different_system_texts_are_different_prompts(folder):
    povid = EXAMPLES["povid"]
    other = [{"from": "system", "value": "Name positions."}, *povid["rejected_conversations"]]
    for rejected in (other, povid["rejected_conversations"]):
        record = changed(with_first_messages("povid", FROM_SYSTEM), rejected_conversations=rejected)

        assert "have different system texts" in folder.error_of(record)


@pytest.mark.parametrize(
    "left_out",
    [[FROM_SYSTEM, *conversation("Why?", "So.")], [{"text": "not a message"}]],
)
def test_a_conversation_that_a_named_format_leaves_out_has_no_say(folder, left_out):
    """Neither its system text counts nor what is wrong with it."""
    example = {**EXAMPLES["pairs"], "conversations": left_out}

    (record,) = folder.read(example, format="pairs")
    assert record.system is None

    (record,) = folder.read({**example, "system": "Else."}, format="pairs")
    assert record.system == "Else."


def test_records_under_two_system_texts_are_two_prompts(folder, capsys):
    """They do not repeat each other, but random numbers are shared if their ids are the same."""
    folder.read({**llava(), "system": BRIEF}, {**llava(id="8"), "system": "Name positions."})
    assert capsys.readouterr().err == ""

    folder.read({**llava(), "system": BRIEF}, llava())
    assert "have the id of an earlier one with another prompt" in capsys.readouterr().err
