"""Lay out tables as text: aligned columns that fit a terminal."""

import unicodedata

from minialign.utils.messages import printable

MAX_WIDTH = 100  # characters of a line
MAX_CELL = 30  # so that two keys and a column fit into a line
GAP = "  "


def aligned_table(
    headings: list[str], rows: list[list[str]], *, num_keys: int = 1, break_before: str = ""
) -> str:
    """Return a table whose columns stand below each other, in lines of MAX_WIDTH at most.

    Columns that do not fit make a second table below the first one, which begins with the same
    keys. A column without any value is left out. Numbers are aligned to the right.

    Args:
        headings: of all columns.
        rows: a list of cells each.
        num_keys: how many columns, from the left, say what a row is about.
        break_before: a column whose heading begins with this text never stands beside one whose
            heading does not.
    """
    # 1. The columns that hold anything, each with its cells padded to its width.
    columns = []
    for i, heading in enumerate(headings):
        cells = [shortened(row[i]) for row in rows]
        if any(cells) or i < num_keys:
            columns.append(pad_column(shortened(heading), cells))
    keys = columns[:num_keys]

    # 2. Cut them into tables that fit.
    tables = []
    width = 0
    belonged = None
    for column in columns[num_keys:]:
        added_width = len(GAP) + display_width(column[0])
        belongs = bool(break_before) and column[0].strip().startswith(break_before)
        if not tables or belongs != belonged or width + added_width > MAX_WIDTH:
            tables.append(list(keys))
            width = sum(display_width(key[0]) + len(GAP) for key in keys) - len(GAP)
        tables[-1].append(column)
        width += added_width
        belonged = belongs

    # 3. Write them line by line.
    texts = []
    for table in tables or [keys]:
        lines = [GAP.join(cells).rstrip() for cells in zip(*table, strict=True)]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def pad_column(heading, cells) -> list[str]:
    """Return a heading and the cells below it, padded to the same width."""
    width = max(display_width(cell) for cell in [heading, *cells])
    is_numeric = all(is_number(cell) for cell in cells)
    padded = []
    for cell in [heading, *cells]:
        padding = " " * (width - display_width(cell))
        padded.append(padding + cell if is_numeric else cell + padding)
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
