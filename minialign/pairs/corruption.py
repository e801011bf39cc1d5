"""Rejected responses by corruption (Sec. 5.3): hallucinations are written into the chosen response.

Either another model rewrites it, or a rule exchanges some of its facts.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from minialign.data.records import Record
from minialign.evaluation.answers import answer_questions_locally, questions_that_fit
from minialign.evaluation.words import any_phrase, phrase, singular, singular_phrase
from minialign.models.checkpoint import fingerprint
from minialign.models.loading import VLM
from minialign.pairs.annotators import NEGATED, GroundTruthAnnotator
from minialign.pairs.pair_files import preference_pair
from minialign.pairs.sentences import split_sentences
from minialign.utils.digests import file_digest

# What the rewriting model is asked.
REQUEST = (
    "Below is an answer that somebody gave to a question about a picture. Rewrite it so that it "
    "says something false about the picture.\n"
    "Change one or two details, of these kinds: which objects are there, where they are, how many "
    "there are, what they are like (colour, size, material), how they relate to each other.\n"
    "The change must be plausible: nobody who cannot see the picture should notice it. Keep the "
    "length, the style and everything else as it is.\n"
    "Question: {question}\n"
    "Answer: {answer}\n"
    "Write the changed answer and nothing else."
)
# Words of a model that refuses to rewrite. Models write either apostrophe.
REFUSAL = re.compile(
    r"\b(sorry|i can ?not|i can['’]t|i won['’]t|unable to|as an ai|not able to)\b", re.IGNORECASE
)
# A text that is a yes or a no and nothing else but punctuation.
BARE_YES_NO = re.compile(r"(yes|no)\W*", re.IGNORECASE)
# An indefinite article at the end of a text, with the space after it. Group 1 is its first letter.
FINAL_ARTICLE = re.compile(r"\b([Aa])n? \Z")


def corrupted_pair(record: Record, text: str) -> dict:
    """Return the preference pair of a record and its rewritten response.

    It is an `unusable_pair` if the text is of no use. Otherwise its "corrupted" says "used".
    """
    reason = rejection_reason(record.chosen, text)
    if reason is not None:
        return unusable_pair(record, reason)
    return {**preference_pair(record, text), "corrupted": "used"}


def unusable_pair(record: Record, reason: str) -> dict:
    """Return a pair whose rejected response is the chosen one. Its "corrupted" says why.

    Readers of the file count such pairs and leave them out.
    """
    return {**preference_pair(record, record.chosen), "corrupted": reason}


def rejection_reason(chosen: str, text: str) -> str | None:
    """Return why a rewritten response is of no use, or None if it can be used.

    It is a "refusal", a "copy" of the chosen response, or "no answer": it must be a single
    paragraph and have between half and twice as many words as the chosen response.
    """
    if REFUSAL.search(text) and not REFUSAL.search(chosen):
        return "refusal"
    words = text.lower().split()
    chosen_words = chosen.lower().split()
    if words == chosen_words:
        return "copy"
    has_similar_length = len(chosen_words) / 2 <= len(words) <= 2 * len(chosen_words)
    if not has_similar_length or "\n\n" in text:
        return "no answer"
    return None


@dataclass
class MLLMCorrupter:
    """Asks an instruction-following MLLM to rewrite the chosen response, without the image."""

    vlm: VLM  # the model to be aligned
    writer: VLM  # the model that rewrites
    name: str
    max_new_tokens: int = 256

    def metadata(self) -> dict:
        """Return what the pairs depend on, to compare when a run is resumed."""
        content = [fingerprint(self.writer.model), *self.writer.file_digests.values()]
        digest = hashlib.sha256(repr(content).encode()).hexdigest()
        return {
            "corrupter": self.name,
            "corrupter_digest": digest[:16],
            "max_new_tokens": self.max_new_tokens,
        }

    def pairs(self, records: list[Record]) -> list[dict]:
        """Return a preference pair for each record.

        Where the request fills the context of the writer, it is an `unusable_pair`, "too long".
        """
        requests = []
        for record in records:
            text = REQUEST.format(question=record.question, answer=record.chosen)
            requests.append(((), text))  # without an image
        # The processes share the records, so each of them has other requests.
        answers = answer_questions_locally(
            self.writer,
            questions_that_fit(self.writer, requests),
            "rewriting",
            max_new_tokens=self.max_new_tokens,
        )
        pairs = []
        for record, request in zip(records, requests, strict=True):
            if request in answers:
                pairs.append(corrupted_pair(record, answers[request].strip()))
            else:
                pairs.append(unusable_pair(record, "too long"))
        return pairs


class RuleCorrupter:
    """Exchanges one or two facts of the chosen response: objects, colors or places.

    An object is exchanged for one that is not in the image, a color or a place for another one.
    Sentences that are false already stay as they are, and so do phrases that deny something. A bare
    yes becomes a no, and a bare no a yes, unless it is false already.
    """

    def __init__(self, vlm: VLM, truth: GroundTruthAnnotator, seed: int):
        """Collect the words that state facts, once for all records.

        A word that is both an object and a color (orange) is an object.
        """
        self.vlm = vlm
        self.truth = truth
        self.seed = seed

        # 1. The names of all objects, the words for them, and their plurals.
        names = truth.vocabulary.names
        self.objects = sorted(set(names.values()))
        self.synonyms = {" ".join(words): name for words, name in names.items()}
        self.plurals = {}
        for text, name in self.synonyms.items():
            if is_plural_of(text, name):
                self.plurals[text] = name

        # 2. The colors and places, each with those that may stand in its place.
        colors = sorted(truth.vocabulary.colors)
        places = sorted(truth.places)
        self.attributes = dict.fromkeys(places, places) | dict.fromkeys(colors, colors)
        self.fact_pattern = any_phrase([*self.synonyms, *self.attributes])

    def metadata(self) -> dict:
        """Return what the pairs depend on, to compare when a run is resumed."""
        return {
            "corrupter": "truth",
            "annotations": file_digest(self.truth.path)[:16],
            "seed": self.seed,
        }

    def pairs(self, records: list[Record]) -> list[dict]:
        """Return a preference pair for each record. The draws depend on (seed, record) alone."""
        pairs = []
        for record in records:
            rng = random.Random(f"{self.seed} {record.id}")
            pairs.append(corrupted_pair(record, self.corrupt(record, rng)))
        return pairs

    def corrupt(self, record: Record, rng: random.Random) -> str:
        """Return the chosen response with one or two of its facts exchanged.

        A bare yes becomes a no, and a bare no becomes a yes.
        """
        text = record.chosen
        if BARE_YES_NO.fullmatch(text):
            is_false = self.truth.judge(record, text).num_wrong > 0
            opposite = "No." if text[0].lower() == "y" else "Yes."
            return text if is_false else opposite

        # 1. Choose one or two of the facts.
        facts = self.find_facts(record)
        num_exchanged = min(len(facts), rng.choice((1, 2)))
        exchanged = rng.sample(sorted(facts), num_exchanged)

        # 2. Exchange them from the last to the first, so that earlier positions stay valid.
        for start in sorted(exchanged, reverse=True):
            fact, replacements = facts[start]
            replacement = rng.choice(replacements)
            before = _with_article_for(replacement, text[:start])
            text = before + replacement + text[start + len(fact) :]
        return text

    def find_facts(self, record: Record) -> dict[int, tuple[str, list[str]]]:
        """Find the facts of the chosen response that can be exchanged.

        Returns {position: (words, what may stand in their place)}.
        """
        # 1. The names of the objects that are not in the image, and their plurals.
        present = {item["name"] for item in self.truth.annotated_objects(record)}
        absent_objects = [name for name in self.objects if name not in present]
        absent_plurals = [text for text, name in self.plurals.items() if name not in present]

        # 2. The facts for which there are other words.
        fixed_positions = self.find_fixed_positions(record)
        facts = {}
        for match in self.fact_pattern.finditer(record.chosen):
            fact = match[0]
            words = self.words_like(fact, absent_objects, absent_plurals)
            replacements = [word for word in words if word != fact]
            if replacements and match.start() not in fixed_positions:
                facts[match.start()] = (fact, replacements)
        return facts

    def words_like(self, fact, absent_objects, absent_plurals) -> list[str]:
        """Return the words of the kind of a fact: absent objects, their plurals, colors or places.

        A plural becomes another plural. But the name of an object may look like one ("skis"), and
        becomes another name if no plural is known.
        """
        if fact not in self.synonyms:
            return self.attributes[fact]
        is_name = fact == self.synonyms[fact].lower()
        if is_plural(fact) and (absent_plurals or not is_name):
            return absent_plurals
        return absent_objects

    def find_fixed_positions(self, record: Record) -> set[int]:
        """Return the positions of the characters of the chosen response that have to stay.

        Another word might make a false sentence true. A negation such as "there is no dog" is true
        of all objects that are not in the image.
        """
        positions = set()
        for start, end in split_sentences(record.chosen):
            sentence = record.chosen[start:end]
            if self.truth.judge(record, sentence).num_wrong > 0:
                positions.update(range(start, end))
            for negation in NEGATED.finditer(sentence.lower()):
                positions.update(range(start + negation.start(), start + negation.end()))
        return positions


def is_plural(text) -> bool:
    """Return whether the last word of a text is a plural: "sports balls", and not "sports ball"."""
    last_word = phrase([text]).split(" ")[-1]
    return singular(last_word) != last_word


def is_plural_of(text, name) -> bool:
    """Return whether a synonym of an object is the plural of its name, as "cups" is of "cup"."""
    has_same_singular = singular_phrase([text]) == singular_phrase([name.lower()])
    return text != name.lower() and is_plural(text) and has_same_singular


def _with_article_for(word, before):
    """Return the text before a word. If it ends with an article, make it "a" or "an" as needed."""
    article = FINAL_ARTICLE.search(before)
    if article is None:
        return before
    ending = "n " if word[0] in "aeiou" else " "
    return before[: article.end(1)] + ending
