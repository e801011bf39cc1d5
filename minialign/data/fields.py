"""Take the fields of a record that several formats share: by name, by type, and its images."""

import json

from minialign.utils.files import InputError, check

# Fields that have different names in the files of different programs. If a record has both, the
# first one counts (find_field).
CONVERSATION = "conversations or messages"
REJECTED_CONVERSATION = "rejected_conversations or rejected_messages"
REJECTED = "rejected or rejected_response"
IMAGE = ("image", "images", "image_path", "img_path")
SYSTEM = "system"
NO_IMAGE = f"none of the fields {', '.join(IMAGE)} names an image"

# What error messages call the types of JSON fields.
TYPE_NAMES = {
    str: "a text",
    list: "a list",
    dict: "a JSON object",
    (list, dict): "a list or a JSON object",
}


def is_blank(value) -> bool:
    """Return whether a field says nothing: it is null, or an empty text, list or object."""
    return value is None or value in ("", [], {})


def get_field(raw, name, expected_type=object):
    """Return a field of a JSON object. Raise InputError unless it has the `expected_type`."""
    if not isinstance(raw, dict):  # no check(), which would write out every record for its message
        raise InputError(f"{json.dumps(raw)[:40]} is not a JSON object")
    value = raw.get(name)
    check(value is not None, f"no field {name!r}")
    if not isinstance(value, expected_type):
        raise InputError(f"field {name!r} is not {TYPE_NAMES[expected_type]}")
    return value


def find_field(raw, names) -> str:
    """Return the one of several names that a record's field has.

    names: "a or b". If the record has neither, the first is returned.
    """
    alternatives = names.split(" or ")
    for name in alternatives:
        if raw.get(name) is not None:
            return name
    return alternatives[0]


def get_images(raw):
    """Return the file name of a record's image, or the list of them, None if it names no image.

    A record from a parquet file may hold the image itself in another field than its name. Then only
    the name counts. Raises InputError if two fields name different images, or none a file.
    """
    # 1. Collect the fields that name images.
    filled_fields = [field for field in IMAGE if not is_blank(raw.get(field))]
    naming_fields = [field for field in filled_fields if isinstance(raw[field], str | list)]
    if not filled_fields:
        return None
    check(
        naming_fields,
        f"field {filled_fields[0]!r} is not the file name of an image, nor a list of names; "
        "write images to files first, as data/README.md shows",
    )

    # 2. All must agree. A list of one image is that image.
    first_field = naming_fields[0]
    images = raw[first_field]
    for field in naming_fields:
        value = raw[field]
        check(
            as_list(value) == as_list(images),
            f"fields {first_field!r} and {field!r} name different images; remove one of them",
        )
    return images


def as_list(value) -> list:
    """Return a list as it is, and any other value as a list of one."""
    if isinstance(value, list):
        return value
    return [value]
