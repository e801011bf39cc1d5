"""Read the image settings of a checkpoint, and refuse what is not supported here.

Every InputError names the file and the setting.
"""

from minialign.utils.files import InputError, check, read_json, read_optional_json

KNOWN_PROCESSORS = (
    "CLIPImageProcessor",
    "CLIPFeatureExtractor",
    "SiglipImageProcessor",
    "LlavaImageProcessor",
    "LlavaNextImageProcessor",
)


def read_settings(directory, patch_size):
    """Return (file, image settings) of a checkpoint.

    transformers 5 writes processor_config.json with the settings nested in it, older versions write
    preprocessor_config.json. If both have them, the nested ones win, as in transformers.
    """
    nested_file = directory / "processor_config.json"
    flat_file = directory / "preprocessor_config.json"
    processor = read_optional_json(nested_file)
    processor_patch_size = processor.get("patch_size")
    check(
        processor_patch_size in (None, patch_size),
        f"{nested_file}: patch_size is {processor_patch_size}, but config.json's vision tower has "
        f"{patch_size}; make them agree",
    )
    if isinstance(processor.get("image_processor"), dict):
        return nested_file, processor["image_processor"]
    check(
        flat_file.exists(),
        f"{directory}: neither preprocessor_config.json nor a processor_config.json with "
        "image_processor; add the checkpoint's own",
    )
    return flat_file, read_json(flat_file, dict)


def read_processor_type(file, settings):
    """Return the type of image processor, a name of KNOWN_PROCESSORS."""
    name = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    processor_type = str(name).removesuffix("Fast")
    check(
        processor_type in KNOWN_PROCESSORS,
        f"{file}: image_processor_type {processor_type} is not supported; "
        f"use one of {', '.join(KNOWN_PROCESSORS)}",
    )
    return processor_type


def read_resize(file, size):
    """Return (shortest_edge, exact_size) of the setting `size`, one of them None."""
    if isinstance(size, int):  # the older form
        size = {"shortest_edge": size}
    lengths = _read_lengths(size)
    if set(lengths) == {"shortest_edge"}:
        return lengths["shortest_edge"], None
    if set(lengths) == {"height", "width"}:
        return None, (lengths["height"], lengths["width"])
    raise InputError(
        f"{file}: size is {size}; it must hold shortest_edge, or height and width in whole pixels"
    )


def check_crop_size(file, crop_size, tile_size):
    """Raise InputError unless the setting `crop_size` is the size of a tile."""
    size = crop_size
    if isinstance(crop_size, int):  # the older form
        size = {"height": crop_size, "width": crop_size}
    lengths = _read_lengths(size)
    check(
        set(lengths) == {"height", "width"},
        f"{file}: crop_size is {crop_size}; it must hold height and width in whole pixels",
    )
    check(
        lengths == {"height": tile_size, "width": tile_size},
        f"{file}: crop_size is {crop_size}, but the vision tower takes {tile_size} pixels; "
        "make them agree",
    )


def _read_lengths(size):
    """Return the lengths of a size setting by name, or {} if one is not a positive integer."""
    if not isinstance(size, dict):
        return {}
    lengths = {name: length for name, length in size.items() if length is not None}
    if not all(_is_multiple(length, of=1) for length in lengths.values()):
        return {}
    return lengths


def _is_multiple(length, *, of):
    """Return whether a length is a positive integer and a multiple of another one."""
    return isinstance(length, int) and length > 0 and length % of == 0


def read_channels(file, settings, name):
    """Return the three numbers of `image_mean` or `image_std`."""
    values = settings.get(name)
    message = f"{file}: {name} is {values}; it must list three numbers, one per color channel"
    check(isinstance(values, list) and len(values) == 3, message)
    for value in values:
        # A comparison with NaN is never true. No image has values near these bounds.
        check(type(value) in (int, float) and -1e6 < value < 1e6, message)
        check(
            name != "image_std" or value > 0,
            f"{file}: {name} is {values}; pixels are divided by it, so it must be above 0",
        )
    return tuple(float(value) for value in values)


def read_grid_pinpoints(file, settings, tile_size, *, model_grids):
    """Return the AnyRes grids as a tuple of (height, width), None if there are none.

    The processor cuts images by these grids and the model lays out their features by them. So the
    two files must agree. Of the models, a LLaVA-NeXT alone has grids, and always has them. Of the
    processors, its own alone cuts by grids. Another one may list them, left from an earlier use.
    """
    processor_type = read_processor_type(file, settings)
    if model_grids is None and processor_type != "LlavaNextImageProcessor":
        return None
    model_grids = _check_grids(file, tile_size, model_grids)
    processor_grids = _check_grids(file, tile_size, settings.get("image_grid_pinpoints"))
    if processor_grids:
        check(
            model_grids,
            f"{file}: lists image_grid_pinpoints, but config.json's model is no LLaVA-NeXT; "
            "make them agree",
        )
        check(
            model_grids == processor_grids,
            f"{file}: image_grid_pinpoints differ from config.json's; make them agree",
        )
    return model_grids or None


def _check_grids(file, tile_size, grids):
    """Return grids as a tuple of (height, width). Raise InputError unless they are whole tiles."""
    checked = []
    for grid in grids or ():
        check(
            _is_multiple_of_tile(grid, tile_size),
            f"{file}: grid pinpoint {grid} is not a (height, width) in multiples of {tile_size} "
            "pixels; correct it here or in config.json",
        )
        checked.append(tuple(grid))
    return tuple(checked)


def _is_multiple_of_tile(grid, tile_size):
    """Return whether a grid pinpoint is (height, width) in whole tiles."""
    if not isinstance(grid, (list, tuple)) or len(grid) != 2:
        return False
    return all(_is_multiple(length, of=tile_size) for length in grid)
