"""The tiny world: its writers repeat the shipped files, and its scenes are what their names say."""

import errno
import os
import random
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY
from PIL import Image

from minialign.utils.files import WriteError

sys.path.insert(0, str(ROOT / "data"))
from tiny_world import benchmarks, files, model_files  # noqa: E402
from tiny_world.scenes import (  # noqa: E402
    DISTRIBUTIONS,
    HABITS,
    THEME_OF,
    corrupt,
    draw_scene,
    perceive,
)
from tiny_world.texts import draw_questions  # noqa: E402


def assert_same_texts(folder, shipped, pattern):
    """Assert that the files of a folder are equal to the shipped ones, to the byte."""
    paths = sorted(folder.glob(pattern))
    assert len(paths) == len(sorted(shipped.glob(pattern)))
    for path in paths:
        assert path.read_bytes() == (shipped / path.name).read_bytes(), path.name


@pytest.mark.parametrize("name", files.EVALUATION_SETS)
def test_the_shipped_evaluation_sets_can_be_written_again(tmp_path, name):
    """Captions and questions are equal to the byte.

    Of an image 98 % of the pixels must be equal, since versions of Pillow may draw the edges of
    ovals differently. With the version that drew the shipped images all are.
    """
    rng = random.Random(f"{files.SEEDS['final']}, {name}")
    num_images = files.NUM_IMAGES["final"]

    files.write_evaluation_set(tmp_path, num_images, DISTRIBUTIONS[name], rng)

    shipped = TINY / "final" / name
    assert_same_texts(tmp_path, shipped, "*.json*")
    for path in sorted((tmp_path / "images").iterdir())[:20]:
        image = np.asarray(Image.open(path).convert("RGB"))
        shipped_image = np.asarray(Image.open(shipped / "images" / path.name).convert("RGB"))
        is_equal = (image == shipped_image).all(axis=-1)
        assert is_equal.mean() >= 0.98


def test_the_shipped_training_texts_can_be_written_again(tmp_path, monkeypatch):
    def name_images(folder, scenes):
        """Return the names of the images without drawing them."""
        folder.mkdir()
        return [f"{i:04}.png" for i in range(1, len(scenes) + 1)]

    monkeypatch.setattr(files, "write_images", name_images)
    rng = random.Random(files.SEEDS["train"] + ", texts")

    files.write_training_data(tmp_path / "train", files.draw_training_scenes(), rng)

    assert_same_texts(tmp_path / "train", TINY / "train", "*.json")


def test_the_shipped_model_files_can_be_written_again(tmp_path):
    """That is the tokenizer, with its learned merges, and the configuration."""
    model_files.write_model_files(tmp_path)

    assert_same_texts(tmp_path, TINY / "model", "*.json")


@pytest.fixture()
def scenes():
    """Return 200 scenes that follow expectations in part."""
    rng = random.Random("test: scenes")
    return [draw_scene(rng, DISTRIBUTIONS["typical"]) for _ in range(200)]


def test_a_full_disk_names_the_folder_of_the_images(tmp_path, scenes, monkeypatch):
    """Pillow's error has no name of a file, and that of a copied image has the one that is read."""

    def fail(*args, **options):
        """Fail as on a full disk."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("PIL.Image.Image.save", fail)
    with pytest.raises(WriteError, match=f"^{tmp_path / 'images'}: .*free some space"):
        files.write_images(tmp_path, scenes[:1])

    monkeypatch.setattr("shutil.copy", fail)
    with pytest.raises(WriteError, match=f"^{tmp_path / 'copies'}: .*free some space"):
        benchmarks.copy_images([{"image": "0001.png"}], tmp_path / "copies")


def test_objects_of_a_scene_are_different_and_in_different_cells(scenes):
    for scene in scenes:
        cells = [item.cell for item in scene.items]
        names = {item.name for item in scene.items}
        assert 2 <= len(names) <= 4
        assert len(names) == len(scene.items)
        assert cells == sorted(set(cells))


def test_without_noise_a_scene_is_perceived_as_it_is(scenes):
    rng = random.Random("test: perceive")

    assert [perceive(scene, rng, caption_noise=0) for scene in scenes] == scenes


def test_with_full_noise_a_scene_is_perceived_as_expected(scenes):
    """All objects are of the theme, and all have their typical color. Cells stay."""
    rng = random.Random("test: perceive")

    for scene in scenes:
        perceived = perceive(scene, rng, caption_noise=1)
        for item, perceived_item in zip(scene.items, perceived.items, strict=True):
            assert THEME_OF[perceived_item.name] == scene.theme
            assert perceived_item.color == HABITS[perceived_item.name][0]
            assert perceived_item.cell == item.cell


def test_errors_of_the_training_captions_are_as_many_as_the_page_says():
    num_objects = 0
    wrong_objects = 0
    wrong_colors = 0
    for true_scene, perceived_scene in files.draw_training_scenes():
        for item, perceived in zip(true_scene.items, perceived_scene.items, strict=True):
            num_objects += 1
            wrong_objects += item.name != perceived.name
            wrong_colors += item.color != perceived.color
    objects = 100 * wrong_objects / num_objects
    colors = 100 * wrong_colors / num_objects

    said = f"{objects:.1f} % of the objects and {colors:.1f} % of the colors are wrong"
    assert f"In the 1,500 training images {said}" in (ROOT / "data" / "README.md").read_text()


def test_a_corrupted_scene_has_one_or_two_errors(scenes):
    rng = random.Random("test: corrupt")
    numbers_of_errors = set()
    for scene in scenes:
        corrupted = corrupt(scene, rng)
        num_errors = 0
        for item, corrupted_item in zip(scene.items, corrupted.items, strict=True):
            num_errors += item != corrupted_item
        numbers_of_errors.add(num_errors)

    assert numbers_of_errors == {1, 2}


def test_answers_to_questions_are_true(scenes):
    rng = random.Random("test: questions")
    for scene in scenes:
        names = {item.name for item in scene.items}
        colors = [f"The {item.name} is {item.color}." for item in scene.items]
        for turn in draw_questions(scene, rng, num_questions=4):
            if turn.question.startswith("Is there"):
                asked = turn.question.split()[3]
                assert turn.answer == ("Yes." if asked in names else "No.")
            elif turn.question.startswith("What colour"):
                assert turn.answer in colors


def test_each_part_is_drawn_from_a_stream_of_its_own():
    """No two evaluation sets show the same scenes, and the streams never change."""
    first_scenes = {}
    for part in ("tune", "final", "study", "study-3"):
        for name in files.EVALUATION_SETS:
            rng = random.Random(f"{files.SEEDS[part]}, {name}")
            scenes = [draw_scene(rng, DISTRIBUTIONS[name]) for _ in range(3)]
            first_scenes[part, name] = repr(scenes)

    assert len(set(first_scenes.values())) == len(first_scenes)
    assert files.SEEDS["study"] == "tiny world 1: study"
    assert files.SEEDS["study-3"] == "tiny world 1: study-3"
    assert files.NUM_IMAGES["study-3"] == 400
