"""COCO: the objects of its images, and CHAIR of captions that describe them (arXiv 1809.02156).

The objects of an image are those of its instances (the annotated outlines), and those that its
reference captions mention.
"""

import functools
from pathlib import Path

from minialign.evaluation.chair import caption_counts, chair_scores
from minialign.evaluation.questions import Question
from minialign.evaluation.shares import share
from minialign.evaluation.vocabulary import Vocabulary
from minialign.utils.files import InputError, check, read_json
from minialign.utils.messages import print_message

PROMPT = "Please describe this image in detail."
# The published limit of a caption. Longer captions hallucinate more, so only scores with the same
# limit can be compared.
MAX_NEW_TOKENS = 1024

# The words that mention each of the 80 objects ("also"), and phrases that mention none ("drop").
OBJECTS_FILE = Path(__file__).resolve().parents[2] / "data" / "coco_objects.json"

# The published scorers read the annotations of 2014. Those of 2017 are the same images and ids.
YEARS = (2014, 2017)
SPLITS = ("train", "val")
FOLDER_FORM = (
    "give the folder with instances_{train,val}2014.json and captions_{train,val}2014.json"
)


@functools.cache
def coco_vocabulary() -> Vocabulary:
    """Return the Vocabulary of COCO's objects."""
    content = read_json(OBJECTS_FILE, dict)
    synonyms = {item["name"]: [item["name"], *item["also"]] for item in content["objects"]}
    return Vocabulary({"objects": synonyms, "no_mention": content["drop"]}, OBJECTS_FILE)


def read_coco(path, image_folder=None, image_ids: list[int] | None = None) -> list[Question]:
    """Read COCO's annotations. Return a Question for each image, whose record has its "objects".

    Args:
        path: the folder of instances_{train,val}{2014,2017}.json and captions_{...}.json.
        image_folder: the folder of the images, or of the folders train2014, val2014 and so on. None
            looks for no image, which is enough to score captions.
        image_ids: the images, in the order of the questions. None takes all annotated images that
            are in `image_folder`, and prints how many are not there.

    Raises InputError if the files have another form, or if one of the `image_ids` is missing.
    """
    # 1. Read the annotations, one file after the other, since each is large.
    file_names = {}  # image id: file name
    objects_of = {}  # image id: the names of its objects
    captions_of = {}  # image id: its reference captions
    files = _annotation_files(Path(path))
    for file in files["instances"]:
        _add_instances(file, file_names, objects_of)
    for file in files["captions"]:
        _add_captions(file, file_names, captions_of)

    # 2. Find the images.
    if image_ids is not None:
        _check_annotated(image_ids, file_names, files["instances"])
    chosen_ids = list(file_names) if image_ids is None else image_ids
    if image_folder is None:
        image_paths = {image_id: Path(file_names[image_id]) for image_id in chosen_ids}
    else:
        image_paths = _find_images(file_names, chosen_ids, Path(image_folder))
        _report_missing_images(image_paths, chosen_ids, image_folder, all_needed=bool(image_ids))

    # 3. Add the objects that captions mention.
    for image_id in image_paths:
        objects = objects_of.setdefault(image_id, set())
        for caption in captions_of.get(image_id, ()):
            objects.update(name for name, _ in coco_vocabulary().mentions(caption))

    # 4. Keep the order of the images. An id that is listed several times gives as many questions,
    #    since several captions may describe the image.
    questions = []
    for image_id in chosen_ids:
        if image_id in image_paths:
            record = {"image_id": image_id, "objects": sorted(objects_of[image_id])}
            questions.append(Question(image_id, image_paths[image_id], PROMPT, record))
    return questions


def score_coco(questions: list[Question], captions: list[str]) -> dict:
    """Return the scores of a caption for each question, as shares from 0 to 1.

    They are `chair_scores` without colors, which COCO does not annotate, and in addition:

    chair_s_refine: captions that mention an absent object / captions that mention any object.
    n: the number of captions.
    """
    counts = []
    for question, caption in zip(questions, captions, strict=True):
        objects = [{"name": name} for name in question.record["objects"]]
        counts.append(caption_counts(caption, objects, coco_vocabulary()))

    scores = chair_scores(counts)
    del scores["colour"]
    num_hallucinated = sum(count.has_absent for count in counts)
    num_mentioning = sum(count.mentions > 0 for count in counts)
    scores["chair_s_refine"] = share(num_hallucinated, num_mentioning)
    scores["n"] = len(counts)
    return scores


def _annotation_files(folder):
    """Return the files of annotations in a folder as {"instances": paths, "captions": paths}."""
    # 1. Choose the year.
    check(folder.is_dir(), f"{folder}: not a folder; {FOLDER_FORM}")
    years = []
    for year in YEARS:
        if any((folder / f"instances_{split}{year}.json").is_file() for split in SPLITS):
            years.append(year)
    check(years, f"{folder}: has no file of instances; {FOLDER_FORM}")
    year = years[0]
    if len(years) > 1:
        print_message(f"{folder}: has annotations of two years; those of {year} are read")

    # 2. Objects come from instances and captions, so each split has two files.
    files = {"instances": [], "captions": []}
    for split in SPLITS:
        paths = {kind: folder / f"{kind}_{split}{year}.json" for kind in files}
        # A split may be absent as a whole, but not one of its two files.
        missing = [path.name for path in paths.values() if not path.is_file()]
        check(
            len(missing) != 1, f"{folder}: has no {_names(missing)}; put it beside its other half"
        )
        if not missing:
            for kind, path in paths.items():
                files[kind].append(path)
    return files


