"""Bias-Driven Hallucination Sampling (Sec. 3.4, Alg. 1): rejected responses from the model itself, its picture hidden; and the
teacher-forced distortion of Sec. 3.3.

A record's draws depend on (seed, record id, round) alone. One prefill of (visible vectors, prompt, y+) serves all sentences of
a record: each rewinds the cache to its cut and writes on from there, and all sentences of all records decode as one batch.
"""

import functools
import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from . import similarity
from .checkpoint import fingerprint
from .files import require, sound, write_jsonl
from .images import diffuse, open_picture, prepare
from .logprobs import scored_states
from .parallel import leads, spread, wait
from .prompts import IMAGE, decode_response, encode_prompt, encode_response, end_id
from .rows import Row
from .sampling import Start, continuations, prefill, seeded
from .subject import Subject

YES_NO = re.compile(
    r"\s*(Yes|yes|No|no)\b"
)  # the paper's pattern, with a word boundary: "Nothing" and "North" are no answers
OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}
SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)


@dataclass(frozen=True)
class Settings:
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
class Sentence:
    """Sentence `start`..`end` of y+, cut at `cut` (characters); `kept` is its first part as it stays, swapped yes/no included."""

    start: int
    end: int
    cut: int
    kept: str


@dataclass
class Draw:
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
    return Sentence(start, end, cut, kept.rstrip())


def draw(text, vectors, settings, generator):
    """A round's Draw for the response `text` of a picture of `vectors` vectors: vector i stays visible iff rho_i >= rho_th (Eq. 6)."""
    visible = (torch.rand(vectors, generator=generator) >= settings.rho).nonzero()[:, 0].tolist()
    sentences = [choose_cut(text, start, end, generator) for start, end in split_sentences(text)]
    return Draw(
        visible,
        sentences,
        [torch.rand(settings.max_new_tokens, generator=generator) for _ in sentences],
    )


