"""Keep what models said in an evaluation, to look at it, and to score it again without a model.

captions.jsonl   a line for each image with annotated objects: its captions and their mentions
answers.jsonl    a line for each question of POPE: its answers

A line holds the answers of every model that was measured, by name. README.md shows both forms.
"""

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
    REMEDY,
    check_caption_line,
    check_question_line,
)
from minialign.evaluation.pope import score_texts
from minialign.evaluation.vocabulary import Mention
from minialign.utils.files import check, read_json_records, write_jsonl

CAPTIONS_FILE = "captions.jsonl"
ANSWERS_FILE = "answers.jsonl"


class KeptAnswers:
    """The lines of both files."""

    def __init__(self, captions=(), questions=()):
        self.captions: list[dict] = list(captions)
        self.questions: list[dict] = list(questions)

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
        lines = [line for line in self.captions if line["set"] == set_name]
        rows = zip(lines, evaluation_set.captions, answers.captions, strict=True)
        for line, record, caption in rows:
            mentions = judge_mentions(caption, record["objects"], evaluation_set.vocabulary)
            line["answers"][model_name] = caption_answer(caption, mentions, line["objects"])

        lines = [line for line in self.questions if line["set"] == set_name]
        texts = []
        for texts_of_split in answers.pope.values():
            texts += texts_of_split
        for line, text in zip(lines, texts, strict=True):
            line["answers"][model_name] = text

    def has(self, model_name: str) -> bool:
        """Return whether a model has answered everything."""
        lines = [*self.captions, *self.questions]
        return all(model_name in line["answers"] for line in lines)

    def scores(self) -> dict[str, dict]:
        """Return {model: {set: scores}}, as evaluation.json has them."""
        results = {}
        for model_name, scores_of_sets in scores_of_captions(self.captions).items():
            for set_name, scores in scores_of_sets.items():
                results.setdefault(model_name, {})[set_name] = scores | {"pope": {}}
        for model_name, scores_of_sets in scores_of_questions(self.questions).items():
            for set_name, pope in scores_of_sets.items():
                scores_of_model = results.setdefault(model_name, {})
                scores_of_model.setdefault(set_name, {})["pope"] = pope
        return results

    def write(self, folder):
        """Write both files to a folder. A file that would be empty is not written."""
        if self.captions:
            write_captions(Path(folder, CAPTIONS_FILE), self.captions)
        if self.questions:
            write_answers(Path(folder, ANSWERS_FILE), self.questions)

    def write_file(self, path):
        """Write the lines of both kinds to one file."""
        write_jsonl(path, [*self.captions, *self.questions])


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
    names = {judged.mention.name for judged in mentions}
    missed = [name for name in objects if name not in names]
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
    # 1. The texts and labels of each model, set and split.
    answered = {}
    for line in lines:
        for model_name, text in line["answers"].items():
            key = (model_name, line["set"], line["split"])
            texts, labels = answered.setdefault(key, ([], []))
            texts.append(text)
            labels.append(line["truth"] == "yes")

    # 2. Their scores.
    scores = {}
    for (model_name, set_name, split), (texts, labels) in answered.items():
        scores_of_sets = scores.setdefault(model_name, {})
        scores_of_sets.setdefault(set_name, {})[split] = score_texts(texts, labels)
    return scores


# --- the files


def write_captions(path, lines: list[dict]):
    """Write the lines of captions.jsonl, all of them or nothing."""
    write_jsonl(path, lines)


def write_answers(path, lines: list[dict]):
    """Write the lines of answers.jsonl, all of them or nothing."""
    write_jsonl(path, lines)


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
    # 1. A folder.
    path = Path(path)
    if path.is_dir():
        files = [path / name for name in (CAPTIONS_FILE, ANSWERS_FILE)]
        files = [file for file in files if file.exists()]
        check(files, f"{path}: holds neither {CAPTIONS_FILE} nor {ANSWERS_FILE}; name their folder")
        kept = KeptAnswers()
        for file in files:
            kept_in_file = read_answers_at(file)
            kept.captions += kept_in_file.captions
            kept.questions += kept_in_file.questions
        return kept

    # 2. A file. Only a line about a caption lists objects.
    kept = KeptAnswers()
    models_of = {}
    for i, line in enumerate(read_json_records(path), start=1):
        where = f"{path}, record {i}"
        if isinstance(line, dict) and "objects" in line:
            check_caption_line(line, where)
            kept.captions.append(line)
        else:
            check_question_line(line, where)
            kept.questions.append(line)
        models = models_of.setdefault(line["set"], line["answers"].keys())
        check(
            line["answers"] and line["answers"].keys() == models,
            f"{where}: has answers of {describe(line['answers'])}, but the first one of the set "
            f"{line['set']!r} has those of {describe(models)}; {REMEDY}",
        )
    return kept


def describe(model_names):
    """Return the names of models as an error shows them."""
    return ", ".join(model_names) or "no model"


def read_answers_of_run(folder, evaluation_sets: dict[str, EvaluationSet]) -> KeptAnswers:
    """Return the answers to these sets that a run has kept so far. A missing file has none.

    Raises InputError if a file has the lines of other sets.
    """
    kept = KeptAnswers.of_sets(evaluation_sets)
    captions_path = Path(folder, CAPTIONS_FILE)
    if kept.captions and captions_path.exists():
        kept.captions = check_same_lines(read_captions(captions_path), kept.captions, captions_path)
    answers_path = Path(folder, ANSWERS_FILE)
    if kept.questions and answers_path.exists():
        kept.questions = check_same_lines(read_answers(answers_path), kept.questions, answers_path)
    return kept


def check_same_lines(lines, expected, path) -> list[dict]:
    """Return the lines of a file. Raise InputError unless they are those, apart from answers."""
    without_answers = [line | {"answers": {}} for line in lines]
    check(
        without_answers == expected,
        f"{path}: not the answers of this run; remove it to measure again",
    )
    return lines
