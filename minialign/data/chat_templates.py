"""Write conversations in the chat format of a model, as ids of a prompt and of a response.

`template` is the name of a built-in template, or the JSON text of another one (templates.py).
`turns` are the texts of question, answer, question, ... and end with a question. `system` is the
system text of the user, or None for what the template writes without one.
"""

import re

from minialign.data.chat_marks import find_template_mark
from minialign.data.system_texts import check_system_text
from minialign.data.templates import IMAGE_PLACEHOLDER, find_template
from minialign.data.tokenizer import check_unicode
from minialign.utils.files import check


def render_turns(template, turns, system=None) -> list[tuple[str, bool]]:
    """Return the text of a conversation in pieces: (text, whether it is an answer).

    An answer comes without the token that closes it.
    """
    check(
        len(turns) % 2 == 1,
        f"{len(turns)} turns: a prompt is question, answer, question, ... and ends with a question",
    )
    chat_format = find_template(template)
    pieces = []
    # The texts before the next user's turn, and before the question in it.
    before_turn, before_question = render_system(chat_format, system)
    for i, text in enumerate(turns):
        if i % 2 == 1:
            pieces.append((text, True))
            before_turn = chat_format.turn_separator
            before_question = ""
        else:
            # Not str.format, which would interpret braces in the text of the user.
            user_turn = chat_format.user_turn.replace("{}", before_question + text, 1)
            pieces.append((before_turn + user_turn, False))
    return pieces


def render_system(chat_format, system) -> tuple[str, str]:
    """Return what stands before the first turn of a conversation, and before its question."""
    if system is None:
        return chat_format.system, ""
    if chat_format.system_in_question is not None:
        return "", chat_format.system_in_question.replace("{}", system, 1)
    return chat_format.system_turn.replace("{}", system, 1), ""


def encode_prompt(tokenizer, template, turns, *, system=None) -> list[int]:
    """Return the ids of a prompt, with the BOS token in front if the tokenizer has one.

    Earlier answers get exactly the ids that `encode_response` gives them, and "<image>" becomes its
    one id. Other special tokens that a question or a system text spells out are encoded as text.

    Raises InputError if the vocabulary has no <image>, if a question is written in a chat format
    already, if the turns do not end with a question, or if the template has no place for `system`.
    """
    # 1. Check the texts. Of what they spell out, only <image> may become a special token.
    if system is not None:
        check_system(template, system)
        system = _cut_special_tokens(tokenizer, system)
    turns = list(turns)
    for i in range(0, len(turns), 2):
        mark = find_template_mark(turns[i], template, tokenizer.bos_text)
        check(
            mark is None,
            f"the question is written in a chat format already, it has {mark!r}: "
            f"{turns[i][:60]!r}; give the question alone",
        )
        turns[i] = _cut_special_tokens(tokenizer, turns[i], kept=IMAGE_PLACEHOLDER)

    # 2. Encode the template's text around them.
    ids = []
    for text, is_answer in render_turns(template, turns, system):
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
            ids += _encode_cut_text(tokenizer, text, bos=True)
        else:
            ids += _encode_cut_text(tokenizer, text, after="token")
    return ids


def check_system(template, system, place=None):
    """Raise InputError for what is no system text, and for one that a template has no place for.

    place: where the text comes from, for errors.
    """
    check_system_text(system, place)
    chat_format = find_template(template)
    prefix = f"{place}: " if place else ""
    has_place = chat_format.system_turn or chat_format.system_in_question
    check(
        has_place,
        f"{prefix}the template {template:.60} has no place for the system text {system[:60]!r}; "
        "leave the text out, or write 'system_turn' into the template's file",
    )


def encode_response(tokenizer, template, text) -> list[int]:
    """Return the ids of an answer as it follows a prompt, with one end token.

    The answer continues the text of the prompt. So it gets the template's space in front, and no
    "▁" of its own: it begins with "▁text" or "Ġtext" after "ASSISTANT:", and with "text" after
    "assistant\\n". Prompt and answer together have the ids of the whole conversation written as one
    string, unless a merge would join the two.

    An answer that ends in the text of an end token, such as "A cup.</s>", gets no second one. Other
    special tokens that it spells out are encoded as text. Raises InputError for an answer with
    <image> in it.
    """
    check(IMAGE_PLACEHOLDER not in text, f"an answer has {IMAGE_PLACEHOLDER} in it: {text[:60]!r}")
    text = _cut_special_tokens(tokenizer, without_end_token(tokenizer, template, text))
    response_text = find_template(template).response_prefix + text
    ids = _encode_cut_text(tokenizer, response_text, after="text")
    return [*ids, end_token_id(tokenizer, template)]


