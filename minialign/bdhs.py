"""Bias-Driven Hallucination Sampling (Sec. 3.4, Alg. 1): rejected responses from the model itself, its picture hidden.

A record's draws depend on (seed, record id, round) alone. One prefill of (visible vectors, prompt, y+) serves all sentences of
a record: each rewinds the cache to its cut and writes on from there, and all sentences of all records decode as one batch.
"""
import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from .files import BadInput, write_jsonl
from .prompts import decode_response, encode_prompt, encode_response, end_id
from .rows import Row
from .sampling import Start, continuations, prefill, seeded

YES_NO = re.compile(r"\s*(Yes|yes|No|no)\b")  # the paper's pattern, with a word boundary: "Nothing" and "North" are no answers
OPPOSITE = {"Yes": "No", "yes": "no", "No": "Yes", "no": "yes"}
SENTENCE = re.compile(r"\S.*?(?:[.!?]+(?=\s|$)|$)", re.DOTALL)


@dataclass(frozen=True)
class Settings:
    """rho: share of picture vectors hidden (rho_th); rounds: N_BDHS; epsilon: eps_s, the cosine at which a draw is drawn again."""
    rho: float = .99
    rounds: int = 5
    epsilon: float = .97
    temperature: float = 1.0
    top_p: float = 1.0
    max_new_tokens: int = 256
    guided: bool = True


@dataclass
class Draw:
    """One round's choices for a record: which vectors stay, and for each sentence its span, its cut and its kept text."""
    visible: list
    sentences: list
    uniforms: list


@dataclass
class Sentence:
    """Sentence `start`..`end` of y+, cut at `cut` (characters); `kept` is its first part as it stays, swapped yes/no included."""
    start: int
    end: int
    cut: int
    kept: str


def split_sentences(text):
    """[(start, end)] of the sentences of a text, in characters, the white space between them left out."""
    return [match.span() for match in SENTENCE.finditer(text)]


def choose_cut(text, start, end, generator):
    """A Sentence cut at a random word start, its first word kept; a lone word is cut before it, unless it answers yes or no.

    A yes or no at the front is swapped for its opposite with probability 1/2 before the cut.
    """
    coin, place = torch.rand(2, generator=generator).tolist()
    answer = YES_NO.match(text, start, end)
    swapped = answer and coin < .5
    words = [start + match.start() for match in re.finditer(r"(?<=\s)\S", text[start:end])]
    if words:
        cut = words[int(place * len(words))]
    else:
        cut = answer.end(1) if answer else start
    kept = text[start:cut].rstrip()
    if swapped:
        kept = OPPOSITE[answer[1]] + text[answer.end(1):cut].rstrip()
    return Sentence(start, end, cut, kept)


def draw(text, vectors, settings, generator):
    """A round's Draw for the response `text` of a picture of `vectors` vectors: vector i stays visible iff rho_i >= rho_th (Eq. 6)."""
    visible = (torch.rand(vectors, generator=generator) >= settings.rho).nonzero()[:, 0].tolist()
    sentences = [choose_cut(text, start, end, generator) for start, end in split_sentences(text)]
    return Draw(visible, sentences, [torch.rand(settings.max_new_tokens, generator=generator) for _ in sentences])


