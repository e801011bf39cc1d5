"""Recipes: files with the options of a run."""

import json
import sys

import pytest
from conftest import ROOT, TINY

import train
from minialign.training.option_rules import CONDITIONS
from minialign.training.options import parse_options
from minialign.training.recipes import PAPER_RECIPES, read_recipe
from minialign.training.run_folder import RunFolder
from minialign.utils.cli import run_script
from minialign.utils.files import InputError

RECIPES = sorted(PAPER_RECIPES.glob("*.json"))
PAPER_COLUMNS = ["POPE", "MMHal-V", "LLaVA-W", "TextVQA", "GQA", "MM-Vet", "Recall"]
OWN_MODEL = ["--model", "elsewhere", "--data", "file"]
NAMES = [path.stem for path in RECIPES]


def write_recipe(path, value):
    """Write a recipe and return the words that name it."""
    path.write_text(json.dumps(value))
    return ["--recipe", str(path)]


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_every_recipe_of_the_paper_parses_and_keeps_its_values(path):
    recipe = read_recipe(path)

    options = vars(parse_options(["--recipe", str(path), *OWN_MODEL]))

    assert recipe["row"] and recipe["needs"]
    for name, value in recipe["options"].items():
        assert options[name] == value, name
    assert options["model"] == "elsewhere"


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_config_json_has_the_options_of_every_recipe(path, tmp_path):
    """config.json holds what `settings` returns."""
    options = parse_options(["--recipe", str(path), *OWN_MODEL, "--steps", "1"])

    settings = RunFolder(tmp_path, options).settings()

    expected = read_recipe(path)["options"] | {"steps": 1}
    expected.pop("epochs", None)
    assert {name: settings[name] for name in expected} == expected
    assert not {"recipe", "recipes"} & set(settings)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_a_recipe_says_what_its_row_is_named_for(path):
    """What the defaults would give anyway is written down too, so that a recipe stands alone."""
    options = read_recipe(path)["options"]

    assert "method" in options
    assert ("limit" in options) == ("5k" in path.stem or "rho" in path.stem)
    if "limit" in options:
        assert options["limit"] == 5000
    for condition in CONDITIONS:
        given = [name for name in condition.options if name in options]
        parsed = parse_options(["--recipe", str(path), *OWN_MODEL])
        assert not given or condition.holds(parsed)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_page_has_a_row_for_every_recipe_with_its_figures(path):
    page = (PAPER_RECIPES / "README.md").read_text()
    recipe = read_recipe(path)

    (row,) = [
        line for line in page.splitlines() if line.startswith("|") and f"`{path.name}`" in line
    ]

    figures = recipe.get("paper", {})
    for value in figures.values():
        assert f"{value:.2f}" in row
    if "POPE" in figures:
        assert list(figures) == PAPER_COLUMNS
        assert " | ".join(f"{value:.2f}" for value in figures.values()) in row


def test_typed_options_take_precedence(tmp_path):
    words = write_recipe(
        tmp_path / "r.json", {"options": {"method": "dpo", "beta": 0.2, "epochs": 5, "lr": 1e-7}}
    )

    options = parse_options([*OWN_MODEL, "--beta", "0.5", *words, "--steps", "7"])

    assert (options.method, options.beta, options.lr) == ("dpo", 0.5, 1e-7)
    assert options.steps == 7


@pytest.mark.parametrize("data", ["a", ["a", "b"]])
def test_a_typed_list_replaces_that_of_the_recipe(tmp_path, data):
    recipe = {"options": {"method": "dpo", "data": data, "eval": ["c"]}}
    words = write_recipe(tmp_path / "r.json", recipe)

    options = parse_options([*words, "--model", "m", "--data", "typed", "--eval"])

    assert (options.method, options.data, options.eval) == ("dpo", ["typed"], [])


def test_typed_epochs_replace_the_steps_of_a_recipe(tmp_path):
    words = write_recipe(tmp_path / "r.json", {"options": {"method": "reward", "steps": 9}})

    options = parse_options([*words, *OWN_MODEL, "--epochs", "2"])

    assert (options.steps, options.epochs) == (None, 2)


def test_a_recipe_may_name_the_model_the_data_and_flags(tmp_path):
    recipe = {
        "options": {
            "method": "bdhs",
            "model": "a",
            "data": ["b", "c"],
            "checkpoint_layers": True,
            "control": False,
            "unguided": False,
        }
    }

    options = parse_options(write_recipe(tmp_path / "r.json", recipe))

    assert (options.model, options.data) == ("a", ["b", "c"])
    assert options.lora_rank == 128  # with a model the defaults are the paper's
    assert options.checkpoint_layers and not options.control and not options.unguided


