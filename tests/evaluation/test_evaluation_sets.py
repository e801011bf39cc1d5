"""Evaluation sets: the shipped ones, and what is said of files and records that cannot be used."""

import json

import pytest
from conftest import TINY
from evaluation_helpers import RAW_VOCABULARY, write_evaluation_set, write_json, write_jsonl

from minialign.evaluation.evaluation_sets import read_folder, read_set, set_name_of
from minialign.utils.files import InputError


@pytest.fixture()
def folder(tmp_path, records):
    """Return a folder with a small evaluation set."""
    return write_evaluation_set(tmp_path, records)


@pytest.mark.parametrize("name", ["typical", "shifted", "balanced"])
def test_the_shipped_sets_are_complete(name):
    """Every object and color is in the vocabulary. Otherwise recall could never reach 1."""
    for part in ("tune", "final"):
        evaluation_set = read_folder(TINY / part / name)

        assert set(evaluation_set.pope) == {"random", "popular", "adversarial"}
        assert len(evaluation_set.captions) >= 200
        known_names = set(evaluation_set.vocabulary.names.values())
        for row in evaluation_set.captions:
            assert (evaluation_set.images / row["image"]).is_file()
            for item in row["objects"]:
                assert item["name"] in known_names
                assert item["colour"] in evaluation_set.vocabulary.colors


# --- files that cannot be used ---


def assert_one_line_that_names(error, folder):
    """Assert that an error is one line that names a file in the folder."""
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_folder_without_an_evaluation_set_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()

    for name, reason in (("empty", "neither"), ("missing", "no such folder")):
        with pytest.raises(InputError, match=reason) as error:
            read_folder(tmp_path / name)
        assert_one_line_that_names(error, tmp_path)


def test_what_is_no_evaluation_folder_is_told(tmp_path, records):
    """A file, the folder around evaluation folders, and one without its images."""
    folder = tmp_path / "typical"
    folder.mkdir()
    write_evaluation_set(folder, records)
    with pytest.raises(InputError, match="is a file; give a folder with captions.json"):
        read_folder(folder / "captions.json")
    with pytest.raises(InputError, match="neither.*in it: typical$"):
        read_folder(tmp_path)

    (folder / "images").rename(folder / "pictures")
    with pytest.raises(InputError, match="has no folder images/"):
        read_folder(folder)


def test_a_captions_file_of_another_form_is_refused(tmp_path):
    texts = {"captions": "[]", "vocabulary": '{"captions": []}', "complete": '{"capt'}

    for named_in_error, text in texts.items():
        path = tmp_path / "captions.json"
        path.write_text(text)
        with pytest.raises(InputError, match=named_in_error) as error:
            read_set(path, [], tmp_path)
        assert_one_line_that_names(error, tmp_path)


def test_a_pope_record_of_another_form_is_refused(tmp_path):
    records = [
        {"image": "a", "text": "b", "label": "maybe"},
        {"image": "a", "label": "yes"},
    ]

    for record in records:
        path = tmp_path / "pope_random.jsonl"
        write_jsonl(path, [record])
        with pytest.raises(InputError, match="record 1") as error:
            read_set(None, [path], tmp_path)
        assert_one_line_that_names(error, tmp_path)


@pytest.mark.parametrize(
    "name, text",
    [
        ("pope_random.jsonl", "3\n"),
        ("pope_random.jsonl", ""),
        (
            "captions.json",
            json.dumps({"vocabulary": RAW_VOCABULARY, "captions": [{"image": "a.png"}]}),
        ),
        ("captions.json", json.dumps({"vocabulary": {"objects": {}}, "captions": []})),
    ],
)
def test_files_without_usable_records_are_refused(folder, name, text):
    (folder / name).write_text(text)

    with pytest.raises(InputError):
        read_folder(folder)


def test_pope_files_are_named_by_what_follows_pope(tmp_path):
    """POPE names its own files so. Two files of one split are refused: one would be lost."""
    shipped = TINY / "tune" / "balanced"
    first_line = (shipped / "pope_random.jsonl").read_text().split("\n")[0] + "\n"
    names = ["coco_pope_random.json", "coco_pope_popular.json", "pope_random.jsonl"]
    files = [tmp_path / name for name in names]
    for file in files:
        file.write_text(first_line)

    evaluation_set = read_set(None, files[:2], shipped / "images")

    assert set(evaluation_set.pope) == {"random", "popular"}
    with pytest.raises(InputError, match="two files of one split"):
        read_set(None, files, shipped / "images")


def test_every_split_of_a_folder_is_read(folder):
    """Published splits come first, in their order. Hidden and other files are not read."""
    text = (folder / "pope_random.jsonl").read_text()
    for name in ("pope_adversarial.jsonl", "pope_attributes.jsonl", "coco_pope_popular.json"):
        (folder / name).write_text(text)
    for name in ("._pope_x.jsonl", "pope_y.jsonl.bak", "pope_notes.txt"):
        (folder / name).write_text("no questions")

    evaluation_set = read_folder(folder)

    assert list(evaluation_set.pope) == ["random", "popular", "adversarial", "attributes"]


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_questions_are_a_list_or_lines_whatever_the_file_is_called(folder, ending, mark):
    lines = (folder / "pope_random.jsonl").read_text()
    rows = [json.loads(line) for line in lines.splitlines()]
    texts = [lines, lines.replace("\n", "\r\n"), json.dumps(rows), json.dumps(rows, indent=1)]

    for text in texts:
        path = folder / f"other_pope_gqa.{ending}"
        path.write_text(mark + text, encoding="utf-8", newline="")

        assert read_set(None, [path], folder / "images").pope == {"gqa": rows}


