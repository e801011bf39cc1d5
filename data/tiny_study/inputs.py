"""The inputs of a study: its recipe, bases, evaluation sets and parts, checked before any work."""

from pathlib import Path

from minialign.evaluation.evaluation_sets import read_folder, set_name_of
from minialign.utils.digests import file_digest
from minialign.utils.files import check, read_json, read_optional_json, write_json
from tiny_study.arms import Part, Run, Study, runs_of
from tiny_study.comparisons import SETS

ABOUT_FORM = '{"seed": number, "q": number}'


def read_recipe(path) -> dict:
    """Read a recipe of the form of data/tiny/recipe.json. Raise InputError for another form."""
    recipe = read_json(path, dict)
    methods = recipe.get("methods")
    has_methods = isinstance(methods, dict) and all(
        isinstance(options, dict) for options in methods.values()
    )
    check(
        has_methods,
        f"{path}: has no 'methods', the options of each method; give a recipe of the form of "
        "data/tiny/recipe.json",
    )
    return recipe


def read_bases(study: Study, folders: list[str]) -> dict:
    """Read the about.json of each base, as {folder: value}. Raise InputError for another form."""
    name_folders("--bases", folders)
    bases = {}
    for folder in folders:
        check(
            Path(folder).name not in ("", ".."),
            f"--bases {folder}: has no name at its end, under which results could be stored; "
            "write the path with the folder's name",
        )
        about = read_json(Path(folder) / "about.json")
        check(
            _is_about(about),
            f"{folder}/about.json: not {ABOUT_FORM}, as data/make_tiny.py writes it",
        )
        bases[folder] = about
    # q is how strongly the training captions of a base are biased.
    strengths = {about["q"] for about in bases.values()}
    check(
        study.compared_with is None or len(strengths) == 1,
        "--bases: the tables of this study have no column for q, and these bases differ in it; "
        "give bases with one q",
    )
    return bases


def check_same_bases(out, bases: dict):
    """Raise InputError if the results of a base in OUT are those of another model.

    bases.json in OUT holds {name: digest of the weights}. Further bases are added to it.
    """
    path = Path(out) / "bases.json"
    digests = read_optional_json(path)
    for folder in bases:
        digest = file_digest(Path(folder) / "model" / "model.safetensors")
        check(
            digests.setdefault(Path(folder).name, digest) == digest,
            f"{folder}: {out} has results of another model of this name; give another --out, or "
            "rename the folder",
        )
    write_json(path, digests)


def _is_about(value):
    """Return whether a JSON value is an object with the numbers "seed" and "q"."""
    if not isinstance(value, dict):
        return False
    return all(type(value.get(name)) in (int, float) for name in ("seed", "q"))


def read_sets(study: Study, folders: list[str]) -> dict:
    """Return {name: folder} of evaluation sets. Raise InputError for one that no table shows."""
    sets = name_folders("--eval", folders)
    if study.shares_records or study.compared_with:
        for name, folder in sets.items():
            check(
                name in SETS,
                f"--eval {folder}: the tables of this study show the sets {', '.join(SETS)}; "
                "rename the folder",
            )
    return sets


def name_folders(option: str, folders: list[str]) -> dict:
    """Return {name: folder}. Raise InputError if two folders have the same name."""
    named = {set_name_of(folder): folder for folder in folders}
    check(
        len(named) == len(folders),
        f"{option}: two folders have the same name, which their results would share; rename one",
    )
    return named


def count_images(sets: dict) -> dict:
    """Return the number of images with captions in each evaluation set.

    Raises InputError for a set without captions or without POPE's questions.
    """
    num_images = {}
    for name, folder in sets.items():
        evaluation_set = read_folder(folder)
        check(
            evaluation_set.captions and evaluation_set.pope,
            f"{folder}: the study needs captions.json and pope_*.jsonl",
        )
        num_images[name] = len(evaluation_set.captions)
    return num_images


def choose_parts(study: Study, numbers: list[int] | None, bases: dict, out) -> tuple[Part, ...]:
    """Return the parts of a study with these numbers, or all without any.

    Raises InputError for a number that no part has, and for parts whose arms would have no row
    in a table, because the arm that they are compared with is neither in these parts nor done.
    """
    if numbers is None:
        return study.parts
    check(
        max(numbers) <= len(study.parts),
        f"--parts {max(numbers)}: this study has {len(study.parts)} parts",
    )
    parts = tuple(study.parts[number - 1] for number in numbers)
    for base, about in bases.items():
        runs = []
        for part in parts:
            runs += runs_of(part, {base: about})
        number, compared = find_compared(study, base, about)
        is_done = (compared.folder(out) / "scores.json").exists()
        check(
            not runs or compared in runs or is_done,
            f"--parts: the arms are compared with {compared.arm.name!r}, which is not done on "
            f"{base}; name part {number} too",
        )
    return parts


def find_compared(study: Study, base: str, about: dict) -> tuple[int, Run]:
    """Return the run that those of a base are compared with, and the number of its part."""
    name = study.compared_with or "control"
    for number, part in enumerate(study.parts, start=1):
        for run in runs_of(part, {base: about}):
            if run.arm.name == name:
                return number, run
    raise KeyError(name)
