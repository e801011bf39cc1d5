"""The contact sheet shows what the model saw, what differs, and what is really in the image."""

import argparse
from dataclasses import replace

import pytest
import torch
from bdhs_helpers import NOISE, ONE_ROUND, sample_pairs
from conftest import TINY
from PIL import Image, ImageFont

import sample
from minialign.data.diffusion import diffuse
from minialign.data.image_processor import preprocess
from minialign.data.images import open_image
from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.pairs.contact_sheet import (
    GAP,
    GRAY,
    IMAGE_SIZE,
    MARGIN,
    ORANGE,
    SMALL_FONT,
    TEXT_WIDTH,
    add_noise,
    choose_rows,
    contact_sheet,
    describe_objects,
    describe_pair,
    differing_words,
    dim_masked_patches,
    draw_seen_image,
    drawn_size,
    legend,
    make_paragraph,
    place_words,
    tile_to_image,
)
from minialign.utils.seeding import seeded_generator

PATCH = IMAGE_SIZE // 8  # pixels of a patch: an image of the tiny world has 8 x 8


@pytest.fixture
def annotator():
    """Return the annotations of the shipped training images."""
    return GroundTruthAnnotator(TINY / "train" / "captions.json")


def words_of(paragraphs):
    """Return the text of all paragraphs."""
    return " ".join(word for paragraph in paragraphs for word in paragraph.words)


# --- the image


def test_masked_patches_are_dimmed_and_visible_ones_framed(vlm):
    """A black image of which patch 9, the second of the second row, is visible."""
    black = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))

    image = dim_masked_patches(black, [9], vlm.model.config)

    assert image.getpixel((PATCH + PATCH // 2, PATCH + PATCH // 2)) == (0, 0, 0)
    assert image.getpixel((PATCH, PATCH)) == ORANGE
    assert image.getpixel((2 * PATCH - 1, 2 * PATCH - 1)) == ORANGE
    assert min(image.getpixel((2 * PATCH, 2 * PATCH))) > 100


def test_a_class_token_is_no_patch(vlm):
    """Where the class token is kept it is image token 0, and the first patch is image token 1."""
    config = replace(vlm.model.config, drop_class_token=False)
    black = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE))

    class_token = dim_masked_patches(black, [0], config)
    first_patch = dim_masked_patches(black, [1], config)

    assert class_token.getcolors() == [(IMAGE_SIZE**2, class_token.getpixel((0, 0)))]
    assert first_patch.getpixel((0, 0)) == ORANGE


@pytest.mark.parametrize("pair", [{"rounds": 2}, {}], ids=["BDHS", "distortion"])
def test_the_noise_is_that_of_the_sampling(vlm, records, pair):
    """BDHS draws new noise in each round, distortion once."""
    record = records[0]
    key = [5, record.id, *pair.values(), "noise"]
    tiles, _ = preprocess(open_image(record.paths[0]), vlm.image_processor)

    noisy_tiles = add_noise(tiles, pair | {"id": record.id, "seed": 5, "noise": 500})

    assert torch.equal(noisy_tiles, diffuse(tiles, 500, seeded_generator(*key)))


def test_a_squashed_image_is_drawn_in_its_aspect(vlm):
    """A thin one keeps an edge at which its patches can be told apart."""
    assert drawn_size((480, 640)) == (256, 192)
    assert drawn_size((640, 480)) == (192, 256)
    assert drawn_size((10, 4000)) == (256, 96)
    wide = Image.new("RGB", (256, 96))

    image = dim_masked_patches(wide, [63], vlm.model.config)

    assert image.size == (256, 96)
    assert image.getpixel((255, 95)) == image.getpixel((224, 84)) == ORANGE


@pytest.mark.parametrize("config", [ONE_ROUND, replace(NOISE, rounds=1)], ids=["masked", "noisy"])
def test_the_sheet_draws_the_noise_that_the_model_saw(vlm, records, config):
    """Without it, the image on the sheet is the clean one."""
    record = records[0]
    (pair,) = sample_pairs(vlm, [record], config)
    tiles, _ = preprocess(open_image(record.paths[0]), vlm.image_processor)
    if "noise" in pair:
        key = (pair["seed"], record.id, pair["rounds"], "noise")
        tiles = diffuse(tiles, pair["noise"], seeded_generator(*key))
    expected = tile_to_image(tiles[0], vlm.image_processor)
    if "visible" in pair:
        expected = dim_masked_patches(expected, pair["visible"], vlm.model.config)

    image = draw_seen_image(record.paths[0], pair, vlm.image_processor, config=vlm.model.config)

    assert image.tobytes() == expected.tobytes()


# --- the text


def test_words_that_differ_are_found_by_hand():
    chosen = "A red cup is at the top".split()
    rejected = "A green cup is at the very bottom".split()

    chosen_differs, rejected_differs = differing_words(chosen, rejected)

    assert {chosen[i] for i in chosen_differs} == {"red", "top"}
    assert {rejected[i] for i in rejected_differs} == {"green", "very", "bottom"}


def test_objects_are_described_as_far_as_they_are_annotated():
    objects = [
        {"name": "pen", "colour": "blue", "place": "top left"},
        {"name": "cup", "colour": None},
    ]

    assert describe_objects(objects) == "blue pen (top left), cup"
    assert describe_objects([]) == "no objects"


def test_a_pair_is_described_with_what_is_really_in_the_image(vlm, records, annotator):
    record = records[0]
    (pair,) = sample_pairs(vlm, [record], ONE_ROUND)

    text = words_of(describe_pair(record, pair, annotator))
    without_annotations = words_of(describe_pair(record, pair, None))

    assert "in the image: yellow lamp (top middle), blue pen (bottom middle)" in text
    assert "in the image" not in without_annotations
    assert "false claims" not in without_annotations
    for part in (record.id, "Which things are there?", pair["chosen"], pair["rejected"]):
        assert part in text
        assert part in without_annotations


