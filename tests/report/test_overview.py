"""The command that a page shows starts the run again."""

import shlex

import pytest
from conftest import TINY

from minialign.methods.registry import COMMON_OPTIONS, METHODS
from minialign.report.overview import repeat_command
from minialign.training.options import parse_options

NOT_SETTINGS = ("resume", "out", "export", "keep_features")


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--method rloo --seed 3 --reward-steps 5",
        "--no-control --by noise --noise-steps 400 --eval",
        "--method distill --on policy --epochs 2",
        "--method dpo --loss ipo --limit 40 --steps 4",
        f"--model {TINY / 'model'} --data 'my data.json' --unguided",
    ],
)
def test_the_command_has_the_same_settings(words):
    """Whatever was typed: options that are the defaults are left out."""
    settings = vars(parse_options(shlex.split(words)))

    command = repeat_command(settings)

    script, *typed = shlex.split(command.removeprefix("python "))
    repeated = vars(parse_options(typed))
    assert script == "train.py"
    for name in (*COMMON_OPTIONS, *METHODS[settings["method"]].options):
        if name not in NOT_SETTINGS:
            assert (repeated[name] or None) == (settings[name] or None), name


def test_the_default_run_is_a_short_command():
    settings = vars(parse_options(["--limit", "40"]))

    assert repeat_command(settings) == "python train.py --method bdhs --limit 40"


def test_an_option_without_effect_is_not_typed():
    """--lora-alpha would be refused beside --lora-rank 0."""
    settings = vars(parse_options(["--lora-rank", "0"]))

    command = repeat_command(settings | {"lora_alpha": 7})

    assert command == "python train.py --method bdhs --lora-rank 0"


def test_a_method_of_another_version_has_no_command():
    assert repeat_command({"method": "unknown"}) == ""
