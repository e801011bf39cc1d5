"""The command that makes a base: a stage that cannot work, or would mislabel it, is refused."""

import json
import sys

import pytest
from conftest import ROOT

from minialign.utils.cli import run_script

sys.path.insert(0, str(ROOT / "data"))
import make_tiny  # noqa: E402


@pytest.fixture()
def run_stages(tmp_path, monkeypatch, capsys):
    """Return a function that runs the command without any training, and returns its last line.

    What would be done is noted in `run_stages.done`.
    """
    done = []
    monkeypatch.setattr(make_tiny, "fresh_model", lambda *arguments: (None, None))
    monkeypatch.setattr(make_tiny, "write_all", lambda out, q: out.mkdir(exist_ok=True))
    monkeypatch.setattr(make_tiny, "write_model_files", lambda folder: done.append("files"))
    monkeypatch.setattr(make_tiny, "write_evaluation_sets", lambda out, part: done.append(part))
    for stage in ("truthful", "perceived"):
        name = f"run_{stage}_stage"
        monkeypatch.setattr(make_tiny, name, lambda *_, stage=stage: done.append(stage))

    def run(*words):
        folders = ["--out", tmp_path / "out", "--work", tmp_path / "work"]
        monkeypatch.setattr(sys, "argv", ["make_tiny.py", *map(str, [*folders, *words])])
        try:
            status = run_script(make_tiny.main)
        except SystemExit as error:
            status = error.code
        lines = capsys.readouterr().err.splitlines()
        assert status == (2 if lines else 0)
        return "".join(lines)

    run.done = done
    return run


def leave_weights(folder, *names):
    """Write empty files in the place of the weights that earlier stages leave."""
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.safetensors").touch()


@pytest.mark.parametrize(
    "words, message",
    [
        (["tower"], "out/about.json: no such file; name the stage 'files', too"),
        (["files", "truthful"], "work/tower.safetensors: no such file; name the stage 'tower'"),
        (["perceived", "files"], "work/truthful.safetensors: no such file; name the stage 'tru"),
        (["fils"], "a stage is one of files, tower, text, truthful, perceived, study, study-3"),
        (["--q", "7"], "argument --q: '7' is not a number from 0 to 1"),
        (["--q", "nan"], "argument --q: 'nan' is not a number from 0 to 1"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number from 0"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(run_stages, words, message):
    assert message in run_stages(*words)
    assert run_stages.done == []


def test_a_base_is_made_with_the_seed_and_the_q_that_its_files_name(run_stages, tmp_path):
    """Else about.json would name another q than the captions that the model has learned from."""
    leave_weights(tmp_path / "work", "tower", "head", "truthful")
    assert run_stages("--q", "0", "--seed", "2", "files", "perceived") == ""
    assert json.loads((tmp_path / "out" / "about.json").read_text()) == {"seed": 2, "q": 0}

    assert "is of q 0.0, not 0.35; give the same" in run_stages("--seed", "2", "perceived")
    assert "is of seed 2, not 1; give the same" in run_stages("--q", "0", "perceived")
    assert run_stages.done == ["files", "perceived"]

    assert run_stages("--seed", "2", "truthful") == ""  # it learns from true captions
    assert run_stages("--seed", "2", "--q", "0", "perceived") == ""
    assert run_stages.done == ["files", "perceived", "truthful", "perceived"]


def test_images_of_a_study_need_no_base(run_stages):
    assert run_stages("--seed", "5", "study-3") == ""
    assert run_stages.done == ["study-3"]
