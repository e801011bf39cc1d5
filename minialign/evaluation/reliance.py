"""Reliance on the image: how much likelier the image makes each word of an answer.

A language model expects some words whatever the image shows. The model reads the same answer twice,
with the image and with all image tokens left out. The difference of the two log-probs of a word,

    log p(word | image, words before) - log p(word | image hidden, words before)

says in nats what the image adds to it. At 0 the language alone expects the word as much. At 3 the
image makes it e^3 = 20 times as likely. Below 0 it makes it less likely. Summed over the answer,
end token included, this is the difference of the two log-probs of the whole answer.
"""

import re
from dataclasses import dataclass

import torch

from minialign.data.chat_templates import encode_prompt, stop_ids
from minialign.data.packing import PackedExample
from minialign.data.stream_decoder import StreamDecoder
from minialign.data.templates import IMAGE_PLACEHOLDER, find_template
from minialign.generation.decoding import (
    DecodeRequest,
    SamplingParams,
    generate_continuations,
    prefill,
)
from minialign.logprobs import response_hidden_states, token_logps
from minialign.models.loading import VLM
from minialign.utils.messages import printable

MAX_WORD_TOKENS = 8  # tokens of a word that the model would say instead
MAX_SHOWN = 20  # characters of a word, and marks of a bar, in the table
# What continues a word if no white space comes before it. A full stop or a comma does not.
WORD_CHARACTER = re.compile(r"[\w'’-]")
# Scripts without white space between words (Thai, Japanese, Chinese): each token is a word there.
UNSPACED_CHARACTER = re.compile("[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")


@dataclass(frozen=True)
class WordReliance:
    """A word of an answer, and what the image adds to it.

    Both texts begin with the white space before the word, so that all `text` joined are the answer.
    The end token of an answer is the last word. Its text is empty.
    """

    text: str
    nats: float  # log p(word | image) - log p(word | image hidden), summed over its tokens
    instead: str  # the likeliest word here with the image hidden, chosen token by token


@dataclass(frozen=True)
class WordTokens:
    """A word of an answer, and which of the answer's tokens spell it: those from start to end."""

    text: str
    start: int
    end: int


@torch.no_grad()
def token_reliance(vlm: VLM, paths, prompt: str, response_ids: list[int]) -> list[WordReliance]:
    """Compute the reliance of each word of a response on the images at `paths`.

    prompt: the question. If it has no <image>, the images come before it.
    response_ids: the ids of the response, as `encode_response` or decoding returns them.
    """
    # 1. The response with the image, and with all image tokens left out. What follows the image
    #    keeps its positions (data/packing.py).
    if IMAGE_PLACEHOLDER not in prompt:
        placeholders = f"{IMAGE_PLACEHOLDER}\n" * len(paths)
        prompt = placeholders + prompt
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, [prompt], system=vlm.system)
    features = vlm.encode_images(paths)
    with_image = PackedExample.of(prompt_ids, features, [response_ids])
    without_image = PackedExample.of(prompt_ids, features, [response_ids], visible=[])

    # 2. What the image adds to each token, in nats. One batch reads both, in this order.
    num_tokens = len(response_ids)
    states, targets, _ = response_hidden_states(vlm.model, [with_image, without_image])
    logps = token_logps(states, vlm.model.vocab_head, targets)
    logps_with_image, logps_without_image = logps.double().split(num_tokens)
    nats = logps_with_image - logps_without_image

    # 3. Find the words of which the model would choose a token otherwise without the image.
    words = group_tokens(vlm.tokenizer, vlm.template, response_ids)
    states_without_image = states[num_tokens:]
    likeliest_ids = likeliest_tokens(states_without_image, vlm.model.vocab_head)
    changed_words = []
    for word in words:
        if likeliest_ids[word.start : word.end] != response_ids[word.start : word.end]:
            changed_words.append(word)
    alternatives = words_without_image(vlm, without_image, changed_words)

    # 4. Add up the tokens of each word.
    reliances = []
    for word in words:
        nats_of_word = nats[word.start : word.end].sum().item()
        instead = alternatives.get(word, word.text)
        reliances.append(WordReliance(word.text, nats_of_word, instead))
    return reliances


def likeliest_tokens(states, head) -> list[int]:
    """Return the likeliest next token of each state (N, D), with 1,024 x V logits at a time."""
    likeliest_ids = []
    for block in states.split(1024):
        logits = block @ head.T
        likeliest_ids += logits.argmax(dim=-1).tolist()
    return likeliest_ids


