"""The inputs of a study: what would end it after hours, or leave a table empty, is refused."""

import json
import sys

import pytest
from conftest import ROOT, TINY
from small_sets import write_small_set

from minialign.utils.files import InputError

sys.path.insert(0, str(ROOT / "data"))
from tiny_study.arms import STUDIES, Run, runs_of  # noqa: E402
from tiny_study.inputs import (  # noqa: E402
    check_same_bases,
    choose_parts,
    count_images,
    find_compared,
    read_bases,
    read_recipe,
    read_sets,
)

BDHS = STUDIES["bdhs"]
DISTILLATION = STUDIES["distillation"]
PARTS = STUDIES["parts"]
BASES = {"b/one": {"seed": 1, "q": 0.35}, "b/true": {"seed": 2, "q": 0}}


def write_about(folder, **about):
    """Write the about.json of a base into a new folder, and return the folder as text."""
    folder.mkdir()
    (folder / "about.json").write_text(json.dumps(about))
    return str(folder)


def test_the_shipped_files_are_accepted():
    assert read_recipe(TINY / "recipe.json")["methods"]["bdhs"]
    assert read_bases(PARTS, [str(TINY)]) == {str(TINY): {"seed": 1, "q": 0.35}}
    folder = str(TINY / "tune" / "balanced")
    assert read_sets(PARTS, [folder]) == {"balanced": folder}


@pytest.mark.parametrize("methods", [None, [], {"dpo": 3}])
def test_a_recipe_of_another_form_is_refused(tmp_path, methods):
    """The recipes of the paper's rows have no 'methods', and their options stand elsewhere."""
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps({"options": {"beta": 0.1}, "methods": methods}))

    with pytest.raises(InputError, match=f"{path}: has no 'methods'"):
        read_recipe(path)
    with pytest.raises(InputError, match="dpo-povid-5k.json: has no 'methods'"):
        read_recipe(ROOT / "data" / "paper" / "dpo-povid-5k.json")


@pytest.mark.parametrize("about", [{"seed": 1}, {"seed": 1, "q": "0.35"}, {"seed": True, "q": 0}])
def test_a_base_whose_seed_or_q_is_no_number_is_refused(tmp_path, about):
    folder = write_about(tmp_path / "base", **about)

    with pytest.raises(InputError, match='base/about.json: not {"seed": number, "q": number}'):
        read_bases(BDHS, [folder])


@pytest.mark.parametrize("folder", [".", ".."])
def test_a_base_without_a_name_is_refused(folder):
    """Its results would stand beside those of other bases, or above them."""
    with pytest.raises(InputError, match="has no name at its end"):
        read_bases(BDHS, [folder])


def test_the_results_of_another_model_of_one_name_are_not_taken(tmp_path):
    """A base may be made again. New bases may be added to a study."""
    for name, weights in (("a/one", "1"), ("b/one", "2"), ("a/two", "3")):
        folder = tmp_path / name / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(weights)
    first = str(tmp_path / "a/one")
    other = str(tmp_path / "b/one")
    second = str(tmp_path / "a/two")
    out = tmp_path / "out"

    check_same_bases(out, {first: {}})
    check_same_bases(out, {first: {}, second: {}})
    with pytest.raises(InputError, match="b/one: .*out has results of another model of this name"):
        check_same_bases(out, {other: {}})
    check_same_bases(out, {second: {}})

    assert list(json.loads((out / "bases.json").read_text())) == ["one", "two"]


def test_bases_that_differ_in_q_are_refused_where_no_table_tells_them_apart(tmp_path):
    folders = [write_about(tmp_path / f"q{q}", seed=1, q=q) for q in (0, 0.35)]

    assert len(read_bases(BDHS, folders)) == 2
    with pytest.raises(InputError, match="have no column for q, and these bases differ in it"):
        read_bases(PARTS, folders)


@pytest.mark.parametrize("study", [DISTILLATION, PARTS])
def test_a_set_that_no_table_shows_is_refused(study):
    assert read_sets(BDHS, ["here/mine"]) == {"mine": "here/mine"}
    with pytest.raises(InputError, match="--eval here/mine: .* balanced, shifted, typical; rename"):
        read_sets(study, ["balanced", "here/mine"])


@pytest.mark.parametrize(
    "study, folders", [(BDHS, ["a/x", "b/x"]), (PARTS, ["a/typical", "typical"])]
)
def test_two_sets_of_one_name_are_refused(study, folders):
    with pytest.raises(InputError, match="--eval: two folders have the same name"):
        read_sets(study, folders)


def test_a_set_without_captions_or_questions_is_refused(tmp_path):
    folder = tmp_path / "balanced"
    write_small_set("balanced", folder, num_images=2)
    assert count_images({"balanced": folder}) == {"balanced": 2}

    (folder / "captions.json").unlink()
    with pytest.raises(InputError, match="balanced: the study needs captions.json and pope_"):
        count_images({"balanced": folder})


# --- the parts


@pytest.mark.parametrize("study", STUDIES.values())
def test_without_numbers_all_parts_are_chosen_and_all_bases_have_what_is_compared(study, tmp_path):
    parts = choose_parts(study, None, BASES, tmp_path)

    assert parts == study.parts
    for base, about in BASES.items():
        number, compared = find_compared(study, base, about)
        assert compared in runs_of(parts[number - 1], {base: about})
        assert compared.seed == 0


@pytest.mark.parametrize(
    "study, numbers, compared, needed",
    [(BDHS, [3], "control", 1), (BDHS, [5, 4], "control", 1), (PARTS, [2, 8], "distill", 1)],
)
def test_parts_without_what_they_are_compared_with_are_refused(
    tmp_path, study, numbers, compared, needed
):
    """Their tables would be empty. They are not if it is among the parts, or done already."""
    bases = {"b/one": BASES["b/one"]}
    message = f"compared with '{compared}', which is not done on b/one; name part {needed} too"

    with pytest.raises(InputError, match=message):
        choose_parts(study, numbers, bases, tmp_path)

    with_it = choose_parts(study, [*numbers, needed], bases, tmp_path)
    assert with_it == tuple(study.parts[number - 1] for number in [*numbers, needed])
    _, run = find_compared(study, "b/one", bases["b/one"])
    folder = run.folder(tmp_path)
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("{}")
    assert len(choose_parts(study, numbers, bases, tmp_path)) == len(numbers)


def test_each_base_has_what_it_is_compared_with_in_the_part_of_its_q(tmp_path):
    """The truthful base has its control in part 2. Part 3 asks nothing of it."""
    true_base = {"b/true": BASES["b/true"]}

    assert choose_parts(BDHS, [3], true_base, tmp_path) == (BDHS.parts[2],)
    with pytest.raises(InputError, match="not done on b/true; name part 2 too"):
        choose_parts(BDHS, [6], true_base, tmp_path)
    assert find_compared(BDHS, "b/true", BASES["b/true"]) == (
        2,
        Run("b/true", BDHS.parts[1].arms[1], 0),
    )


def test_a_part_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="--parts 9: this study has 6 parts"):
        choose_parts(BDHS, [1, 9], BASES, tmp_path)
