"""POPE: yes-or-no questions about which objects are in an image (Li et al., arXiv 2305.10355)."""

POPE_SPLITS = ("random", "popular", "adversarial")


def says_yes(answer: str) -> bool:
    """Return whether an answer means yes, by POPE's published rule.

    Only the text before the first full stop counts, without its commas. If one of its words is
    exactly "No", "not" or "no", the answer means no. Every other answer means yes, even an empty
    one.
    """
    first_sentence = answer.split(".")[0]
    words = first_sentence.replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def pope_scores(predictions: list[bool], labels: list[bool]) -> dict:
    """Return POPE's scores as shares from 0 to 1, and the number of questions.

    Args:
        predictions: for each question, whether the model answered yes.
        labels: for each question, whether yes is the right answer.

    Accuracy, precision, recall and F1 are those of a classifier whose positive class is yes. The
    last three are 0 where they are not defined. `yes` is the share of questions that the model
    answered with yes: it shows a bias towards yes. `n` is the number of questions.
    """
    num_correct = 0
    num_true_positives = 0
    for prediction, label in zip(predictions, labels, strict=True):
        num_correct += prediction == label
        num_true_positives += prediction and label

    precision = num_true_positives / max(1, sum(predictions))
    recall = num_true_positives / max(1, sum(labels))
    f1 = 0.0
    if num_true_positives:
        f1 = 2 * precision * recall / (precision + recall)

    return {
        "accuracy": num_correct / len(labels),
        "precision": precision,
        "recall": recall,
        "f1": f1,
        "yes": sum(predictions) / len(labels),
        "n": len(labels),
    }
