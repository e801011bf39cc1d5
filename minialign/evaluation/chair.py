"""CHAIR: the share of mentioned objects that are not in the image (arXiv 1809.02156).

A model that mentions nothing hallucinates nothing. So CHAIR is measured together with recall, the
accuracy of colors, the length of captions and repeats. Files and scores spell "colour".
"""

from dataclasses import dataclass, fields

from minialign.evaluation.shares import share
from minialign.evaluation.vocabulary import Vocabulary


@dataclass
class CaptionCounts:
    """What one caption says, compared with the annotated objects of its image.

    The sum of several is their total. data/study.py stores the counts as lists, in the order of
    these fields.
    """

    mentions: int = 0  # mentions of any object of the vocabulary
    absent_mentions: int = 0  # mentions of objects that are not annotated
    has_absent: bool = False  # whether there is such a mention; in a total, how many captions have
    recalled_objects: int = 0  # different annotated objects that are mentioned
    annotated_objects: int = 0  # different annotated objects
    color_mentions: int = 0  # colors said of annotated objects whose color is known
    right_colors: int = 0  # those of them that are right
    words: int = 0  # pieces between white space
    repeats: int = 0  # mentions of an object that was mentioned before

    def __add__(self, other):
        """Add the counts of two captions field by field."""
        total = CaptionCounts()
        for field in fields(CaptionCounts):
            setattr(total, field.name, getattr(self, field.name) + getattr(other, field.name))
        return total


def caption_counts(caption: str, objects: list[dict], vocabulary: Vocabulary) -> CaptionCounts:
    """Count what CHAIR and the scores beside it need from one caption.

    Args:
        caption: the text.
        objects: the annotated objects of its image, [{"name": text, "colour": text}]. The color
            may be missing.
        vocabulary: the names to look for.

    Raises InputError for an annotated object or color that the vocabulary lacks.
    """
    # 1. The colors of each annotated object. Two objects of the same name may differ in color.
    known_colors = {}  # name: the set of its colors, empty if none is known
    for item in objects:
        name = vocabulary.object_name(item["name"], vocabulary.path)
        colors = known_colors.setdefault(name, set())
        if item.get("colour"):
            colors.add(vocabulary.color_name(item["colour"], vocabulary.path))

    # 2. The objects that the caption mentions.
    mentions = vocabulary.mentions(caption)
    names = [name for name, _ in mentions]
    different_names = set(names)
    num_absent = sum(name not in known_colors for name in names)

    # 3. The colors that it says of annotated objects.
    num_color_mentions = 0
    num_right_colors = 0
    for name, color in mentions:
        if color is not None and known_colors.get(name):
            num_color_mentions += 1
            num_right_colors += color in known_colors[name]

    return CaptionCounts(
        mentions=len(names),
        absent_mentions=num_absent,
        has_absent=num_absent > 0,
        recalled_objects=len(different_names & set(known_colors)),
        annotated_objects=len(known_colors),
        color_mentions=num_color_mentions,
        right_colors=num_right_colors,
        words=len(caption.split()),
        repeats=len(names) - len(different_names),
    )


def chair_scores(counts: list[CaptionCounts]) -> dict[str, float | None]:
    """Return the scores of several captions from the CaptionCounts of each.

    chair_i: mentions of objects that are not in the image / all mentions.
    chair_s: captions with such a mention / all captions.
    recall: annotated objects that are mentioned / all annotated objects, summed over the images.
    colour: right colors / all colors that are said of annotated objects.
    words: mean number of words in a caption.
    repeats: mentions of an object that its caption mentioned before / all mentions.

    A score is None where it is a share of nothing: without a mention there is no CHAIR_i.
    """
    num_captions = len(counts)
    total = sum(counts, start=CaptionCounts())
    return {
        "chair_i": share(total.absent_mentions, total.mentions),
        "chair_s": share(total.has_absent, num_captions),
        "recall": share(total.recalled_objects, total.annotated_objects),
        "colour": share(total.right_colors, total.color_mentions),
        "words": share(total.words, num_captions),
        "repeats": share(total.repeats, total.mentions),
    }
