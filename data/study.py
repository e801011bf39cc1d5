"""Run a study: its arms on several base models and seeds, with intervals over images.

    python data/study.py --bases data/tiny runs/bases/* --eval runs/study/study/* --out OUT
    python data/study.py --study distillation --bases ... --eval runs/study/study-3/* --out OUT
    python data/study.py --study parts --bases data/tiny --eval data/tiny/tune/* --out OUT

Runs that are done stay in OUT, so the study continues where it was stopped. At the end it writes
study.json (all scores) and study.md (the tables) there. --freeze writes OUT/settings.json and
stops: recipe, arms and images can then be committed before anything is measured.
"""

import hashlib
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

import torch  # noqa: E402
from tiny_study.arms import STUDIES, LaterArm, Run, Study, ordered_runs  # noqa: E402
from tiny_study.comparisons import TARGETS  # noqa: E402
from tiny_study.difference_tables import difference_lines, difference_tables  # noqa: E402
from tiny_study.distillation_report import (  # noqa: E402
    caption_lines,
    distillation_lines,
    summarize_distillation,
)
from tiny_study.inputs import (  # noqa: E402
    check_same_bases,
    choose_parts,
    count_images,
    read_bases,
    read_recipe,
    read_sets,
)
from tiny_study.markdown import markdown_lines  # noqa: E402
from tiny_study.running import measure_run  # noqa: E402
from tiny_study.tables import load_results, summarize  # noqa: E402
from tqdm import tqdm  # noqa: E402

from minialign.utils.cli import Parser, number_type, run_script  # noqa: E402
from minialign.utils.digests import file_digest  # noqa: E402
from minialign.utils.files import atomic_write, check, read_json, write_json  # noqa: E402


def build_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser(prog="python data/study.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--study",
        choices=list(STUDIES),
        default="bdhs",
        help="which study (default: %(default)s)",
    )
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
        type=number_type(int, 1),
        help="which questions, by number (default: all); what their arms are compared with must "
        "be in one of them, or done",
    )
    parser.add_argument("--jobs", type=number_type(int, 1), default=2, help="runs at a time")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="where the runs and the tables go; what is done there is not done again",
    )
    parser.add_argument(
        "--freeze", action="store_true", help="write OUT/settings.json, and measure nothing"
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
    study = STUDIES[options.study]
    recipe = read_recipe(options.recipe)
    bases = read_bases(study, options.bases)
    sets = read_sets(study, options.eval)
    parts = choose_parts(study, options.parts, bases, options.out)
    settings = {"recipe": recipe, "pictures": count_images(sets)}
    settings |= describe_study(options.study, sets)
    frozen = freeze_settings(options.out, settings)
    if options.freeze:
        print(f"{options.out}/settings.json holds the settings; nothing was measured")
        return
    check_same_bases(options.out, bases)

    # 2. The runs. Two parts may share a run.
    runs = ordered_runs(study, parts, bases)
    run_all(runs, sets, recipe, options)

    # 3. The tables of all runs that are done, whatever parts were asked for.
    write_report(study, bases, sets, options.out, frozen)


def describe_study(name: str, sets: dict) -> dict:
    """Return the arms, seeds, targets and images of a study, to be frozen before it starts."""
    arms = []
    for part in STUDIES[name].parts:
        for arm in part.arms:
            arms.append(asdict(arm) | {"seeds": part.num_seeds if arm.train_options else 1})
    described = {"study": name, "arms": arms}
    if STUDIES[name].shares_records:
        described["targets"] = [target.text for target in TARGETS]
    digests = {set_name: digest_set(folder) for set_name, folder in sets.items()}
    return described | {"image_digests": digests}


def digest_set(folder) -> str:
    """Return a hash of the content of all files of an evaluation set."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            digest.update(f"{name} {file_digest(path)}\n".encode())
    return digest.hexdigest()[:32]


def write_report(study: Study, bases: dict, sets: dict, out, frozen: dict):
    """Write study.json and study.md from the runs that are done, and print the tables."""
    # 1. What the scores say.
    report = frozen | {"torch": torch.__version__}
    if study.shares_records:
        runs: list[Run] = ordered_runs(study, study.parts, bases)
        report |= summarize_distillation(runs, bases, sets, out)
        lines = distillation_lines(report)
        write_text(Path(out) / "captions.md", caption_lines(report["captions"]))
    elif study.compared_with:
        runs = ordered_runs(study, study.parts, bases)
        results = load_results(runs, bases, out)
        tables = difference_tables(study.parts, results, study.compared_with)
        report |= {"bases": list(bases.values()), "tables": tables}
        lines = difference_lines(tables)
    else:
        tables = summarize(study.parts, bases, sets, out)
        report |= {"bases": list(bases.values()), "tables": tables}
        lines = markdown_lines(tables)

    # 2. The files.
    write_json(Path(out) / "study.json", report)
    print(write_text(Path(out) / "study.md", lines))


def write_text(path: Path, lines: list[str]) -> str:
    """Write lines to a file and return them as one text."""
    text = "\n".join(lines).strip() + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return text


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
    common = {name: settings[name] for name in settings if name in frozen}
    check(
        frozen | common == frozen,
        f"{out}: was started as another study, or with another recipe, other arms or images; "
        "give another --out",
    )
    # An earlier version stored fewer settings. Nothing tells whether those it lacks were the same.
    missing = [name for name in settings if name not in frozen]
    check(
        not missing,
        f"{path}: lacks {', '.join(missing)}, as an earlier version of this script started the "
        "study; give another --out",
    )
    return frozen


def run_all(runs, sets, recipe, options):
    """Do all runs, `--jobs` at a time, each in a process of its own.

    Arms that start from what another arm has trained wait until all other arms are done.
    """
    first_runs = [run for run in runs if not isinstance(run.arm, LaterArm)]
    later_runs = [run for run in runs if isinstance(run.arm, LaterArm)]
    measure = partial(
        measure_run,
        sets=sets,
        recipe=recipe,
        out=options.out,
        shares_records=STUDIES[options.study].shares_records,
    )
    os.environ["TQDM_DISABLE"] = "1"  # in those processes: one progress bar is enough
    pool = ProcessPoolExecutor(
        options.jobs,
        mp_context=get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    )
    with pool, tqdm(total=len(runs), desc="runs", unit="run") as progress:
        try:
            for runs_together in (first_runs, later_runs):
                futures = [pool.submit(measure, run) for run in runs_together]
                for future in as_completed(futures):
                    future.result()  # raises what the run raised
                    progress.update()
        finally:
            pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    sys.exit(run_script(main))