def test_false_claims_of_both_responses_are_counted(records, annotator):
    """There is a lamp at the top middle, and a pen at the bottom middle."""
    pair = {"id": "x", "chosen": "There is a yellow lamp.", "rejected": "A red cup. A red pen."}

    text = words_of(describe_pair(records[0], pair, annotator))
    silent = words_of(describe_pair(records[0], pair | {"rejected": "Who knows?"}, annotator))

    assert "chosen (false claims: 0, true ones: 2)" in text
    assert "rejected (false claims: 2, true ones: 1)" in text
    assert "rejected Who knows?" in silent


def test_the_legend_explains_what_the_sheet_shows(annotator):
    """Only what these pairs have is explained."""
    masked = words_of(legend({"visible": [], "rounds": 1}, annotator))
    noisy = words_of(legend({"noise": 500}, None))
    rewritten = words_of(legend({}, None))

    assert "Dimmed patches were masked, patches in a frame were visible" in masked
    assert "Similarity: of the two answers" in masked
    assert "Round: the draw that was kept" in masked
    assert "In the image: its annotated objects" in masked
    assert "whose chosen answer has none are shown first" in masked
    assert "as the model saw it" in noisy
    assert "True objects: not shown, as no captions.json is at hand" in noisy
    for text in (noisy, rewritten):
        assert "patches" not in text
        assert "Round" not in text
    for text in (masked, noisy, rewritten):
        assert "green in the chosen answer, red in the rejected answer" in text


def test_lines_break_before_the_width():
    """All words stay within the width, in order, and the height is that of the lines."""
    paragraph = make_paragraph([("word " * 200, GRAY)], SMALL_FONT)

    placed_words, height = place_words([paragraph], TEXT_WIDTH)

    assert len(placed_words) == 200
    assert all(0 <= word.x < TEXT_WIDTH for word in placed_words)
    lines = {word.y for word in placed_words}
    assert len(lines) > 1
    assert height == max(lines) + min(lines - {0})
    positions = [(word.y, word.x) for word in placed_words]
    assert positions == sorted(positions)


@pytest.mark.parametrize("word", ["W" * 5000, "猫" * 900, "क्षि" * 500, "🙂" * 400, "ا" * 2000])
def test_a_word_that_is_wider_than_a_line_is_split(word):
    paragraph = make_paragraph([(f"before {word} after", GRAY)], SMALL_FONT)

    placed_words, _ = place_words([paragraph], TEXT_WIDTH)

    font = ImageFont.load_default(SMALL_FONT)
    assert "".join(placed.text for placed in placed_words) == f"before{word}after"
    for placed in placed_words:
        assert placed.x + font.getlength(placed.text) <= TEXT_WIDTH


# --- the sheet


def test_pairs_whose_chosen_response_is_true_come_first(records, annotator):
    """The shipped captions are wrong in places: the white pot of the second record is red."""
    pairs = [{"id": record.id} for record in records[:4]]

    rows = choose_rows(records[:4], pairs, annotator, max_rows=3)
    rows_without_annotations = choose_rows(records[:4], pairs, None, max_rows=3)

    assert "white pot" in records[1].chosen
    assert [record.id for record, _ in rows] == ["tiny-0001", "tiny-0003", "tiny-0004"]
    assert [pair["id"] for _, pair in rows] == ["tiny-0001", "tiny-0003", "tiny-0004"]
    ids = [record.id for record, _ in rows_without_annotations]
    assert ids == ["tiny-0001", "tiny-0002", "tiny-0003"]


@pytest.mark.parametrize("config", [ONE_ROUND, replace(NOISE, rounds=1)], ids=["masked", "noisy"])
def test_a_row_is_as_high_as_its_text(vlm, records, annotator, config):
    """A long response makes its row higher, and does not run into the next one."""
    pairs = sample_pairs(vlm, records[:3], config)
    long_pairs = [pairs[0] | {"rejected": "There is a cup. " * 100}, *pairs[1:]]

    sheet = contact_sheet(vlm, records[:3], pairs, annotator)
    short_sheet = contact_sheet(vlm, records[:3], pairs, annotator, max_rows=1)
    long_sheet = contact_sheet(vlm, records[:3], long_pairs, annotator)

    assert sheet.width == long_sheet.width == 2 * MARGIN + IMAGE_SIZE + GAP + TEXT_WIDTH
    assert sheet.height >= 3 * (IMAGE_SIZE + MARGIN)
    assert long_sheet.height > sheet.height
    assert sheet.height - short_sheet.height >= 2 * (IMAGE_SIZE + MARGIN)


# --- annotations of the user's images


def data_options(*files):
    return argparse.Namespace(data=[str(file) for file in files], images=None)


def test_annotations_are_found_beside_the_images(tmp_path):
    found = sample.find_annotations(data_options(TINY / "train" / "instruct.json"))
    missing = sample.find_annotations(data_options(tmp_path / "data.json"))

    assert found.path == TINY / "train" / "captions.json"
    assert missing is None


def test_another_captions_json_is_no_error(tmp_path, capsys):
    """A file of this name may be anything, such as COCO's. The sheet is drawn without it."""
    (tmp_path / "captions.json").write_text('{"annotations": []}')

    assert sample.find_annotations(data_options(tmp_path / "data.json")) is None
    assert "shows no annotations" in capsys.readouterr().err
