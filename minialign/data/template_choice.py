"""Choose the chat template of a checkpoint: the built-in one that writes the same as its own.

A checkpoint may bring a chat template of its own, a text in Jinja. It is rendered on a short
conversation (jinja_rendering.py). A built-in template is chosen if it writes the same. If none
does, the checkpoint is refused. In another format than that of its training, a model would answer
worse, and no error would say so.
"""

import difflib
from pathlib import Path

from minialign.data.chat_templates import render_turns
from minialign.data.jinja_expressions import UnreadableTemplate
from minialign.data.jinja_rendering import render
from minialign.data.templates import IMAGE_PLACEHOLDER, TEMPLATES
from minialign.data.tokenizer import Tokenizer
from minialign.utils.files import InputError, check, friendly_errors, read_optional_json, read_text

# The conversation on which templates are compared.
QUESTION = f"{IMAGE_PLACEHOLDER}\nWhat is it?"
ANSWER = "A cup."
SECOND_QUESTION = "Where is it?"
# The JSON files that may hold a chat template. The first one that does counts.
TEMPLATE_FILES = ("chat_template.json", "processor_config.json", "tokenizer_config.json")

# The token that gives a chat format away, for checkpoints without a chat template.
TEMPLATE_OF_TOKEN = (
    ("<|eot_id|>", "llama3"),
    ("<|im_start|>", "chatml"),
    ("[INST]", "mistral"),
)
# The template of checkpoints without such a token, by the model_type of config.json and of its
# text_config: the LLaVA-1.5 and 1.6 of the Hugging Face hub.
TEMPLATE_OF_MODEL_TYPES = {
    ("llava", "llama"): "vicuna",
    ("llava_next", "llama"): "vicuna",
    ("llava_next", "mistral"): "mistral",
}
REMEDY = (
    "name a built-in template with --template NAME, "
    "or write the format into a JSON file and give --template FILE"
)


def default_template(directory, config_dict) -> str:
    """Return the name of the built-in template that a checkpoint was trained with.

    config_dict: its config.json. The checkpoint's own chat template decides. If it has none, its
    tokens and model types do. Raises InputError that asks for --template if no built-in template
    fits.
    """
    # 1. The checkpoint's own chat template decides.
    chat_template = read_chat_template(directory)
    if chat_template is not None:
        return _matching_template(directory, chat_template)

    # 2. Without one, a token of the vocabulary decides, or else the types of the model.
    model_type = config_dict.get("model_type")
    text_model_type = _text_model_type(config_dict)
    name = TEMPLATE_OF_MODEL_TYPES.get((model_type, text_model_type))
    tokens = Tokenizer.load(directory).ids
    for token, template_of_token in TEMPLATE_OF_TOKEN:
        if token in tokens:
            name = template_of_token
            break
    # Qwen2 has the tokens of ChatML, with line breaks between the turns.
    if name == "chatml" and text_model_type.startswith("qwen"):
        name = "qwen"
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


# --- the checkpoint's own chat template ---


def read_chat_template(directory) -> str | None:
    """Return the text of a checkpoint's own chat template, or None if it has none.

    Raises InputError for one that is not a text, or is empty.
    """
    path = Path(directory) / "chat_template.jinja"
    if path.exists():
        return _checked_template(read_text(path), path)
    for file in TEMPLATE_FILES:
        path = Path(directory) / file
        chat_template = read_optional_json(path).get("chat_template")
        if chat_template is not None:
            return _checked_template(chat_template, path)
    return None


def _checked_template(chat_template, path):
    """Return the text of a chat template. Of several templates with names, "default" counts."""
    if isinstance(chat_template, list):
        with friendly_errors(path, REMEDY):
            chat_template = {entry["name"]: entry["template"] for entry in chat_template}
    if isinstance(chat_template, dict):
        names = ", ".join(map(str, chat_template)) or "none"
        chat_template = chat_template.get("default")
        check(
            chat_template is not None,
            f"{path}: of its chat templates ({names}) none is called default; {REMEDY}",
        )
    check(
        isinstance(chat_template, str) and chat_template.strip(),
        f"{path}: the chat template is empty or is no text; {REMEDY}",
    )
    return chat_template


