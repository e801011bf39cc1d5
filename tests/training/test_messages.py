"""What a run says when it ends."""

import json

import pytest

from minialign.training.messages import (
    check_learned,
    describe_change,
    print_reward_model_first,
    print_skipped_prompts,
    warn_if_nothing_learned,
)
from minialign.utils.files import InputError


def scores(**chair_i):
    """Return variant -> set -> scores, with one set that has captions and one that has none."""
    return {name: {"typical": {"chair_i": x}, "asked": {}} for name, x in chair_i.items()}


def test_the_sentence_names_the_control():
    """By hand: shares of 1/2, 1/4 and 1/3. A set without captions is not mentioned."""
    sentence = describe_change(scores(base=0.5, control=1 / 3, aligned=0.25), "bdhs", "runs/1")

    assert sentence == (
        "bdhs took the share of mentioned objects that are not there "
        "from 50.0 to 25.0 % (control 33.3) on typical; model and logs are in runs/1"
    )


def test_the_sentence_without_a_control():
    sentence = describe_change(scores(base=0.5, aligned=0.25), "bdhs", "runs/1")

    assert "from 50.0 to 25.0 % on typical; " in sentence


def test_the_sentence_without_captions():
    pope_alone = {"typical": {"pope": {}}}
    sentence = describe_change({"base": pope_alone, "aligned": pope_alone}, "sft", "runs/1")

    assert sentence == "sft is done; model and logs are in runs/1"


def test_the_sentence_says_that_nothing_was_measured():
    sentence = describe_change({"base": {}, "aligned": {}}, "sft", "runs/1")

    assert sentence == (
        "sft is done, nothing was measured (--eval names no folder); model and logs are in runs/1"
    )


def test_the_sentence_says_that_no_object_was_mentioned():
    """A share of no mention is no value, and no number is made of it."""
    silent = describe_change(scores(base=None, control=0.5, aligned=None), "bdhs", "runs/1")
    silent_control = describe_change(scores(base=0.5, control=None, aligned=0.25), "bdhs", "runs/1")

    assert silent == (
        "bdhs is done; no object was mentioned on typical by base and aligned; "
        "model and logs are in runs/1"
    )
    assert "from 50.0 to 25.0 % (control -) on typical; " in silent_control
    assert "no object was mentioned on typical by control; " in silent_control


def test_skipped_prompts_are_averaged_over_the_steps(tmp_path, capsys):
    """By hand: (0.5 + 0) / 2 = 25 %. A metric that the log does not have is not mentioned."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"same": share}) + "\n" for share in (0.5, 0.0)))

    print_skipped_prompts(path)

    printed = capsys.readouterr().err
    assert printed.startswith("25.0 % of the sampled prompts gave no two different responses")
    assert "ties" not in printed


def online_line(same, tied, offline=0.0, **metrics):
    """Return a line of the log of an online method."""
    return {"same": same, "tied": tied, "offline": offline, "grad_norm": 1.0, **metrics}


def write_log(folder, lines):
    """Write metrics.jsonl and return its path."""
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# An MLLM that was asked eight times a step and never understood.
NOT_UNDERSTOOD = {"annotator: asked": 8, "annotator: not understood": 8}
USELESS = online_line(same=0.25, tied=0.75, **NOT_UNDERSTOOD)
USEFUL = online_line(same=0.25, tied=0.5, **NOT_UNDERSTOOD)


def test_a_run_without_a_decided_pair_is_an_error_with_the_annotators_counts(tmp_path):
    """By hand: 25 % and 75 % of the prompts, and 8 + 8 questions."""
    path = write_log(tmp_path, [USELESS, USELESS])

    with pytest.raises(InputError) as caught:
        check_learned("online-dpo", path)

    assert str(caught.value).startswith(
        f"{path}: online-dpo has found no pair to learn from in 2 steps of sampling: "
        "25.0 % of the sampled prompts gave no two different responses; "
        "75.0 % of the sampled prompts were ties for the annotator "
        "(the annotator: asked: 16, not understood: 16); no result is saved"
    )


def test_online_bdhs_that_found_no_other_response_is_an_error(tmp_path):
    path = write_log(tmp_path, [{"rounds": 5.0, "same": 1.0, "grad_norm": 0.0}])

    with pytest.raises(InputError, match="100.0 % of the sampled prompts gave no two"):
        check_learned("online-bdhs", path)


def test_mixed_dpo_whose_samples_were_all_ties_is_an_error(tmp_path):
    """It learned from the pairs of the data, which is what plain DPO does.

    The first step took all pairs from the data, and so says nothing about the annotator.
    """
    all_offline = online_line(same=0.0, tied=0.0, offline=1.0)
    path = write_log(tmp_path, [all_offline, online_line(same=0.0, tied=1.0, offline=0.5)])

    with pytest.raises(InputError, match="in 1 steps of sampling"):
        check_learned("mixed-dpo", path)


@pytest.mark.parametrize(
    "lines",
    [
        [USELESS, USEFUL, USELESS],
        [online_line(same=0.0, tied=0.0, offline=1.0)],  # --mix 1
        [{"loss": 0.7, "grad_norm": 1.0}],  # a method that does not sample
    ],
)
def test_one_step_with_a_pair_is_enough(tmp_path, lines):
    check_learned("online-dpo", write_log(tmp_path, lines))


def test_a_run_whose_gradient_was_always_0_is_an_error(tmp_path):
    path = write_log(tmp_path, [{"loss": 0.0, "grad_norm": 0.0}] * 2)

    with pytest.raises(InputError, match="the gradient was 0 in every step"):
        check_learned("rloo", path)


@pytest.mark.parametrize(
    "lines, warns",
    [
        ([USELESS], True),
        ([USELESS] * 2, False),
        ([USELESS] * 10, True),
        ([USEFUL], False),
        ([USEFUL, USELESS], False),
        ([{"loss": 0.7}], False),
    ],
)
def test_a_warning_while_nothing_was_learned_yet(capsys, lines, warns):
    """It comes in the first step and in the tenth, and says what the annotator counted."""
    warn_if_nothing_learned(lines)

    printed = capsys.readouterr().err
    assert printed.startswith("warning: no sampled pair") == warns
    assert (f"not understood: {8 * len(lines)})" in printed) == warns


def test_a_reward_model_is_announced_with_its_steps(capsys):
    print_reward_model_first(4000, "runs/1/reward")

    printed = capsys.readouterr().err
    assert "trained first, for 4000 steps, in runs/1/reward" in printed
    assert "--reward-steps" in printed
