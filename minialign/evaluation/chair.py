"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

import re

from minialign.utils.files import check


def _texts(value):
    return isinstance(value, list) and all(isinstance(one, str) and one.strip() for one in value)


class Vocabulary:
    """The names to look for in a caption: each object's synonyms (up to several words) and the colours."""

    def __init__(self, raw, where):
        objects, colours = (
            (raw.get("objects"), raw.get("colours", [])) if isinstance(raw, dict) else (None, None)
        )
        whole = (
            isinstance(objects, dict)
            and objects
            and all(_texts(synonyms) and synonyms for synonyms in objects.values())
            and _texts(colours)
        )
        check(
            whole,
            f'{where}: no "vocabulary" with "objects": {{name: [synonyms]}} and, if any, "colours": [names]',
        )
        self.names = {
            tuple(synonym.lower().split()): name
            for name, synonyms in objects.items()
            for synonym in synonyms
        }
        self.colours, self.longest = set(map(str.lower, colours)), max(map(len, self.names))

    def mentions(self, caption):
        """[(object, colour or None)] in order; of overlapping names the longest counts, a colour stands just before the name."""
        words, found, place = re.findall(r"[\w'-]+", caption.lower()), [], 0
        while place < len(words):
            runs = (tuple(words[place : place + length]) for length in range(self.longest, 0, -1))
            known = next((run for run in runs if run in self.names), None)
            if known:
                found.append(
                    (
                        self.names[known],
                        words[place - 1] if place and words[place - 1] in self.colours else None,
                    )
                )
            place += len(known) if known else 1
        return found


COUNTS = (
    "mentions",
    "absent",
    "wrong",
    "found",
    "annotated",
    "coloured",
    "right",
    "words",
    "repeats",
)


def caption_counts(caption, objects, vocabulary):
    """What CHAIR and its companions count in one caption beside the annotated objects of its picture, in the order of COUNTS.

    Mentions and how many are of absent objects, whether there is one; annotated objects that are mentioned, and their number; colours said
    of annotated objects and how many are right; words; mentions of an object already mentioned.
    """
    colours = {
        thing["name"]: {
            other["colour"].lower() if other.get("colour") else None
            for other in objects
            if other["name"] == thing["name"]
        }
        for thing in objects
    }
    said = vocabulary.mentions(caption)
    names = [name for name, _ in said]
    absent = sum(name not in colours for name in names)
    of_colour = [
        colour in colours[name]
        for name, colour in said
        if colour and name in colours and colours[name] != {None}
    ]
    return (
        len(names),
        absent,
        absent > 0,
        len(set(names) & set(colours)),
        len(colours),
        len(of_colour),
        sum(of_colour),
        len(caption.split()),
        len(names) - len(set(names)),
    )


def chair_scores(counts):
    """CHAIR_i, CHAIR_s, recall, colour accuracy, words and repeats from the `caption_counts` of captions.

    chair_i: absent mentions / mentions; chair_s: captions with an absent mention / captions; recall: distinct annotated
    objects mentioned / annotated; colour: right colours / colours said of annotated objects; words: mean a caption;
    repeats: mentions of an object already mentioned in the same caption / mentions.
    """
    c, n = dict(zip(COUNTS, map(sum, zip(*counts)))), len(counts)
    return {
        "chair_i": c["absent"] / max(1, c["mentions"]),
        "chair_s": c["wrong"] / n,
        "recall": c["found"] / max(1, c["annotated"]),
        "colour": c["right"] / max(1, c["coloured"]),
        "words": c["words"] / n,
        "repeats": c["repeats"] / max(1, c["mentions"]),
    }