def test_the_placeholder_of_a_question_is_the_place_of_the_image(folder):
    """The image always comes first, so that "<image>" is left out of the question."""
    path = folder / "pope_random.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    questions = ["<image>\nIs it red?", "Is it red?\n<image>", "Is it red?"]
    for row, question in zip(rows, questions, strict=True):
        row["text"] = question
    write_jsonl(path, rows)

    assert [row["text"] for row in read_folder(folder).pope["random"]] == 3 * ["Is it red?"]


@pytest.mark.parametrize(
    "question", ["<image><image>\nIs it red?", " <image>\n", "", " \n", "Half: \ud83d"]
)
def test_a_question_that_cannot_be_asked_is_named(folder, question):
    """It is found before the model is loaded."""
    path = folder / "pope_random.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1]["text"] = question
    write_jsonl(path, rows)

    with pytest.raises(InputError, match="pope_random.jsonl, record 2: a question has"):
        read_folder(folder)


def test_the_placeholder_of_a_request_for_a_caption(folder):
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    raw["captions"][1]["prompt"] = "<image>\nWhat is there?"
    write_json(path, raw)

    assert read_folder(folder).captions[1]["prompt"] == "What is there?"


def test_an_object_that_is_listed_twice_is_refused(folder):
    """Python's json would keep the synonyms of the last one alone, without a word."""
    path = folder / "captions.json"
    text = path.read_text()
    assert text.count('"objects": {') == 1
    path.write_text(text.replace('"objects": {', '"objects": {"dog": ["hound"], '))

    with pytest.raises(InputError, match="captions.json: 'dog' occurs twice in an object"):
        read_folder(folder)


def test_an_empty_request_for_a_caption_is_refused(folder):
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    raw["captions"][1]["prompt"] = ""
    write_json(path, raw)

    with pytest.raises(InputError, match="captions.json, record 2: a question has a text"):
        read_folder(folder)


def test_annotations_get_the_names_of_the_vocabulary(folder):
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    raw["captions"][1]["objects"] = [{"name": "CUP", "colour": "Red"}, {"name": "puppy"}]
    write_json(path, raw)

    objects = read_folder(folder).captions[1]["objects"]

    assert objects == [{"name": "cup", "colour": "red"}, {"name": "dog"}]


@pytest.mark.parametrize(
    "item, named",
    [({"name": "fork"}, 'no object "fork"'), ({"name": "cup", "colour": "mauve"}, '"mauve"')],
)
def test_annotations_that_the_vocabulary_lacks_are_refused(folder, item, named):
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    raw["captions"][1]["objects"].append(item)
    write_json(path, raw)

    with pytest.raises(InputError, match=f"captions.json, record 2: .*{named}") as error:
        read_folder(folder)
    assert_one_line_that_names(error, folder)


def test_a_missing_image_is_refused(folder):
    next((folder / "images").iterdir()).unlink()

    with pytest.raises(InputError):
        read_folder(folder)


# --- values of another form ---


@pytest.mark.parametrize(
    "vocabulary",
    [
        3,
        {},
        {"objects": ["cup"]},
        {"objects": {"cup": "cup"}},
        {"objects": {"cup": 3}},
        {"objects": {"cup": None}},
        {"objects": {"cup": []}},
        {"objects": {"cup": [3]}},
        {"objects": {"cup": [""]}},
        RAW_VOCABULARY | {"colors": ["red"]},
        RAW_VOCABULARY | {"colours": 3},
        RAW_VOCABULARY | {"colours": None},
        RAW_VOCABULARY | {"colours": "red"},
        RAW_VOCABULARY | {"colours": [3]},
        RAW_VOCABULARY | {"colours": [["red"]]},
    ],
)
def test_a_vocabulary_of_another_form_is_refused(folder, vocabulary):
    """A text in place of a list would be read letter by letter. An empty synonym is never found."""
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    write_json(path, raw | {"vocabulary": vocabulary})

    with pytest.raises(InputError, match='captions.json: no "vocabulary".*synonyms.*colours'):
        read_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 3},
        {"prompt": None},
        {"prompt": ["What?"]},
        {"image": 3},
        {"image": []},
        {"objects": {"name": "cup"}},
        {"objects": [["cup"]]},
        {"objects": [{"name": "cup", "color": "red"}]},
        {"objects": [{"name": "cup", "colour": 3}]},
        {"objects": [{"name": "cup", "colour": []}]},
        {"objects": [{"name": "cup", "colour": {}}]},
        {"objects": [{"name": "cup", "place": 3}]},
        {"objects": [{"name": "cup", "place": []}]},
        {"objects": [{"name": "cup", "place": {}}]},
    ],
)
def test_a_caption_of_another_form_is_named(folder, changes):
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    raw["captions"][1].update(changes)
    write_json(path, raw)

    with pytest.raises(
        InputError, match='captions.json, record 2: .*"prompt": text.*fix or remove'
    ):
        read_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [{"text": 3}, {"text": None}, {"text": []}, {"label": []}, {"label": {}}, {"image": 3}],
)
def test_a_question_of_another_form_is_named(folder, changes):
    path = folder / "pope_random.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1].update(changes)
    write_jsonl(path, rows)

    message = 'pope_random.jsonl, record 2: .*"text": text.*fix or remove'
    with pytest.raises(InputError, match=message):
        read_folder(folder)


def test_a_set_has_the_name_of_its_folder(tmp_path, monkeypatch):
    (tmp_path / "typical").mkdir()
    monkeypatch.chdir(tmp_path / "typical")

    assert set_name_of(".") == set_name_of("../typical/") == "typical"
    assert set_name_of("/") == "set"
