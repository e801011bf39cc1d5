"""Run every method of the study once on the tiny model and store what was measured: the README's table of methods.

    python data/methods.py --methods sft dpo rloo --out FILE [options of train.py ...]

Prints a Markdown table, a row a method. Several bases and seeds, with intervals: `python data/study.py`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def method_lines(runs):
    """Markdown rows of {method: evaluation.json}: the base, then each method, CHAIR_i and recall by set and what else may change."""
    first = next(iter(runs.values()))["base"]
    yield f"| method | {' | '.join(f'CHAIR_i {name}' for name in first)} | {' | '.join(f'recall {name}' for name in first)} | colour balanced | words balanced | repeats balanced | POPE |"
    yield "|" + "---|" * (2 * len(first) + 5)
    for method, scores in {
        "base": first,
        **{method: run["aligned"] for method, run in runs.items()},
    }.items():
        cells = [
            f"{100 * one[key]:.1f}" for key in ("chair_i", "recall") for one in scores.values()
        ]
        hard, pope = (
            scores["balanced"],
            statistics.mean(
                part["accuracy"] for one in scores.values() for part in one["pope"].values()
            ),
        )
        yield f"| {method} | {' | '.join(cells)} | {100 * hard['colour']:.1f} | {hard['words']:.1f} | {100 * hard['repeats']:.1f} | {100 * pope:.1f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", required=True)
    parser.add_argument(
        "--out", type=Path, required=True, help="where the scores of all runs go, as JSON"
    )
    options, others = parser.parse_known_args()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            out = Path(folder) / method
            subprocess.run(
                [sys.executable, ROOT / "train.py", "--method", method, "--out", out, *others],
                check=True,
                stdout=sys.stderr,
            )
            runs[method] = json.loads((out / "evaluation.json").read_text())
            print(method, json.loads((out / "summary.json").read_text()), file=sys.stderr)
    command = " ".join(
        ["python data/methods.py --methods", *options.methods, "--out", str(options.out), *others]
    )
    options.out.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    print("\n".join(method_lines(runs)))


if __name__ == "__main__":
    main()
