"""Who ranks two responses to a prompt: the ground truth, a multimodal LLM, or a reward model (Sec. 2.3, App. D).

Every annotator has `better(records, firsts, seconds)`: for each record 0 if the first response is better, 1 if the second, None
for a tie; and `notes`, a Counter of what happened on the way.
"""

import re
from collections import Counter
from pathlib import Path

from minialign.evaluation.answers import answer_questions
from minialign.evaluation.evaluation_sets import read_captions
from minialign.models.loading import load_vlm
from minialign.pairs.bdhs import YES_NO
from minialign.pairs.reward_model import load_reward_model
from minialign.utils.files import check

CRITERIA = """Two responses were given to a question about the picture. Say which of them is better.
First look for what is not in the picture: every object, attribute (such as a colour), number and relation in a response must be as the picture shows it; what the picture leaves unclear is better left out. The response with fewer such mistakes is better.
If neither has fewer, the more helpful one is better: practical, to the point.
Question: {question}
Response 1: {first}
Response 2: {second}
Begin your answer with "Response 1" or "Response 2"; then give the reason."""
# What a negation takes back, to the end of its clause: it states nothing of what is there.
NEGATED = re.compile(
    r"(\b(no|not|without|cannot|neither|nor|none)\b|n['’]t\b)(?! only| a doubt| fewer| less).*?(?= but | and (?:an?|the) |[,;:!?(–]|\n *[-*•\d]|$)",
    re.DOTALL,
)


class GroundTruthAnnotator:
    """Ranks by annotated objects (a captions.json, as of the tiny world): fewer wrong statements first, then more right ones."""

    def __init__(self, path):
        self.path, self.counters = path, Counter()
        self.vocabulary, rows = read_captions(path)
        self.objects = {row["image"]: row["objects"] for row in rows}
        self.places = {
            one["place"] for objects in self.objects.values() for one in objects if one.get("place")
        }

    def annotated_objects(self, record):
        """The objects of a record's picture. Raises BadInput where there is no annotation of it."""
        image = (
            record.image[0]
            if isinstance(record.image, list) and len(record.image) == 1
            else str(record.image)
        )
        check(
            image in self.objects,
            f"{self.path}: record {record.id}: no objects are annotated for picture {image}; give another --annotator",
        )
        return self.objects[image]

    def judged(self, record, text):
        """(number of wrong statements, set of right ones) of a response: objects, and the colours and places said of them."""
        objects, wrong, right = self.annotated_objects(record), 0, set()
        asked = {name for name, _ in self.vocabulary.mentions(record.turns[-1])}
        answer = YES_NO.match(text)
        if answer and len(asked) == 1:
            true = answer[1].lower() == (
                "yes" if asked & {one["name"] for one in objects} else "no"
            )
            wrong, right = wrong + (not true), right | {answer[1].lower()} if true else right
        for sentence in (NEGATED.sub("", sentence) for sentence in text.lower().split(".")):
            mentions = self.vocabulary.mentions(sentence)
            for name, beside in mentions:
                same = [one for one in objects if one["name"] == name]
                # A sentence about one thing says its colour and place anywhere; of several, the colour just before the name.
                colours = (
                    self.vocabulary.colors & set(re.findall(r"\w+", sentence))
                    if len(mentions) == 1
                    else {beside} - {None}
                )
                said = [("colour", colour) for colour in colours] + [
                    ("place", place)
                    for place in self.places
                    if place in sentence and len(mentions) == 1
                ]
                true = {
                    (name, key, value)
                    for key, value in said
                    if any((one.get(key) or value) == value for one in same)
                } | ({name} if same else set())
                wrong, right = (
                    wrong + len(said) + 1 - len(true) if same else wrong + 1,
                    right | true,
                )
        return wrong, right

    def compare(self, records, firsts, seconds):
        """0, 1 or None for each record."""
        judged = [
            [self.judged(record, text) for text in texts]
            for record, *texts in zip(records, firsts, seconds)
        ]
        found = [[(-wrong, len(right)) for wrong, right in both] for both in judged]
        return [None if a == b else int(b > a) for a, b in found]


