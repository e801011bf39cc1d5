"""One run of a study: train the arm's model, and measure it on every evaluation set."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

from minialign.methods.registry import METHODS
from minialign.models.adapters import load_adapter
from minialign.models.checkpoint import save_model
from minialign.models.loading import load_vlm
from minialign.utils.files import InputError, check, read_json, write_json
from tiny_study.arms import LaterArm, Run
from tiny_study.measuring import measure_set
from tiny_study.recipe import recipe_options
from tiny_study.records import share_records

ROOT = Path(__file__).resolve().parents[2]


def measure_run(run: Run, sets: dict, recipe: dict, out, shares_records: bool = False):
    """Train and measure a run, unless that is done. Write scores.json in its folder.

    Args:
        run: what to measure.
        sets: {name: folder} of the evaluation sets.
        recipe: the frozen options of train.py.
        out: the study's folder.
        shares_records: whether all arms of the study learn from the same records.
    """
    folder = run.folder(out)
    if (folder / "scores.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)

    # 1. The model. Runs share the cores, so each computes with one thread.
    torch.set_num_threads(1)
    base_vlm = load_vlm(str(Path(run.base) / "model"))
    vlm = base_vlm
    if run.arm.train_options:
        records = None
        if shares_records:
            records = share_records(run.base, run.seed, recipe, out)
        model_folder = start_model(run, out)
        train_run(run, recipe, folder, records, model_folder=model_folder)
        vlm = load_vlm(str(model_folder))
        load_adapter(vlm.model, folder / "run" / "adapter")

    # 2. Its scores, with what the intervals need of each image.
    stored = {}
    for name, path in sets.items():
        stored[name] = measure_set(vlm, base_vlm, path, run.arm.contrast)
    write_json(folder / "scores.json", stored)


def start_model(run: Run, out) -> Path:
    """Return the folder of the model that a run's training starts from.

    It is the base, unless another arm comes first. Then it is what that arm has trained, merged and
    written into the folder of this run.
    """
    base_model = Path(run.base) / "model"
    if not isinstance(run.arm, LaterArm):
        return base_model
    first_arm = replace(run.arm, name=run.arm.first)
    adapter = replace(run, arm=first_arm).folder(out) / "run" / "adapter"
    check(
        adapter.exists(),
        f"{adapter}: the arm {run.arm.name!r} starts from it; run the arm {run.arm.first!r} first",
    )
    model_folder = run.folder(out) / "start"
    vlm = load_vlm(str(base_model))
    load_adapter(vlm.model, adapter).merge()
    save_model(vlm.model, base_model, model_folder)
    return model_folder


def train_run(run: Run, recipe: dict, folder: Path, records: Path | None, *, model_folder: Path):
    """Train a run's model by train.py, or finish its training. Raise InputError if that fails.

    The arm's own options come after those of the recipe, so that they take precedence. `records` is
    the folder of the shared records, or None. The training starts from the model in `model_folder`.
    """
    # 1. Train.
    options = run.arm.train_options.split()
    method = options[1]  # behind --method
    command = [sys.executable, ROOT / "train.py", "--model", model_folder]
    command += data_options(run, method, records)
    command += recipe_options(recipe, method, arm_options=options)
    command += [*options, "--seed", str(run.seed)]
    command += ["--out", folder / "run", "--resume"]
    with open(folder / "log", "w", encoding="utf-8") as log:
        done = subprocess.run(
            command,
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
    if done.returncode:
        raise InputError(
            f"{folder / 'log'}: the training of this arm ended with status {done.returncode}; "
            "its last lines say why"
        )

    # 2. Training leaves out what it cannot learn from. Of shared records that is none.
    if records is not None:
        num_used = read_json(folder / "run" / "summary.json", dict)["pairs"]
        num_shared = read_json(records / "counts.json", dict)["records"]
        check(
            num_used == num_shared,
            f"{folder / 'run'}: learned from {num_used} of the {num_shared} records that all arms "
            "share",
        )


def data_options(run: Run, method: str, records: Path | None) -> list:
    """Return the options of train.py that name the data of a run."""
    train_folder = Path(run.base) / "train"
    if records is None:
        needs_pairs = METHODS[method].data != "chosen"
        return ["--data", train_folder / ("povid.json" if needs_pairs else "instruct.json")]
    name = "chosen.json"
    if run.arm.sampler:
        name = f"{run.arm.sampler}.jsonl"
    return ["--data", records / name, "--images", train_folder / "images"]
