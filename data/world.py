"""The tiny world: what a picture may hold, how it is drawn, what is said of it, and the files made from it.

Pure functions of a `random.Random` handed in. A Scene is the truth; `perceive` turns it into what somebody with
expectations would report, and every text is made from whichever of the two it is given.
"""

import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image, ImageDraw

from minialign.utils.files import write_json, write_jsonl

SIDE, CELL_WIDTH, CELL_HEIGHT = 96, 32, 48  # pixels; 3 x 2 cells
PLACES = ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right")
NUMBERS, NUMBER_WEIGHTS = (2, 3, 4), (0.25, 0.40, 0.35)
THEMES = {  # most popular first
    "kitchen": ("cup", "bowl", "banana", "knife", "pot"),
    "office": ("laptop", "book", "pen", "lamp", "clock"),
    "park": ("tree", "bench", "dog", "ball", "kite"),
    "street": ("car", "bus", "bicycle", "sign", "cone"),
}
POPULARITY = (6, 5, 3, 2, 1)
OBJECTS = tuple(name for names in THEMES.values() for name in names)
HOME = {name: theme for theme, names in THEMES.items() for name in names}
PLURALS = {"knife": "knives", "bench": "benches", "bus": "buses"}  # the others take an s

# Each colour as (fill, line): lines and details take the second, so that black things keep their insides visible.
COLOURS = {
    "red": ((225, 25, 35), (110, 5, 15)),
    "yellow": ((255, 222, 20), (130, 100, 0)),
    "green": ((15, 145, 45), (0, 65, 15)),
    "blue": ((30, 75, 235), (5, 20, 110)),
    "purple": ((170, 40, 200), (75, 5, 95)),
    "brown": ((125, 65, 20), (55, 25, 5)),
    "white": ((255, 255, 255), (95, 95, 105)),
    "black": ((25, 25, 30), (120, 120, 130)),
}
# Typical colour and preferred cells (indices into PLACES).
HABITS = {
    "cup": ("red", (3, 4)),
    "bowl": ("blue", (4, 5)),
    "banana": ("yellow", (3, 5)),
    "knife": ("black", (0, 1)),
    "pot": ("white", (1, 2)),
    "laptop": ("black", (4, 3)),
    "book": ("purple", (0, 5)),
    "pen": ("blue", (5, 4)),
    "lamp": ("yellow", (0, 2)),
    "clock": ("white", (1, 2)),
    "tree": ("green", (0, 2)),
    "bench": ("brown", (4, 5)),
    "dog": ("brown", (3, 4)),
    "ball": ("red", (3, 5)),
    "kite": ("purple", (1, 2)),
    "car": ("blue", (3, 4)),
    "bus": ("red", (4, 5)),
    "bicycle": ("green", (3, 5)),
    "sign": ("yellow", (0, 2)),
    "cone": ("red", (5, 3)),
}
# Silhouettes on a 24 x 24 square, painted in order: (shape, tone, corners). "ring" and "stroke" are lines without a border.
SHAPES = {
    "cup": (
        ("ring", "fill", (13, 8, 23, 17)),
        ("poly", "fill", (2, 3, 18, 3, 16, 22, 4, 22)),
        ("rect", "line", (3, 6, 17, 7)),
    ),
    "bowl": (
        ("dish", "fill", (0, -2, 24, 21)),
        ("rect", "fill", (7, 20, 17, 22)),
        ("oval", "line", (0, 5, 24, 12)),
    ),
    "banana": (
        ("poly", "fill", (3, 2, 7, 2, 8, 9, 12, 13, 18, 14, 23, 11, 23, 15, 17, 21, 9, 20, 4, 14)),
        ("rect", "line", (3, 0, 6, 3)),
    ),
    "knife": (
        ("poly", "fill", (7, 0, 13, 3, 17, 14, 7, 14)),
        ("rect", "line", (5, 13, 19, 15)),
        ("rect", "fill", (9, 15, 15, 23)),
    ),
    "pot": (
        ("rect", "fill", (0, 10, 24, 13)),
        ("dome", "fill", (4, 3, 20, 16)),
        ("oval", "line", (10, 0, 14, 4)),
        ("rect", "fill", (3, 9, 21, 22)),
    ),
    "laptop": (
        ("rect", "fill", (3, 2, 21, 15)),
        ("rect", "line", (6, 5, 18, 12)),
        ("poly", "fill", (3, 15, 21, 15, 24, 21, 0, 21)),
    ),
    "book": (
        ("poly", "fill", (0, 4, 12, 8, 12, 22, 0, 18)),
        ("poly", "fill", (24, 4, 12, 8, 12, 22, 24, 18)),
        ("stroke", "line", (3, 9, 9, 11)),
        ("stroke", "line", (3, 13, 9, 15)),
        ("stroke", "line", (21, 9, 15, 11)),
        ("stroke", "line", (21, 13, 15, 15)),
    ),
    "pen": (
        ("poly", "line", (1, 23, 4, 15, 9, 20)),
        ("poly", "fill", (4, 15, 18, 1, 23, 6, 9, 20)),
        ("stroke", "line", (15, 4, 20, 9)),
    ),
    "lamp": (
        ("rect", "line", (11, 11, 13, 20)),
        ("poly", "fill", (8, 0, 16, 0, 22, 12, 2, 12)),
        ("dome", "fill", (5, 17, 19, 27)),
    ),
    "clock": (
        ("oval", "line", (2, 0, 10, 7)),
        ("oval", "line", (14, 0, 22, 7)),
        ("stroke", "line", (6, 19, 3, 23)),
        ("stroke", "line", (18, 19, 21, 23)),
        ("oval", "fill", (2, 2, 22, 22)),
        ("stroke", "line", (12, 5, 12, 12)),
        ("stroke", "line", (12, 12, 17, 12)),
    ),
    "tree": (
        ("rect", "line", (10, 14, 14, 23)),
        ("oval", "fill", (0, 6, 12, 17)),
        ("oval", "fill", (12, 6, 24, 17)),
        ("oval", "fill", (5, 0, 19, 13)),
    ),
    "bench": (
        ("rect", "line", (3, 4, 5, 22)),
        ("rect", "line", (19, 4, 21, 22)),
        ("rect", "fill", (0, 3, 24, 7)),
        ("rect", "fill", (0, 12, 24, 16)),
    ),
    "dog": (
        ("poly", "fill", (0, 4, 3, 4, 6, 11, 3, 12)),
        ("rect", "fill", (4, 15, 7, 23)),
        ("rect", "fill", (13, 15, 16, 23)),
        ("rect", "fill", (3, 10, 17, 17)),
        ("rect", "fill", (14, 4, 24, 12)),
        ("poly", "line", (14, 3, 17, 3, 17, 10, 14, 10)),
        ("rect", "line", (22, 6, 24, 8)),
    ),
    "ball": (
        ("oval", "fill", (2, 2, 22, 22)),
        ("oval", "fill", (8, 2, 16, 22)),
        ("stroke", "line", (2, 12, 22, 12)),
    ),
    "kite": (
        ("stroke", "line", (12, 17, 8, 19, 14, 21, 9, 23)),
        ("poly", "fill", (12, 0, 22, 8, 12, 18, 2, 8)),
        ("stroke", "line", (12, 0, 12, 18)),
        ("stroke", "line", (2, 8, 22, 8)),
    ),
    "car": (
        ("poly", "fill", (4, 11, 8, 4, 16, 4, 21, 11)),
        ("rect", "line", (9, 6, 15, 10)),
        ("rect", "fill", (0, 10, 24, 18)),
        ("oval", "line", (3, 14, 9, 21)),
        ("oval", "line", (15, 14, 21, 21)),
    ),
    "bus": (
        ("rect", "fill", (0, 1, 24, 20)),
        ("rect", "line", (2, 4, 7, 10)),
        ("rect", "line", (9, 4, 15, 10)),
        ("rect", "line", (17, 4, 22, 10)),
        ("oval", "line", (3, 16, 9, 23)),
        ("oval", "line", (15, 16, 21, 23)),
    ),
    "bicycle": (
        ("ring", "fill", (0, 10, 11, 21)),
        ("ring", "fill", (13, 10, 24, 21)),
        ("thick", "fill", (5, 16, 8, 7, 17, 7, 12, 16, 5, 16)),
        ("thick", "fill", (18, 16, 16, 3, 20, 3)),
        ("thick", "fill", (6, 6, 10, 6)),
    ),
    "sign": (
        ("rect", "line", (9, 12, 12, 24)),
        ("poly", "fill", (0, 1, 15, 1, 23, 7, 15, 13, 0, 13)),
        ("rect", "line", (4, 6, 14, 8)),
    ),
    "cone": (
        ("poly", "fill", (10, 0, 14, 0, 19, 20, 5, 20)),
        ("poly", "line", (8, 8, 16, 8, 17, 12, 7, 12)),
        ("rect", "fill", (1, 19, 23, 23)),
    ),
}


