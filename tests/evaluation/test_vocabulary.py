"""The vocabulary of an evaluation: which words of a caption mention which object."""

import pytest
from evaluation_helpers import RAW_VOCABULARY, VOCABULARY

from minialign.evaluation.vocabulary import Vocabulary
from minialign.utils.files import InputError

# Everyday objects, as COCO has them.
EVERYDAY = Vocabulary(
    {
        "objects": {
            "person": ["person", "people", "man", "baby", "adult", "passenger"],
            "bicycle": ["bicycle"],
            "airplane": ["airplane", "jet"],
            "train": ["train"],
            "bird": ["bird", "duck"],
            "cat": ["cat"],
            "dog": ["dog", "puppy"],
            "elephant": ["elephant"],
            "giraffe": ["giraffe"],
            "tie": ["tie"],
            "skis": ["skis"],
            "baseball bat": ["baseball bat"],
            "baseball glove": ["baseball glove", "catcher's mitt"],
            "tennis racket": ["tennis racket"],
            "sports ball": ["sports ball", "tennis ball"],
            "wine glass": ["wine glass"],
            "knife": ["knife"],
            "orange": ["orange"],
            "hot dog": ["hot dog"],
            "chair": ["chair", "seat"],
            "bed": ["bed"],
            "toilet": ["toilet"],
            "tv": ["tv", "T.V."],
            "mouse": ["mouse"],
            "scissors": ["scissors"],
            "teddy bear": ["teddy bear"],
        },
        "colours": ["red", "brown", "light blue"],
    },
    "captions.json",
)


def mentioned(vocabulary, caption):
    """Return the names of the mentioned objects, separated by commas."""
    return ", ".join(name for name, _ in vocabulary.mentions(caption))


@pytest.mark.parametrize(
    "caption, mentions",
    [
        ("A red cup and a Puppy.", [("cup", "red"), ("dog", None)]),
        # The longest name counts, and its words are not counted again.
        ("A blue teddy bear, two bears.", [("teddy", "blue"), ("bear", None)]),
        ("A soft toy beside a bear-dog.", [("teddy", None)]),  # a hyphen makes another word
        ("red and blue cups; dog", [("cup", "blue"), ("dog", None)]),
        # Punctuation separates the words of a name, and a color from a name.
        ("Teddy. Bear.", [("bear", None)]),
        ("It is red. Dogs bark.", [("dog", None)]),
        # A color counts only directly before the name.
        ("a red shiny cup, a red teddy bear", [("cup", None), ("teddy", "red")]),
        # CHAIR counts what is mentioned, as published, whatever is said of it.
        ("No dog, and not a cup.", [("dog", None), ("cup", None)]),
        ("A hotdog, a cupboard.", []),
        ("", []),
    ],
)
def test_mentions(caption, mentions):
    assert VOCABULARY.mentions(caption) == mentions


@pytest.mark.parametrize(
    "caption, names",
    [
        ("Two dogs, three cats and some wine glasses; men hold knives.",
         "dog, cat, wine glass, person, knife"),
        ("The dog's bowl", "dog"),
        ("The dog\u2019s bowl and the puppies\u2019 bed", "dog, dog, bed"),
        ("-dog\n-cat", "dog, cat"),
        ("*cat*, \"dog\", (tv) and knife/orange", "cat, dog, tv, knife, orange"),
        ("A T.V. is on. TVs and a T.V.'s back", "tv, tv, tv"),
        ("It is hot. Dog food is there.", "dog"),
        ("Hot dogs, a hot-dog and HOT DOG", "hot dog, hot dog, hot dog"),
        ("A ski, skis and a pair of scissors", "skis, skis, scissors"),
        ("a catcher's mitt, a catcher\u2019s mitt", "baseball glove, baseball glove"),
        ("a man-eating plant, a dog-shaped cloud", ""),
    ],
)  # fmt: skip
def test_words_are_found_however_they_are_spelled(caption, names):
    assert mentioned(EVERYDAY, caption) == names


@pytest.mark.parametrize(
    "caption, names",
    [
        ("A man rides a bicycle next to two dogs.", "person, bicycle, dog"),
        ("A baby elephant and an adult giraffe near a baby.", "elephant, giraffe, person"),
        ("Baby ducks and an adult dog", "bird, dog"),
        ("A passenger train, passenger jets and a passenger.", "train, airplane, person"),
        ("Hot dogs on a plate with a dog.", "hot dog, dog"),
        ("A teddy bear on the bed.", "teddy bear, bed"),
        ("He wears a bow tie.", "tie"),
        ("The toilet seat is up.", "toilet"),
        ("A chair and a toilet; the seat is red.", "chair, toilet"),
        ("A red seat.", "chair"),
        ("A wine glass and two wine glasses.", "wine glass, wine glass"),
        ("There is a glass of wine.", ""),
        ("A train track in the hills, train tracks", ""),
        ("Home plate and a baseball bat.", "baseball bat"),
        ("A tennis racket and a tennis ball.", "tennis racket, sports ball"),
        ("An orange shirt and an orange.", "orange, orange"),
        ("The cat's toy mouse.", "cat, mouse"),
        ("Dog, dog, dog.", "dog, dog, dog"),
        # Two words that do not belong together.
        ("the baby's dog, a baby, elephants", "person, dog, person, elephant"),
        ("an adult and a dog, a baby hot dog", "person, dog, person, hot dog"),
    ],
)
def test_the_two_word_rules_of_chair(caption, names):
    """Most captions were run through the published scorer, whose counts these are."""
    assert mentioned(EVERYDAY, caption) == names


