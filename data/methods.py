"""Run methods of the study once each on the tiny model, and store what was measured.

    python data/methods.py --methods sft dpo rloo --out FILE [options of train.py ...]
    python data/methods.py --methods "dpo --loss mpo" --out FILE

Prints a Markdown table with a row for each method. A method in quotes has options of its own. RUNS
in them is the folder of the runs: RUNS/sft/adapter is what the method sft has trained before.
`python data/study.py` measures on several bases and seeds, with intervals.
"""

import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.evaluation.shares import scaled_text  # noqa: E402
from minialign.methods.registry import METHODS  # noqa: E402
from minialign.utils.cli import Parser, check_new, run_script  # noqa: E402
from minialign.utils.files import InputError, check, read_json, write_json  # noqa: E402
from minialign.utils.text_tables import markdown_head, markdown_row  # noqa: E402

# The options of train.py that each run gets from this script.
FIXED_OPTIONS = ("--method", "--out")

# --- the table


def method_lines(runs: dict) -> list[str]:
    """Return the Markdown table of {method: value of evaluation.json}: the base, then each method.

    It shows CHAIR_i and recall on each set, colors, words and repeats on the balanced set, and the
    mean accuracy of POPE. Shares are in percent.
    """
    base_scores = next(iter(runs.values()))["base"]
    lines = [*method_table_head(base_scores), method_line("base", base_scores)]
    for method, evaluation in runs.items():
        lines.append(method_line(method, evaluation["aligned"]))
    return lines


def method_table_head(scores_of_sets: dict) -> list[str]:
    """Return the headings of the table, and the line under them, for {set: scores}."""
    headings = ["method"]
    headings += [f"CHAIR_i {name}" for name in scores_of_sets]
    headings += [f"recall {name}" for name in scores_of_sets]
    headings += ["colour balanced", "words balanced", "repeats balanced", "POPE"]
    return markdown_head(headings)


def method_line(method: str, scores_of_sets: dict) -> str:
    """Return the row of one model, from {set: scores}. A share of nothing is a dash."""
    # 1. The mean accuracy over the splits of POPE of all sets.
    accuracies = []
    for scores in scores_of_sets.values():
        for pope_scores in scores["pope"].values():
            accuracies.append(pope_scores["accuracy"])
    mean_accuracy = None
    if accuracies:
        mean_accuracy = statistics.mean(accuracies)

    # 2. The cells, in the order of the headings.
    cells = [method]
    for name in ("chair_i", "recall"):
        cells += [scaled_text(scores[name]) for scores in scores_of_sets.values()]
    balanced = scores_of_sets["balanced"]
    cells.append(scaled_text(balanced["colour"]))
    cells.append(scaled_text(balanced["words"], factor=1))
    cells.append(scaled_text(balanced["repeats"]))
    cells.append(scaled_text(mean_accuracy))
    return markdown_row(cells)


# --- the runs


def split_method(method: str) -> list[str]:
    """Return the words of a method: its name, and options of its own behind it.

    Raises InputError for one that has no name, or whose images are not measured.
    """
    try:
        words = shlex.split(method)
    except ValueError as error:  # a quotation mark without another
        raise InputError(f"--methods {method!r}: {error}") from None
    measured = [name for name in METHODS if name != "reward"]
    check(
        words and words[0] in measured,
        f"--methods {method!r}: does not begin with one of {', '.join(measured)}",
    )
    refuse_fixed_options(words[1:], f"--methods {method!r}")
    return words


def refuse_fixed_options(words: list[str], place: str):
    """Raise InputError for options of train.py that this script gives itself.

    train.py takes the last of two values. So a second --method would train another method than the
    row of the table says.
    """
    for word in words:
        option = word.split("=")[0]
        check(
            option not in FIXED_OPTIONS,
            f"{place}: {option} is given to train.py for each method; leave it out",
        )


def run_method(method: str, train_options: list[str], folder: Path) -> dict:
    """Train one method by train.py in a folder of runs. Return the value of its evaluation.json.

    method: its name, and options of its own behind it.
    """
    out = folder / run_name(method)
    method_words = [word.replace("RUNS", str(folder)) for word in split_method(method)]
    run_command("train.py", "--method", *method_words, "--out", out, *train_options)
    print(method, read_json(out / "summary.json"), file=sys.stderr)
    evaluation = read_json(out / "evaluation.json", dict)
    check_sets(method, evaluation["base"])
    return evaluation


def check_sets(method: str, scores_of_sets: dict):
    """Raise InputError unless {set: scores} has what the table shows."""
    has_captions = all("chair_i" in scores for scores in scores_of_sets.values())
    check(
        "balanced" in scores_of_sets and has_captions,
        f"{method}: measured on {', '.join(scores_of_sets) or 'nothing'}; the table needs captions "
        "of each set, and a set named balanced",
    )


def run_command(script: str, *words):
    """Run train.py or sample.py. What it prints goes to standard error: the output is the table.

    Raises InputError if the script fails.
    """
    command = [sys.executable, ROOT / script, *map(str, words)]
    try:
        subprocess.run(command, check=True, stdout=sys.stderr)
    except subprocess.CalledProcessError as error:
        raise InputError(
            f"{script} ended with status {error.returncode}; its last line says why"
        ) from None


def run_name(method: str) -> str:
    """Return the name of the folder of a run: "dpo --loss mpo" runs in dpo-loss-mpo."""
    return re.sub(r"[^\w.]+", "-", method)


def main():
    """Run the methods, store their scores, and print the table."""
    # 1. The options. All that are not known here are for train.py.
    parser = Parser(prog="python data/methods.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", required=True, help="each a name, or a name and options in quotes"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the scores of all runs, as JSON"
    )
    options, train_options = parser.parse_known_args()
    for method in options.methods:
        split_method(method)  # raises, before any work
    refuse_fixed_options(train_options, "the options of train.py")
    check_new(options.out)

    # 2. The runs. The scores are stored after each, so a later one that fails loses none.
    words = ["--methods", *options.methods, "--out", str(options.out), *train_options]
    stored = {"command": f"python data/methods.py {shlex.join(words)}", "runs": {}}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            stored["runs"][method] = run_method(method, train_options, Path(folder))
            write_json(options.out, stored)

    # 3. The table.
    print("\n".join(method_lines(stored["runs"])))


if __name__ == "__main__":
    sys.exit(run_script(main))
