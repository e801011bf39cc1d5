"""The grammar of the tiny world's captions: what the world writes is read, all else is refused."""

import random
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
from tiny_world.grammar import is_well_formed, read_caption  # noqa: E402
from tiny_world.scenes import DISTRIBUTIONS, corrupt, draw_scene, perceive  # noqa: E402
from tiny_world.texts import describe, request_caption  # noqa: E402

REQUEST = "This picture shows an office. Describe what is in it."
TWO = "A red cup is at the top left. A blue pen is at the bottom right."


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_captions_of_the_world_are_read_back(name):
    """True, perceived and corrupted captions are all well formed, in every wording."""
    rng = random.Random(f"grammar, {name}")
    for _ in range(50):
        true_scene = draw_scene(rng, DISTRIBUTIONS[name])
        for scene in (true_scene, perceive(true_scene, rng, caption_noise=0.5)):
            request, wording = request_caption(scene, rng)
            caption = describe(scene, wording)

            statements = read_caption(caption, request)

            assert statements == [(item.color, item.name, item.cell) for item in scene.items]
            assert is_well_formed(caption, request)
        assert read_caption(describe(corrupt(true_scene, rng), wording), request) is not None


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "A red cup is at the top left.",  # a scene has two objects or more
        TWO[:-1],  # no full stop
        TWO + " ",
        TWO.lower(),
        TWO.replace(". A", ".  A"),
        TWO.replace("A blue", "An blue"),
        TWO.replace("pen", "pencil"),  # no object of the world
        TWO.replace("blue", "pink"),
        TWO.replace("bottom right", "middle"),
        TWO.replace("blue ", ""),
        "There is a red cup at the top left. There is a blue pen at the bottom right.",
        TWO.replace("blue pen", "red cup"),  # an object twice
        TWO.replace("bottom right", "top left"),  # a place twice
        "A blue pen is at the bottom right. A red cup is at the top left.",  # not row by row
    ],
)
def test_what_the_world_would_not_write_is_refused(caption):
    assert is_well_formed(TWO, REQUEST)
    assert not is_well_formed(caption, REQUEST)


def test_five_sentences_are_too_many():
    """They can be read, but no scene has five objects."""
    names = ("cup", "bowl", "pen", "lamp", "dog")
    places = ("top left", "top middle", "top right", "bottom left", "bottom right")
    sentences = []
    for name, place in zip(names, places, strict=True):
        sentences.append(f"A red {name} is at the {place}.")

    assert is_well_formed(" ".join(sentences[:4]), REQUEST)
    assert len(read_caption(" ".join(sentences), REQUEST)) == 5
    assert not is_well_formed(" ".join(sentences), REQUEST)


def test_a_request_of_another_world_has_no_captions():
    assert read_caption(TWO, "What is in the image?") is None
    assert not is_well_formed(TWO, "This picture shows a garden. Describe what is in it.")
