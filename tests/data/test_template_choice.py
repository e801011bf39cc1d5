"""The chat template of a checkpoint: the built-in one that writes the same, or a refusal."""

import json

import pytest
from golden_tokenizers import read_spec, write_checkpoint

from minialign.data.template_choice import default_template
from minialign.data.templates import LLAMA3, TEMPLATES, VICUNA
from minialign.utils.files import InputError

LLAVA = {"model_type": "llava", "text_config": {"model_type": "llama"}}
LLAVA_MISTRAL = {"model_type": "llava", "text_config": {"model_type": "mistral"}}
NEXT = {"model_type": "llava_next", "text_config": {}}
NEXT_MISTRAL = {"model_type": "llava_next", "text_config": {"model_type": "mistral"}}
ONEVISION = {"model_type": "llava_onevision", "text_config": {"model_type": "qwen2"}}
CHAT_TOKENS = ("<|im_start|>", "<|eot_id|>")

# How the templates of the Hugging Face hub write the images and the texts of a message.
IMAGES = (
    "{# Render all images first #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
)
TEXTS = "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
HUB_VICUNA = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    + IMAGES
    + "{% if message['role'] != 'assistant' %}"
    + TEXTS
    + "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    + TEXTS
    + "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
HUB_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + IMAGES
    + TEXTS
    + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '</s> '}}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)


def loop_over_messages(before_role, after_role, end, *, system=""):
    """Return a template that writes every message alike, and `system` before the first one."""
    start = f"{before_role}{{{{ message['role'] }}}}{after_role}"
    return (
        "{% for message in messages %}"
        "{% if loop.first and messages[0]['role'] != 'system' %}{{ " + repr(system) + " }}"
        "{% endif %}"
        + start
        + IMAGES
        + TEXTS
        + "{{ content['text'] }}{% endfor %}{{ "
        + repr(end)
        + " }}{% endfor %}{% if add_generation_prompt %}{{ "
        + repr(f"{before_role}assistant{after_role}")
        + " }}{% endif %}"
    )


def chatml(end, *, system=""):
    """Return a template of the ChatML kind."""
    return loop_over_messages("<|im_start|>", "\n", end, system=system)


def llama3(*, system=""):
    """Return a template of the Llama 3 kind."""
    return loop_over_messages(
        "<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>", system=system
    )


def write_chat_template(directory, text, **config):
    """Write a checkpoint directory with a chat template and nothing else."""
    directory.mkdir(exist_ok=True)
    (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
    settings = {"eos_token": "</s>", **config}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


# --- the checkpoint's own template ---


@pytest.mark.parametrize(
    "text, template",
    [
        (HUB_VICUNA, "vicuna"),
        (f"{VICUNA} {HUB_VICUNA}", "vicuna_v1"),
        (HUB_MISTRAL, "mistral"),
        (chatml("<|im_end|>", system=TEMPLATES["chatml"].system), "chatml"),
        (chatml("<|im_end|>\n", system=TEMPLATES["qwen"].system), "qwen"),
        (llama3(system=TEMPLATES["llama3"].system), "llama3"),
        # a template for texts, with other spelling and white space control
        (
            "{%- for m in messages -%}\n  {%- if m.role == \"user\" -%}\n    {{- 'USER: ' ~ "
            "m.content | trim }} {% else -%}\n  ASSISTANT: {{ m.content + eos_token -}}\n"
            "  {%- endif %}\n{%- endfor -%}\nASSISTANT:",
            "vicuna",
        ),
    ],
)
def test_the_built_in_template_that_writes_the_same_is_chosen(tmp_path, text, template):
    assert default_template(write_chat_template(tmp_path, text), {}) == template


@pytest.mark.parametrize(
    "text, shown, nearest",
    [
        # xtuner's LLaVA on Llama 3 has no system text
        (llama3(), "<|start_header_id|>user", "llama3"),
        (llama3(system=f"{LLAMA3}!"), "natural language.!<|start", "llama3"),
        (chatml("<|im_end|>\n"), "'<|im_start|>user", "qwen"),
        (chatml("<|im_end|>\n", system=TEMPLATES["chatml"].system), "questions", "chatml"),
        (VICUNA.replace("user", "human") + " " + HUB_VICUNA, "a curious human", "vicuna_v1"),
        (VICUNA + HUB_VICUNA, "questions.USER: ", "vicuna_v1"),
        (HUB_VICUNA.replace("'ASSISTANT:'", "'\nASSISTANT:'"), r"\nASSISTANT:", "vicuna"),
        (HUB_VICUNA.replace("'ASSISTANT:'", "'ASSISTANT: '"), "ASSISTANT: ", "vicuna"),
        (HUB_VICUNA.replace(".upper()", ""), "user: ", "vicuna"),
        (HUB_VICUNA.replace("<image>\n", "<image>"), "<image>What", "vicuna"),
        (HUB_VICUNA.replace("'<image>\n'", "''"), "USER: What", "vicuna"),
        ("<s>" + HUB_VICUNA, "'<s>USER", "vicuna"),
        # the first prompt agrees, the answer or its end does not
        (HUB_VICUNA.replace("+ ' '}}{% endgen", "+ '###'}}{% endgen"), "A cup.###", "vicuna"),
        (HUB_MISTRAL.replace("' ' + message", "message"), "[/INST]A cup.", "mistral"),
        (HUB_MISTRAL.replace("</s>", "<|im_end|>"), "A cup.<|im_end|>", "mistral"),
    ],
)
def test_another_chat_format_is_refused(tmp_path, text, shown, nearest):
    """One line shows what both write, and names the remedy."""
    with pytest.raises(InputError) as error:
        default_template(write_chat_template(tmp_path, text), LLAVA)

    message = str(error.value)
    assert shown in message
    assert f"the nearest, {nearest}, writes" in message
    assert "--template FILE" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "text",
    [
        "{% macro m() %}{% endmacro %}USER: {{ m() }}",
        "{{ messages[0].content.__class__ }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 'a' * 1000000000 }}",
        "{% for i in range(1000000000) %}a{% endfor %}",
        "{% for message in messages %}no end",
        "{% endfor %}",
        "{% if %}{% endif %}",
        "{{ ",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% set x = 'aaaaaaaaaa' %}" + "{% set x = x + x %}" * 200 + "{{ x }}",
        "{{ messages[7] }}",
        "{{ open('secret').read() }}",
        "x" * 200_000,
    ],
)
def test_templates_that_cannot_be_read_are_refused(tmp_path, text):
    """Nothing of them is run, and the end comes soon."""
    with pytest.raises(InputError, match="--template FILE") as error:
        default_template(write_chat_template(tmp_path, text), LLAVA)

    assert len(str(error.value)) < 2500


