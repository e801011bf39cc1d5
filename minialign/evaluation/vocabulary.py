"""The vocabulary of an evaluation: which words of a caption mention which object."""

from dataclasses import dataclass

from minialign.evaluation.words import (
    any_phrase,
    find_words,
    phrase,
    singular,
    singular_phrase,
    split_words,
)
from minialign.utils.files import check

# A synonym whose singular is another thing, so that it matches only as it is spelled.
NO_SINGULAR = "glasses"

# The two-word rules of CHAIR (arXiv 1809.02156), in the singular: two words that together mean one
# thing, whatever each of them means alone.

# Words that only describe the word after them: a baby elephant is an elephant and no person.
# The published scorer has "baby" and "adult" before the animals of the first line, and "passenger"
# before "jet" and "train". The other words are added here for the same reason.
ANIMALS = frozenset(
    "bird cat dog horse sheep cow elephant bear zebra giraffe animal cub "
    "goat pig duck chicken goose swan penguin owl panda lion tiger leopard monkey gorilla kangaroo "
    "koala deer moose fox wolf rabbit squirrel camel donkey rhino hippo whale dolphin seal turtle "
    "kitten puppy".split()
)
VEHICLES = frozenset(
    "jet train plane airplane aircraft bus car van boat ship ferry vehicle".split()
)
DESCRIBES = {
    "baby": ANIMALS,
    "adult": ANIMALS,
    "young": ANIMALS,
    "mother": ANIMALS,
    "father": ANIMALS,
    "male": ANIMALS,
    "female": ANIMALS,
    "passenger": VEHICLES,
}
# Pairs of words, and the word that they stand for. A pair that stands for None mentions no object.
PAIRS = {
    "bow tie": "tie",
    "toilet seat": "toilet",
    "train track": "track",
    "home plate": None,
}
# A word that is no mention if the caption has the other word anywhere: the seat is the toilet's.
PART_OF = {"seat": "toilet"}


@dataclass(frozen=True)
class Mention:
    """A mention of an object in a caption: caption[start:end] names it."""

    name: str  # the object
    color: str | None  # the color that is said of it
    start: int
    end: int