class MLLMAnnotator:
    """A multimodal LLM that is shown the picture, the question and both responses, and says which is better.

    With `both_orders` it is asked twice, the responses swapped, and what does not agree is a tie.
    """

    def __init__(self, vlm, both_orders=True, max_new_tokens=64):
        self.vlm, self.both_orders, self.max_new_tokens, self.counters = (
            vlm,
            both_orders,
            max_new_tokens,
            Counter(),
        )

    def compare(self, records, firsts, seconds):
        """0, 1 or None for each record."""
        verdicts = self._asked(records, firsts, seconds)
        if self.both_orders:
            swapped = [
                verdict if verdict is None else 1 - verdict
                for verdict in self._asked(records, seconds, firsts)
            ]
            self.counters["changed with the order"] += sum(
                a is not None and b is not None and a != b for a, b in zip(verdicts, swapped)
            )
            verdicts = [a if a == b else None for a, b in zip(verdicts, swapped)]
        return verdicts

    def _asked(self, records, firsts, seconds):
        keys = [
            (
                record.paths,
                CRITERIA.format(
                    question=record.turns[-1].replace("<image>", "").strip(),
                    first=first,
                    second=second,
                ),
            )
            for record, first, second in zip(records, firsts, seconds)
        ]
        found = answer_questions(self.vlm, keys, "annotator", max_new_tokens=self.max_new_tokens)
        verdicts = [parse_verdict(found[key]) for key in keys]
        self.counters.update(
            {
                "asked": len(verdicts),
                "not understood": verdicts.count(None),
                "first is better": verdicts.count(0),
            }
        )
        return verdicts


def parse_verdict(answer):
    """0, 1, or None for what cannot be told: the first sentence that prefers neither or names a response decides.

    The response that it names first is meant to be the better one, unless it is said to be worse before another is named.
    """
    for sentence in re.split(r"[.!?\n]", answer.lower()):
        if better := re.search(
            r"\bresponse\s*([12]) is (the |much |far |clearly |slightly )*(better|best)\b", sentence
        ):
            return int(better[1]) - 1
        if re.search(
            r"\b(neither|equal|equally|tied|is a tie|1 or response 2)\b|(\b(not|no|never)|n['’]t) (any |much |the )?(better|best|worse|worst)\b",
            sentence,
        ):
            return None
        named = re.match(r"(.*?\bresponse\s*([12])\b.*?)(\bresponse\s*[12]\b|$)", sentence)
        if named:
            said = re.search(
                r"\b(better|best|(worse|worst|inferior|wrong|less|not as|more (errors|mistakes))(?! mistakes| errors))\b",
                named[1],
            )
            return (int(named[2]) - 1) ^ bool(said and said[2])
    return None


class RewardAnnotator:
    """Ranks by a reward model's score."""

    def __init__(self, reward):
        self.reward, self.counters = reward, Counter()

    def compare(self, records, firsts, seconds):
        found = self.reward.score(records, list(zip(firsts, seconds))).tolist()
        return [None if a == b else int(b > a) for a, b in found]


def load_annotator(options, both_orders=True):
    """The annotator that a script's --annotator says: "truth", "reward:DIR", or the directory of an MLLM."""
    if options.annotator == "truth":
        return GroundTruthAnnotator(captions_file_of(options))
    kind, _, directory = options.annotator.partition(":")
    if kind == "reward":
        return RewardAnnotator(
            load_reward_model(directory, options.model, options.dtype, device=options.device)
        )
    return MLLMAnnotator(
        load_vlm(options.annotator, None, options.dtype, device=options.device), both_orders
    )


def captions_file_of(options):
    """The captions.json that annotates the pictures of --data: beside their one folder. Raises BadInput where there are several."""
    folders = {Path(options.images or Path(file).parent / "images") for file in options.data}
    check(
        len(folders) == 1,
        "truth: the files of --data have pictures in several folders, each with annotations of its own; give one folder's files at a time",
    )
    return folders.pop().parent / "captions.json"


def pair_accuracy(annotator, records, batch=32):
    """How an annotator ranks preference records, each asked in both orders (Tab. 7, 10), shares from 0 to 1.

    accuracy: verdicts for the chosen response, a tie counts half; ties: verdicts that are none; consistency: records whose two
    verdicts agree; first: verdicts for what was shown first (.5 is without bias), ties apart, None where all are ties.
    """
    verdicts = []
    for start in range(0, len(records), batch):
        some = records[start : start + batch]
        chosen, rejected = [record.chosen for record in some], [record.rejected for record in some]
        verdicts += zip(
            annotator.compare(some, chosen, rejected), annotator.compare(some, rejected, chosen)
        )
    told = [verdict for both in verdicts for verdict in both if verdict is not None]
    right = sum((a == 0) + (b == 1) + 0.5 * ((a is None) + (b is None)) for a, b in verdicts)
    return {
        "accuracy": right / (2 * len(verdicts)),
        "ties": 1 - len(told) / (2 * len(verdicts)),
        "first": told.count(0) / len(told) if told else None,
        "consistency": sum(a == (b if b is None else 1 - b) for a, b in verdicts) / len(verdicts),
        "n": len(verdicts),
    }
