"""Scenes of the tiny world: what an image may show, how it is drawn at random, how it is perceived.

A Scene is the truth. `perceive` turns it into what somebody with expectations would report. Texts
are made from either of the two. All randomness comes from a `random.Random` that is handed in.
"""

import random
from dataclasses import dataclass, replace

# An image has 3 x 2 cells, each with one object at most. In pixels:
IMAGE_SIZE = 96
CELL_WIDTH = 32
CELL_HEIGHT = 48
PLACES = ("top left", "top middle", "top right", "bottom left", "bottom middle", "bottom right")

# How many objects a scene has, and how likely that is.
NUMBERS = (2, 3, 4)
NUMBER_WEIGHTS = (0.25, 0.40, 0.35)

# The objects of each theme, the most popular first.
THEMES = {
    "kitchen": ("cup", "bowl", "banana", "knife", "pot"),
    "office": ("laptop", "book", "pen", "lamp", "clock"),
    "park": ("tree", "bench", "dog", "ball", "kite"),
    "street": ("car", "bus", "bicycle", "sign", "cone"),
}
POPULARITY = (6, 5, 3, 2, 1)
OBJECTS = tuple(name for names in THEMES.values() for name in names)
THEME_OF = {name: theme for theme, names in THEMES.items() for name in names}

COLORS = ("red", "yellow", "green", "blue", "purple", "brown", "white", "black")
# The typical color of an object, and the two cells (indices into PLACES) that it prefers.
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


@dataclass(frozen=True)
class SceneDistribution:
    """How much scenes follow expectations. All values are probabilities."""

    off_theme: float | None  # an object is of another theme; None: all objects are equally likely
    typical_color: float  # an object has its typical color, otherwise any color
    preferred_cell: float  # an object is in one of its preferred cells, otherwise in any free one


DISTRIBUTIONS = {
    "text": SceneDistribution(0.06, 0.88, 0.7),
    "typical": SceneDistribution(0.30, 0.60, 0.2),
    "shifted": SceneDistribution(0.50, 0.35, 0.2),
    "balanced": SceneDistribution(None, 0, 0.2),
}


@dataclass(frozen=True)
class Item:
    """One object of a scene."""

    name: str
    color: str
    cell: int  # index into PLACES
    size: int  # pixels
    offset: tuple[int, int]  # of its top left corner in the cell, in pixels

    @property
    def left(self):
        """Return the x of its left edge in the image, in pixels."""
        return self.cell % 3 * CELL_WIDTH + self.offset[0]

    @property
    def top(self):
        """Return the y of its top edge in the image, in pixels."""
        return self.cell // 3 * CELL_HEIGHT + self.offset[1]


@dataclass(frozen=True)
class Scene:
    """A theme and two to four different objects in different cells, row by row."""

    theme: str
    items: list[Item]


def draw_scene(rng: random.Random, distribution: SceneDistribution) -> Scene:
    """Draw a scene at random."""
    # 1. The theme, and the names of the objects.
    theme = rng.choice(list(THEMES))
    names = []
    for _ in range(rng.choices(NUMBERS, NUMBER_WEIGHTS)[0]):
        names.append(_draw_name(rng, distribution, theme, names))

    # 2. A color, a free cell, a size and an offset for each of them.
    items = []
    free_cells = list(range(len(PLACES)))
    for name in names:
        typical_color, preferred_cells = HABITS[name]
        color = typical_color
        if rng.random() >= distribution.typical_color:
            color = rng.choice(COLORS)
        candidates = [cell for cell in preferred_cells if cell in free_cells]
        if not candidates or rng.random() >= distribution.preferred_cell:
            candidates = free_cells
        cell = rng.choice(candidates)
        free_cells.remove(cell)
        size = rng.randint(20, 28)
        offset_x = rng.randint(1, CELL_WIDTH - size - 1)
        offset_y = rng.randint(2, CELL_HEIGHT - size - 2)
        items.append(Item(name, color, cell, size, (offset_x, offset_y)))

    # 3. Row by row.
    items.sort(key=lambda item: item.cell)
    return Scene(theme, items)


def _draw_name(rng, distribution, theme, taken):
    """Draw the name of one more object of a scene."""
    if distribution.off_theme is None:
        return rng.choice([name for name in OBJECTS if name not in taken])
    if rng.random() < distribution.off_theme:
        theme = rng.choice([other for other in THEMES if other != theme])
    return draw_popular(rng, theme, taken)


def draw_popular(rng, theme, taken):
    """Draw an object of a theme that is not in `taken`. Popular ones are more likely."""
    names = []
    weights = []
    for name, weight in zip(THEMES[theme], POPULARITY, strict=True):
        if name not in taken:
            names.append(name)
            weights.append(weight)
    return rng.choices(names, weights)[0]


def perceive(scene: Scene, rng: random.Random, caption_noise: float) -> Scene:
    """Return a scene as somebody who expects the usual would report it.

    With probability `caption_noise` (q) an object of another theme is taken for a popular object of
    this theme that is not there. With the same probability an untypical color is taken for the
    typical one of the object that is reported.
    """
    taken = {item.name for item in scene.items}
    perceived = []
    for item in scene.items:
        if THEME_OF[item.name] != scene.theme and rng.random() < caption_noise:
            item = replace(item, name=draw_popular(rng, scene.theme, taken))
            taken.add(item.name)
        typical_color, _ = HABITS[item.name]
        if item.color != typical_color and rng.random() < caption_noise:
            item = replace(item, color=typical_color)
        perceived.append(item)
    return Scene(scene.theme, perceived)


def corrupt(scene: Scene, rng: random.Random) -> Scene:
    """Return a scene with one or two errors: another object of the theme, color or place."""
    items = list(scene.items)
    num_errors = rng.choice((1, 2))
    for i in rng.sample(range(len(items)), num_errors):
        item = items[i]
        aspect = rng.choice(("object", "color", "place"))
        if aspect == "object":
            present = [other.name for other in items]
            items[i] = replace(item, name=draw_popular(rng, scene.theme, present))
        elif aspect == "color":
            other_colors = [color for color in COLORS if color != item.color]
            items[i] = replace(item, color=rng.choice(other_colors))
        else:
            used_cells = {other.cell for other in items}
            free_cells = [cell for cell in range(len(PLACES)) if cell not in used_cells]
            items[i] = replace(item, cell=rng.choice(free_cells))
    return Scene(scene.theme, items)
