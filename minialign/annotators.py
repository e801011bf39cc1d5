"""Who ranks two responses to a prompt: the ground truth, a multimodal LLM, or a reward model (Sec. 2.3, App. D).

Every annotator has `better(records, firsts, seconds)`: for each record 0 if the first response is better, 1 if the second, None
for a tie; and `notes`, a Counter of what happened on the way.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from .bdhs import YES_NO
from .cli import Parser, add_data_options, add_model_options, run
from .data import read_records
from .evaluate import ask, read_captions
from .files import require
from .rewards import load_reward
from .subject import load_subject

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


class Truth:
    """Ranks by annotated objects (a captions.json, as of the tiny world): fewer wrong statements first, then more right ones."""

    def __init__(self, path):
        self.path, self.notes = path, Counter()
        self.vocabulary, rows = read_captions(path)
        self.objects = {row["image"]: row["objects"] for row in rows}
        self.places = {
            one["place"] for objects in self.objects.values() for one in objects if one.get("place")
        }

    def annotated(self, record):
        """The objects of a record's picture. Raises BadInput where there is no annotation of it."""
        image = (
            record.image[0]
            if isinstance(record.image, list) and len(record.image) == 1
            else str(record.image)
        )
        require(
            image in self.objects,
            f"{self.path}: record {record.id}: no objects are annotated for picture {image}; give another --annotator",
        )
        return self.objects[image]

    def judged(self, record, text):
        """(number of wrong statements, set of right ones) of a response: objects, and the colours and places said of them."""
        objects, wrong, right = self.annotated(record), 0, set()
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
                    self.vocabulary.colours & set(re.findall(r"\w+", sentence))
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

    def better(self, records, firsts, seconds):
        """0, 1 or None for each record."""
        judged = [
            [self.judged(record, text) for text in texts]
            for record, *texts in zip(records, firsts, seconds)
        ]
        found = [[(-wrong, len(right)) for wrong, right in both] for both in judged]
        return [None if a == b else int(b > a) for a, b in found]


class Judge:
    """A multimodal LLM that is shown the picture, the question and both responses, and says which is better.

    With `both_orders` it is asked twice, the responses swapped, and what does not agree is a tie.
    """

    def __init__(self, subject, both_orders=True, max_new_tokens=64):
        self.subject, self.both_orders, self.max_new_tokens, self.notes = (
            subject,
            both_orders,
            max_new_tokens,
            Counter(),
        )

    def better(self, records, firsts, seconds):
        """0, 1 or None for each record."""
        verdicts = self._asked(records, firsts, seconds)
        if self.both_orders:
            swapped = [
                verdict if verdict is None else 1 - verdict
                for verdict in self._asked(records, seconds, firsts)
            ]
            self.notes["changed with the order"] += sum(
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
        found = ask(self.subject, keys, "annotator", max_new_tokens=self.max_new_tokens)
        verdicts = [parse_verdict(found[key]) for key in keys]
        self.notes.update(
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


class ByReward:
    """Ranks by a reward model's score."""

    def __init__(self, reward):
        self.reward, self.notes = reward, Counter()

    def better(self, records, firsts, seconds):
        found = self.reward.score(records, list(zip(firsts, seconds))).tolist()
        return [None if a == b else int(b > a) for a, b in found]


def load_annotator(options, both_orders=True):
    """The annotator that a script's --annotator says: "truth", "reward:DIR", or the directory of an MLLM."""
    if options.annotator == "truth":
        return Truth(captions_beside(options))
    kind, _, directory = options.annotator.partition(":")
    if kind == "reward":
        return ByReward(load_reward(directory, options.model, options.dtype, options.device))
    return Judge(load_subject(options.annotator, None, options.dtype, options.device), both_orders)


def captions_beside(options):
    """The captions.json that annotates the pictures of --data: beside their one folder. Raises BadInput where there are several."""
    folders = {Path(options.images or Path(file).parent / "images") for file in options.data}
    require(
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
            annotator.better(some, chosen, rejected), annotator.better(some, rejected, chosen)
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


def main():
    """The command line: a table of pair accuracies, a row for each data file."""
    parser = Parser(
        prog="python -m minialign.annotators",
        description="How well an annotator ranks the pairs of preference records (Tab. 7, 10).",
    )
    add_model_options(parser)
    parser.add_argument(
        "--annotator",
        required=True,
        metavar="truth|DIR|reward:DIR",
        help="who ranks: captions.json beside the data, an MLLM, a reward model",
    )
    add_data_options(parser, "preference records", required=True)
    options = parser.parse_args()
    everything, annotator = (
        {
            path: paired(
                read_records([path], options.images, format=options.format), "an annotator"
            )
            for path in options.data
        },
        None,
    )
    lines = [
        "| annotator | data | accuracy | ties | consistency | first | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for path, records in everything.items():
        if annotator is None or options.annotator == "truth":  # each file lies beside its own truth
            options.data = [path]
            annotator = load_annotator(options, both_orders=False)  # both are asked for below
        found = pair_accuracy(annotator, records)
        shares = (
            "-" if found[key] is None else f"{100 * found[key]:.1f}"
            for key in ("accuracy", "ties", "consistency", "first")
        )
        lines.append(f"| {options.annotator} | {path} | {' | '.join(shares)} | {found['n']} |")
    print("\n".join(lines))
    if annotator.notes:
        print(
            ", ".join(f"{what}: {count}" for what, count in annotator.notes.items()),
            file=sys.stderr,
        )


def paired(records, what="this"):
    """The records, each with a rejected response. Raises BadInput naming the first that has none."""
    for record in records:
        require(
            record.rejected is not None,
            f"record {record.id} has no rejected response; {what} needs pairs, `sample.py pairs` makes them",
        )
    return records


if __name__ == "__main__":
    sys.exit(run(main))
