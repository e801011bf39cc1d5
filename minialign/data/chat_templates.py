"""Write conversations in the chat format of a model, as ids of a prompt and of a response."""

from dataclasses import dataclass
from pathlib import Path

from minialign.data.tokenizer import Tokenizer
from minialign.utils.files import check, read_optional_json

IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class Template:
    """A chat format.

    A conversation begins with the system text and a user's turn. Each earlier answer adds itself,
    its end token, the separator and the next user's turn.
    """

    user_turn: str  # all text of a user's turn up to the answer; {} stands for what the user says
    system: str = ""  # the text before the first turn
    response_prefix: str = ""  # what separates an answer from the prompt: a space, or nothing
    end_token: str | None = None  # closes an answer; None: the end token of the tokenizer
    turn_separator: str = ""  # stands between an end token and the next turn


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
    ),
    # the original LLaVA-1.5 and 1.6
    "vicuna_v1": Template(
        system=f"{VICUNA} ",
        user_turn="USER: {} ASSISTANT:",
        response_prefix=" ",
    ),
    # LLaVA-1.6-34B, which has no line break after <|im_end|>
    "chatml": Template(
        system="<|im_start|>system\nAnswer the questions.<|im_end|>",
        user_turn="<|im_start|>user\n{}<|im_end|><|im_start|>assistant\n",
        end_token="<|im_end|>",
    ),
    # LLaVA-1.6-Mistral
    "mistral": Template(
        user_turn="[INST] {} [/INST]",
        response_prefix=" ",
    ),
    # LLaVA-NeXT on Llama 3
    "llama3": Template(
        system=f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA3}<|eot_id|>",
        user_turn=(
            "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        end_token="<|eot_id|>",
    ),
    # Qwen2 and the original LLaVA-OneVision
    "qwen": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user_turn="<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n",
        end_token="<|im_end|>",
        turn_separator="\n",
    ),
}
# The text that gives a chat format away, in a checkpoint's own chat template or as a token of its
# vocabulary. The first one that is there decides.
SIGNS = (
    ("<|eot_id|>", "llama3"),
    ("<|im_start|>", "chatml"),
    ("[INST]", "mistral"),
    ("ASSISTANT:", "vicuna"),
)
# The template of checkpoints that show no sign, by the model_type of config.json and of its
# text_config: the LLaVA-1.5 and 1.6 of the Hugging Face hub.
KNOWN = {
    ("llava", "llama"): "vicuna",
    ("llava_next", "llama"): "vicuna",
    ("llava_next", "mistral"): "mistral",
}


def render_turns(template, turns) -> list[tuple[str, bool]]:
    """Return the text of a conversation in pieces: (text, whether it is an answer).

    turns: question, answer, question, ... and at the end a question.
    An answer comes without the token that closes it.
    """
    check(
        len(turns) % 2 == 1,
        f"{len(turns)} turns: a prompt is question, answer, question, ... and ends with a question",
    )
    chat_format = TEMPLATES[template]
    pieces = []
    before_turn = chat_format.system
    for i, text in enumerate(turns):
        if i % 2 == 1:
            pieces.append((text, True))
            before_turn = chat_format.turn_separator
        else:
            # Not str.format, which would interpret braces in the text of the user.
            user_turn = chat_format.user_turn.replace("{}", text, 1)
            pieces.append((before_turn + user_turn, False))
    return pieces


def encode_prompt(tokenizer, template, turns) -> list[int]:
    """Return the ids of a prompt, with the BOS token in front if the tokenizer has one.

    turns: question, answer, question, ... and at the end a question.
    Earlier answers get exactly the ids that `encode_response` gives them, and "<image>" becomes its
    one id. Raises InputError if the vocabulary has no such token, or for other turns.
    """
    ids = []
    for text, is_answer in render_turns(template, turns):
        if is_answer:
            ids += encode_response(tokenizer, template, text)
            continue
        check(
            IMAGE_PLACEHOLDER not in text or IMAGE_PLACEHOLDER in tokenizer.ids,
            f"the prompt has {IMAGE_PLACEHOLDER}, "
            "the checkpoint's tokenizer.json has no such token",
        )
        # The first text begins the sequence. A later one follows the end token of an answer.
        if not ids:
            ids += tokenizer.encode(text, bos=True)
        else:
            ids += tokenizer.encode(text, after="token")
    return ids


