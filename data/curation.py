"""Compare the best share of BDHS pairs with a random share of the same size, on the tiny model.

    python data/curation.py --folder DIR --out FILE

It trains a reward model. For each seed it samples pairs, keeps those of the highest margins under
this model, and aligns the base once on these and once on as many random ones. Prints a Markdown
table. What is done in DIR is not done again, so the same command resumes.
"""

import shlex
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from methods import method_line, method_table_head, run_command  # noqa: E402

from minialign.pairs.curation import dropped_path  # noqa: E402
from minialign.utils.cli import Parser, check_new, number_type, run_script  # noqa: E402
from minialign.utils.files import (  # noqa: E402
    InputError,
    check,
    read_json,
    read_jsonl,
    write_json,
)

IMAGES = ROOT / "data" / "tiny" / "train" / "images"
ARMS = ("best", "random")  # which of the pairs the base is aligned on
STORED_FIELDS = {"command", "share", "pairs", "runs"}  # of the file that this script writes


def curation_lines(runs: dict) -> list[str]:
    """Return the Markdown table of {seed: {one of ARMS: value of evaluation.json}}.

    It has the base, each run, the means over the seeds, and the mean of the best pairs less that of
    the random ones. Shares are in percent.
    """
    # 1. Each run.
    base_scores = next(iter(runs.values()))["best"]["base"]
    lines = [*method_table_head(base_scores), method_line("base", base_scores)]
    means = {}
    for arm in ARMS:
        scores_of_seeds = [evaluations[arm]["aligned"] for evaluations in runs.values()]
        means[arm] = combine(scores_of_seeds, statistics.mean)
        for seed, scores in zip(runs, scores_of_seeds, strict=True):
            lines.append(method_line(f"{arm}, seed {seed}", scores))

    # 2. The means over the seeds.
    for arm in ARMS:
        lines.append(method_line(f"{arm}, mean", means[arm]))
    difference = combine([means["best"], means["random"]], subtract)
    lines.append(method_line("difference", difference))
    return lines


def combine(values: list, function):
    """Apply a function to the numbers that stand at the same place of several nested dicts.

    The means of {"a": {"b": 1}} and {"a": {"b": 3}} are {"a": {"b": 2}}. A share of nothing is
    None. Where one of the dicts has None, so has the result.
    """
    if None in values:
        return None
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


def run_or_resume(script: str, *words):
    """Run train.py or sample.py. What is finished is not done again, what was begun is resumed."""
    run_command(script, *words, "--resume")


def compare(seed: int, share: float, folder: Path, reward: Path) -> tuple[int, dict]:
    """Align the base on the best and on random pairs of a seed.

    Args:
        seed: of the sampled pairs, of the random choice among them, and of the training.
        share: which share of the usable pairs to keep.
        folder: where the pairs and the runs go.
        reward: the folder of the reward model.

    Returns the number of pairs, the same for both, and {one of ARMS: value of evaluation.json}.
    """
    # 1. Sample the pairs. The best go to one file, the others to a second one.
    best_file = folder / "pairs.jsonl"
    scorer = ("--keep", share, "--by-score", f"reward:{reward}")
    run_or_resume("sample.py", "pairs", "--seed", seed, *scorer, "--out", best_file)
    num_kept = len(read_jsonl(best_file))
    all_files = [best_file]
    if dropped_path(best_file).exists():  # it is not there if all pairs were kept
        all_files.append(dropped_path(best_file))

    # 2. Train on the best, and on as many of all. train.py leaves out the pairs without a usable
    #    rejected response first, and then draws as many as --limit says.
    data_of_arms = {
        "best": ("--data", best_file),
        "random": ("--data", *all_files, "--limit", num_kept),
    }
    evaluations = {}
    for arm in ARMS:
        out = folder / arm
        settings = ("--method", "dpo", "--seed", seed, "--images", IMAGES)
        run_or_resume("train.py", *settings, *data_of_arms[arm], "--out", out)
        evaluations[arm] = read_json(out / "evaluation.json", dict)
    return num_kept, evaluations


def check_out(path):
    """Raise InputError if `path` exists, unless this script wrote it.

    Its own file is written again, with the same scores, because the same command resumes.
    """
    try:
        stored = read_json(path, dict)
    except InputError:  # there is none, or a file of another kind
        check_new(path)
        return
    check(
        stored.keys() == STORED_FIELDS,
        f"{path}: exists already and is no file of this script; give another --out",
    )


def main():
    """Train the reward model, do all runs, store their scores, and print the table."""
    # 1. The options.
    parser = Parser(prog="python data/curation.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--share",
        type=number_type(float, 0, 1, above=True),
        default=0.3,
        help="share of the pairs to keep",
    )
    parser.add_argument(
        "--seeds",
        type=number_type(int, 0, 2**32 - 1),
        nargs="+",
        default=[0, 1, 2],
        help="seeds of the pairs, of the random choice among them, and of the training",
    )
    parser.add_argument("--folder", type=Path, required=True, help="where the runs go")
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the scores of all runs, as JSON"
    )
    options = parser.parse_args()
    check_out(options.out)

    # 2. One reward model, which scores the pairs of all seeds.
    reward = options.folder / "reward"
    run_or_resume("train.py", "--method", "reward", "--out", reward)

    # 3. The runs. A finished file of pairs is not sampled again, so each share has its own folder.
    command = shlex.join(["python", "data/curation.py", *sys.argv[1:]])
    stored = {"command": command, "share": options.share, "pairs": {}, "runs": {}}
    for seed in options.seeds:
        folder = options.folder / f"seed-{seed}-share-{options.share}"
        num_kept, evaluations = compare(seed, options.share, folder, reward)
        stored["pairs"][str(seed)] = num_kept
        stored["runs"][str(seed)] = evaluations
        write_json(options.out, stored)

    # 4. The table.
    print("\n".join(curation_lines(stored["runs"])))


if __name__ == "__main__":
    sys.exit(run_script(main))
