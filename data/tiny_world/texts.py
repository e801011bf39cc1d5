"""Texts of the tiny world: captions, questions with their answers, and captions with errors."""

import random
from dataclasses import dataclass

from tiny_world.scenes import (
    DISTRIBUTIONS,
    OBJECTS,
    PLACES,
    Scene,
    corrupt,
    draw_popular,
    draw_scene,
)

# A request for a caption, and how each sentence of the caption reads. The request settles the
# wording. So chosen and rejected captions differ in content alone, and a model's answers do not
# grow or shrink because its style changes.
WORDINGS = (
    (
        "The picture was taken in {theme}. Which things are there?",
        "There is {thing} at the {place}.",
    ),
    (
        "This picture shows {theme}. Describe what is in it.",
        "{Thing} is at the {place}.",
    ),
    (
        "Here is a picture of {theme}. What can be seen in it?",
        "At the {place} you can see {thing}.",
    ),
)
# These objects have an irregular plural. The others take an s.
PLURALS = {"knife": "knives", "bench": "benches", "bus": "buses"}


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str
    rejected: str | None = None  # a caption with errors; questions for no caption have none


def plural(name):
    """Return the plural of an object's name."""
    return PLURALS.get(name, name + "s")


def with_article(words):
    """Return the words with "a" or "an" in front."""
    if words[0] in "aeiou":
        return f"an {words}"
    return f"a {words}"


def request_caption(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Draw a request to describe a scene, and return it with the wording of its caption.

    The request names the theme, as the prompts of LLaVA-Instruct do.
    """
    request, wording = rng.choice(WORDINGS)
    return request.format(theme=with_article(scene.theme)), wording


def describe(scene: Scene, wording: str) -> str:
    """Return a caption: a sentence for each object, row by row."""
    sentences = []
    for item in scene.items:
        thing = with_article(f"{item.color} {item.name}")
        capitalized = thing[0].upper() + thing[1:]
        place = PLACES[item.cell]
        sentences.append(wording.format(thing=thing, Thing=capitalized, place=place))
    return " ".join(sentences)


def draw_caption_turn(scene: Scene, rng: random.Random) -> Turn:
    """Draw a request for a caption, with the caption."""
    request, wording = request_caption(scene, rng)
    return Turn(request, describe(scene, wording))


def draw_questions(scene: Scene, rng: random.Random, num_questions: int) -> list[Turn]:
    """Draw up to 4 different questions about a scene, with their answers.

    One half asks whether an object is there, yes and no being equally likely. Absent objects are
    half popular ones of the theme and half any. A quarter asks for a color, a quarter for a place.
    """
    turns = {}  # by question
    while len(turns) < num_questions:
        turn = _draw_question(scene, rng)
        turns.setdefault(turn.question, turn)
    return list(turns.values())


def _draw_question(scene, rng):
    """Draw one question about a scene."""
    item = rng.choice(scene.items)
    topic = rng.choice(("present", "absent", "color", "place"))
    if topic == "present":
        return Turn(f"Is there {with_article(item.name)} in the picture?", "Yes.")
    if topic == "absent":
        name = _draw_absent_object(scene, rng)
        return Turn(f"Is there {with_article(name)} in the picture?", "No.")
    if topic == "color":
        answer = f"The {item.name} is {item.color}."
        return Turn(f"What colour is the {item.name}?", answer)
    answer = f"The {item.name} is at the {PLACES[item.cell]}."
    return Turn(f"Where is the {item.name}?", answer)


def _draw_absent_object(scene, rng):
    """Draw an object that is not in a scene: half are popular in its theme, half are any."""
    present = [item.name for item in scene.items]
    if rng.random() < 0.5:
        return draw_popular(rng, scene.theme, present)
    return rng.choice([name for name in OBJECTS if name not in present])


def draw_turn(scene: Scene, rng: random.Random) -> Turn:
    """Draw a turn of the instruction data. Of ten, seven ask for a caption."""
    if rng.random() >= 0.7:
        return draw_questions(scene, rng, num_questions=1)[0]
    request, wording = request_caption(scene, rng)
    rejected = describe(corrupt(scene, rng), wording)
    return Turn(request, describe(scene, wording), rejected)


def draw_text_turns(num_turns: int, rng: random.Random) -> list[Turn]:
    """Draw turns about scenes without an image, from which a language model learns expectations."""
    turns = []
    for _ in range(num_turns):
        scene = draw_scene(rng, DISTRIBUTIONS["text"])
        turns.append(draw_turn(scene, rng))
    return turns
