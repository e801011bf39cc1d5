"""The study's runs: which there are, and what each is trained with."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT

from minialign.utils.files import InputError

sys.path.insert(0, str(ROOT / "data"))
from tiny_study import running  # noqa: E402
from tiny_study.arms import (  # noqa: E402
    MAIN_ARMS,
    PARTS,
    STUDIES,
    Arm,
    LaterArm,
    Part,
    Run,
    is_central,
    ordered_runs,
    runs_of,
)
from tiny_study.recipe import recipe_options  # noqa: E402
from tiny_study.running import measure_run  # noqa: E402

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


def test_the_study_of_distillation_does_the_first_seed_of_all_bases_first():
    """Within a seed its most important arms come first, each on all bases."""
    study = STUDIES["distillation"]

    runs = ordered_runs(study, study.parts, BASES)

    assert [run.seed for run in runs] == [0] * 9 * 4 + [1] * 6 * 4 + [2] * 6 * 4
    assert [run.base for run in runs[:8]] == [*BASES, *BASES]
    names = list(dict.fromkeys(run.arm.name for run in runs))
    assert names[:6] == ["base", "a = 0.5", "a = 1.0", "control", "bdhs", "distill"]
    assert len(set(runs)) == len(runs)
    assert len({run.folder("out") for run in runs}) == len(runs)


def test_the_other_study_keeps_the_order_of_its_parts():
    study = STUDIES["bdhs"]
    runs = []
    for part in PARTS:
        runs += runs_of(part, BASES)

    assert ordered_runs(study, study.parts, BASES) == list(dict.fromkeys(runs))


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
    recipe["max_new_tokens"] = 64
    distill_options = " ".join(recipe_options(recipe, "distill"))
    recipe["rho"] = 0.9
    noise_options = " ".join(recipe_options(recipe, "distill", ["--by", "noise"]))

    assert bdhs_options == "--lora-rank 4 --lr 0.0002 --steps 10 --unguided --loss dpo"
    assert rloo_options == "--lora-rank 4 --lr 0.0002 --steps 3 --max-new-tokens 96"
    assert distill_options == "--lora-rank 4 --lr 0.0002 --steps 10"  # it samples with --on alone
    assert noise_options == distill_options  # noise takes the place of the mask


@pytest.fixture()
def train_calls(monkeypatch):
    """Replace training and evaluation, and return the commands and adapters that are used."""
    calls = SimpleNamespace(commands=[], adapters=[])

    def run(command, **options):
        calls.commands.append([str(word) for word in command])
        return subprocess.CompletedProcess(command, returncode=0)

    def load_adapter(model, path):
        calls.adapters.append((model, path))
        return SimpleNamespace(merge=lambda: None)

    def measure_set(vlm, base_vlm, folder, contrast):
        assert base_vlm is not vlm
        return {"chair_i": 0.5, "set": folder, "contrast": contrast}

    monkeypatch.setattr(running.subprocess, "run", run)
    monkeypatch.setattr(running, "load_vlm", lambda path: SimpleNamespace(model=path))
    monkeypatch.setattr(running, "load_adapter", load_adapter)
    monkeypatch.setattr(running, "measure_set", measure_set)
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
    assert stored == {"typical": {"chair_i": 0.5, "set": "pictures/typical", "contrast": 0.0}}


def test_a_later_arm_starts_from_what_the_first_one_has_trained(tmp_path, train_calls, monkeypatch):
    """The first arm's adapter is merged into the base, and the own one belongs to that model.

    Without the first arm's run there is nothing to start from.
    """
    saved = []
    monkeypatch.setattr(running, "save_model", lambda *arguments: saved.append(arguments))
    arm = LaterArm("then bdhs", "--method bdhs", first="distill")
    run = Run("b/one", arm, seed=3)
    arms_folder = tmp_path / "arms" / "one"
    first_adapter = arms_folder / "distill-3" / "run" / "adapter"
    start = arms_folder / "then_bdhs-3" / "start"

    with pytest.raises(InputError, match="run the arm 'distill' first"):
        measure_run(run, {}, {"methods": {}}, tmp_path)
    first_adapter.mkdir(parents=True)
    measure_run(run, {}, {"methods": {}}, tmp_path)

    assert saved == [("b/one/model", Path("b/one/model"), start)]
    assert train_calls.adapters == [
        ("b/one/model", first_adapter),
        (str(start), arms_folder / "then_bdhs-3" / "run" / "adapter"),
    ]
    words = train_calls.commands[0]
    assert words[words.index("--model") + 1] == str(start)
    assert words[words.index("--data") + 1] == "b/one/train/instruct.json"


@pytest.mark.parametrize(
    "arm, data",
    [
        (Arm("control", "--method sft"), "chosen.json"),
        (Arm("bdhs", "--method dpo", sampler="bdhs"), "bdhs.jsonl"),
        (Arm("online", "--method online-dpo"), "chosen.json"),
    ],
)
def test_all_arms_learn_from_the_shared_records(tmp_path, train_calls, monkeypatch, arm, data):
    """The images stay in the folder of the base. An arm that left out a record would be refused."""
    records = tmp_path / "records"
    records.mkdir()
    (records / "counts.json").write_text('{"records": 7}')
    monkeypatch.setattr(running, "share_records", lambda *arguments: records)
    run = Run("b/one", arm, seed=1)
    folder = run.folder(tmp_path)
    (folder / "run").mkdir(parents=True)
    (folder / "run" / "summary.json").write_text('{"pairs": 7}')

    measure_run(run, {}, {"methods": {}}, tmp_path, shares_records=True)

    words = train_calls.commands[0]
    assert words[words.index("--data") + 1] == str(records / data)
    assert words[words.index("--images") + 1] == "b/one/train/images"
    (folder / "scores.json").unlink()
    (folder / "run" / "summary.json").write_text('{"pairs": 6}')
    with pytest.raises(InputError, match="6 of the 7 records"):
        measure_run(run, {}, {"methods": {}}, tmp_path, shares_records=True)
