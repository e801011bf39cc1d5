"""The scripts that run methods on the tiny model: the commands that they give, and their tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

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
        given.append([words[0].removeprefix(f"{ROOT}/"), *words[1:]])
        out = Path(words[words.index("--out") + 1])
        if out.suffix == ".jsonl":
            out.parent.mkdir(parents=True)
            out.write_text("{}\n{}\n")
            return
        out.mkdir(parents=True)
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
