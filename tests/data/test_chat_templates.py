"""Chat templates: ids of prompts and responses, and the template that fits a checkpoint."""

import unicodedata

import pytest
from golden_tokenizers import (
    CHAT_NAMES,
    golden_results,
    golden_tokenizer,
    read_spec,
    write_checkpoint,
)

from minialign.data.chat_templates import (
    TEMPLATES,
    decode_response,
    default_template,
    encode_prompt,
    encode_response,
    end_token_id,
    render_turns,
)
from minialign.data.stream_decoder import StreamDecoder
from minialign.utils.files import InputError

# --- prompts and responses ---


@pytest.mark.parametrize("name", CHAT_NAMES)
@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_response_have_the_ids_of_the_literal_conversation(name, template):
    """`tokenizers` encoded the conversation as one string, an end token after each answer."""
    tokenizer = golden_tokenizer(name)
    turns = golden_results()["turns"]
    answer = golden_results()["answer"]

    ids = encode_prompt(tokenizer, template, turns)
    ids += encode_response(tokenizer, template, answer)

    if name == "odd_added" and TEMPLATES[template].end_token is None:
        # Its </s> is not found in "bed.</s>" (test_normalized_end_token_is_skipped). Here it is.
        assert ids.count(tokenizer.eos) == 2
    else:
        assert ids == golden_results()["kinds"][name]["conversations"][template]
    assert ids.count(tokenizer.id_of("<image>")) == 1
    assert ids[-1] == end_token_id(tokenizer, template)


@pytest.mark.parametrize("template", TEMPLATES)
def test_one_turn_prompts_read_as_documented(template):
    """The prompts are those of the formats' documentation, letter for letter."""
    expected = {
        "vicuna": "USER: <image>\nWhy? ASSISTANT:",
        "vicuna_v1": (
            "A chat between a curious user and an artificial intelligence assistant. "
            "The assistant gives helpful, detailed, and polite answers to the user's questions. "
            "USER: <image>\nWhy? ASSISTANT:"
        ),
        "chatml": (
            "<|im_start|>system\nAnswer the questions.<|im_end|>"
            "<|im_start|>user\n<image>\nWhy?<|im_end|>"
            "<|im_start|>assistant\n"
        ),
        "mistral": "[INST] <image>\nWhy? [/INST]",
        "qwen": (
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            "<|im_start|>user\n<image>\nWhy?<|im_end|>\n"
            "<|im_start|>assistant\n"
        ),
        "llama3": (
            "<|start_header_id|>system<|end_header_id|>\n\n"
            "You are a helpful language and vision assistant. You are able to understand the "
            "visual content that the user provides, and assist the user with a variety of tasks "
            "using natural language.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhy?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
    }

    ((text, is_answer),) = render_turns(template, ["<image>\nWhy?"])

    assert text == expected[template]
    assert not is_answer


# Not "odd_added": its added token of two spaces brings a "▁" with it.
@pytest.mark.parametrize("name", [name for name in CHAT_NAMES if name != "odd_added"])
@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_come_back_from_their_ids(name, template):
    """This holds also for answers that begin with spaces or line breaks, and while streaming."""
    tokenizer = golden_tokenizer(name)
    answers = ["Yes.", "", " two spaces  inside ", "\n- a list\n", "été 中文 👍🏽", "{braces}"]
    for answer in answers:
        expected = unicodedata.normalize("NFC", answer)

        ids = encode_response(tokenizer, template, answer)
        stream = StreamDecoder(tokenizer, strip_prefix=TEMPLATES[template].response_prefix)
        pieces = [stream.push(token_id) for token_id in ids]

        assert decode_response(tokenizer, template, ids) == expected
        assert "".join(pieces) + stream.flush() == expected


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_answers_begin_with_the_space_of_their_template(name):
    """There is a space after "ASSISTANT:", and none after a line break, not even Llama's "▁"."""
    tokenizer = golden_tokenizer(name)
    first_token = {}
    for template in TEMPLATES:
        first_id = encode_response(tokenizer, template, "Zoo")[0]
        first_token[template] = tokenizer.token_text(first_id)

    for template in ("vicuna", "vicuna_v1", "mistral"):
        assert first_token[template].startswith(" ")
    for template in ("chatml", "qwen", "llama3"):
        assert first_token[template] == "Z"


@pytest.mark.parametrize("name", CHAT_NAMES)
def test_earlier_answers_have_the_ids_that_were_scored(name):
    """An earlier answer has the same ids in a later prompt, end token included."""
    tokenizer = golden_tokenizer(name)
    for template in TEMPLATES:
        first_turn = encode_prompt(tokenizer, template, ["Q?"])
        first_turn += encode_response(tokenizer, template, "A b.")

        later_prompt = encode_prompt(tokenizer, template, ["Q?", "A b.", "R?"])

        assert later_prompt[: len(first_turn)] == first_turn


@pytest.mark.parametrize("turns", [["Q", "A"], []])
def test_prompts_that_do_not_end_with_a_question_are_refused(turns):
    with pytest.raises(InputError, match="ends with a question"):
        encode_prompt(golden_tokenizer("llama"), "vicuna", turns)


def test_image_placeholder_is_refused_in_answers_and_without_its_token():
    with pytest.raises(InputError, match="an answer has <image>"):
        encode_response(golden_tokenizer("llama"), "vicuna", "An <image>.")
    with pytest.raises(InputError, match="the prompt has <image>"):
        encode_prompt(golden_tokenizer("across"), "vicuna", ["<image>\nQ"])


def test_missing_end_token_is_refused():
    with pytest.raises(InputError, match="--template"):
        end_token_id(golden_tokenizer("across"), "qwen")


# --- the template of a checkpoint ---

LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}
LLAVA_MISTRAL = {"model_type": "llava", "text_config": {"model_type": "mistral"}}
NEXT = {"model_type": "llava_next", "text_config": {}}
NEXT_MISTRAL = {"model_type": "llava_next", "text_config": {"model_type": "mistral"}}
ONEVISION = {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}}
CHAT_TOKENS = ("<|im_start|>", "<|eot_id|>")
# What the hub's LLaVA-1.5 has as its chat template, shortened.
VICUNA_JINJA = "{{ message['role'].upper() + ': '}}{{ '<image>\n' }}{{ 'ASSISTANT:' }}"


