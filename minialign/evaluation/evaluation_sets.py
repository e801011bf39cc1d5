"""Hallucination measured: POPE, CHAIR with recall, colours, length and repeats, on a folder of pictures with annotations."""

from pathlib import Path

from minialign.data.images import check_images
from minialign.evaluation.chair import Vocabulary
from minialign.evaluation.pope import POPE_SPLITS
from minialign.utils.files import check, read_json, read_jsonl


def read_folder(folder):
    """An evaluation set (see `read_set`) from a folder with captions.json, pope_*.jsonl or both, and images/."""
    folder = Path(folder)
    captions = folder / "captions.json"
    pope = [
        folder / f"pope_{split}.jsonl"
        for split in POPE_SPLITS
        if (folder / f"pope_{split}.jsonl").exists()
    ]
    check(
        captions.exists() or pope,
        f"{folder}: neither captions.json nor pope_*.jsonl is in this folder",
    )
    return read_set(captions if captions.exists() else None, pope, folder / "images")


def _checked(rows, path, images, form, fits):
    """`rows` of a file, each of the given form and with its picture in the folder `images` (None: not looked for)."""
    check(isinstance(rows, list) and rows, f"{path}: no records; each is {form}")
    for number, row in enumerate(rows, 1):
        check(
            isinstance(row, dict) and isinstance(row.get("image"), str) and fits(row),
            f"{path}, record {number}: not of the form {form}; mend or remove it",
        )
        picture = Path(images or "", row["image"])
        check(
            images is None or picture.is_file(),
            f"{path}, record {number}: no picture {picture}; give its folder with --images",
        )
    return rows


def read_captions(path, images=None, *needed):
    """(Vocabulary, rows) of a captions.json; each row has an image, objects and the texts `needed`; an object a name, and perhaps colour and
    place. Raises BadInput."""
    raw, form = (
        read_json(path),
        ", ".join(f'"{name}": text' for name in ("image", *needed))
        + ', "objects": [{"name": text, and perhaps "colour": text, "place": text}]',
    )
    check(
        isinstance(raw, dict), f'{path}: not {{"vocabulary": ..., "captions": [{{{form}}}, ...]}}'
    )

    def fits(row):
        """Whether a row says what it must."""
        objects = row["objects"] if isinstance(row.get("objects"), list) else [None]
        named = all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in objects)
        told = named and all(
            isinstance(one.get(key), str | None) for one in objects for key in ("colour", "place")
        )
        return told and all(isinstance(row.get(name), str) for name in needed)

    return Vocabulary(raw.get("vocabulary"), path), _checked(
        raw.get("captions"), path, images, f"{{{form}}}", fits
    )


def read_set(captions, pope, images):
    """An evaluation set from its files, its pictures looked at: {"captions", "vocabulary", "pope": {split: rows}, "images"}. Raises BadInput."""

    def asked(row):
        """Whether a row is a question of POPE's."""
        return isinstance(row.get("text"), str) and row.get("label") in ("yes", "no")

    vocabulary, captioned = (
        (None, []) if captions is None else read_captions(captions, images, "prompt")
    )
    form = '{"image": text, "text": text, "label": "yes"|"no"}'
    splits = {
        path.stem.rpartition("pope_")[2]: _checked(read_jsonl(path), path, images, form, asked)
        for path in map(Path, pope)
    }
    check(
        len(splits) == len(pope),
        f"{', '.join(map(str, pope))}: two files of one split (what stands after pope_ in a name); give one of each",
    )
    check_images(
        Path(images, row["image"]) for rows in (captioned, *splits.values()) for row in rows
    )
    return {"captions": captioned, "vocabulary": vocabulary, "images": Path(images), "pope": splits}
