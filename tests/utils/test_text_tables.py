"""Tables as aligned text."""

from minialign.utils.text_tables import (
    MAX_WIDTH,
    aligned_table,
    display_width,
    markdown_head,
    markdown_row,
)


def test_numbers_are_aligned_to_the_right_and_texts_to_the_left():
    table = aligned_table(["set", "share", "note"], [["a", "5.0", "x"], ["long", "100.0", "yes"]])

    assert table.splitlines() == [
        "set   share  note",
        "a       5.0  x",
        "long  100.0  yes",
    ]


def test_columns_that_do_not_fit_stand_below():
    """Each part begins with the keys, and no line is too long."""
    headings = ["set", *[f"a quite long heading {i}" for i in range(9)]]
    row = ["near", *[str(i) for i in range(9)]]

    table = aligned_table(headings, [row])

    parts = [part.splitlines() for part in table.split("\n\n")]
    assert len(parts) == 3
    assert all(heading.startswith("set   a quite") for heading, _ in parts)
    assert " ".join(line for _, line in parts).split() == "near 0 1 2 3 near 4 5 6 7 near 8".split()
    assert max(map(len, table.splitlines())) <= MAX_WIDTH


def test_a_group_of_columns_stands_alone_and_empty_columns_are_left_out():
    headings = ["set", "model", "words", "recall", "POPE a", "POPE b", "POPE c"]
    rows = [["x", "base", "3", "", "1 (2)", "", "5"], ["y", "base", "-", "", "", "", ""]]

    table = aligned_table(headings, rows, num_keys=2, group="POPE")

    assert table.splitlines() == [
        "set  model  words",
        "x    base       3",
        "y    base       -",
        "",
        "set  model  POPE a  POPE c",
        "x    base   1 (2)        5",
        "y    base",
    ]


def test_long_wide_and_hostile_cells_fit():
    """Chinese characters take two places, and control characters are shown as escapes."""
    rows = [["\u4e2d\u6587" * 30, "m" * 99, "p" * 99], ["a\x1b[2J", "m", "1"]]

    table = aligned_table(["set", "model", "h" * 200], rows, num_keys=2)

    assert max(map(display_width, table.splitlines())) <= MAX_WIDTH
    assert "\x1b" not in table
    assert "\\x1b[2J" in table


def test_a_table_without_values_has_its_keys():
    assert aligned_table(["set", "share"], [["near", ""]]).splitlines() == ["set", "near"]


def test_a_bar_in_a_cell_of_markdown_does_not_end_it():
    assert markdown_head(["set", "a|b"]) == ["| set | a\\|b |", "|---|---|"]
    assert markdown_row(["near", "5.0"]) == "| near | 5.0 |"
