"""Annotators say which of two responses is better (Sec. 2.3, App. D).

There are three: the annotated objects of the image, a multimodal LLM, and a reward model. Each
has `compare(records, firsts, seconds)`, which returns a verdict for each record: 0 if the first
response is better, 1 if the second is better, None for a tie. The lists may be empty, and every
process calls it with the same lists and must get the same verdicts. `counters` counts what happened
on the way, for the command to print. `check_records(records)` raises InputError for a record that
the annotator cannot judge, whatever its responses are, so that a run finds it before its work. The
table ANNOTATORS names each kind once. To add one, write its class and an entry of that table.
"""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from minialign.data.records import Record, errors_name_record
from minialign.evaluation.answers import answer_questions, leaves_room, questions_that_fit
from minialign.evaluation.evaluation_sets import read_captions
from minialign.evaluation.words import any_phrase
from minialign.models.loading import VLM, load_vlm
from minialign.pairs.reward_model import RewardModel, load_reward_model
from minialign.pairs.sentences import YES_NO
from minialign.pairs.verdicts import CRITERIA, higher_score, parse_verdict, swap_verdict
from minialign.utils.distributed import value_of_first_part
from minialign.utils.files import check

# A negation and the rest of its clause, which says nothing about what is in the image.
NEGATED = re.compile(
    r"(\b(no|not|without|cannot|neither|nor|none)\b|n['’]t\b)"  # the negation
    r"(?! only| a doubt| fewer| less)"  # unless it is one of "not only", "without a doubt" ...
    r".*?"  # and all that follows, up to the end of the clause:
    r"(?= but | and (?:an?|the) |[,;:!?(–]|\n *[-*•\d]|$)",  # punctuation, "but" or a list item
    re.DOTALL,
)


@dataclass
class Judgment:
    """What is wrong and what is right in a response."""

    num_wrong: int = 0  # false statements; one that is repeated counts again
    right: set = field(default_factory=set)  # different true statements

    def add(self, statement, is_true):
        """Count a statement of the response."""
        if is_true:
            self.right.add(statement)
        else:
            self.num_wrong += 1

    def score(self) -> tuple[int, int]:
        """Return a score that is higher for fewer false or, with as many, more true statements."""
        return -self.num_wrong, len(self.right)


class GroundTruthAnnotator:
    """Ranks responses by the annotated objects of a captions.json.

    The response with fewer false statements is better. If both have as many, the one with more true
    statements is better. Statements are about objects, their colors and their places.
    """

    def __init__(self, path, option="--annotator"):
        """Read the annotations. Raise InputError for a file of another form.

        option: the one that names `truth`, for errors.
        """
        check(
            Path(path).exists(),
            f"{path}: no such file; truth reads in it which objects an image shows, so write it "
            f"(data/README.md says how), or give {option} the folder of a multimodal LLM",
        )
        self.path = path
        self.option = option
        self.counters = Counter()
        self.vocabulary, rows = read_captions(path)
        self.objects = {row["image"]: row["objects"] for row in rows}
        self.places = set()
        for objects in self.objects.values():
            self.places.update(item["place"].lower() for item in objects if item.get("place"))
        self.place_pattern = any_phrase(self.places)

    def check_records(self, records):
        """Raise InputError for a record whose image has no annotation."""
        for record in records:
            self.annotated_objects(record)

    def annotated_objects(self, record: Record) -> list[dict]:
        """Return the objects of a record's image. Raise InputError if it has no annotation."""
        image = record.image
        if isinstance(image, list) and len(image) == 1:
            image = image[0]
        image = str(image)
        check(
            image in self.objects,
            f"{self.path}: {record.location}: no objects are annotated for image {image}; "
            f"add them, or give another {self.option}",
        )
        return self.objects[image]

    def judge(self, record: Record, text: str) -> Judgment:
        """Return the Judgment of a response to a record's question."""
        objects = self.annotated_objects(record)
        judgment = Judgment()

        # 1. A yes or no at the beginning answers a question about a single object.
        answer = YES_NO.match(text)
        asked_names = set()
        if answer:
            asked_names = {name for name, _ in self.vocabulary.mentions(record.turns[-1])}
        if len(asked_names) == 1:
            is_present = any(item["name"] in asked_names for item in objects)
            says_present = answer[1].lower() == "yes"
            judgment.add("yes or no", is_true=says_present == is_present)

        # 2. To mention an object is to say that it is there.
        for sentence in text.lower().split("."):
            sentence = NEGATED.sub("", sentence)
            mentions = self.vocabulary.mentions(sentence)
            for name, color_before in mentions:
                matches = [item for item in objects if item["name"] == name]
                judgment.add(name, is_true=bool(matches))
                if not matches:
                    continue

                # 3. Its colors and places must be true of one of the objects of this name.
                is_only_object = len(mentions) == 1
                for key, value in self.claims(sentence, color_before, is_only_object):
                    is_true = _is_true_of_any(matches, key, value)
                    judgment.add((name, key, value), is_true)
        return judgment

    def claims(self, sentence, color_before, is_only_object):
        """Return what a sentence says of an object that it mentions, as (key, value) pairs.

        The keys are "colour" and "place". If the sentence mentions no other object, its color and
        its place may stand anywhere. Otherwise only the color directly before its name counts.
        """
        if not is_only_object:
            return [("colour", color_before)] if color_before else []
        colors = self.vocabulary.colors_in(sentence)
        places = self.place_pattern.findall(sentence)
        claims = [("colour", color) for color in colors]
        claims += [("place", place) for place in set(places)]
        return claims

    def compare(self, records, firsts, seconds) -> list[int | None]:
        """Return a verdict for each record: 0, 1 or None."""
        verdicts = []
        for record, first_text, second_text in zip(records, firsts, seconds, strict=True):
            first = self.judge(record, first_text)
            second = self.judge(record, second_text)
            verdicts.append(higher_score(first.score(), second.score()))
        return verdicts


