"""Run every method of the study once on the tiny model, and store what was measured.

    python data/methods.py --methods sft dpo rloo --out FILE [options of train.py ...]

Prints a Markdown table with a row for each method. `python data/study.py` measures on several bases
and seeds, with intervals.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def method_lines(runs: dict) -> list[str]:
    """Return the Markdown table of {method: value of evaluation.json}: the base, then each method.

    It shows CHAIR_i and recall on each set, colors, words and repeats on the balanced set, and the
    mean accuracy of POPE. Shares are in percent.
    """
    base_scores = next(iter(runs.values()))["base"]
    set_names = list(base_scores)
    headings = ["method"]
    headings += [f"CHAIR_i {name}" for name in set_names]
    headings += [f"recall {name}" for name in set_names]
    headings += ["colour balanced", "words balanced", "repeats balanced", "POPE"]

    lines = [table_line(headings), "|" + "---|" * len(headings)]
    lines.append(method_line("base", base_scores))
    for method, evaluation in runs.items():
        lines.append(method_line(method, evaluation["aligned"]))
    return lines


def method_line(method: str, scores_of_sets: dict) -> str:
    """Return the row of one model, from {set: scores}."""
    balanced = scores_of_sets["balanced"]
    accuracies = []
    for scores in scores_of_sets.values():
        for pope in scores["pope"].values():
            accuracies.append(pope["accuracy"])

    cells = [method]
    for name in ("chair_i", "recall"):
        cells += [percent(scores[name]) for scores in scores_of_sets.values()]
    cells.append(percent(balanced["colour"]))
    cells.append(f"{balanced['words']:.1f}")
    cells.append(percent(balanced["repeats"]))
    cells.append(f"{100 * statistics.mean(accuracies):.1f}")
    return table_line(cells)


def percent(share: float | None) -> str:
    """Return a share in percent, or a dash for a share of nothing."""
    return "-" if share is None else f"{100 * share:.1f}"


def table_line(cells: list[str]) -> str:
    """Return one line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def run_method(method: str, train_options: list[str], out: Path) -> dict:
    """Train one method by train.py, and return the value of its evaluation.json."""
    command = [sys.executable, ROOT / "train.py", "--method", method, "--out", out, *train_options]
    subprocess.run(command, check=True, stdout=sys.stderr)
    summary = json.loads((out / "summary.json").read_text())
    print(method, summary, file=sys.stderr)
    return json.loads((out / "evaluation.json").read_text())


def main():
    """Run the methods, store their scores, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the scores of all runs, as JSON"
    )
    options, train_options = parser.parse_known_args()

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            runs[method] = run_method(method, train_options, Path(folder) / method)

    command = ["python data/methods.py --methods", *options.methods]
    command += ["--out", str(options.out), *train_options]
    stored = {"command": " ".join(command), "runs": runs}
    options.out.write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(method_lines(runs)))


if __name__ == "__main__":
    main()
