"""The evidence: the arms of the study on several base models and seeds, with intervals over pictures; it goes on after a kill.

    python data/study.py --bases data/tiny runs/bases/* --eval runs/study/study/* --out runs/study/out

An arm is a line of options for train.py beside the frozen recipe. A base is what data/make_tiny.py writes: model/, train/ and
about.json, which names its seed and q, the strength of the expectations in its captions. Finished arms stay in OUT; study.json
(all scores, no answers) and study.md (the tables) are written at the end, and whenever it is started again.
"""

import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import astuple, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minialign.evaluation.chair import CaptionCounts, chair_scores  # noqa: E402
from minialign.evaluation.evaluation_sets import read_folder  # noqa: E402
from minialign.evaluation.report import COLUMNS, evaluate_set  # noqa: E402
from minialign.methods.registry import METHODS  # noqa: E402
from minialign.models.adapters import load_adapter  # noqa: E402
from minialign.models.loading import load_vlm  # noqa: E402
from minialign.utils.cli import Parser, number_type, run_script  # noqa: E402
from minialign.utils.files import InputError, atomic_write, check, read_json, write_json  # noqa: E402

CENTRAL = 0.35  # the strength q that the recipe was made for


@dataclass(frozen=True)
class Part:
    """Arms of one question: options of train.py (None: the base itself) by name; seeds a base; which bases, by their q."""

    title: str
    arms: dict
    seeds: int
    wanted: callable


MAIN = {"base": None, "control": "--method sft", "bdhs": "--method bdhs"}
PARTS = (
    Part("BDHS + DPO against a supervised control", MAIN, 3, lambda q: q == CENTRAL),
    Part("Strength of the expectations in the captions", MAIN, 1, lambda q: q != CENTRAL),
    Part(
        "What is hidden, and how the rejected response is written",
        {
            "rho 0, nothing hidden": "--method bdhs --rho 0",
            "rho 0.5": "--method bdhs --rho 0.5",
            "rho 0.9": "--method bdhs --rho 0.9",
            "rho 1, all hidden": "--method bdhs --rho 1",
            "unguided": "--method bdhs --unguided",
            "one round, no similarity check": "--method bdhs --rounds 1",
        },
        1,
        lambda q: q == CENTRAL,
    ),
    Part(
        "Other methods and losses",
        {
            "dpo, rule-corrupted pairs": "--method dpo",
            "online-bdhs": "--method online-bdhs",
            "online-dpo, true annotator": "--method online-dpo",
            "mixed-dpo, true annotator": "--method mixed-dpo",
            "distortion": "--method distortion",
            "bdhs, IPO": "--method bdhs --loss ipo",
            "bdhs, SLiC": "--method bdhs --loss slic",
        },
        1,
        lambda q: q == CENTRAL,
    ),
    Part(
        "Contrasting the picture with its absence while decoding the base",
        {f"a = {a}": a for a in (0.25, 0.5, 1.0, 2.0)},
        1,
        lambda q: True,
    ),
    Part(
        "Closing the gap with truthful captions",
        {
            "bdhs, 300 steps": "--method bdhs --steps 300",
            "bdhs, beta 0.1": "--method bdhs --beta 0.1",
            "bdhs, IPO, q = 0": "--method bdhs --loss ipo",
            "bdhs, epsilon 0.99": "--method bdhs --epsilon 0.99",
            "bdhs, unguided, q = 0": "--method bdhs --unguided",
            "dpo, pairs that differ in a few words": "--method dpo",
        },
        1,
        lambda q: q == 0,
    ),
)


@dataclass(frozen=True)
class Arm:
    """One model to measure: a base, an alignment seed, and train.py's options (None: no training; a number: contrast)."""

    base: str
    name: str
    seed: int
    options: object

    def folder(self, out):
        """Where its work lies."""
        return (
            Path(out) / "arms" / Path(self.base).name / f"{self.name.replace(' ', '_')}-{self.seed}"
        )


def arms_of(part, bases):
    """The Arms of a part on {folder: about.json}; what is not trained has one seed."""
    return [
        Arm(base, name, seed, options)
        for base, about in bases.items()
        if part.wanted(about["q"])
        for name, options in part.arms.items()
        for seed in range(part.seeds if isinstance(options, str) else 1)
    ]


def words(recipe, method):
    """The frozen recipe as options of train.py."""
    chosen = {
        key: value
        for key, value in (recipe | recipe["methods"].get(method, {})).items()
        if key not in ("methods", "method", "control", "seed")
    }
    return [
        word
        for key, value in chosen.items()
        for word in ([f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)]))
    ]


