"""This module makes rejected responses from chosen ones, in the most obvious form.

It continues reference.py. It works on one record at a time, runs every sequence anew, and uses
nothing of the fast code that it specifies. Here are Bias-Driven Hallucination Sampling (BDHS,
Sec. 3.4 and Algorithm 1) and image distortion (Sec. 3.3) of arXiv 2407.02477.
"""

import math
import re
from dataclasses import dataclass

import torch

from minialign.data.chat_templates import (
    decode_response,
    encode_prompt,
    encode_response,
    stop_ids,
)
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.reference import generate, next_token_logits

# --- Images with and without noise


def diffuse(pixels, noise_steps, generator):
    """Return normalized pixels after `noise_steps` steps of forward diffusion (Eq. 8 and 9).

    Steps are counted as in POVID's code: k / 999 where the paper prints k / 1000, from 0 to N.
    """
    abar = 1.0
    for k in range(noise_steps + 1):
        sigmoid = 1 / (1 + math.exp(6 - 12 * k / 999))
        beta_k = sigmoid * (0.5e-2 - 1e-5) + 1e-5
        abar *= 1 - beta_k
    noise = torch.randn(pixels.shape, generator=generator)
    return math.sqrt(abar) * pixels + math.sqrt(1 - abar) * noise


def encode_images(vlm, record, noise_steps=0, generator=None):
    """Encode the images of a record, with diffusion noise on their pixels if there are steps."""
    image_features = []
    for path in record.paths:
        tiles, size = preprocess(open_image(path), vlm.image_processor)
        if noise_steps > 0:
            tiles = diffuse(tiles, noise_steps, generator)
        image_features += vlm.model.encode_images([(tiles, size)])
    return image_features


def count_image_tokens(vlm, image_features):
    """Count the image tokens of all images together."""
    image_tokens = vlm.model.project_image_features(image_features)
    return sum(len(tokens_of_image) for tokens_of_image in image_tokens)


# --- BDHS: sentences, cuts and the mask


@dataclass
class CutSentence:
    """A sentence text[start:end] of the chosen response, and the first part of it that is kept."""

    start: int
    end: int
    cut: int  # the kept part is text[start:cut], but for a yes or no that was swapped
    kept: str


@dataclass
class RoundChoices:
    """The random choices of one round of Algorithm 1."""

    visible: list  # the indices of the image tokens that are not masked
    sentences: list  # CutSentences
    uniforms: list  # for each sentence, a number in [0, 1) for each token that is sampled


@dataclass
class BdhsSettings:
    """The constants of Algorithm 1. BDHS-noise has 500 noise steps and rho = 0."""

    rho: float = 0.99  # rho_th
    epsilon: float = 0.97  # eps_s
    max_new_tokens: int = 256
    noise_steps: int = 0


def split_sentences(text):
    """Return the sentences of a text as (start, end), without the white space between them.

    A sentence ends with a word that ends with a full stop, an exclamation or a question mark.
    """
    sentences = []
    start = None
    for word in re.finditer(r"\S+", text):
        if start is None:
            start = word.start()
        if word[0].endswith((".", "!", "?")):
            sentences.append((start, word.end()))
            start = None
    if start is not None:  # the last sentence has no full stop
        sentences.append((start, len(text)))
    return sentences


def cut_sentence(text, start, end, generator):
    """Cut a sentence before one of its words, but not before the first, at random (Eq. 7).

    A sentence of one word is cut before that word, or after it if it is yes or no. A leading yes or
    no is swapped for its opposite with probability 1/2.
    """
    coin, position = torch.rand(2, generator=generator).tolist()
    sentence = text[start:end]

    # 1. List the places where it may be cut.
    answer = re.match(r"(Yes|yes|No|no)\b", sentence)
    word_starts = [word.start() for word in re.finditer(r"\S+", sentence)]
    cuts = word_starts[1:]
    if not cuts:
        cuts = [answer.end() if answer else 0]

    # 2. Take one of them.
    cut = cuts[int(position * len(cuts))]
    kept = sentence[:cut]

    # 3. The yes/no rule.
    if answer and coin < 0.5:
        opposites = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}
        kept = opposites[answer[0]] + sentence[answer.end() : cut]
    return CutSentence(
        start=start,
        end=end,
        cut=start + cut,
        kept=kept.rstrip(),
    )


def choose_round(text, num_image_tokens, settings, generator):
    """Draw the mask, the cuts, and the numbers to sample tokens with, in this order."""
    # 1. Image token i stays visible if rho_i >= rho_th (Eq. 6).
    rho_i = torch.rand(num_image_tokens, generator=generator)
    visible = []
    for i in range(num_image_tokens):
        if rho_i[i] >= settings.rho:
            visible.append(i)

    # 2. One cut for each sentence.
    sentences = []
    for start, end in split_sentences(text):
        sentences.append(cut_sentence(text, start, end, generator))

    # 3. One number for each token of each completion.
    uniforms = []
    for _ in sentences:
        uniforms.append(torch.rand(settings.max_new_tokens, generator=generator))
    return RoundChoices(visible, sentences, uniforms)


