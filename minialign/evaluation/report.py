"""The report of an evaluation: the scores of one evaluation set, and a table of several."""

from minialign.evaluation.answers import answer_questions
from minialign.evaluation.chair import CaptionCounts, caption_counts, chair_scores
from minialign.evaluation.evaluation_sets import EvaluationSet
from minialign.evaluation.pope import POPE_SPLITS, score_texts
from minialign.evaluation.shares import scaled_text
from minialign.models.loading import VLM

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


def evaluate_set(
    vlm: VLM, evaluation_set: EvaluationSet, title: str = "evaluate", contrast: float = 0.0
) -> tuple[dict, list[CaptionCounts]]:
    """Evaluate a model on an EvaluationSet. Return its scores and each caption's CaptionCounts.

    The scores have the form that evaluation.json stores: those of `chair_scores`, if there are
    captions, and under "pope" those of `score_texts` for each split.
    """
    # 1. Ask everything in one call, so that an image is encoded once for its caption and questions.
    images = evaluation_set.images
    caption_questions = _questions_of(evaluation_set.captions, images, "prompt")
    questions = list(caption_questions)
    for rows in evaluation_set.pope.values():
        questions += _questions_of(rows, images, "text")
    answers = answer_questions(vlm, questions, title, contrast=contrast)

    # 2. CHAIR and the scores beside it, from the captions.
    counts = []
    for row, question in zip(evaluation_set.captions, caption_questions, strict=True):
        caption = answers[question]
        counts.append(caption_counts(caption, row["objects"], evaluation_set.vocabulary))
    scores = {}
    if counts:
        scores = chair_scores(counts)

    # 3. POPE, split by split. White space around an answer is removed, as the scripts do that write
    #    answer files.
    scores["pope"] = {}
    for split, rows in evaluation_set.pope.items():
        split_questions = _questions_of(rows, images, "text")
        texts = [answers[question].strip() for question in split_questions]
        labels = [row["label"] == "yes" for row in rows]
        scores["pope"][split] = score_texts(texts, labels)
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
    # 1. The sets and the splits of POPE, each once, in the order in which they first occur. A dict
    #    without values keeps that order, and a set would not.
    set_names = {}
    splits = dict.fromkeys(POPE_SPLITS)
    for scores_of_sets in results.values():
        set_names |= dict.fromkeys(scores_of_sets)
        for scores in scores_of_sets.values():
            splits |= dict.fromkeys(scores["pope"])

    # 2. The head of the table. The first split of POPE says that they all belong to it.
    headings = ["set", "model"]
    headings += [heading for heading, _, _ in COLUMNS]
    first_split, *other_splits = splits
    headings.append(f"POPE {first_split} (yes)")
    headings += [f"{split} (yes)" for split in other_splits]
    lines = [_table_row(headings), "|" + "---|" * len(headings)]

    # 3. A row for each set and model. The models of a set follow each other.
    for set_name in set_names:
        for model_name, scores_of_sets in results.items():
            if set_name in scores_of_sets:
                cells = _cells(scores_of_sets[set_name], splits)
                lines.append(_table_row([set_name, model_name, *cells]))
    return "\n".join(lines)


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