class Vocabulary:
    """The words to look for in a caption: the synonyms of each object, and the colors.

    Captions and synonyms are cut and put into the singular by the same functions. So the singular
    of a synonym is enough, and case, hyphens and emphasis make no difference. The files spell
    "colour", and the code "color".
    """

    def __init__(self, raw, path):
        """Build a vocabulary from the value of "vocabulary" in the file at `path`.

        Phrases under "no_mention" mention no object: "train station" mentions no train.

        Raises InputError where the value has another form, for a word that cannot be found, and for
        a word that is listed for two objects.
        """
        check(
            _is_vocabulary(raw),
            f'{path}: no "vocabulary" with "objects": {{name: [synonyms]}} and, '
            'if there are any, "colours": [names] and "no_mention": [words]',
        )
        self.path = path
        self.names = {}  # a synonym as a tuple of its words in lower case: its object's name
        self._name_of_phrase = {}  # the `phrase` of a synonym: its object's name
        self._name_of_singular = {}  # the `singular_phrase` of a synonym: its object's name
        self._name_of_lower = {}  # an object's name in lower case: the name
        for name, synonyms in raw["objects"].items():
            other = self._name_of_lower.setdefault(name.strip().lower(), name)
            check(
                other == name,
                f'{path}: the objects "{other}" and "{name}" have the same name; rename one',
            )
            for synonym in synonyms:
                self._add(synonym, name)

        # Of two synonyms with the same singular the first one has it. But words are first looked up
        # as they are spelled, so "glass" and "glasses" may be two objects.
        for text, name in self._name_of_phrase.items():
            if text != NO_SINGULAR:
                self._name_of_singular.setdefault(singular_phrase([text]), name)

        # Phrases that mean something else than their words: a synonym in the singular, or None.
        self._pairs = PAIRS | {singular_phrase([text]): None for text in raw.get("no_mention", [])}
        texts = [*self._name_of_phrase, *self._name_of_singular, *self._pairs]
        self.max_words = max(text.count(" ") + 1 for text in texts)
        self._first_words = {text.split(" ")[0] for text in texts}

        # Colors are found by their phrases, so "dark-blue" and "dark blue" are the same.
        self.colors = {color.lower() for color in raw.get("colours", [])}
        self._colors = {phrase(split_words(color)): color for color in self.colors}
        self._color_pattern = any_phrase(self._colors)
        # Most annotations spell them as the vocabulary does, so that no words need be found.
        for color in self.colors:
            self._colors[color] = self._colors[phrase(split_words(color))]

    def _add(self, synonym, name):
        """Add a synonym of an object. Raise InputError if it has no word, or is another's too."""
        words = split_words(synonym)
        check(words, f'{self.path}: the synonym "{synonym}" of "{name}" has no word; remove it')
        text = phrase(words)
        other = self._name_of_phrase.setdefault(text, name)
        check(
            other == name,
            f'{self.path}: "{synonym}" is a synonym of "{other}" and of "{name}"; '
            "remove it from one of them",
        )
        self.names[tuple(synonym.lower().split())] = name

    def object_name(self, text: str, where) -> str:
        """Return the object that an annotation names, by its name or by a synonym, in any case.

        Raises InputError that begins with `where` if the vocabulary lacks it. Such an object could
        never be recalled, and its mentions would count as hallucinated.
        """
        name = self._name_of_lower.get(text.strip().lower())
        if name is None:
            name = self._look_up(split_words(text))
        check(
            name is not None,
            f'{where}: the vocabulary has no object "{text}"; correct it, or add it to "objects"',
        )
        return name

    def color_name(self, text: str, where) -> str:
        """Return the color that an annotation names, as the vocabulary spells it, in lower case.

        A vocabulary without colors accepts any text, because captions are not searched for colors.

        Raises InputError that begins with `where` for a color that the vocabulary lacks.
        """
        if not self.colors:
            return text.lower()
        color = self._colors.get(text.lower())
        if color is None:
            color = self._colors.get(phrase(split_words(text)))
        check(
            color is not None,
            f'{where}: the vocabulary has no color "{text}"; correct it, or add it to "colours"',
        )
        return color

    def colors_in(self, text: str) -> set[str]:
        """Return the colors that a text names anywhere."""
        found = self._color_pattern.findall(phrase(split_words(text)))
        return {self._colors[color] for color in found}

    def mentions(self, caption: str) -> list[tuple[str, str | None]]:
        """Return the mentions of objects in a caption, in order, as (object, color or None)."""
        return [(mention.name, mention.color) for mention in self.find_mentions(caption)]

    def find_mentions(self, caption: str) -> list[Mention]:
        """Return the mentions of objects in a caption, in order, each with its place.

        Of the names that begin at a word the longest counts, and the two-word rules of CHAIR are
        applied. A color counts if it stands directly before the name.
        """
        # 1. Go through the words from left to right, name by name.
        places = find_words(caption)
        words = [word.text for word in places]
        mentions = []
        phrases = []  # the whole caption in the singular, with each name as one phrase
        position = 0
        while position < len(words):
            start = position
            if self._describes_next(words, position):
                position += 1  # in "red baby elephant" the color is still before `start`
            length, name = self._longest_name(words, position)
            text = singular_phrase(words[position : position + length])
            phrases.append(text)
            if name is not None:
                mention = Mention(
                    name=name,
                    color=self._color_before(words, start),
                    start=places[position].start,
                    end=places[position + length - 1].end,
                )
                mentions.append((text, mention))
            position += length

        # 2. Leave out the seat of a toilet (PART_OF), unless the object itself is called a seat.
        kept = []
        for text, mention in mentions:
            is_part = PART_OF.get(text) in phrases and text != mention.name.lower()
            if not is_part:
                kept.append(mention)
        return kept

    def _look_up(self, words):
        """Return the object that words mention, as they are spelled or in the singular, or None."""
        name = self._name_of_phrase.get(phrase(words))
        if name is None:
            name = self._name_of_singular.get(singular_phrase(words))
        return name

    def _longest_name(self, words, position):
        """Return the number of words of the longest name at `position`, and its object's name.

        The name is None for a phrase that mentions no object, such as "home plate". Where no name
        and no such phrase begins, it is (1, None).
        """
        # Most words begin no name, so most of them need no look-up of phrases. This is exact: every
        # phrase of a name begins with this word, as it is spelled or in the singular.
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
                return length, self._name_of_singular.get(self._pairs[text])
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
        """Return the color of one or two words directly before the word at `start`, or None."""
        for length in (2, 1):
            if length <= start:
                color = self._colors.get(phrase(words[start - length : start]))
                if color is not None:
                    return color
        return None


def _is_vocabulary(raw):
    """Return whether a JSON value maps objects to synonyms, and has lists of texts beside them."""
    if not isinstance(raw, dict) or "colors" in raw:  # they would be left out without a word
        return False
    objects = raw.get("objects")
    if not isinstance(objects, dict) or not objects or [] in objects.values():
        return False
    lists = [*objects.values(), raw.get("colours", []), raw.get("no_mention", [])]
    return all(_is_list_of_texts(value) for value in lists)


def _is_list_of_texts(value):
    """Return whether a JSON value is a list of texts that are not blank."""
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