# --- BDHS: completion


def complete(vlm, record, image_features, *, context_text, uniforms, end_ids, visible):
    """Return the text that the model adds to `context_text`, the beginning of a response."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns, system=record.system)
    context = []
    if context_text:
        context = encode_response(vlm.tokenizer, vlm.template, context_text)
        context = context[:-1]  # without the end token
    new_ids = generate(
        vlm.model,
        prompt_ids,
        image_features,
        context=context,
        uniforms=uniforms,
        stop_ids=end_ids,
        visible=set(visible),
    )
    # Decode the new ids after the old ones, because alone they may lose a leading space.
    text_before = decode_response(vlm.tokenizer, vlm.template, context)
    text_after = decode_response(vlm.tokenizer, vlm.template, context + new_ids)
    return text_after[len(text_before) :]


def guided_rejected(vlm, record, image_features, choices):
    """Return the rejected response of a guided round (Eq. 7).

    Each sentence is completed from its kept part up to the first full stop. Its context is the true
    text before it, not the completions. The white space between sentences stays as it is.
    """
    end_ids = stop_ids(vlm.tokenizer, vlm.template)
    for token_id in range(vlm.tokenizer.size):
        if "." in vlm.tokenizer.token_text(token_id):
            end_ids.add(token_id)

    rejected = ""
    previous_end = 0
    for sentence, uniforms in zip(choices.sentences, choices.uniforms, strict=True):
        # 1. Complete the sentence.
        context_text = (record.chosen[: sentence.start] + sentence.kept).rstrip()
        completion = complete(
            vlm,
            record,
            image_features,
            context_text=context_text,
            uniforms=uniforms,
            end_ids=end_ids,
            visible=choices.visible,
        )
        # 2. End it at the full stop, whose token may hold more than that.
        if "." in completion:
            completion = completion[: completion.index(".") + 1]
        # 3. Without a kept part the white space before the sentence is enough.
        if not sentence.kept:
            completion = completion.lstrip()
        # 4. Append both.
        gap = record.chosen[previous_end : sentence.start]
        rejected += gap + sentence.kept + completion
        previous_end = sentence.end
    return rejected.strip()


def unguided_rejected(vlm, record, image_features, choices):
    """Return the rejected response of a free round: a whole answer, with the image masked."""
    rejected = complete(
        vlm,
        record,
        image_features,
        context_text="",
        uniforms=choices.uniforms[0],
        end_ids=stop_ids(vlm.tokenizer, vlm.template),
        visible=choices.visible,
    )
    return rejected.strip()


def cosine(u, v):
    """Compute the cosine of the angle between two vectors."""
    return float(u @ v / (u.norm() * v.norm()))


@dataclass
class BdhsPair:
    """What Algorithm 1 finds for one record."""

    rejected: str
    rounds: int  # how many it took
    similarity: float  # cosine of the embeddings of chosen and rejected response
    choices: RoundChoices  # of the last of these rounds


@torch.no_grad()
def bdhs_pair(vlm, record, embed, settings, *, generators, noise_generators=None):
    """Sample a rejected response for one record by Algorithm 1.

    `embed` maps a text to a vector, its sentence embedding. `generators` holds a torch.Generator
    for each round, so that N_BDHS = len(generators). With noise, so does `noise_generators`.
    """
    num_rounds = len(generators)
    for n in range(num_rounds):
        # 1. Restrict the access to the image, by noise on its pixels or by masking its tokens.
        if settings.noise_steps > 0:
            noise_generator = noise_generators[n]
            image_features = encode_images(vlm, record, settings.noise_steps, noise_generator)
        else:
            image_features = encode_images(vlm, record)
        num_image_tokens = count_image_tokens(vlm, image_features)
        choices = choose_round(record.chosen, num_image_tokens, settings, generators[n])

        # 2. Complete every sentence. The last of several rounds writes the whole response freely.
        is_last = n + 1 == num_rounds
        if is_last and num_rounds > 1:
            rejected = unguided_rejected(vlm, record, image_features, choices)
        else:
            rejected = guided_rejected(vlm, record, image_features, choices)

        # 3. Stop as soon as the response differs enough from the chosen one (Sec. 3.4.3).
        similarity = cosine(embed(rejected), embed(record.chosen))
        if similarity < settings.epsilon or is_last:
            break
    return BdhsPair(
        rejected=rejected,
        rounds=n + 1,
        similarity=similarity,
        choices=choices,
    )


# --- Image distortion (Sec. 3.3)


@torch.no_grad()
def distorted_ids(vlm, record, noise_steps, generator):
    """Return y~-: in each place the most likely token, given a noisy image and the y+ before it."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns, system=record.system)
    chosen = encode_response(vlm.tokenizer, vlm.template, record.chosen)
    image_features = encode_images(vlm, record, noise_steps, generator)
    predicted = []
    for t in range(len(chosen)):
        logits = next_token_logits(vlm.model, prompt_ids, image_features, chosen[:t])[-1]
        predicted.append(int(logits.argmax()))
    return predicted
