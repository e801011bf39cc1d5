"""The corruption strategy (Sec. 5.3): a chosen response rewritten with plausible hallucinations, by a model or by rule."""

import random
import re
from dataclasses import dataclass

from minialign.evaluation.answers import answer_questions
from minialign.models.loading import VLM
from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.pairs.pair_files import preference_pair

REQUEST = """Below is an answer that somebody gave to a question about a picture. Rewrite it so that it says something false about the picture.
Change one or two details, of these kinds: which objects are there, where they are, how many there are, what they are like (colour, size, material), how they relate to each other.
The change must be plausible: nobody who cannot see the picture should notice it. Keep the length, the style and everything else as it is.
Question: {question}
Answer: {answer}
Write the changed answer and nothing else."""
REFUSAL = re.compile(
    r"\b(sorry|i can ?not|i can't|i won't|unable to|as an ai|not able to)\b", re.IGNORECASE
)


def rejection_reason(chosen, text):
    """Why a rewritten response is of no use ("refusal", "copy", "no answer"), or None if it is. Half to twice the words is an answer."""
    if REFUSAL.search(text) and not REFUSAL.search(chosen):
        return "refusal"
    words, old = text.lower().split(), chosen.lower().split()
    if words == old:
        return "copy"
    return (
        None
        if words and len(old) / 2 <= len(words) <= 2 * len(old) and "\n\n" not in text
        else "no answer"
    )


@dataclass
class MLLMCorrupter:
    """Asks an instruction-following MLLM, which is not shown the picture, to rewrite the chosen response."""

    vlm: VLM
    writer: VLM
    name: str
    max_new_tokens: int = 256

    def metadata(self):
        """What a file of pairs says of how they came about."""
        return {"corrupter": self.name, "max_new_tokens": self.max_new_tokens}

    def pairs(self, records):
        """A pair for each record; an unusable answer leaves the chosen response in its place, which readers leave out as a tie."""
        keys = [
            (
                (),
                REQUEST.format(
                    question=record.turns[-1].replace("<image>", "").strip(), answer=record.chosen
                ),
            )
            for record in records
        ]
        found = answer_questions(self.writer, keys, "rewriting", max_new_tokens=self.max_new_tokens)
        return [usable_pair(record, found[key].strip()) for record, key in zip(records, keys)]


@dataclass
class RuleCorrupter:
    """Changes one or two facts of the chosen response by rule: an object to one that is not there, a colour or a place to another."""

    vlm: VLM
    truth: GroundTruthAnnotator
    seed: int

    def metadata(self):
        """What a file of pairs says of how they came about."""
        return {"corrupter": "truth", "seed": self.seed}

    def pairs(self, records):
        """A pair for each record."""
        return [
            usable_pair(record, self.changed(record, random.Random(f"{self.seed} {record.id}")))
            for record in records
        ]

    def changed(self, record, rng):
        """The chosen response with one or two of its words for objects, colours and places exchanged, yes and no turned round."""
        present, text = {one["name"] for one in self.truth.annotated_objects(record)}, record.chosen
        if re.fullmatch(r"(yes|no)\W*", text, re.IGNORECASE):
            return {"y": "No.", "n": "Yes."}[text[0].lower()]
        kinds = [
            sorted(set(self.truth.vocabulary.names.values()) - present),
            sorted(self.truth.vocabulary.colors),
            sorted(self.truth.places),
        ]
        facts = [" ".join(words) for words in self.truth.vocabulary.names], kinds[1], kinds[2]
        spots = {}  # by place, so that what is an object and a colour (an orange) is changed once
        for words, others in zip(facts, kinds):
            longest = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
            for match in (
                re.finditer(rf"\b({longest})\b", text) if words and len(others) > 1 else ()
            ):
                spots.setdefault(match.start(), (match, others))
        for start, (match, others) in sorted(
            rng.sample(sorted(spots.items()), min(len(spots), rng.choice((1, 2)))), reverse=True
        ):
            new = rng.choice([other for other in others if other != match[0]])
            before = re.sub(
                r"\b([Aa])n? $", lambda a: a[1] + ("n " if new[0] in "aeiou" else " "), text[:start]
            )
            text = before + new + text[match.end() :]
        return text


def usable_pair(record, text):
    """The pair of a record and its rewritten response; `corrupted` says "used", or why it is not."""
    why = rejection_reason(record.chosen, text)
    return preference_pair(record, record.chosen if why else text) | {"corrupted": why or "used"}