@dataclass(frozen=True)
class Knobs:
    """Chances that an object is off-theme (None: all objects alike), has its typical colour (else uniform), keeps its cells."""

    off: float | None
    dom: float
    pref: float


KNOBS = {
    "text": Knobs(0.06, 0.88, 0.7),
    "typical": Knobs(0.30, 0.60, 0.2),
    "shifted": Knobs(0.50, 0.35, 0.2),
    "balanced": Knobs(None, 0, 0.2),
}
EVALUATION = ("typical", "shifted", "balanced")
MISTAKES = 0.35  # q of the supervised texts
# Each file set draws from its own stream, named by these words; everything else made of the world must use other names.
SEEDS = {
    "train": "tiny world 1: train",
    "tune": "tiny world 1: tune",
    "final": "tiny world 1: final",
    "study": "tiny world 1: study",
}
SIZES = {"train": 1500, "tune": 200, "final": 300, "study": 400}


@dataclass(frozen=True)
class Item:
    """One object: its cell (index into PLACES), its size and its offset inside the cell in pixels."""

    name: str
    colour: str
    cell: int
    size: int
    offset: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """A theme and two to four different objects in different cells, in raster order."""

    theme: str
    items: list[Item]


def popular(rng, theme, taken):
    """An object of the theme, by popularity, that is not in `taken`."""
    free = [(name, weight) for name, weight in zip(THEMES[theme], POPULARITY) if name not in taken]
    return rng.choices([name for name, _ in free], [weight for _, weight in free])[0]


