"""Compare the best share of BDHS pairs with a random share of the same size, on the tiny model.

    python data/curation.py --folder DIR --out FILE

For each seed it samples pairs, keeps those of the highest margins under a reward model, and aligns
the base once on these and once on as many random ones. Prints a Markdown table. What is done in DIR
is not done again, so the same command resumes.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from methods import ROOT, method_line, method_table_head

TRAIN = ROOT / "data" / "tiny" / "train"


def curation_lines(runs: dict) -> list[str]:
    """Return the Markdown table of {seed: {"best" or "random": value of evaluation.json}}.

    It has the base, each run, the means over the seeds, and the difference of these means.
    """
    # 1. Each run.
    base_scores = next(iter(runs.values()))["best"]["base"]
    lines = [*method_table_head(base_scores), method_line("base", base_scores)]
    scores_of_arms = {}
    for arm in ("best", "random"):
        scores_of_arms[arm] = [evaluations[arm]["aligned"] for evaluations in runs.values()]
        for seed, scores in zip(runs, scores_of_arms[arm], strict=True):
            lines.append(method_line(f"{arm}, seed {seed}", scores))

    # 2. The means over the seeds.
    best_mean = combine(scores_of_arms["best"], statistics.mean)
    random_mean = combine(scores_of_arms["random"], statistics.mean)
    difference = combine([best_mean, random_mean], subtract)
    lines.append(method_line("best, mean", best_mean))
    lines.append(method_line("random, mean", random_mean))
    lines.append(method_line("difference", difference))
    return lines


def combine(values: list, function):
    """Apply a function to the numbers that stand at the same place of several nested dicts."""
    if not isinstance(values[0], dict):
        return function(values)
    combined = {}
    for name in values[0]:
        values_of_name = [value[name] for value in values]
        combined[name] = combine(values_of_name, function)
    return combined


def subtract(values: list[float]) -> float:
    """Return the first of two numbers less the second."""
    first, second = values
    return first - second


def run_script(*words):
    """Run a script of the repository. What is finished, or was begun, is not done again."""
    subprocess.run([sys.executable, *map(str, words), "--resume"], check=True, stdout=sys.stderr)


def compare(seed: int, share: float, folder: Path, reward: Path) -> tuple[int, dict]:
    """Align the base on the best and on random pairs of a seed.

    Returns the number of pairs, the same for both, and {"best" or "random": value of
    evaluation.json}.
    """
    # 1. Sample the pairs, and keep the best.
    best_file = folder / "pairs.jsonl"
    dropped_file = folder / "pairs.dropped.jsonl"
    scorer = ("--keep", share, "--by-score", f"reward:{reward}")
    run_script(ROOT / "sample.py", "pairs", "--seed", seed, *scorer, "--out", best_file)
    num_kept = len(best_file.read_text().splitlines())

    # 2. Train on them, and on as many of all usable pairs.
    data_of_arms = {
        "best": ("--data", best_file),
        "random": ("--data", best_file, dropped_file, "--limit", num_kept),
    }
    evaluations = {}
    for arm, data in data_of_arms.items():
        train = (ROOT / "train.py", "--method", "dpo", "--seed", seed, "--images", TRAIN / "images")
        run_script(*train, *data, "--out", folder / arm)
        evaluations[arm] = json.loads((folder / arm / "evaluation.json").read_text())
    return num_kept, evaluations


def main():
    """Train the reward model, do all runs, store their scores, and print the table."""
    # 1. The options.
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.3, help="of the pairs, to keep")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the scores of all runs, as JSON"
    )
    options = parser.parse_args()

    # 2. The runs.
    reward = options.folder / "reward"
    run_script(ROOT / "train.py", "--method", "reward", "--out", reward)
    command = shlex.join(["python", "data/curation.py", *sys.argv[1:]])
    stored = {"command": command, "share": options.share, "pairs": {}, "runs": {}}
    for seed in options.seeds:
        num_kept, evaluations = compare(
            seed, options.share, options.folder / f"seed-{seed}", reward
        )
        stored["pairs"][str(seed)] = num_kept
        stored["runs"][str(seed)] = evaluations
        options.out.write_text(json.dumps(stored, indent=1) + "\n")

    # 3. The table.
    print("\n".join(curation_lines(stored["runs"])))


if __name__ == "__main__":
    main()
