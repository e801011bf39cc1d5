"""Who ranks two responses to a prompt: the ground truth, a multimodal LLM, or a reward model (Sec. 2.3, App. D).

Every annotator has `better(records, firsts, seconds)`: for each record 0 if the first response is better, 1 if the second, None
for a tie; and `notes`, a Counter of what happened on the way.
"""

import sys

from minialign.data.records import read_records
from minialign.options import add_data_options, add_model_options
from minialign.pairs.annotators import load_annotator, pair_accuracy
from minialign.pairs.pair_files import check_pairs
from minialign.utils.cli import Parser, run_script


def main():
    """The command line: a table of pair accuracies, a row for each data file."""
    parser = Parser(
        prog="python -m minialign.annotators",
        description="How well an annotator ranks the pairs of preference records (Tab. 7, 10).",
    )
    add_model_options(parser)
    parser.add_argument(
        "--annotator",
        required=True,
        metavar="truth|DIR|reward:DIR",
        help="who ranks: captions.json beside the data, an MLLM, a reward model",
    )
    add_data_options(parser, "preference records", required=True)
    options = parser.parse_args()
    everything, annotator = (
        {
            path: check_pairs(
                read_records([path], options.images, format=options.format), "an annotator"
            )
            for path in options.data
        },
        None,
    )
    lines = [
        "| annotator | data | accuracy | ties | consistency | first | n |",
        "|---|---|---|---|---|---|---|",
    ]
    for path, records in everything.items():
        if annotator is None or options.annotator == "truth":  # each file lies beside its own truth
            options.data = [path]
            annotator = load_annotator(options, both_orders=False)  # both are asked for below
        found = pair_accuracy(annotator, records)
        shares = (
            "-" if found[key] is None else f"{100 * found[key]:.1f}"
            for key in ("accuracy", "ties", "consistency", "first")
        )
        lines.append(f"| {options.annotator} | {path} | {' | '.join(shares)} | {found['n']} |")
    print("\n".join(lines))
    if annotator.counters:
        print(
            ", ".join(f"{what}: {count}" for what, count in annotator.counters.items()),
            file=sys.stderr,
        )


if __name__ == "__main__":
    sys.exit(run_script(main))
