"""CHAIR: the share of mentioned objects that are not in the image (arXiv 1809.02156).

A model that says nothing has a perfect CHAIR. So it is measured together with recall, the accuracy
of colors, the length of captions and repeats.
"""

import re
from dataclasses import dataclass, fields

from minialign.utils.files import check


class Vocabulary:
    """The words to look for in a caption: the synonyms of each object, and the colors."""

    def __init__(self, raw, path):
        """Build a vocabulary from the value of "vocabulary" in the file at `path`.

        Raises InputError where the value has another form.
        """
        check(
            _is_vocabulary(raw),
            f'{path}: no "vocabulary" with "objects": {{name: [synonyms]}} and, '
            'if there are any, "colours": [names]',
        )
        self.names = {}  # the words of a synonym, as a tuple: the name of its object
        for name, synonyms in raw["objects"].items():
            for synonym in synonyms:
                self.names[tuple(synonym.lower().split())] = name
        self.colors = {color.lower() for color in raw.get("colours", [])}
        self.max_words = max(len(words) for words in self.names)

    def mentions(self, caption: str) -> list[tuple[str, str | None]]:
        """Return the mentions of objects in a caption, in order, as (object, color).

        Of overlapping names the longest counts. A color counts if it is the word directly before
        the name. The color is None where there is no such word.
        """
        # A word is a run of letters, digits, underscores, apostrophes and hyphens.
        words = re.findall(r"[\w'-]+", caption.lower())
        mentions = []
        position = 0
        while position < len(words):
            length = self._length_of_name_at(words, position)
            if length == 0:
                position += 1
                continue
            name = self.names[tuple(words[position : position + length])]
            color = None
            if position > 0 and words[position - 1] in self.colors:
                color = words[position - 1]
            mentions.append((name, color))
            position += length
        return mentions

    def _length_of_name_at(self, words, position):
        """Return the number of words in the longest name that begins at `position`, or 0."""
        longest = min(self.max_words, len(words) - position)
        for length in range(longest, 0, -1):
            if tuple(words[position : position + length]) in self.names:
                return length
        return 0


def _is_vocabulary(raw):
    """Return whether a JSON value maps objects to synonyms and lists colors, if any."""
    if not isinstance(raw, dict):
        return False
    objects = raw.get("objects")
    if not isinstance(objects, dict) or not objects or [] in objects.values():
        return False
    lists = [*objects.values(), raw.get("colours", [])]
    return all(_is_list_of_texts(value) for value in lists)


def _is_list_of_texts(value):
    """Return whether a JSON value is a list of texts that are not blank."""
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


@dataclass
class CaptionCounts:
    """What one caption says, compared with the annotated objects of its image.

    data/study.py stores the counts as lists, in the order of these fields.
    """

    mentions: int = 0  # mentions of any object of the vocabulary
    absent_mentions: int = 0  # mentions of objects that are not annotated
    has_absent: bool = False  # whether there is such a mention
    recalled_objects: int = 0  # different annotated objects that are mentioned
    annotated_objects: int = 0  # different annotated objects
    color_mentions: int = 0  # colors said of annotated objects whose color is known
    right_colors: int = 0  # those of them that are right
    words: int = 0
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
        objects: the annotated objects of its image, [{"name": text, and perhaps "colour": text}].
        vocabulary: the names to look for.
    """
    # 1. The colors of each annotated object. Two objects of the same name may differ in color.
    known_colors = {}  # name: the set of its colors, empty if none is known
    for item in objects:
        colors = known_colors.setdefault(item["name"], set())
        if item.get("colour"):
            colors.add(item["colour"].lower())

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


def chair_scores(counts: list[CaptionCounts]) -> dict[str, float]:
    """Return the scores of several captions, given the CaptionCounts of each.

    chair_i: mentions of objects that are not in the image / all mentions.
    chair_s: captions with such a mention / all captions.
    recall: annotated objects that are mentioned / all annotated objects, of each image.
    colour: right colors / all colors that are said of annotated objects.
    words: mean number of words in a caption.
    repeats: mentions of an object that its caption mentioned before / all mentions.
    """
    num_captions = len(counts)
    total = sum(counts, start=CaptionCounts())
    return {
        "chair_i": total.absent_mentions / max(1, total.mentions),
        "chair_s": total.has_absent / num_captions,
        "recall": total.recalled_objects / max(1, total.annotated_objects),
        "colour": total.right_colors / max(1, total.color_mentions),
        "words": total.words / num_captions,
        "repeats": total.repeats / max(1, total.mentions),
    }
