"""Write the page about runs that are there: python -m minialign.report OUT [OUT ...]."""

import sys

if __name__ == "__main__":
    from minialign.utils.interrupts import exit_quietly_on_ctrl_c

    exit_quietly_on_ctrl_c()  # torch takes seconds to import

from minialign.report.page import REPORT_FILE, write_report
from minialign.utils.cli import Parser, run_script


def main():
    """Write report.html, and print where it is."""
    parser = Parser(
        prog="python -m minialign.report",
        description="Show what a run did, or several side by side, as one page of HTML.",
    )
    parser.add_argument("folders", nargs="+", metavar="OUT", help="folders of runs of train.py")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"the page; if not given, {REPORT_FILE} in the first folder. An earlier page is "
        "overwritten",
    )
    options = parser.parse_args()
    print(write_report(options.folders, options.out))


if __name__ == "__main__":
    sys.exit(run_script(main))