class Sampler:
    """BDHS for a model: what does not change from record to record."""

    def __init__(self, model, tokenizer, template, settings, similarity, seed):
        self.model, self.tokenizer, self.template = model, tokenizer, template
        self.settings, self.similarity, self.seed = settings, similarity, seed
        self.end = end_id(tokenizer, template)
        self.full_stops = {id for id in range(tokenizer.size) if "." in tokenizer.token_text(id)} | {self.end}

    @torch.no_grad()
    def pairs(self, records, features):
        """Pairs (dictionaries) for records with the Features of their pictures (a list each), all decoded together."""
        pairs, pending = {}, list(range(len(records)))
        vectors = [[len(v) for v in self.model.vectors(pictures)] for pictures in features]
        for number in range(1, self.settings.rounds + 1):
            last = number == self.settings.rounds
            guided = self.settings.guided and not (last and number > 1)
            draws = [draw(records[i].chosen, sum(vectors[i]), self.settings, seeded(self.seed, records[i].id, number)) for i in pending]
            rejected = self._round([records[i] for i in pending], [features[i] for i in pending], [vectors[i] for i in pending], draws, guided)
            again = []
            for i, one, text in zip(pending, draws, rejected):
                similarity = self.similarity.cosine(text, records[i].chosen)
                if similarity < self.settings.epsilon or last:
                    cuts = [sentence.cut for sentence in one.sentences] if guided else []
                    pairs[i] = {"id": records[i].id, "image": records[i].image, "prompt": records[i].turns[-1], "chosen": records[i].chosen, "rejected": text,
                                "rounds": number, "similarity": round(similarity, 6), "visible": one.visible, "cuts": cuts, "seed": self.seed}
                else:
                    again.append(i)
            pending = again
            if not pending:
                break
        return [pairs[i] for i in range(len(records))]

    def _round(self, records, features, vectors, draws, guided):
        """One rejected text for each record: guided sentence by sentence (Eq. 7), or written freely under the same mask."""
        rows, starts = [], []
        for record, pictures, counts, one in zip(records, features, vectors, draws):
            prompt = encode_prompt(self.tokenizer, self.template, record.turns)
            response = encode_response(self.tokenizer, self.template, record.chosen)
            rows.append(Row.of(prompt, pictures, [response], self._per_picture(one.visible, counts)))
        cache, batch = prefill(self.model, rows)
        contexts = []
        for number, (record, row, one) in enumerate(zip(records, rows, draws)):
            if guided:
                texts = [record.chosen[:sentence.start] + sentence.kept for sentence in one.sentences]
                contexts.append([encode_response(self.tokenizer, self.template, text.rstrip())[:-1] if text.strip() else [] for text in texts])
            else:
                contexts.append([[]])
            starts += [self._start(batch, number, row, context, draws_of) for context, draws_of in zip(contexts[-1], one.uniforms)]
            if not guided:
                starts[-1].stops = {self.end}
        written = iter(continuations(self.model, cache, starts, self.settings.max_new_tokens, self.settings.temperature, self.settings.top_p))
        return [self._join(record.chosen, one, [self._text(context, next(written)) for context in own], guided)
                for record, one, own in zip(records, draws, contexts)]

    @staticmethod
    def _per_picture(visible, counts):
        """Split indices over all vectors of a prompt into indices within each picture."""
        parts, first = [], 0
        for count in counts:
            parts.append([i - first for i in visible if first <= i < first + count])
            first += count
        return parts

    def _start(self, batch, number, row, context, uniforms):
        """Continue after `context` (ids of y+'s true beginning and the kept part): rewind to where it leaves y+, feed the rest."""
        (lead, response), = row.branches
        common = 0
        while common < min(len(context), len(response) - 1) and context[common] == response[common]:
            common += 1
        # The cached row reads prefix, the prompt's last token, y+; the last token of what is common is fed again.
        read = (lead + response)[:common + 1]
        slots = range(batch.prefix[number] + common)
        return Start(number, slots, read[-1:] + context[common:], batch.start[number] + common, uniforms, self.full_stops)

    def _text(self, context, written):
        """The text that new tokens add to their context, without the end token."""
        before = decode_response(self.tokenizer, self.template, context)
        return decode_response(self.tokenizer, self.template, context + [id for id in written if id != self.end])[len(before):]

    @staticmethod
    def _join(chosen, one, texts, guided):
        """Alg. 1: each sentence is its kept part and its completion up to the first full stop; what stood between them stays."""
        if not guided:
            return texts[0].strip()
        joined, place = "", 0
        for sentence, text in zip(one.sentences, texts):
            stop = text.find(".") + 1
            joined += chosen[place:sentence.start] + sentence.kept + (text[:stop] if stop else text)
            place = sentence.end
        return joined.strip()


def sample_file(sampler, subject, records, path, group, resume=False):
    """Pairs of all records, written to `path` as JSONL; groups are formed from the full list, so a restart changes nothing.

    Work in progress lies beside, in `path`.part, a header line first; it is renamed when it is whole.
    Raises BadInput when what is to be resumed was begun with other settings.
    """
    part = Path(f"{path}.part")
    header = {"settings": asdict(sampler.settings), "seed": sampler.seed, "group": group, "similarity": sampler.similarity.name,
              "records": hashlib.sha256(repr([(r.id, r.path, r.turns, r.chosen) for r in records]).encode()).hexdigest()[:16]}
    done = []
    if resume and part.exists():
        lines = part.read_text(encoding="utf-8").split("\n")[:-1]  # a line cut short has no end
        if not lines or json.loads(lines[0]) != header:
            raise BadInput(f"{part}: was begun with other settings or data; give the same options, or remove it")
        done = [json.loads(line) for line in lines[1:]]
        done = done[:len(done) // group * group]
    write_jsonl(part, [header, *done])
    with open(part, "a", encoding="utf-8") as stream, tqdm(total=len(records), initial=len(done), desc="BDHS pairs", unit="pair") as bar:
        for first in range(len(done), len(records), group):
            chosen = records[first:first + group]
            pairs = sampler.pairs(chosen, [subject.look([record.path]) for record in chosen])
            stream.write("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
            stream.flush()
            done += pairs
            bar.update(len(pairs))
    write_jsonl(path, done)
    part.unlink()
    return done
