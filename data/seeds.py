"""Run the default job with several alignment seeds and store what was measured: the README's central table.

    python data/seeds.py --seeds 0 1 2 --out FILE [options of train.py ...]

Prints a Markdown table of means over seeds, with the spread (standard deviation) of what training changes.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ("chair_i", "chair_s", "recall", "colour", "words", "repeats")


def lines(runs):
    """Markdown rows of {seed: evaluation.json}: mean and, where seeds differ, spread; POPE as accuracy (share of yes)."""
    first = next(iter(runs.values()))
    yield "| set | model | CHAIR_i | CHAIR_s | recall | colour | words | repeats | POPE random | popular | adversarial |"
    yield "|" + "---|" * 11
    for name in first["base"]:
        for arm in first:
            scores = [run[arm][name] for run in runs.values()]
            cells = [spread([one[key] for one in scores], 1 if key == "words" else 100) for key in COLUMNS]
            for split in ("random", "popular", "adversarial"):
                popes = [one["pope"][split] for one in scores]
                yes = statistics.mean(one["yes"] for one in popes)
                cells.append(f"{spread([one['accuracy'] for one in popes])} ({100 * yes:.0f})")
            yield f"| {name} | {arm} | {' | '.join(cells)} |"


def spread(values, scale=100):
    """"mean ± standard deviation" of values, the mean alone where they are all the same."""
    mean = f"{scale * statistics.mean(values):.1f}"
    return mean if len(set(values)) == 1 else f"{mean} ± {scale * statistics.stdev(values):.1f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--out", type=Path, required=True, help="where the scores of all seeds go, as JSON")
    options, others = parser.parse_known_args()
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            out = Path(folder) / seed
            subprocess.run([sys.executable, ROOT / "train.py", "--seed", seed, "--out", out, *others], check=True, stdout=sys.stderr)
            runs[seed] = json.loads((out / "evaluation.json").read_text())
            summary = json.loads((out / "summary.json").read_text())
            print(seed, summary, file=sys.stderr)
    command = " ".join(["python data/seeds.py --seeds", *options.seeds, "--out", str(options.out), *others])
    options.out.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    print("\n".join(lines(runs)))


if __name__ == "__main__":
    main()
