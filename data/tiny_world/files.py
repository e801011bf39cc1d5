"""The files of the tiny world: training data, and evaluation sets for POPE and CHAIR."""

import random
from collections import Counter
from pathlib import Path

from minialign.utils.files import write_errors, write_json, write_jsonl
from tiny_world.drawing import render
from tiny_world.scenes import (
    COLORS,
    DISTRIBUTIONS,
    OBJECTS,
    PLACES,
    THEME_OF,
    THEMES,
    Scene,
    SceneDistribution,
    draw_scene,
    perceive,
)
from tiny_world.texts import draw_turn, plural, request_caption, with_article

EVALUATION_SETS = ("typical", "shifted", "balanced")
CAPTION_NOISE = 0.35  # q, how often captions of the training data follow expectations
# Each part draws from streams of its own, which are named by these words. Use a different seed
# string for anything else.
SEEDS = {
    "train": "tiny world 1: train",
    "tune": "tiny world 1: tune",
    "final": "tiny world 1: final",
    "study": "tiny world 1: study",
    "study-3": "tiny world 1: study-3",
}
NUM_IMAGES = {"train": 1500, "tune": 200, "final": 300, "study": 400, "study-3": 400}  # of a set


def write_all(root, caption_noise=CAPTION_NOISE):
    """Write train/, tune/ and final/ under `root`."""
    rng = random.Random(SEEDS["train"] + ", texts")
    write_training_data(Path(root) / "train", draw_training_scenes(caption_noise), rng)
    for part in ("tune", "final"):
        write_evaluation_sets(root, part)


def write_evaluation_sets(root, part):
    """Write the three evaluation sets of a part under `root`, each from a seed of its own."""
    for name in EVALUATION_SETS:
        rng = random.Random(f"{SEEDS[part]}, {name}")
        folder = Path(root) / part / name
        write_evaluation_set(folder, NUM_IMAGES[part], DISTRIBUTIONS[name], rng)


# --- training data


def draw_training_scenes(caption_noise=CAPTION_NOISE) -> list[tuple[Scene, Scene]]:
    """Draw the scenes of the training images, as (true, perceived) pairs.

    Each is perceived once, so all texts about an image agree.
    """
    rng = random.Random(SEEDS["train"])
    scenes = [draw_scene(rng, DISTRIBUTIONS["typical"]) for _ in range(NUM_IMAGES["train"])]
    return [(scene, perceive(scene, rng, caption_noise)) for scene in scenes]


def write_training_data(folder: Path, scene_pairs, rng: random.Random):
    """Write the images of (true, perceived) scenes, and what is said of them.

    instruct.json has a question about each image, answered as the scene is perceived. povid.json
    has its captions, each with a rejected caption that has more errors. captions.json is true.
    """
    # 1. The images show the true scenes.
    true_scenes = [true_scene for true_scene, _ in scene_pairs]
    image_names = write_images(folder, true_scenes)

    # 2. The texts follow the perceived scenes.
    instruct = []
    povid = []
    for image_name, (_, perceived_scene) in zip(image_names, scene_pairs, strict=True):
        turn = draw_turn(perceived_scene, rng)
        question = {"from": "human", "value": f"<image>\n{turn.question}"}
        record = {
            "id": f"tiny-{Path(image_name).stem}",
            "image": image_name,
            "conversations": [question, {"from": "gpt", "value": turn.answer}],
        }
        instruct.append(record)
        if turn.rejected is not None:
            rejected = [question, {"from": "gpt", "value": turn.rejected}]
            povid.append(record | {"rejected_conversations": rejected})
    write_json(folder / "instruct.json", instruct)
    write_json(folder / "povid.json", povid)

    # 3. The annotations are true.
    write_captions(folder, image_names, true_scenes, rng)


def write_images(folder: Path, scenes: list[Scene]) -> list[str]:
    """Write the images of scenes under images/, and return their file names.

    A palette holds the few flat colors, and reads back to the same RGB.
    """
    names = [f"{i:04}.png" for i in range(1, len(scenes) + 1)]
    image_folder = folder / "images"
    with write_errors(image_folder):  # on a full disk Pillow names no file
        image_folder.mkdir(parents=True, exist_ok=True)
        for name, scene in zip(names, scenes, strict=True):
            render(scene).quantize(64).save(image_folder / name, optimize=True)
    return names


def write_captions(folder: Path, image_names, scenes, rng: random.Random):
    """Write captions.json: the true objects of each image, a prompt, and the words to look for."""
    captions = []
    for image_name, scene in zip(image_names, scenes, strict=True):
        prompt, _ = request_caption(scene, rng)
        objects = []
        for item in scene.items:
            objects.append({"name": item.name, "colour": item.color, "place": PLACES[item.cell]})
        captions.append({"image": image_name, "prompt": prompt, "objects": objects})
    vocabulary = {
        "objects": {name: [name, plural(name)] for name in OBJECTS},
        "colours": list(COLORS),
    }
    write_json(folder / "captions.json", {"vocabulary": vocabulary, "captions": captions})


# --- evaluation sets


def write_evaluation_set(
    folder: Path, num_images: int, distribution: SceneDistribution, rng: random.Random
):
    """Write images, captions.json, and the three splits of POPE.

    POPE asks about two objects that are in the image, the same in all splits, and two that are not.
    """
    # 1. Images and annotations.
    scenes = [draw_scene(rng, distribution) for _ in range(num_images)]
    image_names = write_images(folder, scenes)
    write_captions(folder, image_names, scenes, rng)

    # 2. How often each object occurs, and the two objects of each image that are asked for.
    frequency = Counter(dict.fromkeys(OBJECTS, 0))
    for scene in scenes:
        frequency.update(item.name for item in scene.items)
    present_objects = []
    for scene in scenes:
        present_objects.append([item.name for item in rng.sample(scene.items, 2)])

    # 3. A question for a present object, then one for an absent object, twice for each image.
    for split in ("random", "popular", "adversarial"):
        rows = []
        for image_name, scene, present in zip(image_names, scenes, present_objects, strict=True):
            absent = choose_absent_objects(scene, split, frequency, rng)
            for present_name, absent_name in zip(present, absent, strict=True):
                rows.append(_pope_row(len(rows) + 1, image_name, present_name, "yes"))
                rows.append(_pope_row(len(rows) + 1, image_name, absent_name, "no"))
        write_jsonl(folder / f"pope_{split}.jsonl", rows)


def choose_absent_objects(scene, split, frequency, rng):
    """Choose two absent objects to ask for, as POPE's splits do.

    random: any. popular: those that are most frequent in the set. adversarial: the most popular
    ones of the scene's theme, then those of other themes.
    """
    present = {item.name for item in scene.items}
    absent = [name for name in OBJECTS if name not in present]
    if split == "random":
        return rng.sample(absent, 2)
    if split == "popular":
        absent.sort(key=frequency.get, reverse=True)
        return absent[:2]

    def distance_from_theme(name):
        """Return a key that sorts by theme first, then by popularity."""
        theme = THEME_OF[name]
        return theme != scene.theme, THEMES[theme].index(name)

    absent.sort(key=distance_from_theme)
    return absent[:2]


def _pope_row(question_id, image_name, object_name, label):
    """Return one question of POPE."""
    question = f"Is there {with_article(object_name)} in the picture?"
    return {"question_id": question_id, "image": image_name, "text": question, "label": label}