def draw_scene(rng, knobs):
    """A Scene by the knobs: names first, then a colour, a free cell, a size and a jitter for each."""
    theme, names, items, free = rng.choice(list(THEMES)), [], [], list(range(len(PLACES)))
    for _ in range(rng.choices(NUMBERS, NUMBER_WEIGHTS)[0]):
        if knobs.off is None:
            names.append(rng.choice([name for name in OBJECTS if name not in names]))
        else:
            home = (
                rng.choice([other for other in THEMES if other != theme])
                if rng.random() < knobs.off
                else theme
            )
            names.append(popular(rng, home, names))
    for name in names:
        typical, preferred = HABITS[name]
        colour = typical if rng.random() < knobs.dom else rng.choice(list(COLOURS))
        liked = [cell for cell in preferred if cell in free]
        cell = rng.choice(liked if liked and rng.random() < knobs.pref else free)
        free.remove(cell)
        size = rng.randint(20, 28)
        offset = (rng.randint(1, CELL_WIDTH - size - 1), rng.randint(2, CELL_HEIGHT - size - 2))
        items.append(Item(name, colour, cell, size, offset))
    return Scene(theme, sorted(items, key=lambda item: item.cell))


def perceive(scene, rng, q):
    """The scene as reported by somebody who expects the usual: with chance q an off-theme object becomes a popular absent
    one of the theme, and with chance q an untypical colour the typical one of what is reported."""
    taken, items = {item.name for item in scene.items}, []
    for item in scene.items:
        if HOME[item.name] != scene.theme and rng.random() < q:
            item = replace(item, name=popular(rng, scene.theme, taken))
            taken.add(item.name)
        typical = HABITS[item.name][0]
        if item.colour != typical and rng.random() < q:
            item = replace(item, colour=typical)
        items.append(item)
    return Scene(scene.theme, items)