def without_end_token(tokenizer, template, text) -> str:
    """Return an answer without the end tokens that it ends in as text: "A cup.</s>" is "A cup."."""
    end_texts = []
    for token_id in stop_ids(tokenizer, template) & tokenizer.special_ids:
        end_texts.append(tokenizer.tokens[token_id])
    return _without_endings(text, tuple(end_texts))


def decode_response(tokenizer, template, ids) -> str:
    """Return the text of a response, as `encode_response` took it.

    The end token, other special tokens and the template's space are left out. So is an <image> that
    the model spelled out: in a text it would stand for an image.
    """
    return _decode(tokenizer, template, ids).replace(IMAGE_PLACEHOLDER, "")


def decode_completion(tokenizer, template, context, new_ids) -> str:
    """Return the text of new ids behind those of a context, as `decode_response` writes it.

    They are decoded together, because alone new ids may lose their leading space.
    """
    start = len(_decode(tokenizer, template, context))
    text = _decode(tokenizer, template, context + new_ids)
    # Removing an <image> would shift the start, so that comes last. But one that begins in the
    # context is skipped: together with the context its end would stand for an image.
    for match in re.finditer(IMAGE_PLACEHOLDER, text):
        if match.start() < start:
            start = max(start, match.end())
    return text[start:].replace(IMAGE_PLACEHOLDER, "")


def _decode(tokenizer, template, ids):
    """Return the text of a response with each <image> that is spelled out in it."""
    if ids and ids[-1] in stop_ids(tokenizer, template):
        ids = ids[:-1]
    end_id = end_token_id(tokenizer, template)
    text_ids = [token_id for token_id in ids if token_id != end_id]
    return tokenizer.decode(text_ids, strip_prefix=find_template(template).response_prefix)


def end_token_id(tokenizer, template) -> int:
    """Return the id of the token that closes an answer, which training scores.

    Raises InputError if the vocabulary lacks it.
    """
    end_token = find_template(template).end_token
    if end_token is None:
        return tokenizer.eos
    token_id = tokenizer.id_of(end_token)
    check(
        token_id is not None,
        f"template {template} closes answers with {end_token}, which the checkpoint's "
        "tokenizer.json lacks: choose another --template",
    )
    return token_id


def stop_ids(tokenizer, template) -> set[int]:
    """Return the ids of all tokens at which generation stops.

    These are the template's end token, and all end tokens that the checkpoint's files name.
    """
    return {end_token_id(tokenizer, template), *tokenizer.end_ids}


# --- texts of data that spell out special tokens ---

# The end tokens of the built-in templates' models.
END_TEXTS = ("</s>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")
# A mark between two letters, over which no token reaches. No text contains it: it is half of a
# surrogate pair, which check_unicode refuses.
CUT = "\udfff"


def without_end_text(answer) -> str:
    """Return an answer of a data file without white space around it and end tokens behind it.

    "A cup.</s>" is "A cup.", whatever the tokenizer: training puts the model's own end token there.
    """
    return _without_endings(answer.strip(), END_TEXTS)


def _without_endings(text, endings):
    """Return a text without the endings that it has, one behind the other, and the space before.

    A text without any of them stays as it is.
    """
    stripped = text.rstrip()
    while stripped.endswith(endings):
        for ending in endings:
            stripped = stripped.removesuffix(ending).rstrip()
        text = stripped
    return text


def _cut_special_tokens(tokenizer, text, kept=None):
    """Return a text with a CUT behind the first letter of each special token that it spells out.

    A "</s>" in a data set means these four letters, and must not end the answer. Only the special
    tokens that this module adds itself, and the token `kept`, remain special.
    """
    check_unicode(text)

    def cut(match):
        """Return the first letter of a special token, with a CUT behind it."""
        token, first_letter = match.groups()
        return first_letter if token == kept else first_letter + CUT

    return tokenizer.special_start.sub(cut, text)


def _encode_cut_text(tokenizer, text, bos=False, after=None):
    """Return the ids of a text, in which no token reaches over a CUT."""
    first_piece, *pieces = text.split(CUT)
    ids = tokenizer.encode(first_piece, bos=bos, after=after)
    for piece in pieces:
        ids += tokenizer.encode(piece, after="text")
    return ids
