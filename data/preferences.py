"""Teach the tiny model to follow a stated preference, and measure whether it does.

    python data/preferences.py pairs --out runs/preferences.jsonl
    python train.py --method dpo --loss mpo --data runs/preferences.jsonl \
        --images data/tiny/train/images --eval --out runs/mpo
    python data/preferences.py measure --runs runs/mpo --out FILE

`pairs` writes two pairs for each caption of the training records, one for each system text. --eval
without a folder leaves out the evaluation of train.py. `measure` asks the base and the aligned
models for captions of the tuning images, under each system text and without one. It prints a
Markdown table.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from tiny_world.preferences import SYSTEM_TEXTS, names_position, preference_pairs  # noqa: E402

from minialign.evaluation.answers import answer_questions  # noqa: E402
from minialign.evaluation.chair import caption_counts, chair_scores  # noqa: E402
from minialign.evaluation.evaluation_sets import (  # noqa: E402
    EvaluationSet,
    read_folder,
    set_name_of,
)
from minialign.evaluation.shares import scaled_text, share  # noqa: E402
from minialign.models.adapters import load_adapter, open_adapter  # noqa: E402
from minialign.models.loading import load_vlm  # noqa: E402
from minialign.utils.cli import Parser, check_new, run_script  # noqa: E402
from minialign.utils.files import check, read_json, write_json, write_jsonl  # noqa: E402
from minialign.utils.text_tables import markdown_head, markdown_row  # noqa: E402

TINY = ROOT / "data" / "tiny"
SET_NAMES = ("typical", "shifted", "balanced")  # of the tuning images
BASE = "base"  # the name of the model before training
NO_TEXT = "none"  # the name under which the scores without a system text stand
HEADINGS = ("model", "system text", "names positions", "words", "CHAIR_i", "recall", "repeats")


def main():
    """Write the pairs, or measure the models that were trained on them."""
    # 1. The command line.
    parser = Parser(prog="python data/preferences.py", description=__doc__.splitlines()[0])
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

    # 2. The command.
    if options.command == "pairs":
        records = read_json(TINY / "train" / "instruct.json")
        write_jsonl(options.out, preference_pairs(records))
    else:
        results = measure_preferences(name_adapters(options.runs))
        write_json(options.out, results)
        print("\n".join(table_lines(results)))


def name_adapters(run_folders) -> dict[str, Path]:
    """Return {name of a run: folder of its adapter}. A run has the name of its folder.

    Raises InputError, before any work, for a folder without an adapter, and for a name that is
    there twice.
    """
    adapters = {}
    for folder in run_folders:
        name = set_name_of(folder)
        check(
            name not in (BASE, *adapters),
            f"--runs {folder}: the scores of another model have the name {name!r}; rename the run",
        )
        adapters[name] = Path(folder, "adapter")
        open_adapter(adapters[name])  # raises if there is none
    return adapters


def measure_preferences(adapters: dict[str, Path]) -> dict:
    """Return {model: {name of a system text: scores}} on the tuning images.

    The models are the base, and the base with each of the adapters, by their names.
    """
    evaluation_sets = [read_folder(TINY / "tune" / name) for name in SET_NAMES]
    results = {BASE: measure_model(load_vlm(TINY / "model"), evaluation_sets)}
    for name, adapter in adapters.items():
        vlm = load_vlm(TINY / "model")
        load_adapter(vlm.model, adapter, str(TINY / "model"))
        results[name] = measure_model(vlm, evaluation_sets)
    return results


def measure_model(vlm, evaluation_sets: list[EvaluationSet]) -> dict:
    """Return {name of a system text: scores} of a model. NO_TEXT names those without one."""
    system_texts = {NO_TEXT: None, **SYSTEM_TEXTS}
    scores_of_texts = {}
    for name, system in system_texts.items():
        vlm.system = system
        scores_of_texts[name] = measure_captions(vlm, evaluation_sets)
    return scores_of_texts


def measure_captions(vlm, evaluation_sets: list[EvaluationSet]) -> dict:
    """Return the scores of a model's captions of all images of the evaluation sets.

    They are asked for under the system text of the model. `names_positions` is the share of the
    captions that name a position. The other scores are those of `chair_scores`.
    """
    counts = []  # the CaptionCounts of each caption
    num_with_position = 0
    for evaluation_set in evaluation_sets:
        # 1. Ask for the captions. A question is a pair: the paths of its images, and its text.
        questions = []
        for row in evaluation_set.captions:
            path = str(evaluation_set.images / row["image"])
            questions.append(((path,), row["prompt"]))
        answers = answer_questions(vlm, questions, "captions")

        # 2. Compare each caption with the objects of its image.
        for row, question in zip(evaluation_set.captions, questions, strict=True):
            caption = answers[question]
            if names_position(caption):
                num_with_position += 1
            counts.append(caption_counts(caption, row["objects"], evaluation_set.vocabulary))

    # 3. The scores of all captions together.
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
    """Return the Markdown table of the results. Shares are in percent, one of nothing is a dash."""
    lines = markdown_head(HEADINGS)
    for model, scores_of_texts in results.items():
        for name, scores in scores_of_texts.items():
            cells = [model, SYSTEM_TEXTS.get(name, name)]
            cells.append(scaled_text(scores["names_positions"]))
            cells.append(scaled_text(scores["words"], factor=1))
            for score in ("chair_i", "recall", "repeats"):
                cells.append(scaled_text(scores[score]))
            lines.append(markdown_row(cells))
    return lines


if __name__ == "__main__":
    sys.exit(run_script(main))
