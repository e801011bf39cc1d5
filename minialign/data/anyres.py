"""Find the grid of tiles that an AnyRes image (LLaVA-1.6) fills, and count its image tokens.

AnyRes shows an image twice: squashed to one tile, and at a higher resolution on a grid of tiles.
The grids that a checkpoint knows are its pinpoints, (height, width) in pixels. All sizes here are
(height, width), and all rounding is that of transformers.
"""


def select_best_resolution(size, pinpoints):
    """Return the pinpoint that shows most pixels of an image and, of those, wastes least canvas.

    Of equally good pinpoints the first wins.
    """
    height, width = size
    best_pinpoint = None
    best_score = None
    for pinpoint in pinpoints:
        canvas_height, canvas_width = pinpoint
        scale = min(canvas_width / width, canvas_height / height)
        scaled_pixels = int(width * scale) * int(height * scale)
        # Enlarging adds no detail: an image never shows more pixels than it has.
        shown_pixels = min(scaled_pixels, width * height)
        wasted_pixels = canvas_height * canvas_width - shown_pixels
        score = (shown_pixels, -wasted_pixels)
        if best_score is None or score > best_score:
            best_pinpoint = pinpoint
            best_score = score
    return best_pinpoint


def grid_shape(size, pinpoints, tile_size):
    """Return (rows, columns) of the grid of tiles for an image, the squashed tile not counted."""
    height, width = select_best_resolution(size, pinpoints)
    return height // tile_size, width // tile_size


def unpadded_region(size, rows, columns):
    """Return (top, bottom, left, right): the region of a feature map that shows the image.

    The image is centered on its canvas, so black bars lie above and below it or left and right of
    it. The features of the bars are dropped from the map of (rows, columns) features.
    """
    height, width = size
    # A length is rounded to seven digits before it is cut, so that 23.9999999 becomes 24, not 23.
    if width / height > columns / rows:  # wider than the canvas: bars above and below
        kept_rows = int(round(height * (columns / width), 7))
        bar = (rows - kept_rows) // 2
        return bar, rows - bar, 0, columns
    kept_columns = int(round(width * (rows / height), 7))
    bar = (columns - kept_columns) // 2
    return 0, rows, bar, columns - bar


def count_image_tokens(size, image_processor, patches_per_side):
    """Return the number of image tokens of an image.

    Without AnyRes it is the number of patches of one tile. With AnyRes these are the patches of the
    squashed tile, then those of the unpadded map of the grid, with a newline token after each row.
    """
    tokens_per_tile = patches_per_side * patches_per_side
    if image_processor.grid_pinpoints is None:
        return tokens_per_tile
    tile_rows, tile_columns = grid_shape(
        size, image_processor.grid_pinpoints, image_processor.tile_size
    )
    top, bottom, left, right = unpadded_region(
        size, rows=tile_rows * patches_per_side, columns=tile_columns * patches_per_side
    )
    tokens_per_row = right - left + 1  # and the newline
    return tokens_per_tile + (bottom - top) * tokens_per_row
