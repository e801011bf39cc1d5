"""Cut English texts into words, and find the singular of a word.

Captions and vocabularies are both cut by `split_words`, so that they cannot disagree. A
singular follows from the ending of a word (ENDINGS). The lists before it hold the exceptions, and
were written by hand.
"""

import functools
import itertools
import re
import unicodedata
from dataclasses import dataclass

# Stands in a list of words where the end of a sentence or another mark separates two of them, so
# that no name of several words is found across it.
BORDER = "."

# One spelling of each apostrophe and hyphen. Invisible marks are left out.
SPELLING = str.maketrans(
    dict.fromkeys("\u2018\u2019\u02bc\u2032\u00b4`\uff07", "'")
    | dict.fromkeys("\u2010\u2011", "-")
    | dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff", "")
)
# Single letters with a full stop after each: "T.V.", also without the last stop, and "T. V.".
ABBREVIATION = re.compile(r"\b(?:[^\W\d_]\.)+[^\W\d_]\b\.?|\b(?:[^\W\d_]\. )+[^\W\d_]\.")
# Letters and digits, with apostrophes and hyphens inside but not at the ends.
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")
# What may stand between two words of a name: white space with at most one line break, and the
# marks of emphasis at the words. A blank line or the mark of a list item is more than that.
SPACE = re.compile(r"[*_]*[^\S\n]*\n?[^\S\n]*[*_]*")

# Plural and singular, or another spelling of a singular.
IRREGULAR = """
    oxen ox, lice louse, dice dice, quizzes quiz, fezzes fez, busses bus, gasses gas, ax axe,
    lives life, elves elf, thieves thief, dwarves dwarf, wharves wharf, sheaves sheaf, staves staff,
    handkerchieves handkerchief, rooves roof, turves turf, selves self,
    cacti cactus, octopi octopus, hippopotami hippopotamus, fungi fungus, alumni alumnus,
    foci focus, nuclei nucleus, radii radius, stimuli stimulus, syllabi syllabus,
    antennae antenna, larvae larva, vertebrae vertebra, algae alga, formulae formula,
    oases oasis, crises crisis, analyses analysis, theses thesis, parentheses parenthesis,
    plateaux plateau, bureaux bureau, chateaux chateau, tableaux tableau, gateaux gateau,
    bacteria bacterium, aquaria aquarium, phenomena phenomenon, criteria criterion,
    matrices matrix, vertices vertex, indices index, appendices appendix
"""
# Singulars that take only an s, although their plurals end like those that ENDINGS changes in
# another way. By ENDINGS "ties" would become "ty", as "puppies" becomes "puppy".
TAKES_S = """
    tie necktie bowtie pie potpie magpie lie die movie cookie brownie hoodie zombie selfie smoothie
    birdie doggie kiddie genie collie budgie pixie cabbie foodie beanie bootie sweetie cutie auntie
    hippie veggie goalie rookie calorie prairie junkie groupie laddie lassie talkie newbie freebie
    cowrie bookie pinkie nightie hankie rotisserie patisserie boogie bogie sortie eerie
    toe tiptoe mistletoe canoe hoe oboe foe aloe floe woe
    use fuse muse ruse excuse abuse recluse
    ache headache toothache stomachache cache moustache mustache avalanche quiche niche creche
    cliche brioche porsche apache axe pickaxe
    ski taxi kiwi bikini zucchini panini martini salami corgi safari alibi jacuzzi sushi rabbi okapi
    sari khaki broccoli spaghetti ravioli tortellini semi mini yeti zamboni bonsai samurai wii tai
    menu emu gnu guru tutu tofu zebu kudu caribou bayou haiku flu tiramisu tzu
    plateau bureau chateau tableau gateau
"""
# Singulars that end in s and take es. By ENDINGS "lens" would become "len", and "lenses" "lense".
TAKES_ES = """
    gas lens atlas canvas alias bias pancreas christmas thermos rhinoceros cosmos iris trellis
    clematis ibis mantis topaz
"""
# Words that stay as they are, although ENDINGS would change them. Without its s another word would
# be left of "news" and "shorts". "Specimen" only ends like "snowmen", and "pumice" like "mice".
UNCHANGED = """
    scissors pants trousers jeans shorts tights leggings pajamas pyjamas overalls clothes goggles
    binoculars sunglasses eyeglasses pliers tongs tweezers series species news means goods woods
    headquarters barracks crossroads gallows bellows biceps triceps forceps chaos molasses
    mathematics physics athletics gymnastics aerobics electronics ceramics greens blues sweets
    specimen abdomen omen ramen amen semen regimen stamen acumen hymen bitumen lumen albumen pumice
    as has was does his its yes hers ours theirs yours always perhaps besides towards
"""
# How a plural ends, and how its singular ends. The first ending that fits counts.
ENDINGS = (
    # Whole words, which are also the ends of longer ones: snowmen, grandchildren, bookshelves.
    ("men", "man"),
    ("people", "person"),
    ("children", "child"),
    ("feet", "foot"),
    ("teeth", "tooth"),
    ("geese", "goose"),
    ("mice", "mouse"),
    ("knives", "knife"),
    ("wives", "wife"),
    ("wolves", "wolf"),
    ("shelves", "shelf"),
    ("halves", "half"),
    ("calves", "calf"),
    ("leaves", "leaf"),
    ("loaves", "loaf"),
    ("scarves", "scarf"),
    ("hooves", "hoof"),
    ("shoes", "shoe"),
    # Singulars, which stay as they are: glass, bus, tennis.
    ("ss", "ss"),
    ("us", "us"),
    ("is", "is"),
    # Plurals in es: glasses, dishes, benches, boxes, quizzes, waltzes.
    ("sses", "ss"),
    ("shes", "sh"),
    ("ches", "ch"),
    ("xes", "x"),
    ("zzes", "zz"),
    ("tzes", "tz"),
    # Mouses and causes keep the e, buses do not.
    ("ouses", "ouse"),
    ("auses", "ause"),
    ("uses", "us"),
    # Potatoes, puppies, and all others.
    ("oes", "o"),
    ("ies", "y"),
    ("s", ""),
)


