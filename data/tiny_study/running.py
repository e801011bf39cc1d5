"""One run of the study: train the arm's model, and measure it on every evaluation set."""

import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import torch

from minialign.evaluation.evaluation_sets import read_folder
from minialign.evaluation.report import evaluate_set
from minialign.methods.registry import COMMON_OPTIONS, METHODS
from minialign.models.adapters import load_adapter
from minialign.models.loading import load_vlm
from minialign.utils.files import InputError, write_json
from tiny_study.arms import Run

ROOT = Path(__file__).resolve().parents[2]


def measure_run(run: Run, sets: dict, recipe: dict, out):
    """Train and measure a run, unless that is done. Write scores.json in its folder.

    Args:
        run: what to measure.
        sets: {name: folder} of the evaluation sets.
        recipe: the frozen options of train.py.
        out: the study's folder.
    """
    folder = run.folder(out)
    if (folder / "scores.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)

    # 1. The model. Runs share the cores, so each computes with one thread.
    torch.set_num_threads(1)
    vlm = load_vlm(str(Path(run.base) / "model"))
    if run.arm.train_options:
        train_run(run, recipe, folder)
        load_adapter(vlm.model, folder / "run" / "adapter")

    # 2. Its scores, with the counts of each caption for the intervals.
    stored = {}
    for name, path in sets.items():
        scores, counts = evaluate_set(vlm, read_folder(path), contrast=run.arm.contrast)
        scores["counts"] = [astuple(caption) for caption in counts]
        stored[name] = scores
    write_json(folder / "scores.json", stored)


def train_run(run: Run, recipe: dict, folder: Path):
    """Train a run's model by train.py, or finish its training. Raise InputError if that fails.

    The arm's own options come after those of the recipe, so that they take precedence.
    """
    options = run.arm.train_options.split()
    method = options[1]  # behind --method
    needs_pairs = METHODS[method].data != "chosen"
    data = "povid.json" if needs_pairs else "instruct.json"
    command = [sys.executable, ROOT / "train.py", "--model", f"{run.base}/model"]
    command += ["--data", Path(run.base) / "train" / data]
    command += [*recipe_options(recipe, method), *options, "--seed", str(run.seed)]
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


def recipe_options(recipe: dict, method: str) -> list[str]:
    """Return the frozen recipe as options of train.py. A method's own values take precedence.

    The study itself chooses method, control and seed. What the method does not read is left out,
    because train.py refuses it.
    """
    settings = recipe | recipe["methods"].get(method, {})
    read_by_method = {*COMMON_OPTIONS, *METHODS[method].options} - {"method", "control", "seed"}
    options = []
    for name, value in settings.items():
        if name not in read_by_method:
            continue
        options.append(f"--{name.replace('_', '-')}")
        if value is not True:
            options.append(str(value))
    return options
