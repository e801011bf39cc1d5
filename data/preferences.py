"""Teach the tiny model to follow a stated preference, and measure whether it does.

    python data/preferences.py pairs --out runs/preferences.jsonl
    python train.py --method dpo --loss mpo --data runs/preferences.jsonl \
        --images data/tiny/train/images --eval --out runs/mpo
    python data/preferences.py measure --runs runs/mpo --out FILE

`measure` asks the base and the aligned models for captions of the tuning images, under each system
text and without one. It prints a Markdown table.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tiny_world.preferences import SYSTEM_TEXTS, names_position, preference_pairs  # noqa: E402

from minialign.evaluation.answers import answer_questions  # noqa: E402
from minialign.evaluation.chair import caption_counts, chair_scores  # noqa: E402
from minialign.evaluation.evaluation_sets import EvaluationSet, read_folder  # noqa: E402
from minialign.evaluation.shares import share  # noqa: E402
from minialign.models.adapters import load_adapter  # noqa: E402
from minialign.models.loading import load_vlm  # noqa: E402
from minialign.utils.cli import check_new, run_script  # noqa: E402
from minialign.utils.files import read_json, write_json, write_jsonl  # noqa: E402
from minialign.utils.text_tables import markdown_head, markdown_row  # noqa: E402

TINY = ROOT / "data" / "tiny"
SET_NAMES = ("typical", "shifted", "balanced")
NO_TEXT = "none"  # the name of the row without a system text
HEADINGS = ("model", "system text", "names positions", "words", "CHAIR_i", "recall", "repeats")


def main():
    """Write the pairs, or measure a model that was trained on them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pairs = commands.add_parser("pairs", help="write the pairs of the tiny training records")
    pairs.add_argument("--out", required=True, help="JSONL file to write")
    measure = commands.add_parser("measure", help="measure the base and the aligned models")
    measure.add_argument(
        "--runs", nargs="+", required=True, help="folders of runs of train.py on the pairs"
    )
    measure.add_argument("--out", required=True, help="JSON file of the scores to write")
    options = parser.parse_args()
    check_new(options.out)
    if options.command == "pairs":
        write_jsonl(options.out, preference_pairs(read_json(TINY / "train" / "instruct.json")))
        return
    results = measure_preferences(options.runs)
    write_json(options.out, results)
    print("\n".join(table_lines(results)))


def measure_preferences(run_folders) -> dict:
    """Return {model: {name of a system text: scores}} on the tuning images.

    The models are the base, and the one of each run under the name of its folder.
    """
    evaluation_sets = [read_folder(TINY / "tune" / name) for name in SET_NAMES]
    results = {"base": measure_model(load_vlm(TINY / "model"), evaluation_sets)}
    for folder in run_folders:
        vlm = load_vlm(TINY / "model")
        load_adapter(vlm.model, Path(folder, "adapter"), str(TINY / "model"))
        results[Path(folder).name] = measure_model(vlm, evaluation_sets)
    return results


def measure_model(vlm, evaluation_sets: list[EvaluationSet]) -> dict:
    """Return the scores of a model under each system text, and without one."""
    scores = {}
    for name, system in {NO_TEXT: None, **SYSTEM_TEXTS}.items():
        vlm.system = system
        scores[name] = measure_captions(vlm, evaluation_sets)
    return scores


def measure_captions(vlm, evaluation_sets: list[EvaluationSet]) -> dict:
    """Return the scores of a model's captions of all images of the evaluation sets."""
    counts = []
    num_with_position = 0
    for evaluation_set in evaluation_sets:
        questions = []
        for row in evaluation_set.captions:
            path = str(evaluation_set.images / row["image"])
            questions.append(((path,), row["prompt"]))
        answers = answer_questions(vlm, questions, "captions")
        for row, question in zip(evaluation_set.captions, questions, strict=True):
            caption = answers[question]
            num_with_position += names_position(caption)
            counts.append(caption_counts(caption, row["objects"], evaluation_set.vocabulary))
    scores = chair_scores(counts)
    return {
        "images": len(counts),
        "names_positions": share(num_with_position, len(counts)),
        "words": scores["words"],
        "chair_i": scores["chair_i"],
        "recall": scores["recall"],
        "repeats": scores["repeats"],
    }


def table_lines(results: dict) -> list[str]:
    """Return the Markdown table of the results. Shares are in percent."""
    lines = markdown_head(HEADINGS)
    for model, scores_of_texts in results.items():
        for name, scores in scores_of_texts.items():
            cells = [model, SYSTEM_TEXTS.get(name, name)]
            cells.append(f"{100 * scores['names_positions']:.1f}")
            cells.append(f"{scores['words']:.1f}")
            cells.append(f"{100 * scores['chair_i']:.1f}")
            cells.append(f"{100 * scores['recall']:.1f}")
            cells.append(f"{100 * scores['repeats']:.1f}")
            lines.append(markdown_row(cells))
    return lines


if __name__ == "__main__":
    sys.exit(run_script(main))
