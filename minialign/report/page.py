"""Write report.html: one page about one run, or about several side by side."""

from pathlib import Path

from minialign.report.comparison import comparison_section
from minialign.report.curves import curves_section
from minialign.report.markup import Markup, element, join
from minialign.report.overview import overview_section
from minialign.report.pictures import PICTURES_PER_GROUP, pictures_section
from minialign.report.run_files import (
    CONFIG_FILE,
    PAIRS_FILE,
    RELIANCE_FILE,
    REMEDY,
    RunFiles,
    read_run,
)
from minialign.report.sampled_pairs import NUM_SHOWN, pairs_section
from minialign.report.scores import scores_section
from minialign.report.style import STYLE
from minialign.utils.files import atomic_write, check, friendly_errors, read_errors

REPORT_FILE = "report.html"
DOCTYPE = "<!DOCTYPE html>"  # how a page begins
MAX_RUNS = 40  # of one page, which must stay under 5 MB


def write_report(folders, path=None) -> Path:
    """Write the page about one or several runs. Return its path.

    path: where to write it. If not given, report.html in the first folder.

    Raises InputError for a folder that is not that of a run, for a broken file in it, and for a
    `path` that is another file than a page.
    """
    check(len(folders) <= MAX_RUNS, f"{len(folders)} runs; name {MAX_RUNS} at most")
    path = Path(path or Path(folders[0]) / REPORT_FILE)
    check_no_other_file(path)
    runs = [read_run(folder) for folder in folders]
    page = page_of(runs)
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def check_no_other_file(path):
    """Raise InputError if the file at `path` is no page. An earlier page may be overwritten."""
    if not path.is_file():
        return
    with read_errors(path), open(path, "rb") as stream:
        is_page = stream.read(len(DOCTYPE)) == DOCTYPE.encode()
    check(is_page, f"{path}: exists already and is no report; give another --out")


def page_of(runs: list[RunFiles]) -> str:
    """Return the page about runs as HTML."""
    names = ", ".join(run.name for run in runs)
    noun = "run" if len(runs) == 1 else "runs"
    title = f"Report of the {noun} {names}"
    parts = [element("h1", title)]
    if len(runs) > 1:
        parts.append(comparison_section(runs))
    for number, run in enumerate(runs, start=1):
        with friendly_errors(run.folder, "a file in it is damaged; remove that file"):
            parts.append(run_sections(run, number, num_runs=len(runs)))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", Markup(STYLE)),
    )
    body = element("body", element("main", *parts))
    return f"{DOCTYPE}\n{element('html', head, body, lang='en')}\n"


def run_sections(run: RunFiles, number: int, *, num_runs: int) -> Markup:
    """Return everything about one run. With many runs on the page there are fewer pictures.

    config.json, reliance.jsonl and pairs.jsonl are not checked when they are read. If the section
    that shows one of them fails, the error names that file.
    """
    per_group = max(1, PICTURES_PER_GROUP // num_runs)
    num_pairs = max(1, NUM_SHOWN // num_runs)
    parts = []
    if num_runs > 1:
        parts.append(element("h1", f"Run {number}: {run.name}", id=f"run-{number}"))
    with friendly_errors(run.folder / CONFIG_FILE, "restore the original file"):
        parts.append(overview_section(run))
    parts.append(scores_section(run))
    if run.method != "reward":
        with friendly_errors(run.folder / RELIANCE_FILE, REMEDY):
            parts.append(pictures_section(run, per_group))
    with friendly_errors(run.folder / PAIRS_FILE, REMEDY):
        parts.append(pairs_section(run, num_pairs))
    parts.append(curves_section(run))
    return join(*parts)
