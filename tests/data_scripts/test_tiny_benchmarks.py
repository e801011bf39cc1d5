"""The miniatures of the paper's benchmarks: one command asks all of them, another scores again."""

import json
import shlex
import sys

import pytest
from conftest import ROOT, TINY

sys.path.insert(0, str(ROOT / "data"))

from tiny_world import benchmarks as miniatures  # noqa: E402

from minialign import evaluate  # noqa: E402
from minialign.evaluation.benchmarks import BENCHMARKS, find_lacking  # noqa: E402
from minialign.utils.cli import run_script  # noqa: E402
from minialign.utils.files import read_jsonl  # noqa: E402

SCORED = ("pope", "textvqa", "gqa", "coco")


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """Return a folder with the miniatures of two images."""
    folder = tmp_path_factory.mktemp("miniatures") / "mini"
    miniatures.write_miniatures(folder, 2)
    return folder


def run_command(monkeypatch, *words):
    """Run the command in this process and return its exit status."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
    return run_script(evaluate.main)


def test_every_benchmark_has_a_miniature():
    assert list(BENCHMARKS) == list(miniatures.NAMES)
    assert set(SCORED) == {name for name, spec in BENCHMARKS.items() if spec.score}


def test_the_command_that_is_printed_can_be_pasted(tmp_path, monkeypatch, capsys):
    """A shell would cut a path with a blank in two."""
    out = tmp_path / "my folder"
    monkeypatch.setattr(sys, "argv", ["benchmarks.py", "--out", str(out), "--num-images", "1"])

    assert run_script(miniatures.main) == 0

    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["python", "-m", "minialign.evaluate"]
    options = evaluate.build_parser().parse_args(words[3:])
    assert options.benchmark == [(name, f"{out}/{name}") for name in BENCHMARKS]
    assert options.images == [f"{out}/images"]


def test_one_command_asks_all_and_another_scores_their_answers_again(
    mini, tmp_path, monkeypatch, capfd
):
    # Act: ask all of them.
    out = tmp_path / "out"
    paths = [f"{name}={mini / name}" for name in BENCHMARKS]
    words = ["--model", TINY / "model", "--benchmark", *paths, "--images", mini / "images"]
    words += ["--max-new-tokens", *(f"{name}=6" for name in BENCHMARKS), "--out", out]
    assert run_command(monkeypatch, *words) == 0

    # Assert: the scores, and files for judges and servers.
    scores = json.loads((out / "scores.json").read_text())
    assert list(scores) == list(BENCHMARKS)
    assert 0 < scores["pope"]["f1"] <= 1
    assert scores["gqa"]["binary"] == 1
    assert scores["mmhal"] == {"n": 96}
    assert len(read_jsonl(out / "llava-bench.submission.jsonl")) == 2
    assert list(json.loads((out / "mmvet.submission.json").read_text())) == ["v1_0", "v1_1"]
    prediction = json.loads((out / "gqa.submission.json").read_text())[0]
    assert set(prediction) == {"questionId", "prediction"}
    headings, this_model, paper = capfd.readouterr().err.splitlines()[-3:]
    assert headings.split() == ["model", *(spec.column for spec in BENCHMARKS.values())]
    assert this_model.split()[3] == "-"
    assert "86.40" in paper

    # Act and assert: their answers give the same scores, without model and images.
    scored_paths = [f"{name}={mini / name}" for name in SCORED]
    answers = [f"{name}={out / name}.answers.jsonl" for name in SCORED]
    assert run_command(monkeypatch, "--benchmark", *scored_paths, "--answers", *answers) == 0
    again = json.loads(capfd.readouterr().out)
    assert again == {name: scores[name] for name in SCORED}

    # Act and assert: so do the files for servers and scorers. Those of POPE are a folder.
    for name, submission in (
        ("pope", "pope.submission"),
        ("gqa", "gqa.submission.json"),
        ("textvqa", "textvqa.submission.json"),
    ):
        words = ["--benchmark", f"{name}={mini / name}", "--answers", f"{name}={out / submission}"]
        assert run_command(monkeypatch, *words) == 0
        assert json.loads(capfd.readouterr().out) == {name: scores[name]}

    # Assert: the answers to TextVQA name the image, as LLaVA's scorer reads them.
    record = read_jsonl(out / "textvqa.answers.jsonl")[0]
    assert f"{record['question_id']}.jpg" == record["image"]


def test_coco_is_asked_about_the_images_of_a_list(mini, tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("2\n")
    words = ["--model", TINY / "model", "--benchmark", f"coco={mini / 'coco'}"]
    words += ["--images", mini / "images", "--out", tmp_path / "out"]
    words += ["--coco-list", tmp_path / "list.txt", "--max-new-tokens", "coco=4"]

    assert run_command(monkeypatch, *words) == 0

    records = read_jsonl(tmp_path / "out" / "coco.answers.jsonl")
    assert [record["question_id"] for record in records] == [2]


def test_each_caption_of_an_image_of_coco_counts(mini, tmp_path, monkeypatch, capfd):
    captions = [{"image_id": 1, "caption": "A cup."}, {"image_id": 1, "caption": "A dog."}]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    words = ["--benchmark", f"coco={mini / 'coco'}"]
    words += ["--answers", f"coco={tmp_path / 'captions.json'}"]

    assert run_command(monkeypatch, *words) == 0

    scores = json.loads(capfd.readouterr().out)["coco"]
    assert (scores["n"], scores["chair_s"], scores["chair_i"]) == (2, 0.5, 0.5)


def test_questions_without_right_answers_are_asked_and_not_scored(
    mini, tmp_path, monkeypatch, capfd
):
    """LLaVA's file alone: it has no labels. This is told before anything is asked."""
    folder = tmp_path / "gqa"
    folder.mkdir()
    name = next((mini / "images").iterdir()).name
    question = {"question_id": "201", "image": name, "text": "Is it red?", "category": "default"}
    (folder / "llava_gqa_testdev_balanced.jsonl").write_text(json.dumps(question) + "\n")
    words = ["--model", TINY / "model", "--benchmark", f"gqa={folder}"]
    words += ["--images", mini / "images", "--out", tmp_path / "out"]

    assert run_command(monkeypatch, *words, "--max-new-tokens", "gqa=4") == 0

    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == {"gqa": {"n": 1}}
    err = capfd.readouterr().err
    assert "gqa: its answers will not be scored: " in err
    assert err.index("will not be scored") < err.index("1 questions")

    # An answer file is given to be scored, so there it is an error.
    answers = tmp_path / "out" / "gqa.answers.jsonl"
    words = ["--benchmark", f"gqa={folder}", "--answers", f"gqa={answers}"]
    assert run_command(monkeypatch, *words) == 2


def test_a_benchmark_that_a_judge_scores_is_not_noted(capfd):
    scoring = {"mmvet": BENCHMARKS["mmvet"].score}

    assert find_lacking({"mmvet": []}, scoring, "its answers will not be scored") == set()
    assert capfd.readouterr().err == ""
