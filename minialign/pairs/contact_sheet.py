"""The contact sheet: one image that shows a few preference pairs, for a person to look at.

Every row shows the image as the model saw it. Beside it stand the question, the objects that are
really in the image (where annotations are at hand), and the chosen and the rejected response.
"""

import difflib
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.data.records import Record
from minialign.models.loading import VLM
from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.utils.files import InputError
from minialign.utils.seeding import seeded_generator

BLACK = (30, 30, 34)
GRAY = (120, 120, 128)
GREEN = (0, 125, 60)
RED = (205, 30, 30)
ORANGE = (255, 140, 0)
LIGHT_GRAY = (235, 235, 238)

DEFAULT_ROWS = 8

# Lengths in pixels.
IMAGE_SIZE = 256
MIN_EDGE = 96  # of an image
TEXT_WIDTH = 844
GAP = 32  # between an image and its text
MARGIN = 24  # around the sheet and between its rows
LARGE_FONT = 19
SMALL_FONT = 14
LEGEND_FONT = 16
LINE_SPACING = 6


@dataclass
class Paragraph:
    """Words that fill as many lines as they need, each in a color of its own."""

    words: list[str]
    colors: list[tuple]  # one for each word
    font_size: int
    space_above: int = 0


@dataclass
class PlacedWord:
    """A word and where it is drawn."""

    text: str
    color: tuple
    x: float
    y: float
    font_size: int


def contact_sheet(
    vlm: VLM,
    records: list[Record],
    pairs: list[dict],
    annotator: GroundTruthAnnotator | None = None,
    *,
    max_rows: int = DEFAULT_ROWS,
) -> Image.Image:
    """Draw some pairs of records below a legend, as rows of one image."""
    rows = choose_rows(records, pairs, annotator, max_rows=max_rows)
    paragraphs = legend(pairs[0], annotator)
    shown_text = "".join(pair["chosen"] + pair["rejected"] for _, pair in rows)
    if not shown_text.isascii():
        font_line = "A box is a character that this font lacks. The file of pairs has all of them."
        paragraphs.append(make_paragraph([(font_line, GRAY)], LEGEND_FONT))
    parts = [draw_paragraphs(paragraphs, IMAGE_SIZE + GAP + TEXT_WIDTH)]
    for record, pair in rows:
        image = draw_seen_image(record.paths[0], pair, vlm.image_processor, config=vlm.model.config)
        text = draw_paragraphs(describe_pair(record, pair, annotator), TEXT_WIDTH)
        parts.append(side_by_side(image, text))
    return stack(parts)


def choose_rows(records, pairs, annotator, *, max_rows):
    """Choose (record, pair)s: the first ones, but those with a false chosen response come last.

    Without annotations no chosen response is known to be false.
    """
    true_rows = []
    false_rows = []
    for record, pair in zip(records, pairs, strict=True):
        is_false = False
        if annotated_objects(annotator, record) is not None:
            is_false = annotator.judge(record, record.chosen).num_wrong > 0
        if is_false:
            false_rows.append((record, pair))
        else:
            true_rows.append((record, pair))
    return (true_rows + false_rows)[:max_rows]


def annotated_objects(annotator, record):
    """Return the objects that are really in a record's image, or None if nobody annotated it."""
    if annotator is None:
        return None
    try:
        return annotator.annotated_objects(record)
    except InputError:
        return None


# --- the image as the model saw it


@torch.no_grad()
def draw_seen_image(path, pair, image_processor, *, config) -> Image.Image:
    """Draw the whole image as the model saw it: with noise, or with most of its patches masked.

    Of an AnyRes image this is the tile that shows all of it. A tile into which the whole image was
    squashed is stretched to the image's aspect again.
    """
    tiles, size = preprocess(open_image(path), image_processor)
    if "noise" in pair:
        tiles = add_noise(tiles, pair)
    image = tile_to_image(tiles[0], image_processor)
    has_grid = image_processor.grid_pinpoints is not None
    if has_grid or image_processor.exact_size is not None:
        image = image.resize(drawn_size(size))
    if "visible" in pair:
        image = dim_masked_patches(image, pair["visible"], config)
    return image


def add_noise(tiles, pair):
    """Put the same noise on the tiles as when the pair was sampled."""
    key = [pair["seed"], pair["id"]]
    if "rounds" in pair:  # BDHS draws new noise in every round
        key.append(pair["rounds"])
    generator = seeded_generator(*key, "noise")
    return diffuse(tiles, pair["noise"], generator)


def tile_to_image(tile, image_processor):
    """Undo the normalization of a tile (3, S, S), and enlarge it."""
    mean = torch.tensor(image_processor.mean)[:, None, None]
    std = torch.tensor(image_processor.std)[:, None, None]
    levels = (tile * std + mean).clamp(0, 1) * 255
    pixels = levels.byte().permute(1, 2, 0).numpy()  # (S, S, 3)
    return Image.fromarray(pixels).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST)


