"""Measure a model on the public benchmarks, or on annotated images of one's own (POPE and CHAIR).

python -m minialign.evaluate --model DIR --benchmark NAME=PATH... --images NAME=DIR... --out OUT
python -m minialign.evaluate --benchmark NAME=PATH --answers NAME=FILE
python -m minialign.evaluate --model DIR --captions FILE --pope FILE... --images DIR
python -m minialign.evaluate --answers RUN
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.evaluation.benchmark_options import (
    add_benchmark_options,
    check_benchmark_options,
    refuse_benchmark_options,
    refuse_options,
)
from minialign.evaluation.benchmarks import benchmark_table, measure_benchmarks
from minialign.evaluation.evaluation_sets import read_set, set_name_of
from minialign.evaluation.kept_answers import KeptAnswers, read_answers_at
from minialign.evaluation.results import ask_set, check_set, results_text, score_set
from minialign.models.adapters import check_adapter_directory, load_adapter
from minialign.models.loading import load_vlm
from minialign.models.split import split_models
from minialign.options import add_model_options
from minialign.utils.cli import Parser, check_new, number_type, run_script
from minialign.utils.distributed import init_distributed
from minialign.utils.files import write_json

MODEL_NAME = "model"  # in tables and in files of answers
# Options that have no effect if kept answers are scored. --device is not among them, because its
# default hides whether it was given.
ASKING_A_MODEL = (
    *("adapter", "contrast", "template", "system", "dtype"),
    *("images", "captions", "pope"),
)


def build_parser():
    """Build the parser of the command line."""
    parser = Parser(prog="python -m minialign.evaluate", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument("--adapter", metavar="DIR", help="adapter to load into the model")
    parser.add_argument(
        "--contrast",
        type=number_type(float, 0),
        default=0.0,
        metavar="A",
        help="decode from (1 + A) log p(.|image) - A log p(.|image masked), against what "
        "language alone makes likely",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        action="extend",
        default=[],
        metavar="DIR|NAME=DIR",
        help="folder of the images; NAME=DIR is the folder of one benchmark",
    )
    parser.add_argument(
        "--out",
        metavar="PATH",
        help="where the scores go: a JSON file, or with --benchmark a folder for them and the "
        "answers (default: standard output)",
    )
    add_benchmark_options(parser)
    group = parser.add_argument_group("annotated images of one's own")
    group.add_argument(
        "--pope",
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="files of POPE questions, named pope_SPLIT.jsonl or .json with any SPLIT",
    )
    group.add_argument(
        "--captions",
        metavar="FILE",
        help="annotated objects, in the form of data/tiny/final/*/captions.json",
    )
    return parser


def main():
    """Evaluate a model. Print a table to standard error, and write the scores as JSON."""
    parser = build_parser()
    options = parser.parse_args()
    if options.split > 1 and not options.model:
        parser.error("--split has no effect without --model; leave it out")
    init_distributed(options.device)
    split_models(options.split)
    if options.adapter and options.model:
        check_adapter_directory(options.adapter)
    if options.benchmark:
        check_benchmark_options(parser, options)
        scores = measure_benchmarks(options, lambda: load_model(options))
        print(benchmark_table(scores), file=sys.stderr)
        if not options.out:
            print(json.dumps(scores, indent=1))
        return
    refuse_benchmark_options(parser, options)
    if options.answers and not options.model:
        score_kept_answers(parser, options)
    else:
        measure_annotated_images(parser, options)


def score_kept_answers(parser, options):
    """Score the kept answers of one or several models, print the table, and write the scores."""
    refuse_options(parser, options, ASKING_A_MODEL, "has no effect, as the answers are in a file")
    if options.out:
        check_new(options.out)
    scores = read_answers_at(options.answers[0]).scores()
    print(results_text(scores), file=sys.stderr)
    write_scores(options.out, scores)


def measure_annotated_images(parser, options):
    """Measure POPE and CHAIR on annotated images, print the table, and write the scores."""
    # 1. Find what is wrong with the input before any work.
    check_annotated_images(parser, options)
    images = options.images[0]
    evaluation_set = read_set(options.captions, options.pope, images)

    # 2. Evaluate.
    vlm = load_model(options)
    check_set(vlm, evaluation_set)
    answers = ask_set(vlm, evaluation_set, contrast=options.contrast)
    scores, _ = score_set(evaluation_set, answers)

    # 3. Keep the answers. The set has the name of the folder that contains its folder of images.
    set_name = set_name_of(Path(images, ".."))
    if options.answers:
        kept = KeptAnswers.of_sets({set_name: evaluation_set})
        kept.add(MODEL_NAME, set_name, evaluation_set, answers)
        kept.write_file(options.answers[0])

    # 4. Report.
    print(results_text({MODEL_NAME: {set_name: scores}}), file=sys.stderr)
    write_scores(options.out, scores)


def check_annotated_images(parser, options):
    """Exit with one line if an option is missing, or if a file to write exists already."""
    if not options.model:
        parser.error("give --model DIR, the model to measure, or --answers PATH alone")
    if not options.captions and not options.pope:
        parser.error(
            "nothing to measure: give --benchmark NAME=PATH..., --pope FILE... or --captions FILE"
        )
    if len(options.images) != 1:
        parser.error("give --images DIR, one folder with all images")
    if options.out:
        check_new(options.out)
    for path in options.answers:
        check_new(path, "--answers")
        if options.out and Path(path).resolve() == Path(options.out).resolve():
            parser.error("--answers and --out name the same file; give two")


def write_scores(out, scores):
    """Write scores as JSON to a file, or to standard output if there is none."""
    if out:
        write_json(out, scores)
    else:
        print(json.dumps(scores, indent=1))


def load_model(options):
    """Load the model that the options name, with its adapter."""
    vlm = load_vlm(
        options.model,
        template=options.template,
        dtype=options.dtype,
        device=options.device,
        system=options.system,
    )
    if options.adapter:
        load_adapter(vlm.model, options.adapter, options.model)
    return vlm


if __name__ == "__main__":
    sys.exit(run_script(main))
