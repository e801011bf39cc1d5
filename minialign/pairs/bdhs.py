"""Bias-Driven Hallucination Sampling (Sec. 3.4, Alg. 1): rejected responses from the model itself, its picture hidden; and the
teacher-forced distortion of Sec. 3.3.

A record's draws depend on (seed, record id, round) alone. One prefill of (visible vectors, prompt, y+) serves all sentences of
a record: each rewinds the cache to its cut and writes on from there, and all sentences of all records decode as one batch.
"""

import functools
import os
import re
from dataclasses import asdict, dataclass

import torch

from minialign.data.chat_templates import (
    decode_response,
    encode_prompt,
    encode_response,
    end_token_id,
)
from minialign.data.packing import PackedExample
from minialign.generation.decoding import (
    DecodeRequest,
    SamplingParams,
    generate_continuations,
    prefill,
)
from minialign.pairs import similarity
from minialign.pairs.distortion import noisy_image_features
from minialign.pairs.pair_files import preference_pair
from minialign.utils.seeding import seeded_generator

YES_NO = re.compile(
    r"\s*(Yes|yes|No|no)\b"
)  # the paper's pattern, with a word boundary: "Nothing" and "North" are no answers
OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}
SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)


@dataclass(frozen=True)
class BdhsConfig:
    """rho: share of picture vectors hidden (rho_th); rounds: N_BDHS; epsilon: eps_s, the cosine at which a draw is drawn again.

    noise: diffusion steps put on the picture (BDHS-noise, which hides no vector: rho 0), 0 for none; guided: whether sentences
    are finished (Eq. 7) or, in every round, the whole response is written.
    """

    rho: float = 0.99
    rounds: int = 5
    epsilon: float = 0.97
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    noise: int = 0
    guided: bool = True


@dataclass
class CutSentence:
    """Sentence `start`..`end` of y+, cut at `cut` (characters); `kept` is its first part as it stays, swapped yes/no included."""

    start: int
    end: int
    cut: int
    kept: str


@dataclass
class RoundSample:
    """One round's choices for a record: the vectors that stay, its cut sentences, and U(0, 1) draws for each sentence's tokens."""

    visible: list
    sentences: list
    uniforms: list


def split_sentences(text):
    """[(start, end)] of the sentences of a text, in characters, the white space between them left out."""
    return [match.span() for match in SENTENCE.finditer(text)]


def choose_cut(text, start, end, generator):
    """A Sentence cut at a random word start, its first word kept; a lone word is cut before it, unless it answers yes or no.

    A yes or no at the front is swapped for its opposite with probability 1/2 before the cut.
    """
    coin, place = torch.rand(2, generator=generator).tolist()
    answer = YES_NO.match(text, start, end)
    words = [start + match.start() for match in re.finditer(r"(?<=\s)\S", text[start:end])] or [
        answer.end(1) if answer else start
    ]
    cut = words[int(place * len(words))]
    kept = (
        OPPOSITE[answer[1]] + text[answer.end(1) : cut]
        if answer and coin < 0.5
        else text[start:cut]
    )
    return CutSentence(start, end, cut, kept.rstrip())


def sample_round(text, vectors, settings, generator):
    """A round's Draw for the response `text` of a picture of `vectors` vectors: vector i stays visible iff rho_i >= rho_th (Eq. 6)."""
    visible = (torch.rand(vectors, generator=generator) >= settings.rho).nonzero()[:, 0].tolist()
    sentences = [choose_cut(text, start, end, generator) for start, end in split_sentences(text)]
    return RoundSample(
        visible,
        sentences,
        [torch.rand(settings.max_new_tokens, generator=generator) for _ in sentences],
    )