def _is_true_of_any(objects, key, value):
    """Return whether one of the objects has this color or place. An unknown one may be anything."""
    return any(not item.get(key) or item[key].lower() == value for item in objects)


@dataclass
class MLLMAnnotator:
    """Asks a multimodal LLM, which is shown the image, the question and both responses.

    With `both_orders` it is asked a second time with the responses swapped. If the two verdicts do
    not agree, the pair is a tie. So is a pair of responses that are too long to be shown together.
    """

    vlm: VLM
    both_orders: bool = True
    max_new_tokens: int = 64
    counters: Counter = field(default_factory=Counter)

    def check_records(self, records):
        """Raise InputError for a record whose question fills the context of this model."""
        context_length = self.vlm.model.config.text.max_position_embeddings
        for record in records:
            with errors_name_record(record):
                check(
                    leaves_room(self.vlm, *request_for(record, "", "")),
                    "the image and the question leave no room for responses in the annotator's "
                    f"context of {context_length} tokens; shorten the question, remove the record, "
                    "or give another --annotator",
                )

    def compare(self, records, firsts, seconds) -> list[int | None]:
        """Return a verdict for each record: 0, 1 or None."""
        verdicts = self.ask(records, firsts, seconds)
        if not self.both_orders:
            return verdicts

        swapped_verdicts = self.ask(records, seconds, firsts)
        agreed = []
        num_changed = 0
        for verdict, swapped_verdict in zip(verdicts, swapped_verdicts, strict=True):
            other_verdict = swap_verdict(swapped_verdict)
            if verdict == other_verdict:
                agreed.append(verdict)
                continue
            agreed.append(None)
            num_changed += verdict is not None and other_verdict is not None
        self.counters["changed with the order"] += num_changed
        return agreed

    def ask(self, records, firsts, seconds) -> list[int | None]:
        """Return a verdict for each record, with the responses shown in this order."""
        # 1. A request for each record.
        requests = []
        for record, first, second in zip(records, firsts, seconds, strict=True):
            requests.append(request_for(record, first, second))

        # 2. The answers, and what they mean. Sampled responses may be too long for the context.
        answers = answer_questions(
            self.vlm,
            questions_that_fit(self.vlm, requests),
            "annotator",
            max_new_tokens=self.max_new_tokens,
        )
        num_too_long = sum(request not in answers for request in requests)
        verdicts = [parse_verdict(answers.get(request, "")) for request in requests]

        # 3. Without an answer, or without a verdict in it, a pair is a tie. Both are counted here.
        self.counters["asked"] += len(requests) - num_too_long
        self.counters["too long"] += num_too_long
        self.counters["not understood"] += verdicts.count(None) - num_too_long
        self.counters["first is better"] += verdicts.count(0)
        return verdicts


def request_for(record: Record, first, second) -> tuple[tuple, str]:
    """Return what an MLLM is asked about two responses: the files of the images, and the text."""
    text = CRITERIA.format(question=record.question, first=first, second=second)
    return record.paths, text


@dataclass
class RewardAnnotator:
    """Ranks responses by the scores of a reward model."""

    reward: RewardModel
    counters: Counter = field(default_factory=Counter)

    def check_records(self, records):
        """Raise InputError for a record whose prompt fills the context of the reward model."""
        self.reward.check_records(records)

    def compare(self, records, firsts, seconds) -> list[int | None]:
        """Return a verdict for each record: 0, 1 or None."""
        texts = list(zip(firsts, seconds, strict=True))
        scores = value_of_first_part(self.reward.score(records, texts).tolist())
        verdicts = []
        for first_score, second_score in scores:
            verdicts.append(higher_score(first_score, second_score))
        return verdicts


