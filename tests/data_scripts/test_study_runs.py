"""The study's runs: which there are, and what each is trained with."""

import json
import subprocess
import sys
from dataclasses import astuple
from types import SimpleNamespace

import pytest
from conftest import ROOT

from minialign.evaluation.chair import CaptionCounts

sys.path.insert(0, str(ROOT / "data"))
from tiny_study import running  # noqa: E402
from tiny_study.arms import MAIN_ARMS, PARTS, Arm, Part, Run, is_central, runs_of  # noqa: E402
from tiny_study.running import measure_run, recipe_options  # noqa: E402

BASES = {
    "b/one": {"seed": 1, "q": 0.35},
    "b/two": {"seed": 2, "q": 0.35},
    "b/true": {"seed": 1, "q": 0},
    "b/half": {"seed": 1, "q": 0.5},
}


def test_runs_of_a_part_by_hand():
    """A trained arm has a run for each seed. The base itself and contrasts have one run."""
    base = Arm("base")
    sft = Arm("sft", "--method sft")
    contrast = Arm("a = 0.5", contrast=0.5)
    part = Part("A question", (base, sft, contrast), num_seeds=2, wants=is_central)

    runs = runs_of(part, BASES)

    assert runs == [
        Run("b/one", base, 0),
        Run("b/one", sft, 0),
        Run("b/one", sft, 1),
        Run("b/one", contrast, 0),
        Run("b/two", base, 0),
        Run("b/two", sft, 0),
        Run("b/two", sft, 1),
        Run("b/two", contrast, 0),
    ]
    assert runs_of(part, {"b/true": BASES["b/true"]}) == []


def test_every_base_has_the_main_arms():
    """The other arms of a base are compared with them, whatever its q."""
    runs = []
    for part in PARTS:
        runs += runs_of(part, BASES)

    for base in BASES:
        for arm in MAIN_ARMS:
            assert Run(base, arm, 0) in runs


def test_different_runs_have_different_folders():
    runs = []
    for part in PARTS:
        runs += runs_of(part, BASES)

    folders = {run.folder("out") for run in runs}

    assert len(folders) == len(set(runs)) == len(runs)
    run = Run("b/one", Arm("bdhs, IPO, q = 0"), 2)
    assert str(run.folder("out")) == "out/arms/one/bdhs,_IPO,_q_=_0-2"


def test_the_recipe_as_options_by_hand():
    """A method's own values take precedence, true is a flag, and underscores become hyphens.

    Method, seed and control are left out: the study chooses them. So is what a method does not
    read.
    """
    recipe = {
        "method": "bdhs",
        "lora_rank": 4,
        "lr": 2e-4,
        "steps": 10,
        "unguided": True,
        "seed": 7,
        "control": True,
        "loss": "dpo",
        "methods": {
            "rloo": {"steps": 3, "max_new_tokens": 96, "control": True},
            "sft": {"lr": 1.0},
        },
    }

    bdhs_options = " ".join(recipe_options(recipe, "bdhs"))
    rloo_options = " ".join(recipe_options(recipe, "rloo"))

    assert bdhs_options == "--lora-rank 4 --lr 0.0002 --steps 10 --unguided --loss dpo"
    assert rloo_options == "--lora-rank 4 --lr 0.0002 --steps 3 --max-new-tokens 96"


@pytest.fixture()
def train_calls(monkeypatch):
    """Replace training and evaluation, and return the commands and adapters that are used."""
    calls = SimpleNamespace(commands=[], adapters=[])

    def run(command, **options):
        calls.commands.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, returncode=0)

    def load_adapter(model, path):
        calls.adapters.append((model, path))

    def evaluate_set(vlm, evaluation_set, contrast):
        scores = {"chair_i": 0.5, "set": evaluation_set, "contrast": contrast}
        return scores, [CaptionCounts(1, 2)]

    monkeypatch.setattr(running.subprocess, "run", run)
    monkeypatch.setattr(running, "load_vlm", lambda path: SimpleNamespace(model=path))
    monkeypatch.setattr(running, "load_adapter", load_adapter)
    monkeypatch.setattr(running, "read_folder", str)
    monkeypatch.setattr(running, "evaluate_set", evaluate_set)
    monkeypatch.setattr(running.torch, "set_num_threads", lambda num_threads: None)
    return calls


@pytest.mark.parametrize(
    "name, options, data, recipe_steps",
    [
        ("control", "--method sft", "instruct.json", "5"),
        ("bdhs", "--method bdhs", "instruct.json", "5"),
        ("online", "--method online-bdhs --rho 1", "instruct.json", "5"),
        ("dpo", "--method dpo --loss ipo", "povid.json", "9"),
    ],
)
def test_what_an_arm_is_trained_with(tmp_path, train_calls, name, options, data, recipe_steps):
    """Methods that sample rejected responses themselves get instructions, the others get pairs.

    The arm's own options come after those of the recipe, so that they take precedence.
    """
    run = Run("b/one", Arm(name, options), seed=3)
    recipe = {"steps": 5, "methods": {"dpo": {"steps": 9}}}

    measure_run(run, {"typical": "pictures/typical"}, recipe, tmp_path)

    folder = tmp_path / "arms" / "one" / f"{name}-3"
    expected = [sys.executable, str(ROOT / "train.py"), "--model", "b/one/model"]
    expected += ["--data", f"b/one/train/{data}", "--steps", recipe_steps, *options.split()]
    expected += ["--seed", "3", "--out", str(folder / "run"), "--resume"]
    assert train_calls.commands == [expected]
    assert train_calls.adapters == [("b/one/model", folder / "run" / "adapter")]
    stored = json.loads((folder / "scores.json").read_text())
    assert stored == {
        "typical": {
            "chair_i": 0.5,
            "set": "pictures/typical",
            "contrast": 0.0,
            "counts": [list(astuple(CaptionCounts(1, 2)))],
        }
    }