def drawn_size(size):
    """Return the (width, height) at which an image of a size (height, width) is drawn."""
    height, width = size
    scale = IMAGE_SIZE / max(size)
    # Thinner than this, the patches of the image could not be told apart.
    return max(MIN_EDGE, round(width * scale)), max(MIN_EDGE, round(height * scale))


def dim_masked_patches(image, visible, config):
    """Dim an image except for its visible patches, which get a frame."""
    patches_per_side = config.vision.patches_per_side
    vertical_edges = patch_edges(image.width, patches_per_side)
    horizontal_edges = patch_edges(image.height, patches_per_side)
    dimmed = Image.blend(image, Image.new("RGB", image.size, LIGHT_GRAY), 0.62)
    draw = ImageDraw.Draw(dimmed)
    for token_index in visible:
        # A class token stands before the patches. Some models drop the first patch.
        patch = token_index - config.extra_image_tokens
        if not 0 <= patch < patches_per_side**2:
            continue  # the class token, or a patch of another tile
        row, column = divmod(patch, patches_per_side)
        left, right = vertical_edges[column : column + 2]
        top, bottom = horizontal_edges[row : row + 2]
        visible_patch = image.crop((left, top, right, bottom))
        dimmed.paste(visible_patch, (left, top))
        draw.rectangle((left, top, right - 1, bottom - 1), outline=ORANGE, width=3)
    return dimmed


def patch_edges(length, patches_per_side):
    """Return where patches begin and end along an edge of an image, in pixels."""
    return [round(i * length / patches_per_side) for i in range(patches_per_side + 1)]


# --- the text


def legend(pair, annotator) -> list[Paragraph]:
    """Explain what the sheet shows of pairs that were sampled like this one."""
    # 1. The image.
    lines = []
    image_text = "Image: as the model saw it when it wrote the rejected answer"
    if "visible" in pair:
        image_line = [
            (f"{image_text}. Dimmed patches were masked,", GRAY),
            ("patches in a frame", ORANGE),
            ("were visible.", GRAY),
        ]
        lines.append(image_line)
    elif "noise" in pair:
        lines.append([(f"{image_text}, with noise.", GRAY)])

    # 2. The lines above and below a question.
    if "rounds" in pair:
        similarity_text = "Similarity: of the two answers, 1 if they say the same."
        round_text = "Round: the draw that was kept. Those before it were too similar."
        lines.append([(f"{similarity_text} {round_text}", GRAY)])
    if "score" in pair:
        score_text = "Score: of the chosen answer, less that of the rejected one, by"
        lines.append([(f"{score_text} {pair['scored_by']}.", GRAY)])
    objects_text = "In the image: its annotated objects. Claims that contradict them are false."
    order_text = "Pairs whose chosen answer has none are shown first."
    if annotator is None:
        lines.append([("True objects: not shown, as no captions.json is at hand.", GRAY)])
    else:
        lines.append([(f"{objects_text} {order_text}", GRAY)])

    # 3. The answers.
    color_line = [
        ("Words that differ:", GRAY),
        ("green in the chosen answer,", GREEN),
        ("red in the rejected answer.", RED),
    ]
    lines.append(color_line)
    return [make_paragraph(pieces, LEGEND_FONT) for pieces in lines]


def describe_pair(record, pair, annotator) -> list[Paragraph]:
    """Describe a pair: how it was sampled, the question, the objects and the two responses."""
    # 1. The question, and what is really in the image.
    objects = annotated_objects(annotator, record)
    paragraphs = [
        make_paragraph([(describe_sampling(pair), GRAY)], SMALL_FONT),
        make_paragraph([(record.question, BLACK)], LARGE_FONT),
    ]
    if record.system is not None:
        line = f"system text: {record.system}"
        paragraphs.append(make_paragraph([(line, GRAY)], SMALL_FONT, space_above=2))
    if objects is not None:
        line = f"in the image: {describe_objects(objects)}"
        paragraphs.append(make_paragraph([(line, GRAY)], SMALL_FONT, space_above=2))

    # 2. The responses, with the words in color that differ.
    chosen_words = pair["chosen"].split()
    rejected_words = pair["rejected"].split()
    chosen_differs, rejected_differs = differing_words(chosen_words, rejected_words)
    for title, words, differs, color in (
        ("chosen", chosen_words, chosen_differs, GREEN),
        ("rejected", rejected_words, rejected_differs, RED),
    ):
        if objects is not None:
            title += describe_truth(annotator.judge(record, pair[title]))
        paragraphs.append(make_paragraph([(title, GRAY)], SMALL_FONT, space_above=10))
        colors = [color if i in differs else BLACK for i in range(len(words))]
        paragraphs.append(Paragraph(words, colors, LARGE_FONT))
    return paragraphs


