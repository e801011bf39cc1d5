"""The chat formats: six that are built in, and others that a JSON file describes."""

import functools
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from minialign.data.tokenizer import LONE_SURROGATE
from minialign.utils.files import check, friendly_errors, read_json

IMAGE_PLACEHOLDER = "<image>"
SYSTEM_PLACES = ("system_turn", "system_in_question")  # the optional fields of a Template


@dataclass(frozen=True)
class Template:
    """A chat format. It has no <image>: a question says where its images stand.

    A conversation is system, user turn, answer, end token, separator, user turn, answer, end token,
    and so on. It may begin with the BOS token, which the tokenizer adds.

    A system text of the user (--system, or of a record) takes the place of `system`. Most formats
    write it before the first turn, some in front of the first question. A format with neither has
    no place for it.
    """

    user_turn: str  # all text of a user's turn up to the answer; {} is the place of the question
    system: str = ""  # the text before the first turn, unless the user gives a system text
    response_prefix: str = ""  # what separates an answer from the prompt: a space, or nothing
    end_token: str | None = None  # closes an answer; None: the end token of the tokenizer
    turn_separator: str = ""  # stands between an end token and the next turn
    # How a system text of the user is written; {} is its place. One of the two, or neither:
    system_turn: str | None = None  # before the first turn
    system_in_question: str | None = None  # in front of the first question, inside of its turn


# The system texts of vicuna_v1 and llama3.
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA3 = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
TEMPLATES = {
    # LLaVA-1.5 and 1.6 on Vicuna, as on the Hugging Face hub
    "vicuna": Template(
        user_turn="USER: {} ASSISTANT:",
        response_prefix=" ",
        system_turn="{} ",
    ),
    # the original LLaVA-1.5 and 1.6
    "vicuna_v1": Template(
        system=f"{VICUNA} ",
        user_turn="USER: {} ASSISTANT:",
        response_prefix=" ",
        system_turn="{} ",
    ),
    # LLaVA-1.6-34B, which has no line break after <|im_end|>
    "chatml": Template(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        user_turn="<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        end_token="<|im_end|>",
        system_turn="<|im_start|>system\n{}<|im_end|>",
    ),
    # LLaVA-1.6-Mistral. Its system text stands before [INST], not inside of it as in Llama 2.
    "mistral": Template(
        user_turn="[INST] {} [/INST]",
        response_prefix=" ",
        system_turn="<<SYS>>\n{}\n<</SYS>>\n\n",
    ),
    # LLaVA-NeXT on Llama 3
    "llama3": Template(
        system=f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA3}<|eot_id|>",
        user_turn=(
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        end_token="<|eot_id|>",
        system_turn="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    ),
    # Qwen2 and the original LLaVA-OneVision
    "qwen": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user_turn="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        end_token="<|im_end|>",
        turn_separator="\n",
        system_turn="<|im_start|>system\n{}<|im_end|>\n",
    ),
}


@functools.lru_cache
def find_template(template) -> Template:
    """Return the Template of what `read_template` returns: a name, or the JSON text of its fields.

    Raises InputError for another name, and for fields that are not a template.
    """
    if template in TEMPLATES:
        return TEMPLATES[template]
    check(
        template.lstrip().startswith("{"),
        f"template {template!r} is unknown; choose one of {', '.join(TEMPLATES)}, or give a JSON "
        "file",
    )
    with friendly_errors("template", "give the fields of a template as JSON"):
        return _template_of_fields(json.loads(template), "template")


def read_template(name_or_file) -> str:
    """Return the name of a built-in template, or the fields in a template's file as a JSON text.

    All other functions take this text as `template`, and runs, reward models and stored log-probs
    record it. So they do not need the file any more. Raises InputError.
    """
    if name_or_file in TEMPLATES:
        return name_or_file
    check(
        Path(name_or_file).exists(),
        f"--template {name_or_file}: neither a built-in template ({', '.join(TEMPLATES)}) "
        "nor a file",
    )
    template = _template_of_fields(read_json(name_or_file), name_or_file)
    for name, built_in in TEMPLATES.items():
        # A file need not say where a system text goes, if all else is that of a built-in template.
        if template in (built_in, replace(built_in, system_turn=None)):
            return name
    template_fields = asdict(template)
    for name in SYSTEM_PLACES:
        if template_fields[name] is None:
            del template_fields[name]
    return json.dumps(template_fields, ensure_ascii=False)


def _template_of_fields(values, path):
    """Return the Template with these fields. Raises InputError that names the `path`."""
    # 1. The fields and their types.
    names = [template_field.name for template_field in fields(Template)]
    remedy = f"give a JSON object with the fields {', '.join(names)}"
    check(isinstance(values, dict), f"{path}: not a JSON object; {remedy}")
    unknown = [name for name in values if name not in names]
    check(not unknown, f"{path}: unknown field {', '.join(map(repr, unknown))}; {remedy}")
    check("user_turn" in values, f"{path}: no field 'user_turn'; {remedy}")
    for name, value in values.items():
        may_be_missing = name in ("end_token", *SYSTEM_PLACES)
        is_missing = may_be_missing and value is None
        check(isinstance(value, str) or is_missing, f"{path}: {name!r} is not a text; {remedy}")
        check(
            not LONE_SURROGATE.search(value or ""),
            f"{path}: {name!r} contains a lone surrogate, which is half of a character; remove it",
        )
        check(
            IMAGE_PLACEHOLDER not in (value or ""),
            f"{path}: {name!r} contains {IMAGE_PLACEHOLDER}; leave it out, a record says itself "
            "where its images stand in the question",
        )

    # 2. There is one place for the question, at most one for a system text, and an end token.
    template = Template(**values)
    num_places = template.user_turn.count("{}")
    check(
        num_places == 1,
        f"{path}: 'user_turn' contains {{}} {num_places} times; it must stand there once, "
        "in place of the question and its images",
    )
    check(template.end_token != "", f"{path}: 'end_token' is empty; leave it out or name a token")
    given_places = [name for name in SYSTEM_PLACES if values.get(name) is not None]
    check(
        len(given_places) < 2,
        f"{path}: has both {' and '.join(map(repr, given_places))}; a system text has one place",
    )
    for name in given_places:
        num_places = values[name].count("{}")
        check(
            num_places == 1,
            f"{path}: {name!r} contains {{}} {num_places} times; it must stand there once, in "
            "place of the system text",
        )
    return template