def _matching_template(directory, chat_template):
    """Return the name of the built-in template that writes the same. Raises InputError if none."""
    # 1. Render the checkpoint's template.
    special_tokens = _special_tokens(directory)
    try:
        prompt = _render_prompt(chat_template, [QUESTION], special_tokens)
        conversation = _render_prompt(
            chat_template, [QUESTION, ANSWER, SECOND_QUESTION], special_tokens
        )
    except UnreadableTemplate as error:
        name = _nearest_template(chat_template)
        raise InputError(
            f"{directory}: its chat template cannot be compared with the built-in ones ({error}): "
            f"{_shown(chat_template)}; the nearest, {name}, writes {_shown(_prompt(name))}; "
            f"{REMEDY}"
        ) from None

    # 2. Leave out a BOS that the template writes, if the tokenizer adds it.
    bos_token = special_tokens["bos_token"]
    if bos_token and prompt.startswith(bos_token) and Tokenizer.load(directory).bos is not None:
        prompt = prompt.removeprefix(bos_token)
        conversation = conversation.removeprefix(bos_token)

    # 3. Compare.
    eos_token = special_tokens["eos_token"]
    for name in TEMPLATES:
        if prompt == _prompt(name) and _continues_alike(name, conversation, eos_token):
            return name

    # 4. Show what differs from the nearest one: the prompt, or else the conversation.
    name = _nearest_template(prompt)
    ours = _prompt(name)
    if prompt == ours:
        prompt = conversation
        ours = _conversation(name, eos_token)
    raise InputError(
        f"{directory}: its chat template writes {_shown(prompt)}, and no built-in template does; "
        f"the nearest, {name}, writes {_shown(ours)}; {REMEDY}"
    )


def _special_tokens(directory):
    """Return the texts of the BOS and the end token, as the files of the tokenizer name them."""
    special_tokens = {}
    config = read_optional_json(Path(directory) / "tokenizer_config.json")
    token_map = read_optional_json(Path(directory) / "special_tokens_map.json")
    for role in ("bos_token", "eos_token"):
        token = config.get(role) or token_map.get(role)
        if isinstance(token, dict):
            token = token.get("content")
        special_tokens[role] = token
    return special_tokens


def _render_prompt(chat_template, turns, special_tokens):
    """Return what a checkpoint's template writes for question, answer, ..., question."""
    # 1. Processors of images pass the parts of a message, tokenizers pass a text.
    messages_of_parts = []
    messages_of_texts = []
    for i, text in enumerate(turns):
        role = "assistant" if i % 2 == 1 else "user"
        parts = [{"type": "text", "text": text.removeprefix(f"{IMAGE_PLACEHOLDER}\n")}]
        if text.startswith(IMAGE_PLACEHOLDER):
            parts.insert(0, {"type": "image"})
        messages_of_parts.append({"role": role, "content": parts})
        messages_of_texts.append({"role": role, "content": text})

    # 2. A template for texts fails on parts.
    try:
        return render(chat_template, messages_of_parts, **special_tokens)
    except UnreadableTemplate as error:
        try:
            return render(chat_template, messages_of_texts, **special_tokens)
        except UnreadableTemplate:
            raise error from None


def _end_token(name, eos_token):
    """Return the text of the token with which a built-in template closes answers."""
    return TEMPLATES[name].end_token or eos_token or "</s>"


def _prompt(name):
    """Return what a built-in template writes for the first question."""
    ((text, _),) = render_turns(name, [QUESTION])
    return text


def _answered_prompt(name):
    """Return what a built-in template writes for the first question and its answer."""
    return _prompt(name) + TEMPLATES[name].response_prefix + ANSWER


def _conversation(name, eos_token):
    """Return what a built-in template writes for question, answer, question."""
    *_, (second_turn, _) = render_turns(name, [QUESTION, ANSWER, SECOND_QUESTION])
    return _answered_prompt(name) + _end_token(name, eos_token) + second_turn


def _continues_alike(name, conversation, eos_token):
    """Return whether a conversation goes on after the first question as a built-in template does.

    conversation: what the checkpoint's template writes for question, answer, question.
    The end token and the white space behind the answer may be missing, as in the templates of the
    Hugging Face hub. minialign writes the end token, as the training code of LLaVA does.
    """
    start = _answered_prompt(name)
    *_, (second_turn, _) = render_turns(name, [QUESTION, ANSWER, SECOND_QUESTION])
    second_turn = second_turn.lstrip()
    has_turns = conversation.startswith(start) and conversation.endswith(second_turn)
    between = conversation[len(start) : len(conversation) - len(second_turn)]
    return has_turns and between.strip() in ("", _end_token(name, eos_token))


def _nearest_template(text):
    """Return the name of the built-in template whose prompt is most like a text."""
    similarity = {}
    for name, template in TEMPLATES.items():
        # A system text, which may be long, says little about the format.
        prompt_without_system = _prompt(name).removeprefix(template.system)
        for candidate in (_prompt(name), prompt_without_system):
            ratio = difflib.SequenceMatcher(None, candidate, text[:2000], False).ratio()
            similarity[name] = max(ratio, similarity.get(name, 0.0))
    return max(similarity, key=similarity.get)


def _shown(text):
    """Return a text with its line breaks escaped, cut to the length of an error message."""
    return repr(text if len(text) <= 400 else text[:400] + "...")