def describe_truth(judgment) -> str:
    """Return what stands behind the title of a response: how many of its claims are true."""
    if judgment.num_wrong == 0 and not judgment.right:
        return ""  # it claims nothing that the annotations could tell
    return f" (false claims: {judgment.num_wrong}, true ones: {len(judgment.right)})"


def describe_sampling(pair):
    """Return the line above a pair: its record, and how BDHS sampled it."""
    line = f"record {pair['id']}"
    if "rounds" in pair:
        line += f", round {pair['rounds']}, similarity {pair['similarity']:.3f}"
    if "visible" in pair:
        line += f", visible image tokens: {len(pair['visible'])}"
    elif "noise" in pair:
        line += f", {pair['noise']} steps of noise"
    if "score" in pair:
        line += f", score {pair['score']:.2f}"
    return line


def describe_objects(objects):
    """List annotated objects: "blue pen (top left), red cup (bottom right)"."""
    texts = []
    for item in objects:
        text = item["name"]
        if item.get("colour"):
            text = f"{item['colour']} {text}"
        if item.get("place"):
            text = f"{text} ({item['place']})"
        texts.append(text)
    return ", ".join(texts) or "no objects"


def differing_words(chosen_words, rejected_words):
    """Return the indices of the words that are not common to both, as two sets."""
    chosen_differs = set()
    rejected_differs = set()
    matcher = difflib.SequenceMatcher(None, chosen_words, rejected_words, autojunk=False)
    for tag, chosen_start, chosen_end, rejected_start, rejected_end in matcher.get_opcodes():
        if tag != "equal":
            chosen_differs.update(range(chosen_start, chosen_end))
            rejected_differs.update(range(rejected_start, rejected_end))
    return chosen_differs, rejected_differs


# --- drawing


def make_paragraph(pieces, font_size, space_above=0) -> Paragraph:
    """Make a paragraph of (text, color) pieces."""
    words = []
    colors = []
    for text, color in pieces:
        new_words = text.split()
        words += new_words
        colors += [color] * len(new_words)
    return Paragraph(words, colors, font_size, space_above)


def draw_paragraphs(paragraphs: list[Paragraph], width: int) -> Image.Image:
    """Draw paragraphs below each other, on an image that is as high as they need."""
    placed_words, height = place_words(paragraphs, width)
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    for word in placed_words:
        font = ImageFont.load_default(word.font_size)
        draw.text((word.x, word.y), word.text, word.color, font)
    return image


def place_words(paragraphs, width) -> tuple[list[PlacedWord], int]:
    """Break paragraphs into lines; return their words with positions, and the height of all."""
    placed_words = []
    y = 0
    for paragraph in paragraphs:
        font = ImageFont.load_default(paragraph.font_size)
        line_height = paragraph.font_size + LINE_SPACING
        x = 0
        y += paragraph.space_above
        for word, color in zip(paragraph.words, paragraph.colors, strict=True):
            for piece in split_word(word, font, width):
                piece_width = font.getlength(piece)
                if x > 0 and x + piece_width > width:
                    x = 0
                    y += line_height
                placed_word = PlacedWord(
                    text=piece, color=color, x=x, y=y, font_size=paragraph.font_size
                )
                placed_words.append(placed_word)
                x += piece_width
            x += font.getlength(" ")
        y += line_height
    return placed_words, y


def split_word(word, font, width) -> list[str]:
    """Split a word that is wider than a line, such as a sentence of Chinese, into pieces that fit.

    Each length is measured once for each piece, by bisection, because a word may have thousands of
    characters.
    """
    pieces = []
    while font.getlength(word) > width:
        fits = 1
        too_long = len(word)
        while fits + 1 < too_long:
            middle = (fits + too_long) // 2
            if font.getlength(word[:middle]) > width:
                too_long = middle
            else:
                fits = middle
        pieces.append(word[:fits])
        word = word[fits:]
    pieces.append(word)
    return pieces


def side_by_side(image, text) -> Image.Image:
    """Put an image and its text next to each other."""
    row = Image.new("RGB", (IMAGE_SIZE + GAP + TEXT_WIDTH, max(IMAGE_SIZE, text.height)), "white")
    row.paste(image, (0, 0))
    row.paste(text, (IMAGE_SIZE + GAP, 0))
    return row


def stack(parts) -> Image.Image:
    """Put images of the same width below each other, with a margin around each."""
    width = MARGIN + parts[0].width + MARGIN
    height = MARGIN + sum(part.height + MARGIN for part in parts)
    sheet = Image.new("RGB", (width, height), "white")
    y = MARGIN
    for part in parts:
        sheet.paste(part, (MARGIN, y))
        y += part.height + MARGIN
    return sheet