class BdhsSampler:
    """BDHS for a Subject: what does not change from record to record."""

    def __init__(self, vlm, settings, encoder, seed):
        self.vlm, self.settings, self.similarity, self.seed = vlm, settings, encoder, seed
        self.end = end_token_id(vlm.tokenizer, vlm.template)
        self.full_stops = {
            id for id in range(vlm.tokenizer.size) if "." in vlm.tokenizer.token_text(id)
        } | {self.end}

    def metadata(self):
        """What a file of pairs says of how they came about."""
        return {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "similarity": self.similarity.name,
        }

    @torch.no_grad()
    def pairs(self, records, step=None):
        """A pair (dictionary, its trace included) for each record, all decoded together; online, `step` makes the draws new."""
        pairs, pending = {}, list(range(len(records)))
        seed = self.seed if step is None else (self.seed, step)
        vectors = [sum(map(self.vlm.num_image_tokens, record.paths)) for record in records]
        for number in range(1, self.settings.rounds + 1):
            last = number == self.settings.rounds
            guided = self.settings.guided and (
                not last or number == 1
            )  # the last of several rounds writes freely (Alg. 1)
            draws = [
                sample_round(
                    records[i].chosen,
                    vectors[i],
                    self.settings,
                    seeded_generator(seed, records[i].id, number),
                )
                for i in pending
            ]
            pictures = [
                noisy_image_features(
                    self.vlm,
                    records[i].paths,
                    self.settings.noise,
                    seeded_generator(seed, records[i].id, number, "noise"),
                )
                if self.settings.noise
                else self.vlm.encode_images(records[i].paths)
                for i in pending
            ]
            texts = self._round([records[i] for i in pending], pictures, draws, guided)
            for i, one, (text, completions) in zip(pending, draws, texts):
                cosine = self.similarity.cosine(text, records[i].chosen)
                if cosine < self.settings.epsilon or last:
                    trace = (
                        {"noise": self.settings.noise}
                        if self.settings.noise
                        else {"visible": one.visible}
                    )
                    cuts = [sentence.cut for sentence in one.sentences] if guided else []
                    pairs[i] = preference_pair(records[i], text) | {
                        "rounds": number,
                        "similarity": round(cosine, 6),
                        **trace,
                        "cuts": cuts,
                        "completed": completions,
                        "seed": self.seed,
                    }
            pending = [i for i in pending if i not in pairs]
            if not pending:
                break
        return [pairs[i] for i in range(len(records))]

    def _round(self, records, pictures, draws, guided):
        """(rejected text, completions) for each record: guided sentence by sentence (Eq. 7), or written freely under the same mask."""
        encode = functools.partial(encode_response, self.vlm.tokenizer, self.vlm.template)
        decode = functools.partial(decode_response, self.vlm.tokenizer, self.vlm.template)
        rows, contexts, starts, stops = [], [], [], self.full_stops if guided else {self.end}
        for record, picture, one in zip(records, pictures, draws):
            prompt = encode_prompt(self.vlm.tokenizer, self.vlm.template, record.turns)
            rows.append(PackedExample.of(prompt, picture, [encode(record.chosen)], one.visible))
            before = (
                [
                    (record.chosen[: sentence.start] + sentence.kept).rstrip()
                    for sentence in one.sentences
                ]
                if guided
                else [""]
            )
            contexts.append(
                [encode(text)[:-1] if text else [] for text in before]
            )  # without the end token
        cache, batch = prefill(self.vlm.model, rows)
        for number, (row, one) in enumerate(zip(rows, draws)):
            starts += [
                self._start(batch, number, row, context, uniforms, stops)
                for context, uniforms in zip(contexts[number], one.uniforms)
            ]
        settings = self.settings
        written = iter(
            generate_continuations(
                self.vlm.model,
                cache,
                starts,
                SamplingParams(
                    max_new_tokens=settings.max_new_tokens,
                    temperature=settings.temperature,
                    top_p=settings.top_p,
                ),
            )
        )
        # What is added is told from the whole: alone, a token's leading space may be lost.
        added = [
            [decode(context + new)[len(decode(context)) :] for context, new in zip(own, written)]
            for own in contexts
        ]
        return [
            (
                join_sentences(record.chosen, one.sentences, texts) if guided else texts[0].strip(),
                texts,
            )
            for record, one, texts in zip(records, draws, added)
        ]

    def _start(self, batch, number, row, context, uniforms, stops):
        """Continue after `context` (ids of y+'s true beginning and the kept part): rewind to where it leaves y+, feed the rest."""
        ((lead, response),) = row.branches
        common = len(os.path.commonprefix([context, response[:-1]]))  # of any two lists
        # The cached row reads prefix, the prompt's last token, y+; the last token of what is common is fed again.
        fed = (lead + response)[common]
        return DecodeRequest(
            number,
            range(batch.prefix_lengths[number] + common),
            [fed] + context[common:],
            batch.first_positions[number] + common,
            uniforms,
            stops,
        )


def bdhs_sampler(options, vlm):
    """The Sampler that the options of a script ask for."""
    noise = options.noise_steps if options.by == "noise" else 0
    settings = BdhsConfig(
        0.0 if noise else options.rho,
        options.rounds,
        options.epsilon,
        options.temperature,
        options.top_p,
        options.max_new_tokens,
        noise,
        not options.unguided,
    )
    return BdhsSampler(
        vlm,
        settings,
        similarity.load_similarity(options.similarity, vlm.model, vlm.tokenizer),
        options.seed,
    )


def join_sentences(chosen, sentences, texts):
    """Alg. 1: each sentence is its kept part and its completion up to the first full stop; what stood between them stays."""
    joined, place = "", 0
    for sentence, text in zip(sentences, texts):
        text = text[: text.find(".") + 1] or text
        joined += (
            chosen[place : sentence.start]
            + sentence.kept
            + (text if sentence.kept else text.lstrip())
        )
        place = sentence.end
    return joined.strip()