def test_the_vocabulary_goes_before_the_two_word_rules():
    """A name that is listed is that object. A seat that is an object is not a toilet's."""
    objects = {"calf": ["baby elephant"], "elephant": ["elephant"]}
    objects |= {"seat": ["seat"], "toilet": ["toilet"]}
    objects |= {"rails": ["train track"], "train": ["train"]}
    vocabulary = Vocabulary({"objects": objects}, "captions.json")

    assert mentioned(vocabulary, "a baby elephant on a train track") == "calf, rails"
    assert mentioned(vocabulary, "a toilet and a seat") == "toilet, seat"


def test_words_under_no_mention_name_nothing_together():
    """In either number, except where they are a name as well."""
    objects = {"train": ["train"], "bus": ["bus"], "sign": ["bus stop"]}
    raw = {"objects": objects, "no_mention": ["train station", "bus stop", "buses' roofs"]}
    vocabulary = Vocabulary(raw, "captions.json")

    caption = "A train at two train-stations, a bus at a bus stop."
    assert mentioned(vocabulary, caption) == "train, bus, sign"
    for wrong in ("train", [3], None):
        with pytest.raises(InputError, match='"no_mention": .words'):
            Vocabulary({"objects": objects, "no_mention": wrong}, "captions.json")


def test_colors_stand_before_the_whole_name():
    mentions = EVERYDAY.mentions("a brown baby elephant, a red bow tie, a light-blue dog")

    assert mentions == [("elephant", "brown"), ("tie", "red"), ("dog", "light blue")]


def test_a_plural_may_be_another_object_than_its_singular():
    """As it is spelled a word comes first. Alone, "glasses" in a vocabulary are no glass."""
    two = Vocabulary({"objects": {"glass": ["glass"], "eyewear": ["glasses"]}}, "captions.json")
    drinks = Vocabulary({"objects": {"glass": ["glass"]}}, "captions.json")
    eyewear = Vocabulary({"objects": {"eyewear": ["glasses"]}}, "captions.json")

    assert mentioned(two, "a glass, glasses") == "glass, eyewear"
    assert mentioned(drinks, "a glass, glasses") == "glass, glass"
    assert mentioned(eyewear, "a glass, glasses") == "eyewear"


def test_plurals_that_are_listed_change_nothing():
    singulars = {"objects": {"bus": ["bus"], "knife": ["knife"], "person": ["person"]}}
    plurals = {"objects": {"bus": ["buses"], "knife": ["knives"], "person": ["people"]}}
    caption = "A bus, two buses, a knife, knives, a person, people."

    expected = "bus, bus, knife, knife, person, person"
    assert mentioned(Vocabulary(singulars, "captions.json"), caption) == expected
    assert mentioned(Vocabulary(plurals, "captions.json"), caption) == expected


@pytest.mark.parametrize("text", ["dog", "Dog", " DOG ", "puppy", "Puppies"])
def test_annotated_names_are_compared_without_case(text):
    assert EVERYDAY.object_name(text, "here") == "dog"
    assert EVERYDAY.color_name("RED", "here") == "red"


def test_annotations_that_the_vocabulary_lacks_are_refused():
    with pytest.raises(InputError, match='captions.json, record 3: .*no object "television"'):
        EVERYDAY.object_name("television", "captions.json, record 3")
    with pytest.raises(InputError, match='captions.json, record 3: .*no color "mauve"'):
        EVERYDAY.color_name("mauve", "captions.json, record 3")

    without_colors = Vocabulary({"objects": {"dog": ["dog"]}}, "captions.json")
    assert without_colors.color_name("Mauve", "here") == "mauve"


@pytest.mark.parametrize(
    "objects, named",
    [
        ({"chair": ["seat"], "bench": ["Seat"]}, '"Seat" is a synonym of "chair" and of "bench"'),
        ({"hot dog": ["hot dog"], "food": ["hot-dog"]}, '"hot dog" and of "food"'),
        ({"dog": ["dog"], "Dog": ["hound"]}, '"dog" and "Dog" have the same name'),
        ({"dog": ["dog", "?!"]}, '"[?]!" of "dog" has no word'),
    ],
)
def test_words_of_two_objects_and_of_none_are_refused(objects, named):
    with pytest.raises(InputError, match=f"captions.json: .*{named}"):
        Vocabulary(RAW_VOCABULARY | {"objects": objects}, "captions.json")
