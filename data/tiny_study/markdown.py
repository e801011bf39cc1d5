"""The tables of the study as Markdown."""

from minialign.evaluation.results import COLUMNS
from minialign.evaluation.shares import scaled_text
from minialign.utils.text_tables import markdown_head, markdown_row
from tiny_study.comparisons import difference_text


def markdown_lines(tables: dict) -> list[str]:
    """Return the lines of a brief and a full table of each part, from {part: {q: {set: rows}}}."""
    lines = []
    for title, tables_by_q in tables.items():
        lines.append(f"\n**{title}**\n")
        lines += brief_table(tables_by_q)
        lines.append("")
        lines += full_table(tables_by_q)
    return lines


def brief_table(tables_by_q: dict) -> list[str]:
    """Return a table with a line for each arm, from {q: {set: rows}}. Shares are in percent.

    It shows CHAIR_i with its difference from the control, recall and repeats, each set by set.
    """
    first_tables = next(iter(tables_by_q.values()))
    set_names = list(first_tables)
    headings = ["q", "arm", "bases", "runs"]
    headings += [f"CHAIR_i {name}" for name in set_names]
    headings += [f"recall {', '.join(set_names)}", "repeats"]
    lines = markdown_head(headings)

    for q, tables in tables_by_q.items():
        for rows_of_arm in zip(*tables.values(), strict=True):  # a row for each set
            first_row = rows_of_arm[0]
            cells = [q, first_row["arm"], str(first_row["bases"]), str(first_row["runs"])]
            for row in rows_of_arm:
                cell = scaled_text(row["chair_i"])
                if "interval" in row:
                    cell += f" ({difference_text(row)})"
                cells.append(cell)
            for score in ("recall", "repeats"):
                cells.append(", ".join(scaled_text(row[score]) for row in rows_of_arm))
            lines.append(markdown_row(cells))
    return lines


def full_table(tables_by_q: dict) -> list[str]:
    """Return a table with a line for each set and arm, from {q: {set: rows}}.

    It shows all scores. Of CHAIR_i it also shows the standard deviation over bases, that over the
    seeds of a base, and the difference from the control.
    """
    other_columns = COLUMNS[1:]
    headings = ["q", "set", "arm", "runs", "CHAIR_i", "± bases", "± seeds"]
    headings.append("against control [95 %]")
    headings += [heading for heading, _, _ in other_columns]
    headings.append("POPE")
    lines = markdown_head(headings)

    for q, tables in tables_by_q.items():
        for set_name, rows in tables.items():
            for row in rows:
                cells = [q, set_name, row["arm"], str(row["runs"]), scaled_text(row["chair_i"])]
                cells += [_percent(row["over_bases"]), _percent(row["over_seeds"])]
                cells.append(difference_text(row))
                for _, score, factor in other_columns:
                    cells.append(scaled_text(row[score], factor))
                cells.append(_percent(row["pope"]))
                lines.append(markdown_row(cells))
    return lines


def _percent(share):
    """Return a share in percent, or an empty text for None."""
    return "" if share is None else f"{100 * share:.1f}"