def test_a_recipe_without_a_model_is_run_on_the_tiny_world(tmp_path):
    words = write_recipe(tmp_path / "r.json", {"options": {"method": "dpo", "beta": 0.2}})

    options = parse_options(words)

    assert options.model == str(TINY / "model")
    assert (options.beta, options.lora_rank) == (0.2, 32)
    assert not hasattr(options, "recipe") and not hasattr(options, "recipes")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ([], "not a JSON object"),
        ({"row": "x"}, "no field 'options'"),
        ({"options": {}, "note": "x"}, "unknown field 'note'"),
        ({"options": []}, "field 'options' is not a JSON object"),
        ({"options": {}, "paper": {"POPE": "88"}}, "figure 'POPE' is not a number"),
        ({"options": {}, "row": 3}, "field 'row' is not a text"),
        ({"options": {"bta": 0.1}}, "unknown option 'bta'"),
        ({"options": {"batch-size": 4}}, "unknown option 'batch-size'"),
        ({"options": {"out": "x"}}, "unknown option 'out'"),
        ({"options": {"recipe": "x"}}, "unknown option 'recipe'"),
        ({"options": {"help": True}}, "unknown option 'help'"),
        ({"options": {"beta": True}}, "give a value as it is typed"),
        ({"options": {"beta": None}}, "give a value as it is typed"),
        ({"options": {"beta": {}}}, "give a value as it is typed"),
        ({"options": {"data": ["a", "--out"]}}, "give a value as it is typed"),
        ({"options": {"beta": "--out"}}, "give a value as it is typed"),
        ({"options": {"control": "yes"}}, "give true or false"),
    ],
)
def test_a_recipe_of_another_form_is_refused(tmp_path, recipe, message):
    path = tmp_path / "r.json"

    with pytest.raises(InputError, match=message) as error_info:
        parse_options(write_recipe(path, recipe))

    assert str(error_info.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("recipe_options", "words", "message"),
    [
        ({"method": "none"}, [], "invalid choice"),
        ({"epochs": 2.5}, [], "whole number"),
        ({"method": "dpo", "rho": 0.9}, [], "--rho is for --method"),
        ({"method": "bdhs", "rho": 0.9}, ["--by", "noise"], "--rho has no effect here"),
    ],
)
def test_what_an_option_of_a_recipe_cannot_be_names_the_recipe(
    tmp_path, capsys, recipe_options, words, message
):
    recipe = {"options": recipe_options}

    with pytest.raises(SystemExit) as exit_info:
        parse_options([*write_recipe(tmp_path / "r.json", recipe), *words])

    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "r.json" in error and message in error


@pytest.mark.parametrize("words", [["--recipe"], ["--recipe", "none.json"]])
def test_a_recipe_that_is_not_there_is_one_line(words, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])

    try:
        status = run_script(train.main)
    except SystemExit as error:
        status = error.code

    assert status == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "recipe" in error or "none.json: no such file" in error


def test_the_recipes_are_listed_with_the_papers_figures(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(["--recipes"])

    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for path in RECIPES:
        assert path.name in out
    assert "| 88.75 | 2.71 | 86.33 |" in out


def test_the_recipe_of_the_tiny_world_is_listed_and_gives_the_default_run(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--recipes"])
    assert "| data/tiny/recipe.json | none: the tiny world" in capsys.readouterr().out

    from_recipe = parse_options(["--recipe", str(TINY / "recipe.json")])

    assert from_recipe == parse_options([])


def test_a_run_records_the_options_of_its_recipe(tmp_path, monkeypatch):
    """One step of DPO on the tiny model, with the paper's options where it has no own model."""
    out = tmp_path / "out"
    words = ["--recipe", PAPER_RECIPES / "slic-povid.json", "--out", out, "--eval"]
    words += ["--steps", "1", "--limit", "4", "--batch-size", "2"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, words)])
    monkeypatch.chdir(ROOT)

    assert run_script(train.main) == 0

    settings = json.loads((out / "config.json").read_text())["settings"]
    assert settings["method"] == "dpo"
    assert (settings["loss"], settings["format"]) == ("slic", "povid")
    assert (settings["steps"], settings["limit"]) == (1, 4)
