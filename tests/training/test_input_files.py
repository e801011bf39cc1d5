"""A run is resumed only if the files that it reads have the content that they had at its start."""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY

from minialign.training.input_files import (
    MODEL_FILES,
    check_same_inputs,
    digest_inputs,
    files_in,
    other_sources,
)
from minialign.training.options import parse_options
from minialign.utils.cli import run_script
from minialign.utils.files import InputError

sys.path.insert(0, str(ROOT))
import train  # noqa: E402


@dataclass
class World:
    """Data, images, annotations and an evaluation set that a test may change."""

    folder: Path
    words: list  # the options of a short run with them

    def parse(self, *words):
        """Return the options of a run."""
        return parse_options([*map(str, self.words), *words])


@pytest.fixture
def world(tmp_path):
    """Return four records with their images and annotations, and a small evaluation set."""
    rows = json.loads((TINY / "train" / "povid.json").read_text())[:4]
    (tmp_path / "images").mkdir()
    for row in rows:
        shutil.copy(TINY / "train" / "images" / row["image"], tmp_path / "images")
    (tmp_path / "data.json").write_text(json.dumps(rows))
    shutil.copy(TINY / "train" / "captions.json", tmp_path)

    source = TINY / "tune" / "typical"
    evaluation = tmp_path / "evaluation"
    (evaluation / "images").mkdir(parents=True)
    questions = (source / "pope_random.jsonl").read_text().splitlines(keepends=True)[:1]
    (evaluation / "pope_random.jsonl").write_text("".join(questions))
    shutil.copy(source / "images" / json.loads(questions[0])["image"], evaluation / "images")
    words = ["--data", tmp_path / "data.json", "--eval", evaluation]
    return World(tmp_path, words)


def run_train(monkeypatch, capfd, *words):
    """Run train.py in this process. Return its exit status and the last line that it printed."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    capfd.readouterr()
    status = run_script(train.main)
    return status, capfd.readouterr().err.strip().splitlines()[-1]


class Killed(BaseException):
    """Ends a run as a kill would: nothing is cleaned up."""


@pytest.fixture
def killed_run(world, monkeypatch, capfd):
    """Return the words that resume a run which was killed before its first step."""
    words = [*world.words, *"--method online-dpo --steps 1 --batch-size 2 --lora-rank 2".split()]
    words += [*"--max-new-tokens 8 --temperature 2".split(), "--out", world.folder / "run"]

    def die(*arguments, **named_arguments):
        raise Killed

    with monkeypatch.context() as patches, pytest.raises(Killed):
        patches.setattr(train, "train_variant", die)
        run_train(patches, capfd, *words)
    return [*words, "--resume"]


def change(path):
    """Change a byte of a file that no reader looks at, and keep its size and its time."""
    status = os.stat(path)
    content = bytearray(path.read_bytes())
    if path.suffix == ".png":
        content += b"x"  # behind the end of the image
    else:
        content = content.replace(b": ", b":\t", 1)
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "pattern",
    [
        "data.json",
        "captions.json",
        "images/*.png",
        "evaluation/pope_random.jsonl",
        "evaluation/images/*.png",
    ],
)
def test_a_changed_file_is_refused_and_restored_it_is_not(
    world, killed_run, monkeypatch, capfd, pattern
):
    """The line names the file and the remedy. The time of the file is as before."""
    path = sorted(world.folder.glob(pattern))[0]
    content = path.read_bytes()
    change(path)

    status, line = run_train(monkeypatch, capfd, *killed_run)

    assert status == 2
    assert line == (
        f"train.py: {path}: is not what it was when the run in {world.folder / 'run'} was started; "
        "restore it, or use a new --out directory"
    )

    path.write_bytes(content)
    status, line = run_train(monkeypatch, capfd, *killed_run)
    assert status == 0, line


def test_files_that_were_only_touched_are_accepted(world, killed_run, monkeypatch, capfd):
    """A finished run keeps no list of its files."""
    assert (world.folder / "run" / ".inputs.json").exists()
    for path in world.folder.rglob("*"):
        os.utime(path)

    status, line = run_train(monkeypatch, capfd, *killed_run)

    assert status == 0, line
    assert not (world.folder / "run" / ".inputs.json").exists()


def test_a_file_that_was_added_or_removed_is_refused(tmp_path):
    """As a split of POPE that was not there at the start."""
    check_same_inputs(tmp_path, {"a": "1", "b": "2"})

    with pytest.raises(InputError, match="b: is not what it was .*; restore it, or"):
        check_same_inputs(tmp_path, {"a": "1"})
    with pytest.raises(InputError, match="c: was not there .*; remove it if it is new, or"):
        check_same_inputs(tmp_path, {"a": "1", "b": "2", "c": "3"})
    check_same_inputs(tmp_path, {"b": "2", "a": "1"})


def test_a_run_of_a_version_that_noted_fewer_files_is_refused(tmp_path):
    """Nobody knows whether this file has changed since, and the line says so."""
    check_same_inputs(tmp_path, {"data.json": "1"})

    with pytest.raises(InputError) as error:
        check_same_inputs(tmp_path, {"data.json": "1", "tokenizer.json": "2"})

    assert str(error.value) == (
        f"tokenizer.json: was not there when the run in {tmp_path} was started, or an earlier "
        "version did not note it; remove it if it is new, or use a new --out directory"
    )


def test_only_files_that_the_run_reads_are_listed(world):
    """An image of no record is not, nor are annotations that no annotator reads."""
    (world.folder / "images" / "other.png").write_bytes(b"")
    image = world.folder / "images" / "0001.png"
    records = [SimpleNamespace(paths=(str(image),))] * 2

    digests = digest_inputs(world.parse("--method", "dpo"), records, {})

    assert list(digests) == [
        str(world.folder / "data.json"),
        str(world.folder / "evaluation" / "pope_random.jsonl"),
        str(image),
    ]


@pytest.mark.parametrize(
    "words, folders",
    [
        ("--method online-dpo --annotator judge", ["judge"]),
        ("--method online-dpo --annotator reward:scores", ["scores"]),
        ("--method ppo --reward scores", ["scores"]),
        ("--method ppo", []),
        ("--method bdhs --similarity encoder", ["encoder"]),
    ],
)
def test_other_models_are_inputs_too(world, words, folders):
    assert other_sources(world.parse(*words.split())) == folders


def test_the_files_of_a_reward_model(tmp_path):
    """Weights, settings, chat template and adapter, and not the log of its training."""
    (tmp_path / "adapter").mkdir()
    read = ["config.json", "chat_template.jinja", "score.safetensors", "adapter/adapter.json"]
    for name in (*read, "metrics.jsonl"):
        (tmp_path / name).write_text("")

    found = files_in(tmp_path, MODEL_FILES)

    names = [path.relative_to(tmp_path).as_posix() for path in found]
    assert names == read


def test_the_annotations_that_rank_are_an_input(world):
    sources = other_sources(world.parse("--method", "online-dpo"))

    assert [source.name for source in sources] == ["captions.json"]
