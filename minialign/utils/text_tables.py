"""Lay out tables as text: aligned columns that fit a terminal."""

import unicodedata

from minialign.utils.messages import printable

MAX_WIDTH = 100  # characters of a line
MAX_CELL = 30  # so that two keys and a column fit into a line
GAP = "  "


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
    columns = []
    for i, heading in enumerate(headings):
        cells = [row[i] for row in rows]
        if any(cells) or i < num_keys:
            columns.append(pad_column(heading, cells))
    tables = split_columns(columns[:num_keys], columns[num_keys:], group)
    return "\n\n".join(join_columns(table) for table in tables)


def split_columns(keys, columns, group) -> list[list]:
    """Return columns in tables that fit into a line, each of which begins with the keys."""
    keys_width = sum(display_width(key[0] + GAP) for key in keys)
    tables = []
    width = 0
    was_in_group = False
    for column in columns:
        column_width = display_width(column[0] + GAP)
        is_in_group = group != "" and column[0].lstrip().startswith(group)
        fits = width + column_width <= MAX_WIDTH + len(GAP)  # no gap follows the last column
        if not tables or not fits or is_in_group != was_in_group:
            tables.append(list(keys))
            width = keys_width
        tables[-1].append(column)
        width += column_width
        was_in_group = is_in_group
    return tables or [keys]


def join_columns(columns) -> str:
    """Return padded columns side by side."""
    lines = []
    for cells in zip(*columns, strict=True):
        lines.append(GAP.join(cells).rstrip())
    return "\n".join(lines)


def pad_column(heading, cells) -> list[str]:
    """Return a heading and the cells below it, shortened if need be, and of the same width."""
    texts = [shortened(cell) for cell in [heading, *cells]]
    width = max(display_width(text) for text in texts)
    is_numeric = all(is_number(cell) for cell in cells)
    padded = []
    for text in texts:
        padding = " " * (width - display_width(text))
        padded.append(padding + text if is_numeric else text + padding)
    return padded


def is_number(cell) -> bool:
    """Return whether a cell is a number, or stands for none."""
    return cell in ("", "-") or cell.replace(".", "", 1).isdigit()


def shortened(cell) -> str:
    """Return a cell as it is printed: without control characters, and shortened in the middle."""
    text = printable(cell)
    if display_width(text) <= MAX_CELL:
        return text
    half = (MAX_CELL - 3) // 2
    while display_width(text[:half] + text[-half:]) > MAX_CELL - 3:
        half -= 1
    return f"{text[:half]}...{text[-half:]}"


def display_width(text) -> int:
    """Return how many columns of a terminal a text takes: Chinese characters take two."""
    num_wide = sum(unicodedata.east_asian_width(character) in "WF" for character in text)
    return len(text) + num_wide