def words_without_image(vlm, without_image, words) -> dict[WordTokens, str]:
    """Return what the model would say in the place of each of these words, with the image hidden.

    without_image: the example with its image tokens left out. What the model reads before a word
        is the answer up to there.
    """
    if not words:
        return {}
    # 1. Read the answer once. Each word forks the cache at its beginning (pairs/bdhs.py does the
    #    same for sentences). The token before the word is read again, for its logits.
    cache, batch = prefill(vlm.model, [without_image])
    ((lead, response_ids),) = without_image.branches  # the lead is the prompt's last token
    requests = []
    for word in words:
        token_before = (lead + response_ids)[word.start]
        request = DecodeRequest(
            row=0,
            cache_positions=range(batch.prefix_lengths[0] + word.start),
            input_ids=[token_before],
            position=batch.first_positions[0] + word.start,
            uniforms=None,
            stop_ids=stop_ids(vlm.tokenizer, vlm.template),
        )
        requests.append(request)

    # 2. Decode all of them as one batch, and take the first word of each.
    sampling = SamplingParams(MAX_WORD_TOKENS, temperature=0)
    continuations = generate_continuations(vlm.model, cache, requests, sampling)
    alternatives = {}
    for word, new_ids in zip(words, continuations, strict=True):
        changed_ids = response_ids[: word.start] + new_ids
        new_words = group_tokens(vlm.tokenizer, vlm.template, changed_ids, first=word.start)
        alternatives[word] = new_words[0].text
    return alternatives


def group_tokens(tokenizer, template, response_ids, first=0) -> list[WordTokens]:
    """Group the tokens of a response from `first` on into words.

    A word begins at a token with white space in front, or at a punctuation mark. A token without a
    text of its own, such as the first byte of a character, belongs to the next one. The end token
    is a word with an empty text.
    """
    texts = token_texts(tokenizer, template, response_ids)
    words = []
    start = first  # of the tokens that no word has yet
    for i in range(first, len(texts)):
        text = texts[i]
        is_last = i == len(texts) - 1
        if not text and not is_last:
            continue
        if words and continues_word(words[-1].text, text):
            previous = words[-1]
            words[-1] = WordTokens(previous.text + text, previous.start, i + 1)
        else:
            words.append(WordTokens(text, start, i + 1))
        start = i + 1
    return words


def token_texts(tokenizer, template, response_ids) -> list[str]:
    """Return the text of each token of a response, that of its end token being empty."""
    stream = StreamDecoder(tokenizer, strip_prefix=find_template(template).response_prefix)
    text_ids = response_ids
    if response_ids[-1] in stop_ids(tokenizer, template):
        text_ids = response_ids[:-1]
    texts = [stream.push(token_id) for token_id in text_ids]
    rest = stream.flush()  # what the last tokens held back
    if texts:
        texts[-1] += rest
    if len(text_ids) < len(response_ids):
        texts.append("")
    return texts


def continues_word(word, text) -> bool:
    """Return whether a token's text continues the word before it. The end token never does."""
    if not text:
        return False
    if word.isspace():
        return True
    is_unspaced = UNSPACED_CHARACTER.match(text)
    return bool(WORD_CHARACTER.match(text)) and not is_unspaced


# --- the table of an answer

TABLE_HEADER = """\
The model reads its answer twice: with the image, and with the image hidden (all
image tokens left out). What the image adds to a word, in nats, is

    log p(word | image, words before) - log p(word | image hidden, words before)

    0: the words before it make the word as likely without the image
   +3: the image makes it e^3 = 20 times as likely (a bar has one mark a nat)
   -1: the image makes it e = 2.7 times less likely

"instead" is the word that the model would choose there with the image hidden,
where that is another word. (end) is the end of the answer.

word                    nats                        instead"""


def reliance_table(words: list[WordReliance]) -> list[str]:
    """Return the lines of a table for the terminal, a line for each word of an answer.

    What the model would say with the image hidden is shown where it is another word.
    """
    lines = TABLE_HEADER.splitlines()
    lines += [table_row(word) for word in words]
    total = sum(word.nats for word in words)
    lines.append(f"{'the whole answer':{MAX_SHOWN}}  {show_nats(total)}")
    lines.append("")
    num_changed = sum(word.instead != word.text for word in words)
    lines.append(
        f"With the image hidden, the model would choose another word in {num_changed} of "
        f"{len(words)} places."
    )
    return lines


def table_row(word: WordReliance) -> str:
    """Return the line of a word: its text, its nats, a bar with a mark a nat, and `instead`."""
    mark = "#" if word.nats > 0 else "-"
    bar = mark * min(MAX_SHOWN, round(abs(word.nats)))
    instead = ""
    if word.instead != word.text:
        instead = shown_word(word.instead)
    text = shown_word(word.text)
    row = f"{text:{MAX_SHOWN}}  {show_nats(word.nats)}  {bar:{MAX_SHOWN}}  {instead}"
    return row.rstrip()


def show_nats(nats):
    """Return a difference of log-probs with its sign and two decimals, six characters wide."""
    text = f"{nats:+.2f}"
    if float(text) == 0:
        text = "0.00"  # a zero has no sign: the log-probs differ by rounding alone
    return f"{text:>6}"


def shown_word(text):
    """Return a word as the table shows it. An empty one is the end of the answer."""
    if not text:
        return "(end)"
    word = printable(text.strip() or text)
    if len(word) > MAX_SHOWN:
        word = word[: MAX_SHOWN - 3] + "..."
    return word
