"""Tables of a study whose arms are all compared with one of them, question by question."""

from collections.abc import Iterable

from minialign.evaluation.shares import scaled_text
from minialign.utils.text_tables import markdown_head, markdown_row
from tiny_study.arms import Part
from tiny_study.comparisons import (
    COMPARED_SCORES,
    SETS,
    compare,
    difference_text,
    image_counts,
    match_runs,
    share_of,
)
from tiny_study.tables import Result

HEADINGS = {"chair_i": "CHAIR_i", "recall": "recall", "pope": "POPE", "repeats": "repeats"}


def difference_tables(parts: Iterable[Part], results: list[Result], against: str) -> dict:
    """Return {part: rows} of the runs that are done, a row for each arm and set.

    A row holds "arm", "set" and "runs". For each of COMPARED_SCORES it holds {"share"}, and beside
    the share "difference" and "interval", unless the arm is `against` itself. That arm comes first
    in every part. A part of which no other arm is done has no table.
    """
    tables = {}
    for part in parts:
        names = dict.fromkeys([against, *[arm.name for arm in part.arms]])
        rows = []
        for set_name in SETS:
            results_of_set = [result for result in results if result.set_name == set_name]
            for name in names:
                rows += rows_of_arm(results_of_set, name, against)
        if {row["arm"] for row in rows} - {against}:
            tables[part.title] = rows
    return tables


def rows_of_arm(results: list[Result], name: str, against: str) -> list[dict]:
    """Return the row of an arm in a list, or an empty list if no run of it is done.

    results: those of all arms on one set.
    """
    # Runs that have no counterpart are left out, as in match_runs.
    matched, others = match_runs(results, name, against)
    if not matched:
        return []
    row = {"arm": name, "set": matched[0].set_name, "runs": len(matched)}
    for score in COMPARED_SCORES:
        counts = sum(image_counts(result.scores, score) for result in matched)
        row[score] = {"share": share_of(counts)}
        if name != against:
            row[score] |= compare(matched, others, score) or {}
    return [row]


def difference_lines(tables: dict) -> list[str]:
    """Return the tables as lines of Markdown. Shares are in percent, differences in points."""
    lines = []
    for title, rows in tables.items():
        headings = ["set", "arm", *[HEADINGS[score] for score in COMPARED_SCORES]]
        lines += ["", f"**{title}**", "", *markdown_head(headings)]
        for row in rows:
            cells = [row["set"], row["arm"]]
            cells += [_score_text(row[score]) for score in COMPARED_SCORES]
            lines.append(markdown_row(cells))
    return lines


def _score_text(score):
    """Return a share with its difference and interval in parentheses, where there is one."""
    text = scaled_text(score["share"])
    difference = difference_text(score)
    if difference:
        text += f" ({difference})"
    return text