def _names(paths):
    """Return the names of several files for an error."""
    return ", ".join(Path(path).name for path in paths)


def _read_annotations(path, file_names, lists=()):
    """Return a file of annotations, and add its {image id: file name} to `file_names`.

    Raises InputError unless it has images, annotations and the other `lists`.
    """
    content = read_json(path, dict, object_hook=_without_outline)
    for name in ("images", "annotations", *lists):
        is_list = isinstance(content.get(name), list)
        check(is_list, f"{path}: has no list {name!r}; restore the original file")
    for i, image in enumerate(content["images"], start=1):
        is_image = (
            isinstance(image, dict)
            and isinstance(image.get("id"), int)
            and isinstance(image.get("file_name"), str)
        )
        check(
            is_image,
            f'{path}, image {i}: not of the form {{"id": number, "file_name": text}}; '
            "restore the original file",
        )
        file_names.setdefault(image["id"], image["file_name"])
    return content


def _without_outline(value):
    """Return a JSON object without the outline of an instance, which is most of a file's size."""
    value.pop("segmentation", None)
    return value


def _add_instances(path, file_names, objects_of):
    """Add the objects of instances to {image id: set of objects}.

    Instances of every size count, and crowds too, as in the published scorer.

    Raises InputError for an instance without an image or a category of this file.
    """
    # 1. The object of each category.
    content = _read_annotations(path, file_names, lists=["categories"])
    name_of = {}
    for i, category in enumerate(content["categories"], start=1):
        where = f"{path}, category {i}"
        try:
            name_of[category["id"]] = coco_vocabulary().object_name(category["name"], where)
        except (KeyError, TypeError, AttributeError):
            raise InputError(f'{where}: has no "id" and "name"; restore the file') from None

    # 2. The instances.
    for image in content["images"]:
        objects_of.setdefault(image["id"], set())
    for i, annotation in enumerate(content["annotations"], start=1):
        try:
            objects_of[annotation["image_id"]].add(name_of[annotation["category_id"]])
        except (KeyError, TypeError):
            raise InputError(
                f'{path}, annotation {i}: "image_id" or "category_id" is none of this file\'s; '
                "restore the original file"
            ) from None


def _add_captions(path, file_names, captions_of):
    """Add reference captions to {image id: list of captions}."""
    content = _read_annotations(path, file_names)
    for i, annotation in enumerate(content["annotations"], start=1):
        try:
            image_id = annotation["image_id"]
            caption = annotation["caption"]
            is_caption = image_id in file_names and isinstance(caption, str)
        except (KeyError, TypeError):
            is_caption = False
        check(
            is_caption,
            f'{path}, annotation {i}: "image_id" is none of this file\'s, or "caption" no text; '
            "restore the original file",
        )
        captions_of.setdefault(image_id, []).append(caption)


def _check_annotated(image_ids, file_names, paths):
    """Raise InputError unless all images are among those of the files of annotations."""
    missing = [image_id for image_id in image_ids if image_id not in file_names]
    check(
        not missing,
        f"{paths[0].parent}: {len(missing)} of {len(image_ids)} images are not annotated in "
        f"{_names(paths)}, the first is {missing[:1]}; give the annotations of train and val",
    )


def _find_images(file_names, image_ids, folder):
    """Return {image id: path} of the images that are in a folder, or in its folders of splits.

    An image is looked for by its name in the annotations, and by its names of 2014 and 2017.
    """
    # 1. List the folders once, which is faster than a look-up of each file.
    check(not folder.is_file(), f"{folder}: is a file; give the folder of COCO's images")
    check(folder.is_dir(), f"{folder}: no such folder; give the folder of COCO's images")
    split_folders = [folder / f"{split}{year}" for year in YEARS for split in SPLITS]
    paths = {}
    for inner in (folder, *split_folders):
        if inner.is_dir():
            paths.update((path.name, path) for path in inner.iterdir())

    # 2. Find the images.
    image_paths = {}
    for image_id in image_ids:
        names = [file_names[image_id], f"{image_id:012d}.jpg"]
        names += [f"COCO_{split}2014_{image_id:012d}.jpg" for split in SPLITS]
        for name in names:
            if name in paths:
                image_paths.setdefault(image_id, paths[name])
    return image_paths


def _report_missing_images(image_paths, image_ids, folder, all_needed):
    """Print how many images are not in their folder, or raise InputError if they are needed."""
    missing = [image_id for image_id in image_ids if image_id not in image_paths]
    if missing:
        sentence = (
            f"{folder}: {len(missing)} of {len(image_ids)} images are not there, "
            f"the first is {missing[0]}"
        )
        check(image_paths and not all_needed, f"{sentence}; check the folder and the list")
        print_message(f"{sentence}; they are left out")