def encode_response(tokenizer, template, text) -> list[int]:
    """Return the ids of an answer as it follows a prompt, with the end token.

    The answer continues the text of the prompt. So it gets the template's space in front, and no
    "▁" of its own: it begins with "▁text" or "Ġtext" after "ASSISTANT:", and with "text" after
    "assistant\\n". Prompt and answer together have the ids of the whole conversation written as one
    string, unless a merge would join the two.

    Raises InputError for an answer with <image> in it.
    """
    response_text = TEMPLATES[template].response_prefix + text
    ids = tokenizer.encode(response_text, after="text")
    check(
        tokenizer.id_of(IMAGE_PLACEHOLDER) not in ids,
        f"an answer has {IMAGE_PLACEHOLDER} in it: {text[:60]!r}",
    )
    return [*ids, end_token_id(tokenizer, template)]


def decode_response(tokenizer, template, ids) -> str:
    """Return the text of a response, as `encode_response` took it.

    The end token, other special tokens and the template's space are left out.
    """
    end_id = end_token_id(tokenizer, template)
    text_ids = [token_id for token_id in ids if token_id != end_id]
    return tokenizer.decode(text_ids, strip_prefix=TEMPLATES[template].response_prefix)


def end_token_id(tokenizer, template) -> int:
    """Return the id of the token that closes an answer.

    Raises InputError if the vocabulary lacks it.
    """
    end_token = TEMPLATES[template].end_token
    if end_token is None:
        return tokenizer.eos
    token_id = tokenizer.id_of(end_token)
    check(
        token_id is not None,
        f"template {template} closes answers with {end_token}, which the checkpoint's "
        "tokenizer.json lacks: choose another --template",
    )
    return token_id


def default_template(directory, config_dict) -> str:
    """Return the name of the template that a checkpoint was trained with.

    config_dict: its config.json. Raises InputError that asks for --template if neither the chat
    template, nor the vocabulary, nor the model types tell. The caller records the choice.
    """
    # 1. Look for a sign in the checkpoint's own chat template, or else among its tokens.
    model_type = config_dict.get("model_type")
    text_model_type = _text_model_type(config_dict)
    evidence = read_chat_template(directory)
    name = None
    if evidence is None:
        evidence = Tokenizer.load(directory).ids
        name = KNOWN.get((model_type, text_model_type))
    for sign, template_with_sign in SIGNS:
        if sign in evidence:
            name = template_with_sign
            break

    # 2. Tell the variants of a format apart.
    if name == "chatml" and text_model_type.startswith("qwen"):
        name = "qwen"
    if name == "vicuna" and "A chat between a curious" in evidence:
        name = "vicuna_v1"
    check(
        name is not None,
        f"{directory}: cannot tell the prompt format of a {model_type} model on "
        f"{text_model_type}: name one with --template ({', '.join(TEMPLATES)})",
    )
    return name


def _text_model_type(config_dict):
    """Return the model type of the decoder, which a sparse config.json may leave out."""
    text_config = config_dict.get("text_config") or {}
    is_onevision = config_dict.get("model_type") == "llava_onevision"
    return text_config.get("model_type", "qwen2" if is_onevision else "llama")


def read_chat_template(directory) -> str | None:
    """Return the text of a checkpoint's own chat template, or None if it has none."""
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    for file in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        chat_template = read_optional_json(Path(directory) / file).get("chat_template")
        if isinstance(chat_template, list):  # several templates, each with a name
            template_of = {entry["name"]: entry["template"] for entry in chat_template}
            chat_template = template_of.get("default")
        if chat_template:
            return chat_template
    return None
