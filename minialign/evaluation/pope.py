"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

POPE_SPLITS = ("random", "popular", "adversarial")


def says_yes(answer):
    """POPE's reading of an answer: before the first full stop, a word "No", "not" or "no" means no, anything else yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_scores(answers, labels):
    """POPE of booleans (said yes, is yes): accuracy, precision, recall, F1 of "yes", share of yes, and n."""
    hit = sum(a and b for a, b in zip(answers, labels))
    said, true, n = sum(answers), sum(labels), len(labels)
    precision, recall = hit / said if said else 0.0, hit / true if true else 0.0
    return {
        "accuracy": sum(a == b for a, b in zip(answers, labels)) / n,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / (precision + recall) if hit else 0.0,
        "yes": said / n,
        "n": n,
    }
