"""The results of an evaluation: the scores of one evaluation set, and a table of several."""

import itertools
from collections import defaultdict
from dataclasses import dataclass

from minialign.evaluation.answers import answer_questions, check_questions
from minialign.evaluation.chair import CaptionCounts, caption_counts, chair_scores
from minialign.evaluation.evaluation_sets import EvaluationSet
from minialign.evaluation.pope import POPE_SPLITS, score_texts
from minialign.evaluation.shares import scaled_text
from minialign.models.loading import VLM
from minialign.utils.text_tables import aligned_table, markdown_head, markdown_row

# The columns of a table of results: (heading, name of the score, factor). The factor 100 shows a
# share in percent.
COLUMNS = (
    ("CHAIR_i", "chair_i", 100),
    ("CHAIR_s", "chair_s", 100),
    ("recall", "recall", 100),
    ("colour", "colour", 100),
    ("words", "words", 1),
    ("repeats", "repeats", 100),
)


@dataclass
class SetAnswers:
    """What a model said about an EvaluationSet, in the order of its records."""

    captions: list[str]
    pope: dict[str, list[str]]  # split: the answers to its questions


def evaluate_set(
    vlm: VLM, evaluation_set: EvaluationSet, title: str = "evaluate", contrast: float = 0.0
) -> tuple[dict, list[CaptionCounts]]:
    """Ask a model all of an EvaluationSet, and return what `score_set` returns for its answers."""
    answers = ask_set(vlm, evaluation_set, title, contrast=contrast)
    return score_set(evaluation_set, answers)


def check_set(vlm: VLM, evaluation_set: EvaluationSet):
    """Raise InputError for a question of an EvaluationSet that a model cannot be asked."""
    # 1. The questions of each file, and the names of the files.
    images = evaluation_set.images
    questions_of_files = []
    if evaluation_set.captions:
        questions = _questions_of(evaluation_set.captions, images, "prompt")
        questions_of_files.append((evaluation_set.vocabulary.path, questions))
    for split, records in evaluation_set.pope.items():
        questions = _questions_of(records, images, "text")
        questions_of_files.append((evaluation_set.pope_files[split], questions))

    # 2. Check them, each with its place.
    for file, questions in questions_of_files:
        placed = []
        for i, (paths, question) in enumerate(questions, start=1):
            placed.append((paths, question, f"{file}, record {i}"))
        check_questions(vlm, placed)


def ask_set(
    vlm: VLM, evaluation_set: EvaluationSet, title: str = "evaluate", *, contrast: float = 0.0
) -> SetAnswers:
    """Ask a model for the captions of an EvaluationSet, and all its questions.

    It is one call, so that an image is encoded once for its caption and questions.
    """
    # 1. Put all questions together. A question is a pair: the paths of its images, and its text.
    images = evaluation_set.images
    caption_questions = _questions_of(evaluation_set.captions, images, "prompt")
    pope_questions = {}
    questions = list(caption_questions)
    for split, records in evaluation_set.pope.items():
        pope_questions[split] = _questions_of(records, images, "text")
        questions += pope_questions[split]

    # 2. Ask them.
    answers = answer_questions(vlm, questions, title, contrast=contrast)

    # 3. Sort the answers into captions and splits. White space around an answer to POPE is removed,
    #    as the scripts do that write answer files.
    captions = [answers[question] for question in caption_questions]
    pope = {}
    for split, questions_of_split in pope_questions.items():
        pope[split] = [answers[question].strip() for question in questions_of_split]
    return SetAnswers(captions, pope)


def score_set(
    evaluation_set: EvaluationSet, answers: SetAnswers
) -> tuple[dict, list[CaptionCounts]]:
    """Return the scores of a model's answers, and each caption's CaptionCounts.

    The scores have the form that evaluation.json stores: those of `chair_scores`, if there are
    captions, and under "pope" those of `score_texts` for each split.
    """
    # 1. CHAIR and the scores beside it, from the captions.
    counts = []
    for record, caption in zip(evaluation_set.captions, answers.captions, strict=True):
        counts.append(caption_counts(caption, record["objects"], evaluation_set.vocabulary))
    scores = {}
    if counts:
        scores = chair_scores(counts)

    # 2. POPE, split by split.
    scores["pope"] = {}
    for split, records in evaluation_set.pope.items():
        labels = [record["label"] == "yes" for record in records]
        scores["pope"][split] = score_texts(answers.pope[split], labels)
    return scores, counts


def _questions_of(records, images, field) -> list[tuple[tuple[str], str]]:
    """Return a pair (paths, text) for each record, with the text of the question in its `field`."""
    questions = []
    for record in records:
        path = str(images / record["image"])
        questions.append(((path,), record[field]))
    return questions


def results_table(results: dict) -> str:
    """Return the Markdown table of {model: {set: scores}}.

    Shares are in percent. POPE is shown as the accuracy and, in parentheses, the share of yes and
    the number of unparsed answers, if there are any. A cell is empty if its score was not measured,
    and a dash if it is a share of nothing.
    """
    # Only the first of the splits has the name POPE before it, which saves width.
    splits = _all_splits(results)
    first_split, *other_splits = splits
    pope_headings = [f"POPE {first_split} (yes)"]
    pope_headings += [f"{split} (yes)" for split in other_splits]
    headings = _headings(pope_headings)
    lines = markdown_head(headings)
    lines += [markdown_row(cells) for cells in _rows(results, splits)]
    return "\n".join(lines)


def results_text(results: dict) -> str:
    """Return the table of `results_table` as aligned text. POPE stands below the other scores."""
    splits = _all_splits(results)
    headings = _headings([f"POPE {split} (yes)" for split in splits])
    return aligned_table(headings, _rows(results, splits), num_keys=2, group="POPE")


def _headings(pope_headings) -> list[str]:
    """Return the headings of all columns, those of the splits of POPE being given."""
    score_headings = [heading for heading, _, _ in COLUMNS]
    return ["set", "model", *score_headings, *pope_headings]


def _all_splits(results) -> list[str]:
    """Return the published splits of POPE and all others, in the order in which they first occur.

    A dict without values keeps that order, and a set would not.
    """
    splits = dict.fromkeys(POPE_SPLITS)
    for scores_of_sets in results.values():
        for scores in scores_of_sets.values():
            splits |= dict.fromkeys(scores["pope"])
    return list(splits)


def _rows(results, splits) -> list[list[str]]:
    """Return the cells of a row for each set and model. The models of a set follow each other."""
    rows_of_sets = defaultdict(list)
    for model_name, scores_of_sets in results.items():
        for set_name, scores in scores_of_sets.items():
            row = [set_name, model_name, *_cells(scores, splits)]
            rows_of_sets[set_name].append(row)
    return list(itertools.chain.from_iterable(rows_of_sets.values()))


def _cells(scores, splits) -> list[str]:
    """Return the cells of one row: the scores of COLUMNS, then the splits of POPE.

    A score that was not measured has an empty cell.
    """
    cells = []
    for _, name, factor in COLUMNS:
        cells.append(scaled_text(scores[name], factor) if name in scores else "")
    pope = scores["pope"]
    for split in splits:
        cells.append(_pope_cell(pope[split]) if split in pope else "")
    return cells


def _pope_cell(pope):
    """Return the cell of one split: the accuracy, the share of yes, and the unparsed answers."""
    accuracy = scaled_text(pope["accuracy"])
    in_parentheses = f"{100 * pope['yes']:.0f}"
    if pope.get("unparsed"):
        in_parentheses += f", {pope['unparsed']} unparsed"
    return f"{accuracy} ({in_parentheses})"
