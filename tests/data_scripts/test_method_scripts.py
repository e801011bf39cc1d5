"""The scripts that run methods on the tiny model: the commands that they give, and their tables."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from minialign.utils.cli import run_script
from minialign.utils.files import InputError, read_json

sys.path.insert(0, str(ROOT / "data"))
import curation  # noqa: E402
import methods  # noqa: E402


def evaluation(chair_i, accuracy=0.5):
    """Return the scores of a base and of an aligned model on one set, as evaluation.json has."""
    base = {"chair_i": 0.25, "recall": 0.5, "colour": 0.75, "words": 20.0, "repeats": 0.0}
    base["pope"] = {"random": {"accuracy": 0.5}, "popular": {"accuracy": 0.7}}
    aligned = base | {"chair_i": chair_i}
    aligned["pope"] = {"random": {"accuracy": accuracy}, "popular": {"accuracy": accuracy}}
    return {"base": {"balanced": base}, "aligned": {"balanced": aligned}}


@pytest.fixture
def commands(monkeypatch):
    """Return a list of the commands that a script gives. A run only writes its files."""
    given = []

    def pretend_to_run(command, **_):
        words = [str(word) for word in command[1:]]
        if "fails" in words:
            raise subprocess.CalledProcessError(2, command)
        given.append([words[0].removeprefix(f"{ROOT}/"), *words[1:]])
        out = Path(words[words.index("--out") + 1])
        if out.suffix == ".jsonl":
            out.parent.mkdir(parents=True)
            out.write_text("{}\n{}\n")
            out.with_name("pairs.dropped.jsonl").write_text("{}\n")
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text("{}")
        (out / "evaluation.json").write_text(json.dumps(evaluation(0.2)))

    monkeypatch.setattr(subprocess, "run", pretend_to_run)
    return given


def test_a_method_may_have_options_and_read_an_earlier_run(tmp_path, commands):
    for method in ("sft", "dpo --reference-adapter RUNS/sft/adapter"):
        assert methods.run_method(method, ["--seed", "1"], tmp_path) == evaluation(0.2)

    second_out = str(tmp_path / "dpo-reference-adapter-RUNS-sft-adapter")
    adapter = ["--reference-adapter", str(tmp_path / "sft" / "adapter")]
    assert commands == [
        ["train.py", "--method", "sft", "--out", str(tmp_path / "sft"), "--seed", "1"],
        ["train.py", "--method", "dpo", *adapter, "--out", second_out, "--seed", "1"],
    ]


def run_methods(monkeypatch, capsys, *words):
    """Run data/methods.py. Return its exit status, and what it prints."""
    monkeypatch.setattr(sys, "argv", ["methods.py", *map(str, words)])
    status = run_script(methods.main)
    return status, *capsys.readouterr()


def test_the_scores_of_earlier_methods_outlast_one_that_fails(
    tmp_path, monkeypatch, capsys, commands
):
    path = tmp_path / "scores.json"
    words = ("--methods", "sft", "dpo --loss fails", "ppo", "--out", path, "--seed", "1")

    status, output, errors = run_methods(monkeypatch, capsys, *words)

    assert status == 2
    assert output == ""
    assert errors.splitlines()[-1] == (
        "methods.py: train.py ended with status 2; its last line says why"
    )
    stored = read_json(path)
    assert stored["runs"] == {"sft": evaluation(0.2)}
    assert stored["command"].startswith("python data/methods.py --methods sft 'dpo --loss fails'")


@pytest.mark.parametrize(
    "method, problem",
    [
        ("sfd", "'sfd': does not begin with one of sft, dpo,"),
        ("reward", "'reward': does not begin with one of"),  # its images are not measured
        (" ", "' ': does not begin with one of"),
        ("dpo --loss 'mpo", "No closing quotation"),
        ("dpo --method sft", "'dpo --method sft': --method is given to train.py for each method"),
        ("dpo --out=x", "'dpo --out=x': --out is given to train.py for each method; leave it out"),
    ],
)
def test_what_is_no_method_is_refused_before_any_run(
    tmp_path, monkeypatch, capsys, commands, method, problem
):
    words = ("--methods", "sft", method, "--out", tmp_path / "scores.json")

    status, _, errors = run_methods(monkeypatch, capsys, *words)

    assert status == 2
    assert problem in errors
    assert commands == []


def test_the_row_of_a_method_is_not_that_of_another_one(tmp_path, monkeypatch, capsys, commands):
    """train.py would take the last --method, and the table would name the first one."""
    words = ("--methods", "sft", "--out", tmp_path / "scores.json", "--steps", "1")

    status, _, errors = run_methods(monkeypatch, capsys, *words, "--method", "dpo")

    assert status == 2
    assert "the options of train.py: --method is given to train.py for each method" in errors
    assert commands == []


def test_stored_scores_are_not_written_over(tmp_path, monkeypatch, capsys, commands):
    """The shipped file holds the runs of several commands."""
    path = tmp_path / "scores.json"
    path.write_text("{}")

    status, _, errors = run_methods(monkeypatch, capsys, "--methods", "sft", "--out", path)

    assert status == 2
    assert f"{path}: exists already" in errors
    assert path.read_text() == "{}"
    assert commands == []


def test_a_run_that_measured_other_sets_has_no_table():
    scores = evaluation(0.2)["base"]["balanced"]
    methods.check_sets("dpo", {"balanced": scores, "other": scores})

    for scores_of_sets in ({}, {"other": scores}, {"balanced": {"pope": {}}}):
        with pytest.raises(InputError, match="dpo: measured on .*; the table needs captions"):
            methods.check_sets("dpo", scores_of_sets)


def test_a_share_of_nothing_is_a_dash():
    scores = evaluation(0.2)["base"]["balanced"]
    scores |= {"chair_i": None, "repeats": None, "pope": {}}

    assert methods.method_line("silent", {"balanced": scores}) == (
        "| silent | - | 50.0 | 75.0 | 20.0 | - | - |"
    )


def test_a_random_share_is_as_large_as_the_best_one(tmp_path, commands):
    """Two pairs were kept. The random ones are drawn from all of the same seed."""
    num_kept, evaluations = curation.compare(3, 0.3, tmp_path / "seed", tmp_path / "reward")

    assert num_kept == 2
    assert evaluations == {"best": evaluation(0.2), "random": evaluation(0.2)}
    sampling, best, random = commands
    assert "--keep 0.3 --by-score reward:" in " ".join(sampling)
    assert best[best.index("--data") + 1 :][:1] == [str(tmp_path / "seed" / "pairs.jsonl")]
    assert random[random.index("--data") + 1 :][:4] == [
        str(tmp_path / "seed" / "pairs.jsonl"),
        str(tmp_path / "seed" / "pairs.dropped.jsonl"),
        "--limit",
        "2",
    ]
    for words in commands:
        assert words[words.index("--seed") + 1] == "3"
        assert words[-1] == "--resume"


def test_without_dropped_pairs_all_are_in_one_file(tmp_path, monkeypatch, commands):
    monkeypatch.setattr(curation, "dropped_path", lambda path: tmp_path / "missing.jsonl")

    curation.compare(3, 1.0, tmp_path / "seed", tmp_path / "reward")

    random = commands[2]
    assert random[random.index("--data") + 2] == "--limit"


def test_another_share_in_the_same_folder_has_runs_of_its_own(
    tmp_path, monkeypatch, capsys, commands
):
    """The pairs of the first share are finished, so with them the second would do nothing."""
    for share in ("0.3", "0.5"):
        words = ["--share", share, "--seeds", "0", "--folder", str(tmp_path / "runs")]
        words += ["--out", str(tmp_path / f"{share}.json")]
        monkeypatch.setattr(sys, "argv", ["curation.py", *words])
        assert run_script(curation.main) == 0

    outs = [words[words.index("--out") + 1] for words in commands]
    assert len(set(outs)) == 7  # one reward model, and three outputs of each share
    assert read_json(tmp_path / "0.5.json")["share"] == 0.5
    assert "| best, seed 0 | 20.0 |" in capsys.readouterr().out


def test_a_folder_as_output_is_refused_before_the_runs(tmp_path, monkeypatch, capsys, commands):
    words = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["curation.py", *words])

    assert run_script(curation.main) == 2

    assert f"{tmp_path}: exists already" in capsys.readouterr().err
    assert commands == []


@pytest.mark.parametrize("content", ["", "my notes", '{"share": 0.3}', "[1]"])
def test_another_file_as_output_is_refused_before_the_runs(
    tmp_path, monkeypatch, capsys, commands, content
):
    path = tmp_path / "notes.json"
    path.write_text(content)
    words = ["--folder", str(tmp_path / "runs"), "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["curation.py", *words])

    assert run_script(curation.main) == 2

    assert f"{path}: exists already" in capsys.readouterr().err
    assert commands == []
    assert path.read_text() == content


def test_an_earlier_file_of_the_script_is_written_again(tmp_path, monkeypatch, capsys, commands):
    path = tmp_path / "scores.json"
    words = ["--seeds", "0", "--folder", str(tmp_path / "runs"), "--out", str(path)]
    monkeypatch.setattr(sys, "argv", ["curation.py", *words])

    assert run_script(curation.main) == 0
    monkeypatch.setattr(curation, "run_or_resume", lambda *words: None)  # all of it is done
    assert run_script(curation.main) == 0

    assert read_json(path)["runs"]["0"]["best"] == evaluation(0.2)


def test_a_mean_or_difference_with_a_share_of_nothing_is_none():
    scores = [{"pope": {"precision": 0.5}, "words": 1.0}, {"pope": {"precision": None}, "words": 2}]

    mean = curation.combine(scores, statistics.mean)

    assert mean == {"pope": {"precision": None}, "words": 1.5}
    assert curation.combine([mean, mean], curation.subtract)["pope"]["precision"] is None


def test_the_table_has_the_means_over_the_seeds_and_their_difference():
    """CHAIR_i of 10 and 20 against 16 and 18, POPE of 50 and 60 against 70."""
    runs = {
        "0": {"best": evaluation(0.10, 0.5), "random": evaluation(0.16, 0.7)},
        "1": {"best": evaluation(0.20, 0.6), "random": evaluation(0.18, 0.7)},
    }

    lines = curation.curation_lines(runs)

    assert lines[2:] == [
        "| base | 25.0 | 50.0 | 75.0 | 20.0 | 0.0 | 60.0 |",
        "| best, seed 0 | 10.0 | 50.0 | 75.0 | 20.0 | 0.0 | 50.0 |",
        "| best, seed 1 | 20.0 | 50.0 | 75.0 | 20.0 | 0.0 | 60.0 |",
        "| random, seed 0 | 16.0 | 50.0 | 75.0 | 20.0 | 0.0 | 70.0 |",
        "| random, seed 1 | 18.0 | 50.0 | 75.0 | 20.0 | 0.0 | 70.0 |",
        "| best, mean | 15.0 | 50.0 | 75.0 | 20.0 | 0.0 | 55.0 |",
        "| random, mean | 17.0 | 50.0 | 75.0 | 20.0 | 0.0 | 70.0 |",
        "| difference | -2.0 | 0.0 | 0.0 | 0.0 | 0.0 | -15.0 |",
    ]
