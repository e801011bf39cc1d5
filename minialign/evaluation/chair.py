"""CHAIR: the share of mentioned objects that are not in the image (arXiv 1809.02156).

A model that mentions nothing hallucinates nothing. So CHAIR is measured together with recall, the
accuracy of colors, the length of captions and repeats. Files and scores spell "colour".
"""

from dataclasses import dataclass, fields

from minialign.evaluation.shares import share
from minialign.evaluation.vocabulary import Mention, Vocabulary


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


@dataclass(frozen=True)
class JudgedMention:
    """A mention in a caption, with the verdict on it."""

    mention: Mention
    present: bool  # whether the object is annotated
    right_color: bool | None  # None if no color was said, or the object's is not known


def caption_counts(caption: str, objects: list[dict], vocabulary: Vocabulary) -> CaptionCounts:
    """Count what CHAIR and the scores beside it need from one caption.

    Args:
        caption: the text.
        objects: the annotated objects of its image, [{"name": text, "colour": text}]. The color
            may be missing.
        vocabulary: the names to look for.

    Raises InputError for an annotated object or color that the vocabulary lacks.
    """
    mentions = judge_mentions(caption, objects, vocabulary)
    names = list(colors_of_objects(objects, vocabulary))
    return count_mentions(caption, mentions, names)


def judge_mentions(
    caption: str, objects: list[dict], vocabulary: Vocabulary
) -> list[JudgedMention]:
    """Find the mentions of a caption, and compare each with the annotated objects.

    The arguments are those of `caption_counts`.
    """
    known_colors = colors_of_objects(objects, vocabulary)
    judged = []
    for mention in vocabulary.find_mentions(caption):
        colors = known_colors.get(mention.name)
        right_color = None
        if mention.color is not None and colors:
            right_color = mention.color in colors
        judged.append(JudgedMention(mention, mention.name in known_colors, right_color))
    return judged


def colors_of_objects(objects, vocabulary) -> dict[str, set[str]]:
    """Return {name: its colors} of annotated objects. The colors are empty if none is known.

    Two objects of the same name may differ in color.
    """
    known_colors = {}
    for item in objects:
        name = vocabulary.object_name(item["name"], vocabulary.path)
        colors = known_colors.setdefault(name, set())
        if item.get("colour"):
            colors.add(vocabulary.color_name(item["colour"], vocabulary.path))
    return known_colors


def count_mentions(
    caption: str, mentions: list[JudgedMention], objects: list[str]
) -> CaptionCounts:
    """Count the judged mentions of a caption whose image has these objects, each named once."""
    names = [judged.mention.name for judged in mentions]
    different_names = set(names)
    num_absent = sum(not judged.present for judged in mentions)
    right_colors = [judged.right_color for judged in mentions]
    return CaptionCounts(
        mentions=len(names),
        absent_mentions=num_absent,
        has_absent=num_absent > 0,
        recalled_objects=len(different_names & set(objects)),
        annotated_objects=len(objects),
        color_mentions=len(right_colors) - right_colors.count(None),
        right_colors=right_colors.count(True),
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
