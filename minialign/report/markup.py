"""Write HTML by plain functions, which escape every text that they are given.

`element` makes a Markup of a name, children and attributes. A child that is a Markup stays as it
is. Any other child is a text, which cannot become HTML, whatever a caption or a file name holds.
"""

import html

MAX_CHARACTERS = 4000  # of one text. A page must stay small enough to open.
VOID_ELEMENTS = ("br", "img", "meta")  # those that have no end tag

# Characters that are shown as escapes, such as \x1b: control characters (without tab and line
# break), halves of a character, which no file can hold, and marks that reorder the text around
# them.
CONTROL_CHARACTERS = [*range(9), *range(11, 32), *range(127, 160)]
HALF_CHARACTERS = range(0xD800, 0xE000)
DIRECTION_MARKS = [0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)]
ESCAPES = {
    code: chr(code).encode("unicode_escape").decode()
    for code in [*CONTROL_CHARACTERS, *HALF_CHARACTERS, *DIRECTION_MARKS]
}


class Markup(str):
    """HTML that was made by the functions of this module."""


def element(tag: str, /, *children, **attributes) -> Markup:
    """Return an HTML or SVG element. An attribute that is None is left out.

    Attributes are named in Python's way: class_ is class, and aria_label is aria-label.
    """
    written = []
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            written.append(f' {key}="{escaped(value)}"')
    start = f"<{tag}{''.join(written)}>"
    if tag in VOID_ELEMENTS:
        return Markup(start)
    return Markup(f"{start}{join(*children)}</{tag}>")


def table(caption, headings, rows) -> Markup:
    """Return a table that scrolls where the page is narrow.

    rows: (title, cells) each. A cell is a list of children.
    """
    body = []
    for title, cells in rows:
        row_cells = [element("td", *cell) for cell in cells]
        body.append(element("tr", element("th", title, scope="row"), *row_cells))
    head = element("tr", *[element("th", heading, scope="col") for heading in headings])
    written = element(
        "table",
        element("caption", caption),
        element("thead", head),
        element("tbody", *body),
    )
    return element("div", written, class_="scroll")


def join(*children) -> Markup:
    """Return children one after the other. Those that are not Markup are escaped."""
    pieces = []
    for child in children:
        is_markup = isinstance(child, Markup)
        pieces.append(child if is_markup else escaped(shortened(child)))
    return Markup("".join(pieces))


def shortened(value) -> str:
    """Return a text that is not too long to read, and says how much it left out."""
    value = str(value)
    num_left_out = len(value) - MAX_CHARACTERS
    if num_left_out <= 0:
        return value
    return f"{value[:MAX_CHARACTERS]} ... ({num_left_out} more characters)"


def escaped(value) -> str:
    """Return a text with nothing in it that a browser could act on."""
    return html.escape(str(value).translate(ESCAPES))
