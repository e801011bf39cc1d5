"""Lay out tables as text: aligned columns that fit a terminal, or the rows of Markdown."""

import re
import unicodedata

from minialign.utils.messages import printable

MAX_WIDTH = 100  # characters of a line
MAX_CELL = 30  # characters of a cell, so that two keys and a column fit into a line
GAP = "  "  # between two columns
# What stands in a column of numbers. A dash or nothing stands for a number that is missing.
NUMBER = re.compile(r"\d+(\.\d+)?|-|")


def aligned_table(
    headings: list[str], rows: list[list[str]], *, num_keys: int = 1, group: str = ""
) -> str:
    """Return a table whose columns stand below each other, in lines of MAX_WIDTH at most.

    Columns that do not fit make a second table below the first one, which begins with the same
    keys. A column without any value is left out. Numbers are aligned to the right.

    Args:
        headings: of all columns.
        rows: a list of cells each.
        num_keys: how many columns, from the left, say what a row is about.
        group: how the headings of columns begin that stand in a table of their own.
    """
    # 1. Pad the columns. The keys stay, whatever they hold.
    columns = []
    for i, heading in enumerate(headings):
        cells = [row[i] for row in rows]
        is_key = i < num_keys
        if is_key or any(cells):
            columns.append(pad_column(heading, cells))

    # 2. Spread them over tables, and join those of each table to lines.
    tables = split_columns(columns[:num_keys], columns[num_keys:], group)
    return "\n\n".join(join_columns(table) for table in tables)


def markdown_head(headings: list[str]) -> list[str]:
    """Return the first two lines of a Markdown table."""
    return [markdown_row(headings), "|" + "---|" * len(headings)]


def markdown_row(cells: list[str]) -> str:
    """Return one row of a Markdown table. A bar inside a cell would end it, and is escaped."""
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return "| " + " | ".join(escaped) + " |"


def pad_column(heading, cells) -> list[str]:
    """Return a heading and the cells below it, shortened if need be, and of the same width."""
    texts = [shortened(cell) for cell in [heading, *cells]]
    width = max(display_width(text) for text in texts)
    is_numeric = all(NUMBER.fullmatch(cell) for cell in cells)
    padded = []
    for text in texts:
        padding = " " * (width - display_width(text))
        if is_numeric:
            padded.append(padding + text)
        else:
            padded.append(text + padding)
    return padded


def split_columns(keys, columns, group) -> list[list]:
    """Return padded columns in tables that fit into a line, each of which begins with the keys.

    A column begins a new table if it does not fit into the last one, or if one of the two belongs
    to the group and the other does not.
    """
    tables = []
    was_in_group = None  # neither True nor False, so the first column begins a table
    for column in columns:
        heading = column[0]
        is_in_group = heading.lstrip().startswith(group)
        if is_in_group != was_in_group or not fits_line([*tables[-1], column]):
            tables.append(list(keys))
        tables[-1].append(column)
        was_in_group = is_in_group
    return tables or [keys]


def fits_line(columns) -> bool:
    """Return whether columns fit side by side into a line. Padded, all their cells are as wide."""
    line = GAP.join(column[0] for column in columns)
    return display_width(line) <= MAX_WIDTH


def join_columns(columns) -> str:
    """Return padded columns side by side, as lines."""
    lines = []
    for cells in zip(*columns, strict=True):
        lines.append(GAP.join(cells).rstrip())
    return "\n".join(lines)


def shortened(cell) -> str:
    """Return a cell as it is printed: without control characters, and shortened in the middle."""
    text = printable(cell)
    if display_width(text) <= MAX_CELL:
        return text
    # Wide characters take two columns each, so fewer of them fit.
    half = MAX_CELL // 2
    while display_width(f"{text[:half]}...{text[-half:]}") > MAX_CELL:
        half -= 1
    return f"{text[:half]}...{text[-half:]}"


def display_width(text) -> int:
    """Return how many columns of a terminal a text takes: Chinese characters take two."""
    num_wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + num_wide