def test_a_bos_in_the_template_is_the_tokenizers(tmp_path):
    """It counts only if the tokenizer begins texts with it."""
    text = "{{ bos_token }}" + HUB_VICUNA
    config = {"eos_token": "</s>", "bos_token": "<s>"}
    with_bos = write_checkpoint(tmp_path / "a", read_spec("llama"), tokenizer_config=config)
    without_bos = write_checkpoint(tmp_path / "b", read_spec("yi"), tokenizer_config=config)
    write_chat_template(with_bos, text, bos_token={"content": "<s>"})
    write_chat_template(without_bos, text, bos_token="<s>")

    assert default_template(with_bos, {}) == "vicuna"
    with pytest.raises(InputError, match="writes '<s>USER"):
        default_template(without_bos, {})


def test_chat_template_files_have_an_order(tmp_path):
    """chat_template.jinja counts first, then the JSON files, each with a text or named texts."""
    directory = write_checkpoint(
        tmp_path,
        read_spec("llama"),
        tokenizer_config={"chat_template": HUB_MISTRAL, "eos_token": "</s>"},
    )
    assert default_template(directory, LLAVA) == "mistral"

    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": HUB_VICUNA}]
    (directory / "processor_config.json").write_text(json.dumps({"chat_template": named}))
    assert default_template(directory, LLAVA) == "vicuna"

    named = {"default": HUB_MISTRAL}
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": named}))
    assert default_template(directory, LLAVA) == "mistral"

    (directory / "chat_template.jinja").write_text(HUB_VICUNA)
    assert default_template(directory, LLAVA) == "vicuna"


@pytest.mark.parametrize(
    "value, message",
    [
        (3, "no text"),
        ("", "empty"),
        ("  \n", "empty"),
        ([], "none is called default"),
        ({}, "none is called default"),
        ([{"name": "tools", "template": "x"}], "tools.* none is called default"),
        (["x"], "chat_template.json"),
        ([{"name": "default", "template": 3}], "no text"),
        (True, "no text"),
    ],
)
def test_chat_templates_that_are_no_text_are_refused(tmp_path, value, message):
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": value}))

    with pytest.raises(InputError, match=message) as error:
        default_template(tmp_path, LLAVA)

    assert "--template" in str(error.value)


def test_chat_template_files_that_cannot_be_read_are_refused(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"USER: \xff")
    with pytest.raises(InputError, match="chat_template.jinja: not UTF-8"):
        default_template(tmp_path, LLAVA)

    path.write_text("")
    with pytest.raises(InputError, match="chat_template.jinja: .* is empty"):
        default_template(tmp_path, LLAVA)

    path.unlink()
    for value in (3, [], "USER"):
        (tmp_path / "chat_template.json").write_text(json.dumps(value))
        with pytest.raises(InputError, match="chat_template.json: not a JSON object"):
            default_template(tmp_path, LLAVA)


# --- checkpoints without a template of their own ---


def write_without_tokens(directory, name, removed_tokens):
    """Write a golden tokenizer without some of its added tokens."""
    spec = read_spec(name)
    spec["added_tokens"] = [
        token for token in spec["added_tokens"] if token["content"] not in removed_tokens
    ]
    return write_checkpoint(directory, spec)


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
