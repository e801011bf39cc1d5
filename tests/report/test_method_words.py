"""What a run learned from is said in words that are true for its options."""

import pytest

from minialign.losses import PAIR_LOSSES
from minialign.methods.registry import METHODS
from minialign.neighbor_losses import NEIGHBOR_LOSSES
from minialign.report.method_words import (
    LOSS_NAMES,
    RESPONSES_OF_ON,
    describe_hidden_image,
    describe_loss,
    describe_not_in_control,
    describe_responses,
)
from minialign.training.options import build_parser


def test_every_loss_has_a_name_for_readers():
    assert set(LOSS_NAMES) == {*PAIR_LOSSES, *NEIGHBOR_LOSSES}


def test_every_method_says_in_full_which_answers_it_learns_from():
    answers = {name: describe_responses(spec, {}) for name, spec in METHODS.items()}

    assert METHODS["grpo"].responses == "as rloo"
    assert answers["grpo"] == METHODS["rloo"].responses
    for name in ("bdhs", "online-bdhs"):
        assert answers[name] == f"the chosen ones of the data, and {METHODS[name].responses}"
    for responses in answers.values():
        assert not responses.startswith("as ")


@pytest.mark.parametrize("method", ["bdhs", "online-bdhs"])
def test_a_run_under_noise_masks_no_image(method):
    masked = describe_responses(METHODS[method], {"by": "attention"})
    noisy = describe_responses(METHODS[method], {"by": "noise"})

    assert "sampled with the image masked" in masked
    assert "sampled with noise added to the image" in noisy
    assert "masked" not in noisy


def test_every_method_says_in_words_what_it_minimizes():
    """The loss of the settings counts only for a method that reads that option."""
    losses = {name: describe_loss(spec, {"loss": "ipo"}) for name, spec in METHODS.items()}

    assert losses["dpo"] == "IPO (Identity Preference Optimization)"
    assert METHODS["grpo"].loss == "as ppo, rewards standardized among the four"
    assert losses["grpo"] == "that of ppo, rewards standardized among the four"
    divergence = "divergence from a target that contrasts the reference"
    assert METHODS["distill"].loss == f"{divergence} with and without the image"
    assert losses["distill"] == f"{divergence} with the image and with the image masked"
    assert losses["reward"] == "ranking loss of a scalar head"
    for loss in losses.values():
        assert not loss.startswith("as ")
        assert "Eq." not in loss


@pytest.mark.parametrize(
    "settings, loss",
    [
        ({}, LOSS_NAMES["dpo"]),
        ({"smoothing": 0.1}, f"{LOSS_NAMES['dpo']}, with label smoothing 0.1"),
        ({"loss": "ipo", "smoothing": 0.1}, LOSS_NAMES["ipo"]),
        (
            {"gamma": 0.3, "distill_weight": 2.0},
            f"{LOSS_NAMES['dpo']}, averaged over two rejected answers, where that of the data has "
            "the weight 0.3, plus 2.0 times the distillation of the chosen answers",
        ),
        (
            {"reference_adapter": "there"},
            f"{LOSS_NAMES['dpo']}, with a reference that merges the model with the adapter there",
        ),
    ],
)
def test_options_that_change_the_loss_are_told(settings, loss):
    assert describe_loss(METHODS["bdhs"], {"method": "bdhs"} | settings) == loss


def test_the_rejected_answers_of_the_data_are_told_where_they_are_used():
    responses = describe_responses(METHODS["bdhs"], {"gamma": 0.5})

    assert responses.startswith("the pairs of the data, and rejected ones sampled")


def test_rejected_answers_of_weight_0_are_not_told():
    assert describe_responses(METHODS["bdhs"], {"gamma": 0.0}) == describe_responses(
        METHODS["bdhs"], {}
    )


def test_mixed_dpo_that_takes_all_pairs_from_the_data_samples_none():
    mixed = METHODS["mixed-dpo"]
    dpo = METHODS["dpo"]

    assert describe_responses(mixed, {"mix": 1.0}) == describe_responses(dpo, {})
    assert describe_not_in_control(mixed, {"mix": 1.0}) == describe_not_in_control(dpo, {})
    assert "online-dpo" in describe_responses(mixed, {"mix": 0.9})
    assert "ranking" in describe_not_in_control(mixed, {"mix": 0.9})


def test_distillation_says_whose_answers_it_reads():
    (action,) = [action for action in build_parser()._actions if action.dest == "on"]

    assert set(RESPONSES_OF_ON) == set(action.choices)
    responses = {on: describe_responses(METHODS["distill"], {"on": on}) for on in action.choices}
    assert responses == {
        "chosen": "the chosen responses of the data",
        "policy": "answers that the policy samples at every step",
        "reference": "answers that the model before training sampled once",
    }
    assert describe_responses(METHODS["distill"], {}) == responses["chosen"]


@pytest.mark.parametrize(
    "settings, hidden",
    [
        ({}, "the image masked"),
        ({"rho": 0.1}, "10.0\u00a0% of the image masked"),
        ({"rho": 1.0, "by": "attention"}, "the whole image masked"),
        ({"rho": 0.99, "by": "noise"}, "noise added to the image"),
    ],
)
def test_as_much_of_an_image_is_hidden_as_the_run_hid(settings, hidden):
    assert describe_hidden_image(settings) == hidden
    assert f"sampled with {hidden}" in describe_responses(METHODS["bdhs"], settings)
    assert describe_loss(METHODS["distill"], settings).endswith(f"the image and with {hidden}")


def test_every_method_with_a_control_says_what_goes_beyond_it():
    """Only a method whose pairs have chosen answers of the data gains from rejected answers."""
    for name, spec in METHODS.items():
        assert bool(spec.not_in_control) == ("control" in spec.options), name
        has_chosen_of_data = "loss" in spec.options and spec.data != "prompts"
        assert ("rejected" in spec.not_in_control) == has_chosen_of_data, name


def test_added_losses_may_be_what_the_aligned_model_gains_from():
    not_in_control = describe_not_in_control(
        METHODS["dpo"], {"loss": "mdpo", "distill_weight": 1.0}
    )

    assert not_in_control == "the rejected answers, or the damaged images, or the distillation"
