"""Run the default job with several alignment seeds, or several methods with one, and store what was measured: the README's tables.

    python data/seeds.py --seeds 0 1 2 --out FILE [options of train.py ...]
    python data/seeds.py --methods sft dpo rloo --out FILE [options of train.py ...]

Prints a Markdown table: of seeds means, with the spread (standard deviation) of what training changes; of methods a row each.
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


def method_lines(runs):
    """Markdown rows of {method: evaluation.json}: the base, then each method, CHAIR_i and recall by set and what else may change."""
    first = next(iter(runs.values()))["base"]
    yield f"| method | {' | '.join(f'CHAIR_i {name}' for name in first)} | {' | '.join(f'recall {name}' for name in first)} | colour balanced | words balanced | repeats balanced | POPE |"
    yield "|" + "---|" * (2 * len(first) + 5)
    for method, scores in {"base": first, **{method: run["aligned"] for method, run in runs.items()}}.items():
        cells = [f"{100 * one[key]:.1f}" for key in ("chair_i", "recall") for one in scores.values()]
        hard, pope = scores["balanced"], statistics.mean(part["accuracy"] for one in scores.values() for part in one["pope"].values())
        yield f"| {method} | {' | '.join(cells)} | {100 * hard['colour']:.1f} | {hard['words']:.1f} | {100 * hard['repeats']:.1f} | {100 * pope:.1f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"])
    parser.add_argument("--methods", nargs="+", help="a run of each of these instead, with the first seed")
    parser.add_argument("--out", type=Path, required=True, help="where the scores of all runs go, as JSON")
    options, others = parser.parse_known_args()
    varied = [("--method", method, "--seed", options.seeds[0]) for method in options.methods or ()] or [("--seed", seed) for seed in options.seeds]
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for words in varied:
            out = Path(folder) / words[1]
            subprocess.run([sys.executable, ROOT / "train.py", *words, "--out", out, *others], check=True, stdout=sys.stderr)
            runs[words[1]] = json.loads((out / "evaluation.json").read_text())
            print(words[1], json.loads((out / "summary.json").read_text()), file=sys.stderr)
    asked = ["--methods", *options.methods, "--seeds", options.seeds[0]] if options.methods else ["--seeds", *options.seeds]
    command = " ".join(["python data/seeds.py", *asked, "--out", str(options.out), *others])
    options.out.write_text(json.dumps({"command": command, "runs": runs}, indent=1) + "\n")
    print("\n".join(method_lines(runs) if options.methods else lines(runs)))


if __name__ == "__main__":
    main()