def captions_file_of(options) -> Path:
    """Return the captions.json that annotates the images of --data, next to their folder.

    Raises InputError if the images are in several folders. Each has annotations of its own, and an
    image of the same name may show something else there.
    """
    folders = set()
    for file in options.data:
        folders.add(Path(options.images or Path(file).parent / "images"))
    check(
        len(folders) == 1,
        "truth: the images of --data are in several folders, each with annotations of its own; "
        "give the files of one folder at a time",
    )
    return folders.pop().parent / "captions.json"


def model_folder_of(options) -> str:
    """Return the folder of the model that --annotator names as DIR or KIND:DIR."""
    prefix = annotator_kind(options.annotator).removesuffix("DIR")
    folder = options.annotator.removeprefix(prefix)
    check(folder, f"--annotator {options.annotator}: name a folder behind the colon")
    return folder


def load_ground_truth(options, both_orders, template):
    """Load the annotated objects. The other arguments are for models that are asked."""
    return GroundTruthAnnotator(captions_file_of(options))


def load_mllm(options, both_orders, template):
    """Load a multimodal LLM with its chat template, or None for the one its checkpoint names."""
    folder = model_folder_of(options)
    vlm = load_vlm(folder, template, dtype=options.dtype, device=options.device)
    return MLLMAnnotator(vlm, both_orders)


def load_reward(options, both_orders, template):
    """Load a reward model, which was trained from --model. It is not asked in words."""
    folder = model_folder_of(options)
    reward = load_reward_model(
        folder, base=options.model, dtype=options.dtype, device=options.device
    )
    return RewardAnnotator(reward)


@dataclass(frozen=True)
class AnnotatorKind:
    """What the commands have to know of a kind of annotator."""

    load: Callable  # from the options, `both_orders` and the chat template
    source: Callable  # from the options, the file or the folder that it is loaded from
    model_options: tuple[str, ...]  # the options on models that it reads
    is_asked_twice: bool = False  # in both orders, unless --one-order is given


# What --annotator names: a word, or a directory behind the word of its kind.
ANNOTATORS = {
    "truth": AnnotatorKind(load_ground_truth, captions_file_of, model_options=()),
    "DIR": AnnotatorKind(
        load_mllm,
        model_folder_of,
        model_options=("template", "dtype", "device", "split"),
        is_asked_twice=True,
    ),
    "reward:DIR": AnnotatorKind(
        load_reward, model_folder_of, model_options=("model", "system", "dtype", "device", "split")
    ),
}


def annotator_kind(name: str) -> str:
    """Return the key of ANNOTATORS that a value of --annotator belongs to."""
    if name in ANNOTATORS:
        return name
    word, _, _ = name.partition(":")
    kind = f"{word}:DIR"
    return kind if kind in ANNOTATORS else "DIR"


def load_annotator(options, both_orders=True, template=None):
    """Load the annotator that --annotator names.

    both_orders: ask an MLLM a second time, with the responses swapped.
    template: the chat template of an MLLM, or None for the one that its checkpoint names.
    """
    kind = ANNOTATORS[annotator_kind(options.annotator)]
    return kind.load(options, both_orders, template)


def pair_accuracy(annotator, records: list[Record], batch_size: int = 32) -> dict:
    """Measure how an annotator ranks preference records, each asked in both orders (Tab. 7, 10).

    accuracy: share of verdicts for the chosen response; a tie counts half.
    ties: share of verdicts that are ties.
    first: of the other verdicts, the share for the response that is shown first. 0.5 is without
        bias. None if all are ties.
    consistency: share of records whose two verdicts agree.
    n: number of records.
    """
    # 1. Two verdicts for each record: the chosen response is shown first, then the rejected one.
    verdict_pairs = []
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        chosen = [record.chosen for record in batch]
        rejected = [record.rejected for record in batch]
        chosen_first = annotator.compare(batch, chosen, rejected)
        rejected_first = annotator.compare(batch, rejected, chosen)
        verdict_pairs += zip(chosen_first, rejected_first, strict=True)

    # 2. Count them.
    num_right = 0
    num_ties = 0
    num_first = 0
    num_consistent = 0
    for chosen_first, rejected_first in verdict_pairs:
        num_right += (chosen_first == 0) + (rejected_first == 1)
        num_ties += (chosen_first is None) + (rejected_first is None)
        num_first += (chosen_first == 0) + (rejected_first == 0)
        num_consistent += chosen_first == swap_verdict(rejected_first)

    # 3. Shares.
    num_verdicts = 2 * len(verdict_pairs)
    num_decided = num_verdicts - num_ties
    return {
        "accuracy": (num_right + 0.5 * num_ties) / num_verdicts,
        "ties": 1 - num_decided / num_verdicts,
        "first": num_first / num_decided if num_decided else None,
        "consistency": num_consistent / len(verdict_pairs),
        "n": len(verdict_pairs),
    }
