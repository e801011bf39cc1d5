"""The command `python -m minialign.evaluate`."""

import json
import shutil
import sys

import pytest
from conftest import TINY
from evaluation_helpers import write_evaluation_set, write_json
from processes import run_process

from minialign import evaluate
from minialign.evaluation import results
from minialign.evaluation.answers import answer_questions
from minialign.utils.cli import run_script


@pytest.fixture()
def folder(tmp_path, records):
    """Return a folder with a small evaluation set."""
    return write_evaluation_set(tmp_path, records)


@pytest.fixture()
def run_command(monkeypatch):
    """Return a function that runs the command in this process and returns its exit status."""

    def run(captions, images, *arguments):
        words = ["--model", TINY / "model", "--captions", captions, "--images", images, *arguments]
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        return run_script(evaluate.main)

    return run


def test_files_of_questions_may_be_named_one_by_one():
    options = evaluate.build_parser().parse_args(["--pope", "a", "b", "--pope", "c"])

    assert options.pope == ["a", "b", "c"]


def test_the_scores_go_to_standard_output_and_the_table_to_standard_error(folder):
    """The command also accepts --dtype."""
    words = ["--model", TINY / "model", "--dtype", "bfloat16", "--images", folder / "images"]
    words += ["--captions", folder / "captions.json", "--pope", folder / "pope_random.jsonl"]

    done = run_process("minialign.evaluate", *words)

    assert done.status == 0, done.stderr
    scores = json.loads(done.stdout)
    assert set(scores) == {"chair_i", "chair_s", "recall", "colour", "words", "repeats", "pope"}
    assert scores["pope"]["random"]["n"] == 3
    assert "CHAIR_i" in done.stderr


def test_a_truncated_image_is_found_before_any_question(folder, run_command, monkeypatch, capfd):
    captions = json.loads((folder / "captions.json").read_text())["captions"]
    damaged = folder / "images" / captions[1]["image"]
    damaged.write_bytes(damaged.read_bytes()[:-300])

    def fail(*args, **kwargs):
        pytest.fail("the model was asked")

    monkeypatch.setattr(evaluate, "ask_set", fail)

    assert run_command(folder / "captions.json", folder / "images") == 2
    assert damaged.name in capfd.readouterr().err


def test_contrast_changes_the_captions(tmp_path, vlm, run_command, monkeypatch, capfd):
    """With --contrast the answers are those of `answer_questions` with that contrast.

    Three of the four captions depend on it.
    """
    # Arrange: four images of a shipped set, and a record of the answers of each run.
    shipped = TINY / "final" / "balanced"
    raw = json.loads((shipped / "captions.json").read_text())
    write_json(tmp_path / "captions.json", raw | {"captions": raw["captions"][4:8]})
    answers_of_runs = []

    def record_answers(*args, **kwargs):
        answers_of_runs.append(answer_questions(*args, **kwargs))
        return answers_of_runs[-1]

    monkeypatch.setattr(results, "answer_questions", record_answers)

    # Act.
    for arguments in ([], ["--contrast", "0.5"], ["--contrast", "0"]):
        assert run_command(tmp_path / "captions.json", shipped / "images", *arguments) == 0
        assert 0 < json.loads(capfd.readouterr().out)["recall"] <= 1

    # Assert.
    without_contrast, with_contrast, with_zero = answers_of_runs
    assert len(without_contrast) == 4
    assert with_zero == without_contrast
    assert all(with_contrast.values())
    assert with_contrast != without_contrast
    questions = list(with_contrast)
    assert with_contrast == answer_questions(vlm, questions, "test", contrast=0.5)
    assert with_contrast != answer_questions(vlm, questions, "test", contrast=1.0)


@pytest.mark.parametrize("value", ["-1", "inf", "much"])
def test_a_bad_contrast_is_one_line_and_status_2(folder, run_command, capfd, value):
    with pytest.raises(SystemExit) as exit_info:
        run_command(folder / "captions.json", folder / "images", "--contrast", value)

    out, err = capfd.readouterr()
    assert exit_info.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "--contrast" in err
    assert value in err


def test_the_folder_of_a_run_is_no_adapter(folder, run_command, tmp_path, monkeypatch, capfd):
    """It is told before the model is loaded."""
    monkeypatch.setattr(evaluate, "load_vlm", lambda *args, **kwargs: pytest.fail("was loaded"))
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)

    status = run_command(folder / "captions.json", folder / "images", "--adapter", run)

    assert status == 2
    error = capfd.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"give --adapter {run / 'adapter'}" in error


# --- kept answers


@pytest.fixture()
def kept_file(folder, run_command, tmp_path, capfd):
    """Return a file with the answers of the shipped model, and the scores that were printed."""
    path = tmp_path / "said.jsonl"
    words = ["--pope", folder / "pope_random.jsonl", "--answers", path]
    assert run_command(folder / "captions.json", folder / "images", *words) == 0
    return path, json.loads(capfd.readouterr().out)


@pytest.fixture()
def score_answers(monkeypatch):
    """Return a function that runs the command without a model and returns its exit status."""
    monkeypatch.setattr(evaluate, "load_vlm", lambda *args, **kwargs: pytest.fail("was loaded"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "--answers", *map(str, words)])
        return run_script(evaluate.main)

    return run


def test_kept_answers_are_scored_without_a_model(kept_file, score_answers, folder, capfd):
    """Not even the images are needed. The scores are those of the command that asked."""
    path, scores = kept_file
    shutil.rmtree(folder / "images")

    assert score_answers(path) == 0

    out, err = capfd.readouterr()
    assert json.loads(out) == {"model": {folder.name: scores}}
    assert "CHAIR_i" in err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--pope", "F"], "--pope has no effect, as the answers are in a file; leave it out"),
        (["--adapter", "D"], "--adapter has no effect"),
        (["--system", "Be brief."], "--system has no effect"),
        (["--images", "D"], "--images has no effect"),
        (["more.jsonl"], "--answers names several files"),
        (["--resume"], "--resume is for --benchmark"),
    ],
)
def test_options_without_effect_are_refused(score_answers, capfd, words, message):
    with pytest.raises(SystemExit) as exit_info:
        score_answers("said.jsonl", *words)

    assert exit_info.value.code == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert message in err


def test_answers_are_never_written_over(folder, run_command, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(evaluate, "load_vlm", lambda *args, **kwargs: pytest.fail("was loaded"))
    path = tmp_path / "said.jsonl"
    path.write_text("mine")

    assert run_command(folder / "captions.json", folder / "images", "--answers", path) == 2

    assert f"{path}: exists already; give another --answers" in capfd.readouterr().err
    assert path.read_text() == "mine"
