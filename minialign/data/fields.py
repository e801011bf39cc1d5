"""Take the fields of a record that several formats share: by name, by type, and its images."""

import json

from minialign.utils.files import InputError, check

# What is called differently in the files of several programs. The first one counts.
CONVERSATION = "conversations or messages"
REJECTED_CONVERSATION = "rejected_conversations or rejected_messages"
REJECTED = "rejected or rejected_response"
IMAGE = ("image", "images", "image_path", "img_path")
NO_IMAGE = f"none of the fields {', '.join(IMAGE)} names an image"

# What error messages call the types of JSON fields.
TYPE_NAMES = {str: "a text", list: "a list", dict: "a JSON object", (list, dict): "a list"}


def is_blank(value) -> bool:
    """Return whether a field says nothing: it is null, or an empty text, list or object."""
    return value is None or value in ("", [], {})


def get_field(raw, name, expected_type=object):
    """Return a field of a JSON object. Raise InputError unless it has the `expected_type`."""
    check(isinstance(raw, dict), f"{json.dumps(raw)[:40]} is not a JSON object")
    value = raw.get(name)
    check(value is not None, f"no field {name!r}")
    if not isinstance(value, expected_type):
        raise InputError(f"field {name!r} is not {TYPE_NAMES[expected_type]}")
    return value


def find_field(raw, names) -> str:
    """Return the name that a record's field has, such as "a" or "b" where `names` is "a or b".

    A record without the field gives the first name.
    """
    alternatives = names.split(" or ")
    for name in alternatives:
        if raw.get(name) is not None:
            return name
    return alternatives[0]


def get_images(raw):
    """Return the file name of a record's image, or the list of them, None if it names no image.

    A parquet file holds the image itself beside its name. What is not a name does not count then.
    Raises InputError if two fields name different images.
    """
    # 1. Collect what the fields name.
    values = {name: raw[name] for name in IMAGE if not is_blank(raw.get(name))}
    names = {field: value for field, value in values.items() if isinstance(value, str | list)}
    if not values:
        return None
    check(
        names,
        f"field {next(iter(values))!r} is not the file name of an image, nor a list of names; "
        "write images to files first, as data/README.md shows",
    )

    # 2. All must agree. A list of one image is that image.
    first_field, images = next(iter(names.items()))
    for field, value in names.items():
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
