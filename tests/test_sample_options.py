"""The command line of sample.py: its default command, its defaults, and options without effect."""

import json

import pytest
from conftest import TINY

from minialign.sample_options import RECIPE_OPTIONS, parse_options


@pytest.mark.parametrize("words", [[], ["--limit", "2"], ["pairs", "--limit", "2"]])
def test_without_a_command_it_is_pairs(words):
    assert parse_options(words).command == "pairs"


def test_the_shipped_model_has_the_settings_of_its_recipe():
    recipe = json.loads((TINY / "recipe.json").read_text())

    options = parse_options([])

    for name in RECIPE_OPTIONS:
        assert getattr(options, name) == recipe[name]


def test_a_model_of_the_user_has_the_settings_of_the_paper():
    options = parse_options(["--model", "checkpoint"])

    assert (options.rho, options.rounds, options.epsilon) == (0.99, 5, 0.97)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--by", "noise", "--rho", "0.5"], "--rho"),
        (["--by", "distortion", "--temperature", "0.5"], "--temperature"),
        (["--by", "corrupt", "--max-new-tokens", "9"], "--max-new-tokens is for --corrupter DIR"),
        (["--temperature", "0", "--top-p", "0.5"], "--top-p is for --temperature above 0"),
        (["--explain", "tiny-0001", "--sheet", "3"], "leave --sheet out"),
        (["--explain", "tiny-0001", "--keep", "1"], "leave --keep out"),
        (["--keep", "0.5"], "--keep needs --by-score"),
        (["--by-score", "policy"], "--by-score needs --keep"),
        (["--keep", "0", "--by-score", "policy"], "--keep: '0' is not a number above 0"),
        (["--keep", "0.5", "--by-score", "reward:"], "'reward:' is neither policy nor reward:DIR"),
        (["--keep", "0.5", "--by-score", "Policy"], "'Policy' is neither policy nor reward:DIR"),
        (["--by", "data", "--rho", "0.5"], "--rho is for --by attention"),
        (["--by", "data", "--seed", "1"], "--seed is for --by data with --limit or --keep"),
        (["--sheet", "0"], "--sheet: '0' is not a whole number from 1 to 200"),
        (["answer", "--image", "a.png", "--prompt", "?", "--seed", "1"], "--seed is for"),
    ],
)
def test_an_option_without_effect_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(words)

    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err
