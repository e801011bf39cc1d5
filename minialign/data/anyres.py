"""The geometry of AnyRes images (LLaVA-1.6): which grid of tiles an image fills, and how many tokens it becomes."""


def select_best_resolution(size, pinpoints):
    """The pinpoint that shows most of the picture's own pixels, then wastes least canvas, then stands first; all (height, width)."""
    return max(pinpoints, key=lambda pinpoint: _shown_and_spared(size, pinpoint))


def _shown_and_spared(size, pinpoint):
    scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
    # Enlarging adds no detail: a picture never shows more pixels than it has.
    shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
    return shown, shown - pinpoint[0] * pinpoint[1]


def grid_shape(size, pinpoints, tile):
    """(rows, columns) of tiles of `tile` pixels, the whole picture not counted, for an AnyRes picture of (height, width) pixels."""
    height, width = select_best_resolution(size, pinpoints)
    return height // tile, width // tile


def unpadded_region(size, rows, columns):
    """(top, bottom, left, right): the part of a (rows, columns) feature map that shows the picture of (height, width).

    What is left out shows only the black bars. The reference's rule: the aspects are compared in features, and a
    length is rounded at the seventh digit before it is cut, lest 23.9999999 become 23.
    """
    height, width = size
    if width / height > columns / rows:
        margin = (rows - int(round(height * (columns / width), 7))) // 2
        return margin, rows - margin, 0, columns
    margin = (columns - int(round(width * (rows / height), 7))) // 2
    return 0, rows, margin, columns - margin


def count_image_tokens(size, image_processor, side):
    """How many vectors a picture of (height, width) pixels becomes; `side` features a tile's edge (S // patch).

    Square: side squared. AnyRes: those of the whole picture, the unpadded map, and a newline vector after each row.
    """
    if image_processor.grid_pinpoints is None:
        return side * side
    rows, columns = grid_shape(size, image_processor.grid_pinpoints, image_processor.tile_size)
    top, bottom, left, right = unpadded_region(size, rows * side, columns * side)
    return side * side + (bottom - top) * (right - left + 1)