# --- pictures


def paint_background(draw, theme):
    """Muted flat colours that no object has."""

    def rect(colour, *corners):
        draw.rectangle(corners, fill=colour)

    if theme == "kitchen":
        rect((222, 205, 175), 0, 0, 95, 63)
        for step in range(15, 96, 16):  # tiles
            rect((205, 186, 155), step, 0, step, 63)
            rect((205, 186, 155), 0, step % 64, 95, step % 64)
        rect((188, 150, 125), 0, 64, 95, 95)
        rect((165, 128, 104), 0, 64, 95, 67)
    elif theme == "office":
        rect((172, 184, 200), 0, 0, 95, 71)
        rect((196, 210, 226), 12, 8, 83, 40)  # a window
        rect((150, 160, 176), 46, 8, 49, 40)
        rect((150, 160, 176), 12, 23, 83, 25)
        rect((142, 132, 140), 0, 72, 95, 95)
    elif theme == "park":
        rect((165, 212, 235), 0, 0, 95, 47)
        draw.ellipse((-20, 36, 60, 80), fill=(158, 198, 140))  # hills
        draw.ellipse((40, 38, 120, 80), fill=(158, 198, 140))
        rect((140, 188, 122), 0, 54, 95, 95)
    else:
        rect((205, 210, 214), 0, 0, 95, 95)
        for left, top in ((0, 14), (34, 4), (66, 20)):  # houses
            rect((190, 172, 176), left, top, left + 27, 57)
            for window in range(left + 4, left + 24, 8):
                rect((214, 200, 200), window, top + 5, window + 3, top + 12)
        rect((148, 148, 154), 0, 58, 95, 95)
        for left in range(4, 96, 24):  # lane marks
            rect((176, 176, 180), left, 76, left + 11, 78)


def paint_item(draw, item):
    """The silhouette of one object, scaled to its size."""
    left, top = (
        item.cell % 3 * CELL_WIDTH + item.offset[0],
        item.cell // 3 * CELL_HEIGHT + item.offset[1],
    )
    tones = dict(zip(("fill", "line"), COLOURS[item.colour]))
    scale = (item.size - 1) / 24
    for shape, tone, corners in SHAPES[item.name]:
        at = [round((left, top)[index % 2] + value * scale) for index, value in enumerate(corners)]
        style = {"fill": tones[tone], "outline": tones["line"]}
        if shape == "rect":
            draw.rectangle(at, **style)
        elif shape == "poly":
            draw.polygon(at, **style)
        elif shape == "oval":
            draw.ellipse(at, **style)
        elif shape in ("dish", "dome"):  # lower and upper half of an ellipse
            draw.chord(at, *((0, 180) if shape == "dish" else (180, 360)), **style)
        elif shape == "ring":
            draw.ellipse(at, outline=tones[tone], width=3)
        else:
            draw.line(at, fill=tones[tone], width={"stroke": 1, "thick": 2}[shape])


def render(scene):
    """The picture of a scene: 96 x 96 RGB, flat colours."""
    picture = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(picture)
    paint_background(draw, scene.theme)
    for item in scene.items:
        paint_item(draw, item)
    return picture


# --- texts

# A request to describe the picture, and how each sentence of its answer reads: the request settles the wording, so that
# what a chosen and a rejected answer differ in is content, and a model's answers do not grow or shrink by a change of style.
WORDINGS = (
    (
        "The picture was taken in {theme}. Which things are there?",
        "There is {thing} at the {place}.",
    ),
    ("This picture shows {theme}. Describe what is in it.", "{Thing} is at the {place}."),
    (
        "Here is a picture of {theme}. What can be seen in it?",
        "At the {place} you can see {thing}.",
    ),
)