def work(arm, sets, recipe, out):
    """Train an arm and measure it on every set, unless that is done: scores.json in its folder, with each caption's counts."""
    folder = arm.folder(out)
    if (folder / "scores.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    vlm = load_vlm(str(Path(arm.base) / "model"))
    if isinstance(arm.options, str):
        method = arm.options.split()[1]
        data = (
            Path(arm.base)
            / "train"
            / ("instruct.json" if METHODS[method].data == "chosen" else "povid.json")
        )
        command = [
            sys.executable,
            ROOT / "train.py",
            "--model",
            f"{arm.base}/model",
            "--data",
            data,
            *words(recipe, method),
            *arm.options.split(),
            "--seed",
            str(arm.seed),
            "--out",
            folder / "run",
            "--resume",
        ]
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
                f"{folder / 'log'}: the arm's training ended with status {done.returncode}; its last lines say why"
            )
        load_adapter(vlm.model, folder / "run" / "adapter")
    scores = {
        name: evaluate_set(
            vlm,
            read_folder(path),
            contrast=arm.options if isinstance(arm.options, float) else 0.0,
        )
        for name, path in sets.items()
    }
    write_json(
        folder / "scores.json",
        {
            name: found | {"counts": [astuple(caption) for caption in counts]}
            for name, (found, counts) in scores.items()
        },
    )


def interval(ours, others, resamples=2000):
    """95 % interval of the difference of CHAIR_i between two models' captions of the same pictures, by a paired bootstrap over pictures.

    ours, others: `caption_counts` (runs, pictures, counts); runs are pooled, so the interval tells of pictures and not of seeds.
    """
    draws = np.random.default_rng(0).integers(0, ours.shape[1], (resamples, ours.shape[1]))
    ratios = [
        pooled[:, 1] / np.maximum(1, pooled[:, 0])
        for pooled in (counts.sum(0)[draws].sum(1) for counts in (ours, others))
    ]
    return [float(edge) for edge in np.quantile(ratios[0] - ratios[1], (0.025, 0.975))]


def pooled_chair_i(counts):
    """CHAIR_i of all captions of counts (runs, pictures, counts) together."""
    captions = counts.reshape(-1, counts.shape[-1])
    return chair_scores([CaptionCounts(*caption) for caption in captions])["chair_i"]


def row(name, found, control):
    """What the tables say of an arm on one set, from {(base, seed): scores} of its runs and of the control's (None: is the control or the base)."""
    values = {key: np.array([scores[key] for scores in found.values()]) for _, key in COLUMNS}
    of_base = {
        base: np.array([scores["chair_i"] for (own, _), scores in found.items() if own == base])
        for base in dict.fromkeys(base for base, _ in found)
    }
    means = np.array([each.mean() for each in of_base.values()])
    line = {
        "arm": name,
        "runs": len(found),
        "bases": len(of_base),
        "by_base": means.tolist(),
        **{key: float(value.mean()) for key, value in values.items()},
        "pope": float(
            np.mean(
                [part["accuracy"] for scores in found.values() for part in scores["pope"].values()]
            )
        ),
        "over_bases": float(means.std(ddof=1)) if len(means) > 1 else None,
        "over_seeds": float(np.mean([each.std(ddof=1) for each in of_base.values()]))
        if min(map(len, of_base.values())) > 1
        else None,
    }
    if control:
        pairs = [
            (scores["counts"], control.get(key, control[key[0], 0])["counts"])
            for key, scores in found.items()
        ]
        ours, others = (np.array(side, dtype=np.int64) for side in zip(*pairs))
        line |= {
            "difference": float(pooled_chair_i(ours) - pooled_chair_i(others)),
            "interval": interval(ours, others),
        }
    return line


def summary(bases, sets, out):
    """{part: {q: {set: [row of each arm]}}} of the arms that are done; a part without any has no table."""
    tables = {}
    for part in PARTS:
        for q in sorted({about["q"] for about in bases.values() if part.wanted(about["q"])}):
            own = {base: about for base, about in bases.items() if about["q"] == q}
            everything = [*arms_of(PARTS[0 if q == CENTRAL else 1], own), *arms_of(part, own)]
            read = {
                arm: read_json(arm.folder(out) / "scores.json")
                for arm in dict.fromkeys(everything)
                if (arm.folder(out) / "scores.json").exists()
            }
            for name in sets:
                found = {
                    arm: {
                        (own.base, own.seed): scores[name]
                        for own, scores in read.items()
                        if own.name == arm
                    }
                    for arm in dict.fromkeys([*MAIN, *part.arms])
                }
                whole = {
                    arm: runs
                    for arm, runs in found.items()
                    if runs and all((base, 0) in found["control"] for base, _ in runs)
                }
                if whole.keys() & part.arms.keys():
                    tables.setdefault(part.title, {}).setdefault(f"{q:g}", {})[name] = [
                        row(arm, runs, found["control"] if arm not in ("base", "control") else None)
                        for arm, runs in whole.items()
                    ]
    return tables


def against(one):
    """The difference of a row's CHAIR_i from the control's in points with its interval, or nothing."""
    return (
        f"{100 * one['difference']:+.1f} [{100 * one['interval'][0]:+.1f}, {100 * one['interval'][1]:+.1f}]"
        if "interval" in one
        else ""
    )


