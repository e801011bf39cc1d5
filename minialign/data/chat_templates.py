"""Prompt templates: a conversation's turns become the ids that the answer follows, the answer becomes the ids that are scored."""

from dataclasses import dataclass
from pathlib import Path

from minialign.data.tokenizer import Tokenizer
from minialign.utils.files import check, read_json

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Template:
    """A chat format as data: `{}` stands for the text of the user.

    A conversation is system, user, [answer, end, between, user, ...]; `response_prefix` is the space between a prompt and its answer.
    """

    user: str  # a user's turn, up to where the answer begins
    system: str = ""  # the system text as it is written
    response_prefix: str = ""
    end: str | None = None  # the token that closes an answer; None: the tokenizer's own end token
    between: str = ""  # what follows the end token before the next turn


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
LLAMA3 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
TEMPLATES = {
    # the hub's LLaVA-1.5 and 1.6 on Vicuna
    "vicuna": Template("USER: {} ASSISTANT:", response_prefix=" "),
    # the original LLaVA-1.5 and 1.6
    "vicuna_v1": Template("USER: {} ASSISTANT:", f"{VICUNA} ", response_prefix=" "),
    # LLaVA-1.6-34B: no line break after <|im_end|>
    "chatml": Template(
        "<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        "<|im_start|>system\nAnswer the questions.<|im_end|>",
        end="<|im_end|>",
    ),
    # LLaVA-1.6-Mistral
    "mistral": Template("[INST] {} [/INST]", response_prefix=" "),
    # LLaVA-NeXT on Llama 3
    "llama3": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA3}<|eot_id|>",
        end="<|eot_id|>",
    ),
    # Qwen2 and the original LLaVA-OneVision
    "qwen": Template(
        "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        end="<|im_end|>",
        between="\n",
    ),
}


def render_turns(template, turns):
    """The conversation as parts in order: (text, whether it is an answer). Answers come without the token that ends them.

    `turns`: question, answer, question, ..., the last one a question.
    """
    check(
        len(turns) % 2,
        f"{len(turns)} turns: a prompt is question, answer, question, ... and ends with a question",
    )
    shape = TEMPLATES[template]
    # Not str.format, which would take braces in a text for its own.
    parts = [(shape.system + shape.user.replace("{}", turns[0], 1), False)]
    for answer, question in zip(turns[1::2], turns[2::2], strict=True):
        parts += [(answer, True), (shape.between + shape.user.replace("{}", question, 1), False)]
    return parts


def encode_prompt(tokenizer, template, turns):
    """Ids of the prompt, BOS first if the tokenizer has one; earlier answers stand in it exactly as `encode_response` writes them.

    "<image>" becomes its one id. Raises BadInput where the tokenizer has no such token, or `turns` do not end with a question.
    """
    ids = []
    for text, is_answer in render_turns(template, turns):
        if is_answer:
            ids += encode_response(tokenizer, template, text)
        else:
            check(
                IMAGE_PLACEHOLDER not in text or IMAGE_PLACEHOLDER in tokenizer.ids,
                f"the prompt has {IMAGE_PLACEHOLDER}, the checkpoint's tokenizer.json has no such token",
            )
            ids += tokenizer.encode(text, bos=not ids, after="token" if ids else None)
    return ids


def encode_response(tokenizer, template, text):
    """Ids of an answer as they follow the prompt, the end token last. Raises BadInput for an answer with <image> in it.

    The answer continues the prompt's text, so it gets the template's space and no ▁ of its own: the ids are those of the whole
    conversation written as one string, unless a merge would join the answer to the prompt. After "ASSISTANT:" it begins with
    "▁text" or "Ġtext"; after "assistant\\n" with "text", also under tokenizers that put a ▁ before every text.
    """
    ids = tokenizer.encode(TEMPLATES[template].response_prefix + text, after="text")
    check(
        tokenizer.id_of(IMAGE_PLACEHOLDER) not in ids,
        f"an answer has {IMAGE_PLACEHOLDER} in it: {text[:60]!r}",
    )
    return [*ids, end_token_id(tokenizer, template)]


def decode_response(tokenizer, template, ids):
    """The text of an answer's ids, the inverse of `encode_response`: end token, special tokens and the template's space are left out."""
    end = end_token_id(tokenizer, template)
    return tokenizer.decode(
        [id for id in ids if id != end], strip_prefix=TEMPLATES[template].response_prefix
    )


def end_token_id(tokenizer, template):
    """The id of the token that closes an answer. Raises BadInput when the vocabulary lacks it."""
    name = TEMPLATES[template].end
    id = tokenizer.eos if name is None else tokenizer.id_of(name)
    check(
        id is not None,
        f"template {template} closes answers with {name}, which the checkpoint's tokenizer.json lacks: choose another --template",
    )
    return id


# What tells a chat format, in the text of a chat template or as a token of the vocabulary; the first that is found decides.
SIGNS = (
    ("<|eot_id|>", "llama3"),
    ("<|im_start|>", "chatml"),
    ("[INST]", "mistral"),
    ("ASSISTANT:", "vicuna"),
)
# Checkpoints without either, by the types of the model and of its text model: the hub's LLaVA-1.5 and 1.6.
KNOWN = {
    ("llava", "llama"): "vicuna",
    ("llava_next", "llama"): "vicuna",
    ("llava_next", "mistral"): "mistral",
}


def default_template(directory, config_dict):
    """The template a checkpoint was trained with: told by its chat template, else its vocabulary, else its model types.

    `config_dict` is its config.json. Raises BadInput, asking for --template, when these do not tell. The caller records the choice.
    """
    kind = config_dict.get("model_type")
    text_kind = (config_dict.get("text_config") or {}).get(
        "model_type", "llama" if kind != "llava_onevision" else "qwen2"
    )
    evidence, usual = read_chat_template(directory), None
    if evidence is None:
        evidence, usual = Tokenizer.load(directory).ids, KNOWN.get((kind, text_kind))
    name = next((name for sign, name in SIGNS if sign in evidence), usual)
    if name == "chatml" and text_kind.startswith("qwen"):
        name = "qwen"
    if name == "vicuna" and "A chat between a curious" in evidence:
        name = "vicuna_v1"
    check(
        name,
        f"{directory}: cannot tell the prompt format of a {kind} model on {text_kind}: name one with --template ({', '.join(TEMPLATES)})",
    )
    return name


def read_chat_template(directory):
    """The text of the checkpoint's chat template, or None if it has none."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        path = Path(directory) / name
        text = read_json(path, dict).get("chat_template") if path.exists() else None
        if isinstance(text, list):  # several, by name
            text = next((one["template"] for one in text if one["name"] == "default"), None)
        if text:
            return text
    return None