def article(words):
    """The words with "a" or "an" in front."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption_request(scene, rng):
    """A request to describe the picture that names the theme, as the prompts of LLaVA-Instruct do, and its answer's wording."""
    request, wording = rng.choice(WORDINGS)
    return request.format(theme=article(scene.theme)), wording


def describe(scene, wording):
    """A sentence for each item, in the items' order, all in the one wording."""
    things = [(article(f"{item.colour} {item.name}"), PLACES[item.cell]) for item in scene.items]
    return " ".join(
        wording.format(thing=thing, Thing=thing[0].upper() + thing[1:], place=place)
        for thing, place in things
    )


def caption_turn(scene, rng):
    """(request, caption) of a scene."""
    request, wording = caption_request(scene, rng)
    return request, describe(scene, wording)


def questions(scene, rng, n):
    """n (up to 4) different (question, answer) pairs: presence one half, colour and position a quarter each.

    Presence is balanced between yes and no; absent objects are half popular ones of the theme, half any.
    """
    names, asked = [item.name for item in scene.items], {}
    while len(asked) < n:
        item, kind = (
            rng.choice(scene.items),
            rng.choice(("present", "absent", "colour", "position")),
        )
        if kind == "present":
            question, answer = f"Is there {article(item.name)} in the picture?", "Yes."
        elif kind == "absent":
            usual = rng.random() < 0.5
            name = (
                popular(rng, scene.theme, names)
                if usual
                else rng.choice([name for name in OBJECTS if name not in names])
            )
            question, answer = f"Is there {article(name)} in the picture?", "No."
        elif kind == "colour":
            question, answer = (
                f"What colour is the {item.name}?",
                f"The {item.name} is {item.colour}.",
            )
        else:
            question, answer = (
                f"Where is the {item.name}?",
                f"The {item.name} is at the {PLACES[item.cell]}.",
            )
        asked.setdefault(question, answer)
    return list(asked.items())


def corrupted(scene, rng):
    """The scene with one or two rule-made mistakes: an object of the theme for another, a colour, or a place."""
    items = list(scene.items)
    for index in rng.sample(range(len(items)), rng.choice((1, 2))):
        item, kind = items[index], rng.choice(("object", "colour", "place"))
        if kind == "object":
            changed = replace(item, name=popular(rng, scene.theme, [other.name for other in items]))
        elif kind == "colour":
            changed = replace(
                item, colour=rng.choice([colour for colour in COLOURS if colour != item.colour])
            )
        else:
            used = {other.cell for other in items}
            changed = replace(
                item, cell=rng.choice([cell for cell in range(len(PLACES)) if cell not in used])
            )
        items[index] = changed
    return Scene(scene.theme, items)


def turn(scene, rng):
    """One question of the instruction data, its answer and, if it asks for a caption (7 in 10 do), a corrupted caption, else None."""
    if rng.random() >= 0.7:
        return *questions(scene, rng, 1)[0], None
    request, wording = caption_request(scene, rng)
    return request, describe(scene, wording), describe(corrupted(scene, rng), wording)


def scene_texts(n, rng):
    """n (question, answer) pairs on scenes nobody sees, drawn with the text knobs: what a language model learns to expect."""
    return [turn(draw_scene(rng, KNOBS["text"]), rng)[:2] for _ in range(n)]


# --- files


def train_scenes(q=MISTAKES):
    """The (true, perceived) scenes of the training pictures, in order: each is perceived once, with strength q, for all its texts."""
    rng = random.Random(SEEDS["train"])
    scenes = [draw_scene(rng, KNOBS["typical"]) for _ in range(SIZES["train"])]
    return [(scene, perceive(scene, rng, q)) for scene in scenes]


