"""Run every method of the study once on the tiny model, and store what was measured.

    python data/methods.py --methods sft dpo rloo --out FILE [options of train.py ...]
    python data/methods.py --methods "dpo --loss mpo" --out FILE

Prints a Markdown table with a row for each method, which may have options of its own. RUNS in them
is the folder of the runs: RUNS/sft/adapter is what the method sft has trained before.
`python data/study.py` measures on several bases and seeds, with intervals.
"""

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from minialign.utils.text_tables import markdown_head, markdown_row  # noqa: E402


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
    return markdown_row(cells)


def percent(share: float | None) -> str:
    """Return a share in percent, or a dash for a share of nothing."""
    return "-" if share is None else f"{100 * share:.1f}"


def run_method(method: str, train_options: list[str], folder: Path) -> dict:
    """Train one method by train.py in a folder of runs. Return the value of its evaluation.json.

    method: its name, and options of its own behind it.
    """
    method_words = shlex.split(method.replace("RUNS", str(folder)))
    out = folder / run_name(method)
    command = [sys.executable, ROOT / "train.py", "--method", *method_words, "--out", out]
    subprocess.run([*command, *train_options], check=True, stdout=sys.stderr)
    summary = json.loads((out / "summary.json").read_text())
    print(method, summary, file=sys.stderr)
    return json.loads((out / "evaluation.json").read_text())


def run_name(method: str) -> str:
    """Return the name of the folder of a run: "dpo --loss mpo" runs in dpo-loss-mpo."""
    return re.sub(r"[^\w.]+", "-", method)


def main():
    """Run the methods, store their scores, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--methods", nargs="+", required=True, help="each a name, or a name and options in quotes"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="where to write the scores of all runs, as JSON"
    )
    options, train_options = parser.parse_known_args()

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            runs[method] = run_method(method, train_options, Path(folder))

    words = ["--methods", *options.methods, "--out", str(options.out), *train_options]
    stored = {"command": f"python data/methods.py {shlex.join(words)}", "runs": runs}
    options.out.write_text(json.dumps(stored, indent=1) + "\n")
    print("\n".join(method_lines(runs)))


if __name__ == "__main__":
    main()
