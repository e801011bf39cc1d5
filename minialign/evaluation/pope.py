"""POPE: yes-or-no questions about which objects are in an image (Li et al., arXiv 2305.10355)."""

import re

from minialign.evaluation.shares import share

# The published splits. Any other name is the name of a split too.
POPE_SPLITS = ("random", "popular", "adversarial")


# The words that make an answer a no, and the word that makes it clear that it is a yes.
NO_WORDS = frozenset({"No", "not", "no"})
YES = re.compile(r"\byes\b", re.IGNORECASE)


def says_yes(answer: str) -> bool:
    """Return whether an answer means yes, by POPE's published rule.

    White space around the answer is left out. Only the text before the first full stop counts,
    without its commas. If one of its words is exactly "No", "not" or "no", the answer means no.
    Every other answer means yes, even an empty one.
    """
    first_sentence = answer.strip().split(".")[0]
    words = first_sentence.replace(",", "").split(" ")
    return NO_WORDS.isdisjoint(words)


def is_unparsed(answer: str) -> bool:
    """Return whether an answer counts as yes only because the rule finds no "no" in it.

    It has no "yes" either, such as "Nothing.", "NO." or an empty answer.
    """
    return says_yes(answer) and YES.search(answer) is None


def pope_scores(predictions: list[bool], labels: list[bool]) -> dict:
    """Return POPE's scores as shares from 0 to 1, and the number of questions.

    Args:
        predictions: for each question, whether the model answered yes.
        labels: for each question, whether yes is the right answer.

    Accuracy, precision, recall and F1 are those of a classifier whose positive class is yes. A
    score is None where it is a share of nothing: without a yes among the answers there is no
    precision. `yes` is the share of questions that the model answered with yes: it shows a bias
    towards yes. `n` is the number of questions.
    """
    num_correct = 0
    num_true_positives = 0
    for prediction, label in zip(predictions, labels, strict=True):
        num_correct += prediction == label
        num_true_positives += prediction and label

    precision = share(num_true_positives, sum(predictions))
    recall = share(num_true_positives, sum(labels))
    if num_true_positives:
        f1 = 2 * precision * recall / (precision + recall)
    else:
        # 2 TP / (2 TP + FP + FN), the same without a division by zero.
        f1 = share(0.0, sum(predictions) + sum(labels))

    return {
        "accuracy": share(num_correct, len(labels)),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes": share(sum(predictions), len(labels)),
        "n": len(labels),
    }