class Sampler:
    """BDHS for a Subject: what does not change from record to record."""

    def __init__(self, subject, settings, encoder, seed):
        self.subject, self.settings, self.similarity, self.seed = subject, settings, encoder, seed
        self.end = end_id(subject.tokenizer, subject.template)
        self.full_stops = {
            id for id in range(subject.tokenizer.size) if "." in subject.tokenizer.token_text(id)
        } | {self.end}

    def about(self):
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
        vectors = [sum(map(self.subject.count, record.paths)) for record in records]
        for number in range(1, self.settings.rounds + 1):
            last = number == self.settings.rounds
            guided = self.settings.guided and (
                not last or number == 1
            )  # the last of several rounds writes freely (Alg. 1)
            draws = [
                draw(
                    records[i].chosen,
                    vectors[i],
                    self.settings,
                    seeded(seed, records[i].id, number),
                )
                for i in pending
            ]
            pictures = [
                noisy(
                    self.subject,
                    records[i].paths,
                    self.settings.noise,
                    seeded(seed, records[i].id, number, "noise"),
                )
                if self.settings.noise
                else self.subject.look(records[i].paths)
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
                    pairs[i] = pair_of(records[i], text) | {
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
        encode = functools.partial(encode_response, self.subject.tokenizer, self.subject.template)
        decode = functools.partial(decode_response, self.subject.tokenizer, self.subject.template)
        rows, contexts, starts, stops = [], [], [], self.full_stops if guided else {self.end}
        for record, picture, one in zip(records, pictures, draws):
            prompt = encode_prompt(self.subject.tokenizer, self.subject.template, record.turns)
            rows.append(Row.of(prompt, picture, [encode(record.chosen)], one.visible))
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
        cache, batch = prefill(self.subject.model, rows)
        for number, (row, one) in enumerate(zip(rows, draws)):
            starts += [
                self._start(batch, number, row, context, uniforms, stops)
                for context, uniforms in zip(contexts[number], one.uniforms)
            ]
        settings = self.settings
        written = iter(
            continuations(
                self.subject.model,
                cache,
                starts,
                settings.max_new_tokens,
                settings.temperature,
                settings.top_p,
            )
        )
        # What is added is told from the whole: alone, a token's leading space may be lost.
        added = [
            [decode(context + new)[len(decode(context)) :] for context, new in zip(own, written)]
            for own in contexts
        ]
        return [
            (join(record.chosen, one.sentences, texts) if guided else texts[0].strip(), texts)
            for record, one, texts in zip(records, draws, added)
        ]

    def _start(self, batch, number, row, context, uniforms, stops):
        """Continue after `context` (ids of y+'s true beginning and the kept part): rewind to where it leaves y+, feed the rest."""
        ((lead, response),) = row.branches
        common = len(os.path.commonprefix([context, response[:-1]]))  # of any two lists
        # The cached row reads prefix, the prompt's last token, y+; the last token of what is common is fed again.
        fed = (lead + response)[common]
        return Start(
            number,
            range(batch.prefix[number] + common),
            [fed] + context[common:],
            batch.start[number] + common,
            uniforms,
            stops,
        )


def bdhs_sampler(options, subject):
    """The Sampler that the options of a script ask for."""
    noise = options.noise_steps if options.by == "noise" else 0
    settings = Settings(
        0.0 if noise else options.rho,
        options.rounds,
        options.epsilon,
        options.temperature,
        options.top_p,
        options.max_new_tokens,
        noise,
        not options.unguided,
    )
    return Sampler(
        subject,
        settings,
        similarity.load(options.similarity, subject.model, subject.tokenizer),
        options.seed,
    )


def noisy(subject, paths, steps, generator):
    """Features of the pictures after `steps` of forward diffusion (Eq. 9); one by one, since company moves the last bits."""
    prepared = (prepare(open_picture(path), subject.preparation) for path in paths)
    return [
        subject.model.look([(diffuse(tiles, steps, generator), size)])[0]
        for tiles, size in prepared
    ]


@torch.no_grad()
def distorted(subject, prompts, paths, responses, steps, generators):
    """What the policy predicts for each token of y+ (ids) that it reads under a noisy picture (Sec. 3.3); a list of id lists."""
    rows = [
        Row.of(prompt, noisy(subject, own, steps, generator), [response])
        for prompt, own, response, generator in zip(prompts, paths, responses, generators)
    ]
    hidden, _, lengths = scored_states(subject.model, rows)
    ids = torch.cat([(part @ subject.model.head.T).argmax(-1) for part in hidden.split(1024)])
    return [part.tolist() for part in ids.split(lengths)]


@dataclass
class Distortion:
    """The sampler of POVID-style distortion: y+ with every token replaced by the prediction, broken words and all."""

    subject: Subject
    steps: int
    seed: int

    def about(self):
        """What a file of pairs says of how they came about."""
        return {"noise": self.steps, "seed": self.seed}

    def pairs(self, records):
        """A pair for each record."""
        tokenizer, template = self.subject.tokenizer, self.subject.template
        prompts = [encode_prompt(tokenizer, template, record.turns) for record in records]
        responses = [encode_response(tokenizer, template, record.chosen) for record in records]
        generators = [seeded(self.seed, record.id, "noise") for record in records]
        found = distorted(
            self.subject,
            prompts,
            [record.paths for record in records],
            responses,
            self.steps,
            generators,
        )
        return [
            pair_of(record, decode_response(tokenizer, template, ids).strip()) | self.about()
            for record, ids in zip(records, found)
        ]


def pair_of(record, rejected):
    """A preference pair as it is written, without its trace; an <image> that the policy may have spelt out is dropped."""
    prompt = record.turns[0] if len(record.turns) == 1 else list(record.turns)
    return {
        "id": record.id,
        "image": record.image,
        "prompt": prompt,
        "chosen": record.chosen,
        "rejected": rejected.replace(IMAGE, ""),
    }


def join(chosen, sentences, texts):
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


def sample_file(sampler, records, path, group, resume=False):
    """Pairs of all records, written to `path` as JSONL; groups are formed from the full list, so a restart changes nothing.

    Work in progress lies beside, in `path`.part, a header line first; it is renamed when it is whole.
    Raises BadInput when what is to be resumed was begun with other settings, data or weights.
    """
    part, subject = Path(f"{path}.part"), sampler.subject
    data = hashlib.sha256(
        repr(
            [(record.id, record.paths, record.turns, record.chosen) for record in records]
        ).encode()
    ).hexdigest()[:16]
    header = sampler.about() | {
        "group": group,
        "model": fingerprint(subject.model),
        "template": subject.template,
        "records": data,
    }
    done = []
    if resume and part.exists():
        lines = part.read_bytes().split(b"\n")[:-1]  # a line cut short has no end
        same = lines and lines[0] == json.dumps(header, ensure_ascii=False).encode()
        require(
            same,
            f"{part}: was begun with other settings, data or weights; give the same options, or remove it",
        )
        with sound(part, "remove it"):
            done = [
                dict(json.loads(line)) for line in lines[1 : 1 + (len(lines) - 1) // group * group]
            ]
    wait()  # until all have read what was done before
    write_jsonl(part, [header, *done])
    with (
        open(part if leads() else os.devnull, "a", encoding="utf-8") as stream,
        tqdm(total=len(records), initial=len(done), desc="pairs", unit="pair") as bar,
    ):
        for first in range(len(done), len(records), group):
            pairs = spread(records[first : first + group], sampler.pairs)
            stream.write("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
            stream.flush()
            done += pairs
            bar.update(len(pairs))
    write_jsonl(path, done)
    if leads():
        part.unlink()
    return done