def write_pictures(folder, scenes):
    """Write images/ and give the file names. A palette holds the few flat colours and reads back to the same RGB."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    names = [f"{index:04}.png" for index in range(1, len(scenes) + 1)]
    for name, scene in zip(names, scenes):
        render(scene).quantize(64).save(folder / "images" / name, optimize=True)
    return names


def write_captions(folder, names, scenes, rng):
    """Write captions.json: the true objects of each picture, the prompt it is described on, and the words to look for."""
    vocabulary = {
        "objects": {name: [name, PLURALS.get(name, name + "s")] for name in OBJECTS},
        "colours": list(COLOURS),
    }
    captions = [
        {
            "image": name,
            "prompt": caption_request(scene, rng)[0],
            "objects": [
                {"name": item.name, "colour": item.colour, "place": PLACES[item.cell]}
                for item in scene.items
            ],
        }
        for name, scene in zip(names, scenes)
    ]
    write_json(folder / "captions.json", {"vocabulary": vocabulary, "captions": captions})


def write_instruct(folder, pairs, rng):
    """Write the pictures of (true, perceived) scenes and what is said of them: instruct.json, one question a picture answered
    from the perceived scene; povid.json, its captions with a corrupted rejected one; captions.json, the truth."""
    truths = [true for true, _ in pairs]
    names, instruct, povid = write_pictures(folder, truths), [], []
    for name, (_, seen) in zip(names, pairs):
        question, answer, rejected = turn(seen, rng)
        human = {"from": "human", "value": f"<image>\n{question}"}
        record = {
            "id": f"tiny-{Path(name).stem}",
            "image": name,
            "conversations": [human, {"from": "gpt", "value": answer}],
        }
        instruct.append(record)
        if rejected:
            povid.append(
                {**record, "rejected_conversations": [human, {"from": "gpt", "value": rejected}]}
            )
    write_json(folder / "instruct.json", instruct)
    write_json(folder / "povid.json", povid)
    write_captions(folder, names, truths, rng)


def absent_objects(scene, split, counts, rng):
    """Two absent objects to ask for, as POPE's splits choose them: any, the set's most frequent, or the theme's most popular."""
    present = {item.name for item in scene.items}
    absent = [name for name in OBJECTS if name not in present]
    if split == "random":
        return rng.sample(absent, 2)
    if split == "popular":
        return sorted(absent, key=lambda name: -counts[name])[:2]
    return sorted(
        absent, key=lambda name: (HOME[name] != scene.theme, THEMES[HOME[name]].index(name))
    )[:2]


def write_evaluation(folder, n, knobs, rng):
    """Write n pictures, captions.json and POPE's three files: on each picture two objects that are there and two that are not."""
    scenes = [draw_scene(rng, knobs) for _ in range(n)]
    names = write_pictures(folder, scenes)
    write_captions(folder, names, scenes, rng)
    counts = Counter(item.name for scene in scenes for item in scene.items)
    present = [
        [item.name for item in rng.sample(scene.items, 2)] for scene in scenes
    ]  # the same in all three, as in POPE
    for split in ("random", "popular", "adversarial"):
        rows = []
        for name, scene, there in zip(names, scenes, present):
            for pair in zip(there, absent_objects(scene, split, counts, rng)):
                for asked, label in zip(pair, ("yes", "no")):
                    rows.append(
                        {
                            "question_id": len(rows) + 1,
                            "image": name,
                            "text": f"Is there {article(asked)} in the picture?",
                            "label": label,
                        }
                    )
        write_jsonl(folder / f"pope_{split}.jsonl", rows)


def write_sets(root, part):
    """Write the three evaluation sets of a part under `root`, each from its own seed."""
    for name in EVALUATION:
        write_evaluation(
            Path(root) / part / name,
            SIZES[part],
            KNOBS[name],
            random.Random(f"{SEEDS[part]}, {name}"),
        )


def write_all(root, q=MISTAKES):
    """Write train/, tune/ and final/ under `root`; q is the strength of the training texts' expectations."""
    write_instruct(Path(root) / "train", train_scenes(q), random.Random(SEEDS["train"] + ", texts"))
    for part in ("tune", "final"):
        write_sets(root, part)
