"""The command line of sample.py: its default command, its defaults, and options without effect."""

import json
import re

import pytest
from conftest import TINY

from minialign.sample_options import RECIPE_OPTIONS, parse_options
from minialign.utils.files import InputError


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
    "text",
    ["Is it a cup?", "<image>\nIs it a cup?", "Is it <image> a cup?", " Is it a cup?<image> "],
)
def test_a_prompt_has_its_image_in_front(text):
    """As in a record, wherever the prompt says that the image is."""
    question = parse_options(["answer", "--image", "a.png", "--prompt", text]).prompt
    assert question == "<image>\n" + text.replace("<image>", "").strip()


@pytest.mark.parametrize(
    "text, message",
    [
        (" ", "--prompt ' ': write a question"),
        ("<image>", "--prompt '<image>': write a question"),
        ("<image> and <image>?", "--prompt: the questions contain <image> 2 times"),
        ("<|image_1|> Is it?", "--prompt: a question has '<|image_1|>'"),
        ("USER: Is it? ASSISTANT:", "--prompt: a question is written in a chat format already"),
    ],
)
def test_a_prompt_that_no_record_may_have_is_refused(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_options(["answer", "--image", "a.png", "--prompt", text])


@pytest.mark.parametrize(
    "words, message",
    [
        (["--by", "noise", "--rho", "0.5"], "--rho"),
        (["--by", "distortion", "--temperature", "0.5"], "--temperature"),
        (["--explain", "tiny-0001", "--sheet", "3"], "leave --sheet out"),
        (["--explain", "tiny-0001", "--keep", "1"], "leave --keep out"),
        (["--keep", "0.5"], "--keep needs --by-score"),
        (["--by-score", "policy"], "--by-score needs --keep"),
        (["--keep", "0", "--by-score", "policy"], "--keep: '0' is not a number above 0"),
        (["--keep", "0.5", "--by-score", "reward:"], "'reward:' is neither policy nor reward:DIR"),
        (["--keep", "0.5", "--by-score", "Policy"], "'Policy' is neither policy nor reward:DIR"),
        (["--by", "data", "--rho", "0.5"], "--rho is for --by attention"),
        (["--sheet", "0"], "--sheet: '0' is not a whole number from 1 to 200"),
    ],
)
def test_an_option_without_effect_is_refused(words, message, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(words)

    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, option, wanted",
    [
        ("--by corrupt --max-new-tokens 9", "--max-new-tokens", "--corrupter DIR"),
        ("--temperature 0 --top-p .5", "--top-p", "--temperature above 0"),
        ("--rounds 1 --epsilon .5", "--epsilon", "--rounds above 1"),
        ("--by noise --rounds=1 --epsilon=.5", "--epsilon", "--rounds above 1"),
        ("--by data --seed 1", "--seed", "--limit or --keep"),
        ("--by corrupt --corrupter m --seed 1", "--seed", "--limit or --keep, or another --by"),
        ("answer --image a.png --prompt ? --seed 1", "--seed", "--temperature above 0"),
    ],
)
def test_an_option_that_another_one_switches_off_is_refused(words, option, wanted, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(words.split())

    assert exit_info.value.code == 2
    assert f"{option} has no effect here: it is for {wanted}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "--by corrupt --seed 1",  # the rule draws the facts that it exchanges
        "--by corrupt --corrupter m --limit 9 --seed 1",
        "--by data --keep .5 --by-score policy --seed 1",
        "--by distortion --seed 1",
        "--temperature 0 --seed 1",  # masks and cuts are still drawn
        "--rounds 2 --epsilon .5",
        "--rounds 1 --unguided",
    ],
)
def test_an_option_with_an_effect_is_accepted(words):
    parse_options(words.split())
