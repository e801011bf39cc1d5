"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

import json
import sys
from pathlib import Path

from minialign.evaluation.evaluation_sets import read_set
from minialign.evaluation.report import evaluate_set, results_table
from minialign.models.adapters import load_adapter
from minialign.models.loading import load_vlm
from minialign.options import add_model_options
from minialign.utils.cli import Parser, check_new, number_type, run_script
from minialign.utils.files import write_json


def main():
    """The command line: a table on standard error, the JSON on standard output or in --out."""
    parser = Parser(prog="python -m minialign.evaluate", description=__doc__)
    add_model_options(parser, required=True)
    parser.add_argument("--adapter", metavar="DIR", help="adapter to put on the model")
    parser.add_argument(
        "--pope",
        nargs="+",
        default=[],
        metavar="FILE",
        help="POPE files, JSONL, named pope_SPLIT.jsonl",
    )
    parser.add_argument(
        "--captions",
        metavar="FILE",
        help="annotated objects, in the form of data/tiny/final/*/captions.json",
    )
    parser.add_argument("--images", required=True, metavar="DIR", help="folder of the pictures")
    parser.add_argument(
        "--contrast",
        type=number_type(float, 0),
        default=0.0,
        metavar="A",
        help="decode from (1 + A) log p(.|picture) - A log p(.|picture hidden)",
    )
    parser.add_argument("--out", metavar="FILE", help="where the JSON goes; none: standard output")
    options = parser.parse_args()
    held = read_set(options.captions, options.pope, options.images)
    if not held.captions and not held.pope:
        parser.error("nothing to measure: give --pope FILE... or --captions FILE")
    if options.out:
        check_new(options.out)
    vlm = load_vlm(options.model, options.template, options.dtype, device=options.device)
    if options.adapter:
        load_adapter(vlm.model, options.adapter)
    scores, _ = evaluate_set(vlm, held, contrast=options.contrast)
    print(
        results_table({"model": {Path(options.images).parent.name or "set": scores}}),
        file=sys.stderr,
    )
    if options.out:
        write_json(options.out, scores)
    else:
        print(json.dumps(scores, indent=1))


if __name__ == "__main__":
    sys.exit(run_script(main))
