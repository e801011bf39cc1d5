"""Run the study: its arms on several base models and seeds, with intervals over images.

    python data/study.py --bases data/tiny runs/bases/* --eval runs/study/study/* --out OUT

Runs that are done stay in OUT, so the study continues where it was stopped. At the end it writes
study.json (all scores, no answers) and study.md (the tables) there.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tiny_study.arms import PARTS, runs_of  # noqa: E402
from tiny_study.markdown import markdown_lines  # noqa: E402
from tiny_study.running import measure_run  # noqa: E402
from tiny_study.tables import summarize  # noqa: E402

from minialign.evaluation.evaluation_sets import read_folder  # noqa: E402
from minialign.utils.cli import Parser, number_type, run_script  # noqa: E402
from minialign.utils.files import atomic_write, check, read_json, write_json  # noqa: E402


def build_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser(prog="python data/study.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--bases",
        nargs="+",
        required=True,
        metavar="DIR",
        help="folders written by data/make_tiny.py: model/, train/ and about.json",
    )
    parser.add_argument(
        "--eval", nargs="+", required=True, metavar="DIR", help="evaluation folders"
    )
    parser.add_argument(
        "--recipe",
        default=str(ROOT / "data" / "tiny" / "recipe.json"),
        metavar="FILE",
        help="options of train.py, frozen",
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        type=number_type(int, 1, len(PARTS)),
        default=list(range(1, len(PARTS) + 1)),
        help="which questions, by number",
    )
    parser.add_argument("--jobs", type=number_type(int, 1), default=2, help="runs at a time")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="where the runs and the tables go; what is done there is not done again",
    )
    return parser


def main():
    """Do all runs, then write and print the tables."""
    options = build_parser().parse_args()
    check(
        (ROOT / "train.py").is_file(),
        f"{ROOT}: no train.py; run the study from a clone of the repository",
    )

    # 1. What is wrong with the input is found before any work.
    recipe = read_json(options.recipe, dict)
    bases = read_bases(options.bases)
    sets = name_folders("--eval", options.eval)
    num_images = count_images(sets)
    frozen = freeze_settings(options.out, {"recipe": recipe, "pictures": num_images})

    # 2. The runs, in the order of the parts. Two parts may share a run.
    runs = []
    for number in options.parts:
        runs += runs_of(PARTS[number - 1], bases)
    run_all(list(dict.fromkeys(runs)), sets, recipe, options)

    # 3. The tables.
    tables = summarize(PARTS, bases, sets, options.out)
    study = frozen | {
        "torch": torch.__version__,
        "bases": list(bases.values()),
        "tables": tables,
    }
    text = "\n".join(markdown_lines(tables)).strip() + "\n"
    write_json(Path(options.out) / "study.json", study)
    with atomic_write(Path(options.out) / "study.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)


def read_bases(folders: list[str]) -> dict:
    """Read the about.json of each base, as {folder: value}. Raise InputError for another form."""
    name_folders("--bases", folders)
    bases = {}
    for folder in folders:
        about = read_json(Path(folder) / "about.json")
        check(
            isinstance(about, dict) and "seed" in about and "q" in about,
            f'{folder}/about.json: not {{"seed": ..., "q": ...}}, as data/make_tiny.py writes it',
        )
        bases[folder] = about
    return bases


def name_folders(option: str, folders: list[str]) -> dict:
    """Return {name: folder}. Raise InputError if two folders have the same name."""
    named = {Path(folder).name: folder for folder in folders}
    check(
        len(named) == len(folders),
        f"{option}: two folders have the same name, which their results would share; rename one",
    )
    return named


def count_images(sets: dict) -> dict:
    """Return the number of images with captions in each evaluation set, which needs POPE too."""
    num_images = {}
    for name, folder in sets.items():
        evaluation_set = read_folder(folder)
        check(
            evaluation_set.captions and evaluation_set.pope,
            f"{folder}: the study needs captions.json and pope_*.jsonl",
        )
        num_images[name] = len(evaluation_set.captions)
    return num_images


def freeze_settings(out, settings: dict) -> dict:
    """Store the settings of a new study with the commit, and return what is stored.

    Raises InputError if the study in `out` was started with other settings. The commit stays that
    of the first start.
    """
    path = Path(out) / "settings.json"
    if not path.exists():
        git = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        write_json(path, settings | {"commit": git.stdout.strip()})
    frozen = read_json(path, dict)
    check(
        frozen | settings == frozen,
        f"{out}: was started with another recipe or other images; give another --out",
    )
    return frozen


def run_all(runs, sets, recipe, options):
    """Do all runs, `--jobs` at a time, each in a process of its own."""
    os.environ["TQDM_DISABLE"] = "1"  # in those processes: one progress bar is enough
    pool = ProcessPoolExecutor(
        options.jobs,
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    with pool, tqdm(total=len(runs), desc="runs", unit="run") as progress:
        try:
            futures = [pool.submit(measure_run, run, sets, recipe, options.out) for run in runs]
            for future in as_completed(futures):
                future.result()  # raises what the run raised
                progress.update()
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