# The singular of each word that ENDINGS would change wrongly.
SINGULARS = dict(entry.split() for entry in IRREGULAR.split(","))
SINGULARS |= {f"{word}s": word for word in TAKES_S.split()}
SINGULARS |= {f"{word}es": word for word in TAKES_ES.split()}
SINGULARS |= {word: word for word in TAKES_ES.split()}
SINGULARS |= {word: word for word in UNCHANGED.split()}


@dataclass(frozen=True, slots=True)
class Word:
    """A word as it is compared, in lower case, and its place: it was read from text[start:end]."""

    text: str
    start: int
    end: int


def split_words(text: str) -> list[str]:
    """Return the words of a text in lower case, with a BORDER where a name cannot go on.

    A hyphenated word is one word. The "'s" of a possessive is a word of its own, so that "the
    dog's" has "dog" and "the baby's dog" is no "baby dog". Emphasis as in "*dog*" is left out.
    """
    return [word.text for word in find_words(text)]


def find_words(text: str) -> list[Word]:
    """Return the words and borders of `split_words`, each with its place in the text."""
    spelled = _spell_alike(text)
    words = []
    end = 0  # of the word before
    for match in WORD.finditer(spelled.text):
        # 1. A border, unless the word may belong to one name with the word before.
        gap = spelled.text[end : match.start()]
        if words and _is_border(gap, match[0]):
            words.append(Word(BORDER, words[-1].end, words[-1].end))

        # 2. The word, or two of a possessive.
        start, end = match.span()
        if match[0].lower().endswith("'s"):
            words += [spelled.word(start, end - 2), spelled.word(end - 2, end)]
        else:
            words.append(spelled.word(start, end))
    return words


def _is_border(gap, next_word) -> bool:
    """Return whether no name goes across the text between two words, the `gap`.

    A line that begins with a capital begins a sentence, and others go on with one.
    """
    begins_sentence = "\n" in gap and next_word[0].isupper()
    return begins_sentence or not SPACE.fullmatch(gap)


@dataclass(frozen=True, slots=True)
class SpelledText:
    """A text in one spelling, and where each of its characters comes from in the original."""

    text: str
    places: list[tuple[int, int]]  # (start, end) in the original, one for each character

    def word(self, start: int, end: int) -> Word:
        """Return the Word that is text[start:end] here, with its place in the original."""
        first_place = self.places[start]
        last_place = self.places[end - 1]
        return Word(self.text[start:end].lower(), first_place[0], last_place[1])


def _spell_alike(text) -> SpelledText:
    """Return a text in one spelling.

    Letters are composed (NFC), marks have the form of SPELLING, and abbreviations have no stops:
    "T.V." is "TV".
    """
    # 1. Letter by letter, each with the accents that follow it.
    characters = []
    places = []
    for start, end in _letters(text):
        letter = text[start:end]
        if not letter.isascii():  # ASCII is composed already
            letter = unicodedata.normalize("NFC", letter)
        for character in letter.translate(SPELLING):
            characters.append(character)
            places.append((start, end))

    # 2. Drop the stops and spaces of abbreviations.
    is_kept = [True] * len(characters)
    for match in ABBREVIATION.finditer("".join(characters)):
        for i in range(match.start(), match.end()):
            is_kept[i] = characters[i] not in ". "
    kept_characters = itertools.compress(characters, is_kept)
    kept_places = itertools.compress(places, is_kept)
    return SpelledText("".join(kept_characters), list(kept_places))


def _letters(text) -> list[tuple[int, int]]:
    """Return the (start, end) of each character with the marks that follow it.

    Normalizing them one by one is the same as normalizing the text: only a mark, or a part of a
    Korean syllable, composes with what stands before it.
    """
    if text.isascii():
        return [(i, i + 1) for i in range(len(text))]
    starts = []
    for i, character in enumerate(text):
        is_mark = unicodedata.category(character).startswith("M")
        is_part_of_syllable = "\u1160" <= character <= "\u11ff"
        if i == 0 or not (is_mark or is_part_of_syllable):
            starts.append(i)
    ends = [*starts[1:], len(text)]
    return list(zip(starts, ends, strict=True))


def phrase(words: list[str]) -> str:
    """Return words as one text in which hyphens are spaces: "hot-dog" is "hot dog"."""
    return " ".join(words).replace("-", " ")


def any_phrase(phrases) -> re.Pattern:
    """Return a pattern that finds any of some phrases as whole words.

    The longest is tried first, so that "top left" is found and not the "left" in it.
    """
    longest_first = sorted(phrases, key=len, reverse=True)
    alternatives = "|".join(map(re.escape, longest_first))
    nothing = "(?!)"  # matches nowhere
    # Not \b, which asks for a letter at the edge: a place may be called "left (back)".
    return re.compile(rf"(?<!\w)(?:{alternatives or nothing})(?!\w)")


@functools.lru_cache(maxsize=1 << 16)
def singular(word: str) -> str:
    """Return the singular of a noun in lower case. A word of another kind may lose an s too."""
    if word in SINGULARS:
        return SINGULARS[word]
    if len(word) <= 2:
        return word
    for ending, replacement in ENDINGS:
        if word.endswith(ending):
            return word.removesuffix(ending) + replacement
    return word


def singular_phrase(words: list[str]) -> str:
    """Return the `phrase` of words with each of them in the singular."""
    return " ".join(singular(word) for word in phrase(words).split(" "))
