"""The folder of a run: what it keeps of an evaluation, and measures again when resumed."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minialign.evaluation.evaluation_sets import EvaluationSet
from minialign.evaluation.kept_answers import read_answers_at
from minialign.evaluation.results import SetAnswers
from minialign.evaluation.vocabulary import Vocabulary
from minialign.training import run_folder
from minialign.training.run_folder import RunFolder
from minialign.utils import files
from minialign.utils.files import InputError, WriteError

SETS = {
    "near": EvaluationSet(
        images=Path("images"),
        captions=[{"image": "1.png", "prompt": "What is there?", "objects": [{"name": "dog"}]}],
        vocabulary=Vocabulary({"objects": {"dog": ["dog"], "cup": ["cup"]}}, "captions.json"),
        pope={"random": [{"image": "1.png", "text": "Is there a dog?", "label": "yes"}]},
        pope_files={"random": Path("pope_random.jsonl")},
    ),
    "questions": EvaluationSet(
        images=Path("images"),
        captions=[],
        vocabulary=None,
        pope={"odd": [{"image": "2.png", "text": "Is there a cup?", "label": "no"}]},
        pope_files={"odd": Path("pope_odd.jsonl")},
    ),
}


class Asked:
    """Answers in place of a model, and remembers what it was asked for."""

    def __init__(self):
        self.titles = []

    def __call__(self, vlm, evaluation_set, title):
        """Answer as `ask_set` does."""
        self.titles.append(title)
        captions = ["A dog and a cup." for _ in evaluation_set.captions]
        return SetAnswers(captions, {split: ["Yes."] for split in evaluation_set.pope})


@pytest.fixture()
def asked(monkeypatch):
    """Return the Asked that is asked in place of a model."""
    asked = Asked()
    monkeypatch.setattr(run_folder, "ask_set", asked)
    return asked


@pytest.fixture()
def open_run(tmp_path):
    """Return a function that opens the folder of a run, as a resumed run does."""
    (tmp_path / "config.json").write_text("{}")
    return lambda: RunFolder(tmp_path, argparse.Namespace())


def test_scores_follow_from_the_answers_that_are_kept(tmp_path, open_run, asked):
    run = open_run()

    run.evaluate("base", None, SETS)
    run.evaluate("aligned", None, SETS)
    run.write_evaluation()

    scores = json.loads((tmp_path / "evaluation.json").read_text())
    assert read_answers_at(tmp_path).scores() == scores
    assert scores["aligned"]["near"]["chair_i"] == 0.5
    assert asked.titles == ["base, near", "base, questions", "aligned, near", "aligned, questions"]
    assert "| near | base | 50.0 |" in (tmp_path / "evaluation.md").read_text()


def test_a_resumed_run_keeps_the_answers_of_what_it_has_measured(tmp_path, open_run, asked):
    open_run().evaluate("base", None, SETS)
    asked.titles.clear()
    run = open_run()

    run.evaluate("base", None, SETS)
    run.evaluate("aligned", None, SETS)

    assert asked.titles == ["aligned, near", "aligned, questions"]
    kept = read_answers_at(tmp_path)
    assert kept.has("base") and kept.has("aligned")


@pytest.mark.parametrize("name", ["captions.jsonl", "answers.jsonl"])
def test_answers_that_were_removed_are_asked_again(tmp_path, open_run, asked, capfd, name):
    open_run().evaluate("base", None, SETS)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).unlink()

    open_run().evaluate("base", None, SETS)

    assert (tmp_path / name).read_bytes() == content
    assert len(asked.titles) == 4
    message = f"{tmp_path}: has no answers of base; measuring it again\n"
    assert capfd.readouterr().err == message


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer.json"])
def test_scores_of_a_model_with_other_files_are_not_kept(tmp_path, name):
    """Weights alone do not say how a model sees an image and reads a text."""
    options = argparse.Namespace(model="m", similarity=None)
    files = {"m/preprocessor_config.json": "1", "m/tokenizer.json": "2"}
    vlm = SimpleNamespace(model=torch.nn.Linear(1, 1), template="none", file_digests=files)
    RunFolder(tmp_path, options).start(vlm, {})
    RunFolder(tmp_path, options).start(vlm, {})

    vlm.file_digests = files | {f"m/{name}": "3"}
    with pytest.raises(InputError, match=f"m/{name}: is not what it was when the run in"):
        RunFolder(tmp_path, options).start(vlm, {})


def test_other_answers_are_refused(tmp_path, open_run, asked):
    open_run().evaluate("base", None, SETS)
    path = tmp_path / "answers.jsonl"
    path.write_text(path.read_text().replace("a cup", "a pen"))

    with pytest.raises(InputError) as error:
        open_run().evaluate("base", None, SETS)

    assert str(error.value) == f"{path}: not the answers of this run; remove it to measure again"


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_full_disk_leaves_whole_files(tmp_path, open_run, asked, monkeypatch, n):
    """The n-th file of the second evaluation cannot be written. It is measured again."""
    open_run().evaluate("base", None, SETS)
    write = Path.write_text
    written = []

    def fail_at_the_nth(path, *args, **kwargs):
        written.append(path)
        if len(written) == n:
            write(path, "half of")
            raise OSError(28, "No space left on device")
        return write(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(files.Path, "write_text", fail_at_the_nth)
        with pytest.raises(WriteError):
            open_run().evaluate("aligned", None, SETS)
    assert read_answers_at(tmp_path).has("base")
    run = open_run()
    run.evaluate("base", None, SETS)
    run.evaluate("aligned", None, SETS)

    assert len(asked.titles) == 6
    assert read_answers_at(tmp_path).scores() == run.scores


# --- the folder of --export ---


@pytest.fixture()
def finished_run(tmp_path):
    """Return the folder of a finished run that has exported its model to tmp_path/export."""
    path = tmp_path / "run"
    files.write_json(path / "summary.json", {})
    files.write_json(path / ".export.json", str(tmp_path / "export"))
    (tmp_path / "export").mkdir()
    options = argparse.Namespace(export=str(tmp_path / "export"), resume=True)
    return RunFolder(path, options)


def test_a_finished_run_is_resumed_with_its_export(finished_run):
    finished_run.check_export()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("new", "has not noted that it wrote its model to"),
        ("exists", "has not noted that it wrote its model to"),
        ("export", "its model is no longer in"),
    ],
)
def test_a_finished_run_refuses_another_export(tmp_path, finished_run, name, reason):
    """The folder is new, somebody else's, or its own that was removed."""
    (tmp_path / "exists").mkdir()
    (tmp_path / "export").rmdir()
    export = str(tmp_path / name)
    finished_run.options.export = export

    with pytest.raises(InputError, match=f"is finished, and {reason} {export}; leave"):
        finished_run.check_export()
