"""Pairs for stated preferences: which caption is better depends on a system text.

Under "Answer briefly." a caption without positions is chosen, and the same caption with positions
is rejected. Under "Name positions." it is the other way round. So a model can lower the loss on all
pairs only if it reads the system text (MetaAlign, arXiv 2410.14184).
"""

from tiny_world.grammar import Statement, read_caption
from tiny_world.scenes import PLACES
from tiny_world.texts import with_article

BRIEFLY = "Answer briefly."
WITH_POSITIONS = "Name positions."
SYSTEM_TEXTS = {"brief": BRIEFLY, "positions": WITH_POSITIONS}


def preference_pairs(records: list[dict]) -> list[dict]:
    """Return two pairs for each caption of the records of instruct.json.

    Records that ask a question with a short answer are left out: they have nothing to shorten.
    """
    pairs = []
    for record in records:
        question, answer = [turn["value"] for turn in record["conversations"]]
        request = question.removeprefix("<image>\n")
        statements = read_caption(answer, request)
        if statements is None:
            continue
        brief = brief_caption(statements)
        pairs.append(make_pair(record, "brief", question, chosen=brief, rejected=answer))
        pairs.append(make_pair(record, "positions", question, chosen=answer, rejected=brief))
    return pairs


def make_pair(record, preference, question, *, chosen, rejected) -> dict:
    """Return a pair in the form that `sample.py pairs` writes, with its system text."""
    return {
        "id": f"{record['id']}-{preference}",
        "image": record["image"],
        "system": SYSTEM_TEXTS[preference],
        "prompt": question,
        "chosen": chosen,
        "rejected": rejected,
    }


def brief_caption(statements: list[Statement]) -> str:
    """Return a caption that names the objects of another one in its order, without positions."""
    sentences = []
    for color, name, _ in statements:
        thing = with_article(f"{color} {name}")
        sentences.append(f"There is {thing}.")
    return " ".join(sentences)


def names_position(caption: str) -> bool:
    """Return whether a caption names one of the places of the tiny world."""
    return any(place in caption for place in PLACES)
