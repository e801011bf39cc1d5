"""The command `python -m minialign.annotators`."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from annotator_helpers import ANNOTATED_OBJECTS, write_annotations
from conftest import TINY
from processes import run_process

from minialign.annotators import main
from minialign.pairs.annotators import annotator_kind, captions_file_of
from minialign.utils.cli import run_script
from minialign.utils.files import InputError

# (chosen, rejected). By the annotations of a.png the verdicts are right, wrong, a tie, right.
PAIRS = [
    ("A red cup.", "A blue cup."),
    ("A lamp.", "A dog."),
    ("A dog.", "There is the dog."),
    ("A cup.", "A lamp."),
]


def write_pairs(folder, annotated_objects=ANNOTATED_OBJECTS):
    """Write PAIRS about a.png with their annotations and an empty image. Return the file."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(b"")
    write_annotations(folder, annotated_objects)
    rows = []
    for i, (chosen, rejected) in enumerate(PAIRS):
        row = {"id": i, "image": "a.png", "prompt": f"<image>\nWhat is there, {i}?"}
        rows.append(row | {"chosen": chosen, "rejected": rejected})
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


@pytest.fixture()
def run_command(monkeypatch, capsys):
    """Return a function that runs the command here: (exit status, standard output and error)."""

    def run(annotator, *arguments):
        words = ["annotators", "--annotator", annotator, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        try:
            status = run_script(main)
        except SystemExit as error:
            status = error.code
        return status, *capsys.readouterr()

    return run


def test_the_command_prints_the_table(tmp_path):
    """Of four pairs two are right, one is wrong, one is a tie: (2 + 2 + 1 + 0) / 8."""
    path = write_pairs(tmp_path / "one")

    done = run_process("minialign.annotators", "--annotator", "truth", "--data", path)

    assert done.status == 0
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "| annotator | data | accuracy | ties | consistency | first | n |",
        "|---|---|---|---|---|---|---|",
        f"| truth | {path} | 62.5 | 25.0 | 100.0 | 50.0 | 4 |",
    ]


def test_annotations_are_next_to_the_folder_of_images(tmp_path, run_command):
    path = write_pairs(tmp_path / "one")
    (tmp_path / "alone.json").write_bytes(path.read_bytes())
    images = tmp_path / "one" / "images"

    status, out, _ = run_command("truth", "--data", tmp_path / "alone.json", "--images", images)

    assert status == 0
    assert "| 62.5 |" in out


def test_each_file_of_pairs_is_judged_by_its_own_annotations(tmp_path, run_command):
    """Two folders have images of the same name, which show different things."""
    first = write_pairs(tmp_path / "one")
    second = write_pairs(tmp_path / "two", {"a.png": [{"name": "lamp"}]})

    status, out, _ = run_command("truth", "--data", first, second)

    assert status == 0
    accuracies = [row.split("|")[3].strip() for row in out.splitlines()[2:]]
    assert accuracies == ["62.5", "50.0"]  # in the second: a tie, right, a tie, wrong


def test_a_model_is_asked_and_its_answers_are_counted(tmp_path, run_command):
    """The tiny model does not know the request: eight times no verdict, for four pairs."""
    path = write_pairs(tmp_path / "one")
    image = (TINY / "train" / "images" / "0001.png").read_bytes()
    (tmp_path / "one" / "images" / "a.png").write_bytes(image)

    status, out, err = run_command(TINY / "model", "--data", path)

    assert status == 0
    assert "| 50.0 | 100.0 | 100.0 | - | 4 |" in out
    assert "asked: 8, too long: 0, not understood: 8, first is better: 0" in err


@pytest.mark.parametrize(
    "annotator, named",
    [
        ("truht", "truht"),
        ("{folder}", "config.json"),
        ("{folder}/none", "none"),
        ("reward:{folder}", "score.safetensors"),
        ("reward:", "name a folder behind the colon"),
        ("truth", "captions.json"),
    ],
)
def test_a_bad_annotator_is_one_line_and_status_2(tmp_path, run_command, annotator, named):
    path = write_pairs(tmp_path / "one")
    (tmp_path / "one" / "captions.json").unlink()
    annotator = annotator.format(folder=tmp_path)
    model = ["--model", TINY / "model"] if annotator.startswith("reward:") else []

    status, _, err = run_command(annotator, "--data", path, *model)

    assert status == 2
    assert err.count("\n") == 1
    assert named in err
    assert "Traceback" not in err


def test_bad_input_leaves_standard_output_empty(tmp_path, run_command):
    """No table is begun, neither for a bad annotator nor for records that are no pairs."""
    path = write_pairs(tmp_path / "one")

    status, out, _ = run_command("truht", "--data", path)
    assert status == 2
    assert out == ""

    status, out, err = run_command("truth", "--data", TINY / "train" / "instruct.json")
    assert status == 2
    assert out == ""
    assert "tiny-0001" in err
    assert "rejected" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("fault", ["long", "cut"])
def test_a_bad_record_of_the_last_file_is_found_before_any_work(
    tmp_path, run_command, monkeypatch, fault
):
    """Its question is too long for the annotator, or its image was cut short."""
    image = (TINY / "train" / "images" / "0001.png").read_bytes()
    first = write_pairs(tmp_path / "one")
    last = write_pairs(tmp_path / "two")
    (tmp_path / "one" / "images" / "a.png").write_bytes(image)
    (tmp_path / "two" / "images" / "a.png").write_bytes(image)
    if fault == "long":
        last.write_text(last.read_text().replace("What is there, 3", "What is there" * 99))
    else:
        (tmp_path / "two" / "images" / "a.png").write_bytes(image[: len(image) // 2])
    monkeypatch.setattr("minialign.annotators.pair_accuracy", pytest.fail)

    status, out, err = run_command(TINY / "model", "--data", first, last)

    assert status == 2
    assert out == ""
    assert f"{last}, record" in err


def test_the_annotations_are_those_of_one_folder():
    """Images of the same name may show different things in different folders."""
    one_folder = SimpleNamespace(images=None, data=["a/x.json", "a/y.json"])
    named_folder = SimpleNamespace(images="c/images", data=["a/x.json", "b/y.json"])
    two_folders = SimpleNamespace(images=None, data=["a/x.json", "b/y.json"])

    assert captions_file_of(one_folder) == Path("a/captions.json")
    assert captions_file_of(named_folder) == Path("c/captions.json")
    with pytest.raises(InputError, match="several folders"):
        captions_file_of(two_folders)


@pytest.mark.parametrize(
    "annotator, option, value, reader",
    [
        ("truth", "--model", "m", "reward:DIR"),
        ("truth", "--dtype", "bfloat16", "DIR, reward:DIR"),
        ("judge", "--model", "m", "reward:DIR"),
        ("reward:r", "--template", "vicuna", "DIR"),
    ],
)
def test_an_option_that_the_annotator_does_not_read_is_refused(
    run_command, annotator, option, value, reader
):
    status, _, err = run_command(annotator, "--data", "d.json", option, value)

    assert status == 2
    assert f"{option} is for --annotator {reader}; " in err


@pytest.mark.parametrize(
    "name, kind",
    [
        ("truth", "truth"),
        ("judge", "DIR"),
        ("runs/0007-truth", "DIR"),
        ("reward:runs/0003-reward", "reward:DIR"),
        ("C:/judge", "DIR"),  # what stands before the colon is no word of the table
        ("truth:judge", "DIR"),
    ],
)
def test_the_name_of_an_annotator_says_its_kind(name, kind):
    assert annotator_kind(name) == kind
