"""The command that a page shows starts the run again."""

import shlex

import pytest
from conftest import TINY

from minialign.losses import PAIR_LOSSES
from minialign.methods.registry import COMMON_OPTIONS, METHODS
from minialign.neighbor_losses import NEIGHBOR_LOSSES
from minialign.report.overview import LOSS_NAMES, describe_loss, describe_responses, repeat_command
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


def test_every_loss_has_a_name_for_readers():
    assert set(LOSS_NAMES) == {*PAIR_LOSSES, *NEIGHBOR_LOSSES}


def test_every_method_says_in_full_which_answers_it_learns_from():
    answers = {name: describe_responses(spec, {}) for name, spec in METHODS.items()}

    assert answers["grpo"] == METHODS["rloo"].responses
    assert answers["bdhs"].startswith("the chosen ones of the data, and rejected ones")
    for responses in answers.values():
        assert not responses.startswith("as ")


@pytest.mark.parametrize("method", ["bdhs", "online-bdhs"])
def test_a_run_under_noise_masks_no_image(method):
    masked = describe_responses(METHODS[method], {"by": "mask"})
    noisy = describe_responses(METHODS[method], {"by": "noise"})

    assert "sampled with the image masked" in masked
    assert "sampled with the image covered by noise" in noisy
    assert "masked" not in noisy


def test_every_method_says_in_words_what_it_minimizes():
    """The loss of the settings counts only for a method that reads that option."""
    losses = {name: describe_loss(spec, {"loss": "ipo"}) for name, spec in METHODS.items()}

    assert losses["dpo"] == "IPO (Identity Preference Optimization)"
    assert losses["grpo"] == "that of ppo, rewards standardized among the four"
    assert losses["reward"] == "ranking loss of a scalar head"
    for loss in losses.values():
        assert not loss.startswith("as ")
        assert "Eq." not in loss
