"""The report of an evaluation: the scores of one evaluation set, and a table of several."""

from dataclasses import dataclass

from minialign.evaluation.answers import answer_questions
from minialign.evaluation.chair import CaptionCounts, caption_counts, chair_scores
from minialign.evaluation.evaluation_sets import EvaluationSet
from minialign.evaluation.pope import POPE_SPLITS, score_texts
from minialign.evaluation.shares import scaled_text
from minialign.models.loading import VLM
from minialign.utils.text_tables import aligned_table

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
    """Evaluate a model on an EvaluationSet. Return its scores and each caption's CaptionCounts.

    They are those of `score_set`.
    """
    answers = ask_set(vlm, evaluation_set, title, contrast=contrast)
    return score_set(evaluation_set, answers)


def ask_set(
    vlm: VLM, evaluation_set: EvaluationSet, title: str = "evaluate", *, contrast: float = 0.0
) -> SetAnswers:
    """Ask a model for the captions of an EvaluationSet, and all its questions.

    It is one call, so that an image is encoded once for its caption and questions.
    """
    images = evaluation_set.images
    caption_questions = _questions_of(evaluation_set.captions, images, "prompt")
    questions_of = {}
    questions = list(caption_questions)
    for split, rows in evaluation_set.pope.items():
        questions_of[split] = _questions_of(rows, images, "text")
        questions += questions_of[split]
    answers = answer_questions(vlm, questions, title, contrast=contrast)

    # White space around an answer to POPE is removed, as the scripts do that write answer files.
    pope = {}
    for split, questions_of_split in questions_of.items():
        pope[split] = [answers[question].strip() for question in questions_of_split]
    captions = [answers[question] for question in caption_questions]
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
    for row, caption in zip(evaluation_set.captions, answers.captions, strict=True):
        counts.append(caption_counts(caption, row["objects"], evaluation_set.vocabulary))
    scores = {}
    if counts:
        scores = chair_scores(counts)

    # 2. POPE, split by split.
    scores["pope"] = {}
    for split, rows in evaluation_set.pope.items():
        labels = [row["label"] == "yes" for row in rows]
        scores["pope"][split] = score_texts(answers.pope[split], labels)
    return scores, counts


def _questions_of(rows, images, field):
    """Return a (paths, question) pair for each record, with the question in its `field`."""
    return [((str(images / row["image"]),), row[field]) for row in rows]


def results_table(results: dict) -> str:
    """Return the Markdown table of {model: {set: scores}}.

    Shares are in percent. POPE is shown as the accuracy and, in parentheses, the share of yes and
    the number of unparsed answers, if there are any. A cell is empty if its score was not measured,
    and a dash if it is a share of nothing.
    """
    # The first split of POPE says that they all belong to it.
    splits = _all_splits(results)
    headings = ["set", "model"]
    headings += [heading for heading, _, _ in COLUMNS]
    first_split, *other_splits = splits
    headings.append(f"POPE {first_split} (yes)")
    headings += [f"{split} (yes)" for split in other_splits]
    lines = [_table_row(headings), "|" + "---|" * len(headings)]
    lines += [_table_row(row) for row in _rows(results, splits)]
    return "\n".join(lines)


def results_text(results: dict) -> str:
    """Return the table of `results_table` as aligned text. POPE stands below the other scores."""
    splits = _all_splits(results)
    headings = ["set", "model"]
    headings += [heading for heading, _, _ in COLUMNS]
    headings += [f"POPE {split} (yes)" for split in splits]
    rows = _rows(results, splits)
    return aligned_table(headings, rows, num_keys=2, group="POPE")


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
    set_names = {}
    for scores_of_sets in results.values():
        set_names |= dict.fromkeys(scores_of_sets)
    rows = []
    for set_name in set_names:
        for model_name, scores_of_sets in results.items():
            if set_name in scores_of_sets:
                cells = _cells(scores_of_sets[set_name], splits)
                rows.append([set_name, model_name, *cells])
    return rows


def _cells(scores, splits):
    """Return the cells of one row: the scores of COLUMNS, then the splits of POPE."""
    cells = []
    for _, name, factor in COLUMNS:
        cell = ""
        if name in scores:
            cell = scaled_text(scores[name], factor)
        cells.append(cell)
    for split in splits:
        cell = ""
        if split in scores["pope"]:
            cell = _pope_cell(scores["pope"][split])
        cells.append(cell)
    return cells


def _pope_cell(pope):
    """Return the cell of one split: the accuracy, the share of yes, and the unparsed answers."""
    in_parentheses = f"{100 * pope['yes']:.0f}"
    if pope.get("unparsed"):
        in_parentheses += f", {pope['unparsed']} unparsed"
    return f"{scaled_text(pope['accuracy'])} ({in_parentheses})"


def _table_row(cells):
    """Return one row of a Markdown table. A bar inside a cell would end it, and is escaped."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"
