"""Drawing: how a scene becomes pixels, in flat colors."""

from pathlib import Path

from PIL import Image, ImageDraw

from minialign.utils.files import read_json
from tiny_world.scenes import IMAGE_SIZE, Item, Scene

# Each color as (fill, line). Outlines and details have the second, so that they show on black too.
RGB = {
    "red": ((225, 25, 35), (110, 5, 15)),
    "yellow": ((255, 222, 20), (130, 100, 0)),
    "green": ((15, 145, 45), (0, 65, 15)),
    "blue": ((30, 75, 235), (5, 20, 110)),
    "purple": ((170, 40, 200), (75, 5, 95)),
    "brown": ((125, 65, 20), (55, 25, 5)),
    "white": ((255, 255, 255), (95, 95, 105)),
    "black": ((25, 25, 30), (120, 120, 130)),
}
# The silhouette of each object, on a square of 24 x 24: [kind, tone, [x, y, x, y, ...]] of each of
# its shapes, in the order in which they are painted. `_paint_shape` knows the kinds. The tone is
# "fill" or "line".
SHAPES = read_json(Path(__file__).with_name("shapes.json"))


def render(scene: Scene) -> Image.Image:
    """Draw the image of a scene, 96 x 96 pixels in RGB."""
    image = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))
    draw = ImageDraw.Draw(image)
    BACKGROUNDS[scene.theme](draw)
    for item in scene.items:
        paint_item(draw, item)
    return image


def paint_item(draw: ImageDraw.ImageDraw, item: Item):
    """Paint the silhouette of an object, scaled to its size."""
    fill_color, line_color = RGB[item.color]
    scale = (item.size - 1) / 24
    for kind, tone, corners in SHAPES[item.name]:
        color = fill_color if tone == "fill" else line_color
        points = []
        for i, value in enumerate(corners):
            origin = item.left if i % 2 == 0 else item.top
            points.append(round(origin + value * scale))
        _paint_shape(draw, kind, points, color, line_color)


def _paint_shape(draw, kind, points, color, line_color):
    """Paint one shape. All but rings and lines have an outline."""
    if kind == "rect":
        draw.rectangle(points, fill=color, outline=line_color)
    elif kind == "poly":
        draw.polygon(points, fill=color, outline=line_color)
    elif kind == "oval":
        draw.ellipse(points, fill=color, outline=line_color)
    elif kind == "dish":
        draw.chord(points, start=0, end=180, fill=color, outline=line_color)
    elif kind == "dome":
        draw.chord(points, start=180, end=360, fill=color, outline=line_color)
    elif kind == "ring":
        draw.ellipse(points, outline=color, width=3)
    elif kind == "stroke":
        draw.line(points, fill=color, width=1)
    elif kind == "thick":
        draw.line(points, fill=color, width=2)


# --- backgrounds, in muted colors that no object has


def _paint_kitchen(draw):
    """Paint a tiled wall, a counter and its edge."""
    joint = (205, 186, 155)
    draw.rectangle((0, 0, 95, 63), fill=(222, 205, 175))
    for position in range(15, 96, 16):
        draw.rectangle((position, 0, position, 63), fill=joint)
        draw.rectangle((0, position % 64, 95, position % 64), fill=joint)
    draw.rectangle((0, 64, 95, 95), fill=(188, 150, 125))
    draw.rectangle((0, 64, 95, 67), fill=(165, 128, 104))


def _paint_office(draw):
    """Paint a wall with a window, and a floor."""
    frame = (150, 160, 176)
    draw.rectangle((0, 0, 95, 71), fill=(172, 184, 200))
    draw.rectangle((12, 8, 83, 40), fill=(196, 210, 226))
    draw.rectangle((46, 8, 49, 40), fill=frame)
    draw.rectangle((12, 23, 83, 25), fill=frame)
    draw.rectangle((0, 72, 95, 95), fill=(142, 132, 140))


def _paint_park(draw):
    """Paint a sky, two hills and grass."""
    hill = (158, 198, 140)
    draw.rectangle((0, 0, 95, 47), fill=(165, 212, 235))
    draw.ellipse((-20, 36, 60, 80), fill=hill)
    draw.ellipse((40, 38, 120, 80), fill=hill)
    draw.rectangle((0, 54, 95, 95), fill=(140, 188, 122))


def _paint_street(draw):
    """Paint houses with a row of windows, and a road with lane marks."""
    draw.rectangle((0, 0, 95, 95), fill=(205, 210, 214))
    for left, top in ((0, 14), (34, 4), (66, 20)):
        draw.rectangle((left, top, left + 27, 57), fill=(190, 172, 176))
        for window in range(left + 4, left + 24, 8):
            draw.rectangle((window, top + 5, window + 3, top + 12), fill=(214, 200, 200))
    draw.rectangle((0, 58, 95, 95), fill=(148, 148, 154))
    for left in range(4, 96, 24):
        draw.rectangle((left, 76, left + 11, 78), fill=(176, 176, 180))


BACKGROUNDS = {
    "kitchen": _paint_kitchen,
    "office": _paint_office,
    "park": _paint_park,
    "street": _paint_street,
}
