"""Measure how well an annotator ranks the pairs of preference records (Tab. 7, 10).

python -m minialign.annotators --annotator truth|DIR|reward:DIR --data FILE...
"""

import sys

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.data.records import check_record_images, read_records
from minialign.models.split import split_models
from minialign.options import (
    add_data_options,
    add_model_options,
    refuse_unread_options,
    typed_options,
    with_default_system,
)
from minialign.pairs.annotators import (
    ANNOTATORS,
    annotator_kind,
    load_annotator,
    pair_accuracy,
)
from minialign.pairs.pair_files import check_pairs
from minialign.utils.cli import Parser, run_script
from minialign.utils.distributed import init_distributed
from minialign.utils.messages import print_message
from minialign.utils.text_tables import markdown_head, markdown_row


def build_parser():
    """Build the parser of the command line."""
    parser = Parser(prog="python -m minialign.annotators", description=__doc__.splitlines()[0])
    add_model_options(parser)
    parser.add_argument(
        "--annotator",
        required=True,
        metavar="|".join(ANNOTATORS),
        help="who ranks: the captions.json of the data, an MLLM, a reward model",
    )
    add_data_options(parser, "preference records", required=True)
    return parser


def parse_options(argv):
    """Return the options. Exit with one line if the annotator does not read one of them."""
    parser = build_parser()
    options = parser.parse_args(argv)
    options_of_kinds = {name: kind.model_options for name, kind in ANNOTATORS.items()}
    refuse_unread_options(
        parser,
        typed_options(argv, options),
        "--annotator",
        chosen=annotator_kind(options.annotator),
        table=options_of_kinds,
    )
    return options


def main():
    """Rank the pairs of every data file. Print a Markdown table with a row for each file."""
    # 1. Read all files first, so that bad records are found before any work.
    options = parse_options(sys.argv[1:])
    init_distributed(options.device)
    split_models(options.split)
    records_of_files = {}
    for path in options.data:
        records = read_records(
            [path],
            image_folder=options.images,
            format=options.format,
            skip_text_only=options.skip_text_only,
        )
        records = with_default_system(records, options)
        records_of_files[path] = check_pairs(records, "an annotator")

    # 2. Load the annotator, and let it check all records. Each file has annotations of its own.
    #    Only models are shown the images.
    annotator = None
    annotators = {}
    for path, records in records_of_files.items():
        if annotator is None or options.annotator == "truth":
            options.data = [path]
            annotator = load_annotator(options, both_orders=False, template=options.template)
        annotator.check_records(records)
        if options.annotator != "truth":
            check_record_images(records)
        annotators[path] = annotator

    # 3. Measure. `pair_accuracy` asks in both orders itself, so an MLLM annotator need not.
    rows = []
    for path, records in records_of_files.items():
        scores = pair_accuracy(annotators[path], records)
        rows.append(table_row(options.annotator, path, scores))

    # 4. Print the table, and what the annotator counted.
    headings = ["annotator", "data", "accuracy", "ties", "consistency", "first", "n"]
    print("\n".join([*markdown_head(headings), *rows]))
    if annotator.counters:
        counts = [f"{name}: {count}" for name, count in annotator.counters.items()]
        print_message(", ".join(counts))


def table_row(annotator_name, path, scores):
    """Return the row of one data file: shares in percent, a dash for what is not defined."""
    cells = [annotator_name, str(path)]
    for name in ("accuracy", "ties", "consistency", "first"):
        if scores[name] is None:
            cells.append("-")
        else:
            cells.append(f"{100 * scores[name]:.1f}")
    cells.append(str(scores["n"]))
    return markdown_row(cells)


if __name__ == "__main__":
    sys.exit(run_script(main))