def brief(strengths):
    """A line an arm: CHAIR_i on each set with its difference from the control, recall and repeats set by set, in per cent."""
    names = list(next(iter(strengths.values())))
    yield (
        "| q | arm | bases | runs | "
        + " | ".join(f"CHAIR_i {name}" for name in names)
        + f" | recall {', '.join(names)} | repeats |"
    )
    yield "|" + "---|" * (len(names) + 6)
    for q, sets in strengths.items():
        for lines in zip(*sets.values()):
            cells = [
                f"{100 * one['chair_i']:.1f}" + (f" ({against(one)})" if against(one) else "")
                for one in lines
            ]
            several = [
                ", ".join(f"{100 * one[key]:.1f}" for one in lines) for key in ("recall", "repeats")
            ]
            yield f"| {q} | {lines[0]['arm']} | {lines[0]['bases']} | {lines[0]['runs']} | {' | '.join(cells + several)} |"


def full(strengths):
    """A line a set and an arm: shares in per cent; of CHAIR_i the standard deviation over bases and within one over seeds, and the difference from the control."""
    yield (
        "| q | set | arm | runs | CHAIR_i | ± bases | ± seeds | against control [95 %] | "
        + " | ".join(name for name, _ in COLUMNS[1:])
        + " | POPE |"
    )
    yield "|" + "---|" * (len(COLUMNS) + 8)
    for q, sets in strengths.items():
        for name, lines in sets.items():
            for one in lines:
                spreads = " | ".join(
                    "" if one[key] is None else f"{100 * one[key]:.1f}"
                    for key in ("over_bases", "over_seeds")
                )
                shares = " | ".join(
                    f"{one[key] * (1 if key == 'words' else 100):.1f}" for _, key in COLUMNS[1:]
                )
                yield f"| {q} | {name} | {one['arm']} | {one['runs']} | {100 * one['chair_i']:.1f} | {spreads} | {against(one)} | {shares} | {100 * one['pope']:.1f} |"


def markdown(tables):
    """The tables as Markdown: of every part the brief one, then the full one."""
    for title, strengths in tables.items():
        yield from (f"\n**{title}**\n", *brief(strengths), "", *full(strengths))


def main():
    """The command line: arms in the order of PARTS, `--jobs` at a time, one thread each; then the tables on standard output."""
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
        default=[*range(1, len(PARTS) + 1)],
        help="which questions, by number",
    )
    parser.add_argument("--jobs", type=number_type(int, 1), default=2, help="arms at a time")
    parser.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="where the arms' work and the tables go; what is done there is not done again",
    )
    options = parser.parse_args()
    check(
        (ROOT / "train.py").is_file(),
        f"{ROOT}: no train.py; run the study from a clone of the repository",
    )
    recipe, bases = (
        read_json(options.recipe, dict),
        {base: read_json(Path(base) / "about.json") for base in options.bases},
    )
    for base, about in bases.items():
        check(
            isinstance(about, dict) and {"seed", "q"} <= set(about),
            f'{base}/about.json: not {{"seed": ..., "q": ...}}, as data/make_tiny.py writes it',
        )
    sets = {Path(folder).name: folder for folder in options.eval}
    for what, folders in (("--bases", options.bases), ("--eval", options.eval)):
        check(
            len({Path(folder).name for folder in folders}) == len(folders),
            f"{what}: two folders have one name, by which their results are told apart; rename one",
        )
    held = {name: read_folder(folder) for name, folder in sets.items()}
    for name, one in held.items():
        check(
            one.captions and one.pope,
            f"{sets[name]}: the study needs captions.json and pope_*.jsonl",
        )
    sizes = {name: len(one.captions) for name, one in held.items()}
    begun, settings = Path(options.out) / "settings.json", {"recipe": recipe, "pictures": sizes}
    if not begun.exists():  # the commit is that of the beginning: what was frozen
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
        ).stdout.strip()
        write_json(begun, settings | {"commit": commit})
    frozen = read_json(begun, dict)
    check(
        frozen | settings == frozen,
        f"{options.out}: was begun with another recipe or other pictures; give another --out",
    )
    os.environ["TQDM_DISABLE"] = "1"  # of the processes below: one bar is enough
    arms = list(
        dict.fromkeys(arm for part in options.parts for arm in arms_of(PARTS[part - 1], bases))
    )
    with (
        ProcessPoolExecutor(
            options.jobs, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_DFL)
        ) as pool,
        tqdm(total=len(arms), desc="arms", unit="arm") as bar,
    ):
        try:
            for done in as_completed(
                [pool.submit(work, arm, sets, recipe, options.out) for arm in arms]
            ):
                done.result()
                bar.update()
        finally:
            pool.shutdown(cancel_futures=True)
    tables = summary(bases, sets, options.out)
    write_json(
        Path(options.out) / "study.json",
        frozen | {"torch": torch.__version__, "bases": list(bases.values()), "tables": tables},
    )
    text = "\n".join(markdown(tables)).strip() + "\n"
    with atomic_write(Path(options.out) / "study.md") as path:
        path.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    sys.exit(run_script(main))
