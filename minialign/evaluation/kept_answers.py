"""Keep what models said in an evaluation, to look at it, and to score it again without a model.

captions.jsonl   a line for each image with annotated objects: its captions and their mentions
answers.jsonl    a line for each question of POPE: its answers

A line holds the answers of every model that was measured, by name. README.md shows both forms.
"""

import itertools
from collections import defaultdict
from pathlib import Path

from minialign.evaluation.chair import (
    CaptionCounts,
    JudgedMention,
    chair_scores,
    colors_of_objects,
    count_mentions,
    judge_mentions,
)
from minialign.evaluation.evaluation_sets import EvaluationSet
from minialign.evaluation.kept_answer_checks import (
    check_caption_line,
    check_models,
    check_question_line,
)
from minialign.evaluation.pope import score_texts
from minialign.evaluation.vocabulary import Mention
from minialign.utils.files import check, read_json_records, write_jsonl

CAPTIONS_FILE = "captions.jsonl"
ANSWERS_FILE = "answers.jsonl"


class KeptAnswers:
    """The lines of both files, each a JSON object whose "answers" are those of all models."""

    def __init__(self):
        self.captions: list[dict] = []  # the lines of captions.jsonl
        self.questions: list[dict] = []  # the lines of answers.jsonl

    @classmethod
    def of_sets(cls, evaluation_sets: dict[str, EvaluationSet]):
        """Return the lines of all records of the evaluation sets, without any answer yet."""
        kept = cls()
        for set_name, evaluation_set in evaluation_sets.items():
            kept.captions += caption_lines(set_name, evaluation_set)
            kept.questions += question_lines(set_name, evaluation_set)
        return kept

    def add(self, model_name: str, set_name: str, evaluation_set: EvaluationSet, answers):
        """Add the SetAnswers of a model to one of the sets."""
        # Lines, records and answers have the same order, question after question of each split.
        lines = lines_of_set(self.captions, set_name)
        rows = zip(lines, evaluation_set.captions, answers.captions, strict=True)
        for line, record, caption in rows:
            mentions = judge_mentions(caption, record["objects"], evaluation_set.vocabulary)
            line["answers"][model_name] = caption_answer(caption, mentions, line["objects"])

        lines = lines_of_set(self.questions, set_name)
        texts = itertools.chain.from_iterable(answers.pope.values())
        for line, text in zip(lines, texts, strict=True):
            line["answers"][model_name] = text

    def has(self, model_name: str) -> bool:
        """Return whether a model has answered everything."""
        lines = [*self.captions, *self.questions]
        return all(model_name in line["answers"] for line in lines)

    def scores(self) -> dict[str, dict]:
        """Return {model: {set: scores}}, as evaluation.json has them."""
        caption_scores = scores_of_captions(self.captions)
        question_scores = scores_of_questions(self.questions)
        results = {}
        for model_name in caption_scores | question_scores:
            chair_of_sets = caption_scores.get(model_name, {})
            pope_of_sets = question_scores.get(model_name, {})
            results[model_name] = {}
            for set_name in chair_of_sets | pope_of_sets:
                chair = chair_of_sets.get(set_name, {})
                pope = pope_of_sets.get(set_name, {})
                results[model_name][set_name] = chair | {"pope": pope}
        return results

    def write(self, folder):
        """Write both files to a folder. A file that would be empty is not written."""
        if self.captions:
            write_jsonl(Path(folder, CAPTIONS_FILE), self.captions)
        if self.questions:
            write_jsonl(Path(folder, ANSWERS_FILE), self.questions)

    def write_file(self, path):
        """Write the lines of both kinds to one file."""
        write_jsonl(path, [*self.captions, *self.questions])


def lines_of_set(lines: list[dict], set_name: str) -> list[dict]:
    """Return those lines that belong to one evaluation set."""
    return [line for line in lines if line["set"] == set_name]


def caption_lines(set_name, evaluation_set) -> list[dict]:
    """Return a line without answers for each image whose objects are annotated."""
    lines = []
    for record in evaluation_set.captions:
        names = colors_of_objects(record["objects"], evaluation_set.vocabulary)
        line = {
            "set": set_name,
            "folder": str(evaluation_set.images),
            "image": record["image"],
            "prompt": record["prompt"],
            "objects": list(names),
            "answers": {},
        }
        lines.append(line)
    return lines


def question_lines(set_name, evaluation_set) -> list[dict]:
    """Return a line without answers for each question of POPE."""
    lines = []
    for split, records in evaluation_set.pope.items():
        for record in records:
            line = {
                "set": set_name,
                "split": split,
                "folder": str(evaluation_set.images),
                "image": record["image"],
                "question": record["text"],
                "truth": record["label"],
                "answers": {},
            }
            lines.append(line)
    return lines


def caption_answer(caption: str, mentions: list[JudgedMention], objects: list[str]) -> dict:
    """Return a caption with its mentions, in order, and the objects that it misses.

    A mention of an object is caption[start:end]. A color that is said of it has a verdict where
    that of the object is known.
    """
    kept_mentions = []
    for judged in mentions:
        mention = judged.mention
        kept = {
            "start": mention.start,
            "end": mention.end,
            "object": mention.name,
            "present": judged.present,
        }
        if mention.color is not None:
            kept |= {"colour": mention.color, "right_colour": judged.right_color}
        kept_mentions.append(kept)
    mentioned = {judged.mention.name for judged in mentions}
    missed = [name for name in objects if name not in mentioned]
    return {"text": caption, "mentions": kept_mentions, "missed": missed}


