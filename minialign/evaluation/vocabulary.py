"""The vocabulary of an evaluation: which words of a caption mention which object."""

from minialign.evaluation.words import (
    DESCRIBES,
    PAIRS,
    PART_OF,
    phrase,
    singular,
    singular_phrase,
    split_words,
)
from minialign.utils.files import check

# A synonym that names another thing than its singular. It matches only as it is spelled.
OWN_MEANING = "glasses"


class Vocabulary:
    """The words to look for in a caption: the synonyms of each object, and the colors.

    Captions and synonyms are cut and put into the singular by the same functions. So a synonym need
    not be listed in both numbers, and case, hyphens and emphasis make no difference.
    """

    def __init__(self, raw, path):
        """Build a vocabulary from the value of "vocabulary" in the file at `path`.

        Its words under "no_mention" name no object together: "train station" mentions no train.
        Raises InputError where the value has another form, for a word that cannot be found, and for
        a word that is listed for two objects.
        """
        check(
            _is_vocabulary(raw),
            f'{path}: no "vocabulary" with "objects": {{name: [synonyms]}} and, '
            'if there are any, "colours": [names] and "no_mention": [words]',
        )
        self.path = path
        self.names = {}  # the words of a synonym as it is spelled, as a tuple: its object's name
        self._spelled = {}  # the phrase of a synonym: its object's name
        self._singular = {}  # the same in the singular
        self._objects = {}  # the name of an object without regard to case: the name
        for name, synonyms in raw["objects"].items():
            other = self._objects.setdefault(name.strip().lower(), name)
            check(
                other == name,
                f'{path}: the objects "{other}" and "{name}" have the same name; rename one',
            )
            for synonym in synonyms:
                self._add(synonym, name)

        # A word is looked up as it is spelled first. So "glass" and "glasses" may be two objects.
        for text, name in self._spelled.items():
            if text != OWN_MEANING:
                self._singular.setdefault(singular_phrase([text]), name)

        # Words that mean something else together: the object that they name, or None.
        self._pairs = PAIRS | {singular_phrase([text]): None for text in raw.get("no_mention", [])}
        texts = [*self._spelled, *self._singular, *self._pairs]
        self.max_words = max(text.count(" ") + 1 for text in texts)
        self._first_words = {text.split(" ")[0] for text in texts}

        self.colors = {color.lower() for color in raw.get("colours", [])}
        self._colors = {phrase(split_words(color)): color for color in self.colors}

    def _add(self, synonym, name):
        """Add a synonym of an object. Raise InputError if it has no word, or is another's too."""
        words = split_words(synonym)
        check(words, f'{self.path}: the synonym "{synonym}" of "{name}" has no word; remove it')
        text = phrase(words)
        other = self._spelled.setdefault(text, name)
        check(
            other == name,
            f'{self.path}: "{synonym}" is a synonym of "{other}" and of "{name}"; '
            "remove it from one of them",
        )
        self.names[tuple(synonym.lower().split())] = name

    def object_name(self, text: str, where) -> str:
        """Return the object that an annotation names, by its name or by a synonym, in any case.

        Raises InputError that begins with `where` if the vocabulary lacks it. It could never be
        recalled, and its mentions would count as hallucinated.
        """
        name = self._objects.get(text.strip().lower())
        if name is None:
            name = self._look_up(split_words(text))
        check(
            name is not None,
            f'{where}: the vocabulary has no object "{text}"; correct it, or add it to "objects"',
        )
        return name

    def color_name(self, text: str, where) -> str:
        """Return the color that an annotation names, as the vocabulary spells it, in lower case.

        Without colors in the vocabulary any text will do, because none is looked for. Raises
        InputError that begins with `where` for a color that is not among them.
        """
        if not self.colors:
            return text.lower()
        color = self._colors.get(phrase(split_words(text)))
        check(
            color is not None,
            f'{where}: the vocabulary has no color "{text}"; correct it, or add it to "colours"',
        )
        return color

    def mentions(self, caption: str) -> list[tuple[str, str | None]]:
        """Return the mentions of objects in a caption, in order, as (object, color).

        Of overlapping names the longest counts, and the two-word rules of CHAIR are applied. A
        color counts if it stands directly before the name. The color is None where there is none.
        """
        # 1. Go through the words from left to right, name by name.
        words = split_words(caption)
        mentions = []
        phrases = []  # all words, where names are one phrase
        position = 0
        while position < len(words):
            start = position
            if self._describes_next(words, position):
                position += 1
            length, name = self._longest_name(words, position)
            text = singular_phrase(words[position : position + length])
            phrases.append(text)
            if name is not None:
                mentions.append((text, name, self._color_before(words, start)))
            position += length

        # 2. Leave out the seat of a toilet, unless the object itself is called a seat.
        kept = []
        for text, name, color in mentions:
            is_part = PART_OF.get(text) in phrases and text != name.lower()
            if not is_part:
                kept.append((name, color))
        return kept

    def _look_up(self, words):
        """Return the object that words mention, as they are spelled or in the singular, or None."""
        name = self._spelled.get(phrase(words))
        if name is None:
            name = self._singular.get(singular_phrase(words))
        return name

    def _longest_name(self, words, position):
        """Return the number of words of the longest name at `position`, and its object's name.

        Without a name there it is (1, None). A pair of CHAIR may be two words without an object.
        """
        # Most words begin no name, and no longer phrase need be made of them. What is looked up
        # begins with this word as it is spelled or in the singular, so nothing is missed.
        first_word = phrase(words[position : position + 1]).split(" ")[0]
        if self._first_words.isdisjoint((first_word, singular(first_word))):
            return 1, None

        longest = min(self.max_words, len(words) - position)
        for length in range(longest, 0, -1):
            name_words = words[position : position + length]
            name = self._look_up(name_words)
            if name is not None:
                return length, name
            text = singular_phrase(name_words)
            if text in self._pairs:
                return length, self._singular.get(self._pairs[text])
        return 1, None

    def _describes_next(self, words, position):
        """Return whether a word only describes the name after it, as in "baby elephant"."""
        described = DESCRIBES.get(singular(words[position]), ())
        if not described or position + 1 == len(words):
            return False
        length, _ = self._longest_name(words, position)
        next_length, next_name = self._longest_name(words, position + 1)
        next_text = singular_phrase(words[position + 1 : position + 1 + next_length])
        return length == 1 and (next_text in described or next_name in described)

    def _color_before(self, words, start):
        """Return the color that stands directly before the word at `start`, or None."""
        for length in (2, 1):
            if length <= start:
                color = self._colors.get(phrase(words[start - length : start]))
                if color is not None:
                    return color
        return None


def _is_vocabulary(raw):
    """Return whether a JSON value maps objects to synonyms, and has lists of texts beside them."""
    if not isinstance(raw, dict):
        return False
    objects = raw.get("objects")
    if not isinstance(objects, dict) or not objects or [] in objects.values():
        return False
    lists = [*objects.values(), raw.get("colours", []), raw.get("no_mention", [])]
    return all(_is_list_of_texts(value) for value in lists)


def _is_list_of_texts(value):
    """Return whether a JSON value is a list of texts that are not blank."""
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