def write_without_tokens(directory, name, removed_tokens, **files):
    """Write a golden tokenizer without some of its added tokens."""
    spec = read_spec(name)
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] not in removed_tokens
    ]
    return write_checkpoint(directory, spec, **files)


@pytest.mark.parametrize(
    "name, removed_tokens, config, template",
    [
        ("llama", CHAT_TOKENS, LLAVA, "vicuna"),
        ("llama", CHAT_TOKENS, NEXT, "vicuna"),
        ("llama", CHAT_TOKENS, NEXT_MISTRAL, "mistral"),
        ("llama", (), LLAVA, "llama3"),
        ("llama", ("<|eot_id|>",), LLAVA, "chatml"),
        ("qwen2", ("<|eot_id|>",), ONEVISION, "qwen"),
    ],
)
def test_template_follows_from_tokens_and_model_types(
    tmp_path, name, removed_tokens, config, template
):
    directory = write_without_tokens(tmp_path, name, removed_tokens)

    assert default_template(directory, config) == template


@pytest.mark.parametrize("config", [LLAVA_MISTRAL, {"model_type": "gpt2"}, {}])
def test_unknown_template_has_to_be_named(tmp_path, config):
    directory = write_without_tokens(tmp_path, "llama", CHAT_TOKENS)

    with pytest.raises(InputError, match="--template"):
        default_template(directory, config)


def test_the_checkpoints_own_chat_template_comes_first(tmp_path):
    """chat_template.jinja counts before chat_template.json, and both before the vocabulary."""
    chat_template = {"chat_template": VICUNA_JINJA}
    directory = write_without_tokens(tmp_path, "llama", CHAT_TOKENS, chat_template=chat_template)
    assert default_template(directory, LLAVA) == "vicuna"

    chat_template = {"chat_template": "A chat between a curious user and" + VICUNA_JINJA}
    write_without_tokens(tmp_path, "llama", CHAT_TOKENS, chat_template=chat_template)
    assert default_template(directory, LLAVA) == "vicuna_v1"

    (directory / "chat_template.jinja").write_text("[INST]")
    assert default_template(directory, LLAVA) == "mistral"

    (directory / "chat_template.jinja").write_text("Human: Bot:")
    with pytest.raises(InputError, match="--template"):
        default_template(directory, LLAVA)