# --- scores


def counts_of_captions(lines: list[dict]) -> dict[str, dict[str, list[CaptionCounts]]]:
    """Return {model: {set: the CaptionCounts of each caption}} of the lines of captions.jsonl."""
    counts = {}
    for line in lines:
        for model_name, answer in line["answers"].items():
            mentions = [judged_mention(kept) for kept in answer["mentions"]]
            counts_of_caption = count_mentions(answer["text"], mentions, line["objects"])
            counts_of_sets = counts.setdefault(model_name, {})
            counts_of_sets.setdefault(line["set"], []).append(counts_of_caption)
    return counts


def judged_mention(kept: dict) -> JudgedMention:
    """Return the JudgedMention that `caption_answer` has kept."""
    mention = Mention(
        name=kept["object"],
        color=kept.get("colour"),
        start=kept["start"],
        end=kept["end"],
    )
    return JudgedMention(mention, kept["present"], kept.get("right_colour"))


def scores_of_captions(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """Return {model: {set: `chair_scores`}} of the lines of captions.jsonl."""
    scores = {}
    for model_name, counts_of_sets in counts_of_captions(lines).items():
        scores[model_name] = {}
        for set_name, counts in counts_of_sets.items():
            scores[model_name][set_name] = chair_scores(counts)
    return scores


def scores_of_questions(lines: list[dict]) -> dict[str, dict[str, dict]]:
    """Return {model: {set: {split: `score_texts`}}} of the lines of answers.jsonl."""
    # 1. Sort the answers and their labels by model, set and split.
    texts = defaultdict(list)
    labels = defaultdict(list)
    for line in lines:
        for model_name, text in line["answers"].items():
            key = (model_name, line["set"], line["split"])
            texts[key].append(text)
            labels[key].append(line["truth"] == "yes")

    # 2. Score each split.
    scores = {}
    for key in texts:
        model_name, set_name, split = key
        scores_of_sets = scores.setdefault(model_name, {})
        scores_of_splits = scores_of_sets.setdefault(set_name, {})
        scores_of_splits[split] = score_texts(texts[key], labels[key])
    return scores


# --- the files


def read_captions(path) -> list[dict]:
    """Read the lines of a captions.jsonl. Raise InputError for one of another form."""
    return read_answers_at(path).captions


def read_answers(path) -> list[dict]:
    """Read the lines of an answers.jsonl. Raise InputError for one of another form."""
    return read_answers_at(path).questions


def read_answers_at(path) -> KeptAnswers:
    """Read kept answers: the folder of a run, one of its two files, or a file with both kinds.

    Raises InputError that names the file, the record and what to do.
    """
    path = Path(path)
    if not path.is_dir():
        return read_answers_file(path)
    files = [file for file in (path / CAPTIONS_FILE, path / ANSWERS_FILE) if file.exists()]
    check(files, f"{path}: holds neither {CAPTIONS_FILE} nor {ANSWERS_FILE}; name their folder")
    kept = KeptAnswers()
    for file in files:
        kept_in_file = read_answers_file(file)
        kept.captions += kept_in_file.captions
        kept.questions += kept_in_file.questions
    return kept


def read_answers_file(path) -> KeptAnswers:
    """Read the lines of one file, and check that all lines of a set have the same models."""
    kept = KeptAnswers()
    models_of_sets = {}  # set: the models of its first line
    for i, line in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        # Only a line about a caption lists objects.
        if isinstance(line, dict) and "objects" in line:
            check_caption_line(line, where)
            kept.captions.append(line)
        else:
            check_question_line(line, where)
            kept.questions.append(line)
        set_name = line["set"]
        model_names = line["answers"].keys()
        first_names = models_of_sets.setdefault(set_name, model_names)
        check_models(model_names, first_names, set_name, where)
    return kept


def read_answers_of_run(folder, evaluation_sets: dict[str, EvaluationSet]) -> KeptAnswers:
    """Return the answers to these sets that a run has kept so far. A missing file has none.

    Raises InputError if a file has the lines of other sets.
    """
    kept = KeptAnswers.of_sets(evaluation_sets)
    captions_path = Path(folder, CAPTIONS_FILE)
    if kept.captions and captions_path.exists():
        captions = read_captions(captions_path)
        check_same_lines(captions, kept.captions, captions_path)
        kept.captions = captions
    answers_path = Path(folder, ANSWERS_FILE)
    if kept.questions and answers_path.exists():
        questions = read_answers(answers_path)
        check_same_lines(questions, kept.questions, answers_path)
        kept.questions = questions
    return kept


def check_same_lines(lines, expected_lines, path):
    """Raise InputError unless the lines of a file are those of a run, apart from their answers."""
    lines_without_answers = [line | {"answers": {}} for line in lines]
    check(
        lines_without_answers == expected_lines,
        f"{path}: not the answers of this run; remove it to measure again",
    )
