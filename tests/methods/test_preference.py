"""Test the losses on preference pairs: gradients, step 0, metrics, and the average of Eq. 5."""

import math

import pytest
import torch
from method_runs import BETA, assert_equal_loss_and_gradient, assert_policy_has_moved, make_run

from minialign import reference
from minialign.logprobs import response_logps
from minialign.losses import PAIR_LOSSES
from minialign.methods.base import add_reference_logps, encode_example, pack_examples
from minialign.methods.preference import PreferenceMethod
from minialign.models.policy import Policy


def slow_pair_loss(name, run, pairs):
    """Return a loss on pairs by the reference implementation."""
    model = run.vlm.model
    if name == "slic-calibration":
        return reference.slic_calibration_loss(model, pairs, BETA)
    if name == "ipo":
        return reference.ipo_loss(model, run.ref_model, pairs, BETA)
    if name == "ipo-mean":
        return reference.ipo_mean_loss(model, run.ref_model, pairs, BETA)
    if name == "slic":
        return reference.slic_loss(model, run.ref_model, pairs, BETA)
    if name == "dpo":
        return reference.dpo_loss(model, run.ref_model, pairs, BETA)
    raise ValueError(f"no slow loss is called {name}; add it here")


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_loss_and_gradient_equal_the_reference(vlm, records, name):
    """The adapters and the projector have the gradient of the slow loss."""
    run = make_run(name, vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    slow_loss = slow_pair_loss(name, run, run.pairs(examples))
    assert_policy_has_moved(metrics)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def test_loss_and_gradient_over_all_weights_equal_the_reference(vlm, records):
    """Rank 0 trains decoder, head and projector in place. The reference is their frozen copy."""
    run = make_run("dpo", vlm, records, rank=0, num_records=3)
    run.move_policy(0.003)

    loss, _ = run.method.loss(run.examples, batch=run.examples)

    slow_loss = slow_pair_loss("dpo", run, run.pairs(run.examples))
    assert_equal_loss_and_gradient(run, loss, slow_loss)


@pytest.mark.parametrize("rank", [0, 4])
def test_step_0_with_stored_reference_logps_of_another_layout(vlm, records, rank):
    """The reference saw each example alone, so its last bits differ from the policy's.

    The margin stays within the tolerance of log-probs, max(1e-6 |x|, 1e-5 a token).
    """
    policy = Policy(vlm.model, rank, 8)
    rejected_texts = ("A red cup is here.", "No.", "There is a dog. " * 4)
    examples = []
    for record, text in zip(records, rejected_texts, strict=False):
        examples.append(encode_example(vlm, record, [record.chosen, text]))
    add_reference_logps(policy, vlm, examples, max_tokens=1)

    loss, metrics = PreferenceMethod(vlm, "dpo", 1.0).loss(examples, batch=examples)

    tolerance = 0.0
    for example in examples:
        for logp, response in zip(example.ref_logps, example.responses, strict=True):
            tolerance += max(1e-6 * abs(float(logp)), 1e-5 * len(response))
    assert abs(metrics["margin"]) <= tolerance
    assert abs(loss.item() - math.log(2)) <= tolerance
    assert metrics["logp_chosen"] == pytest.approx(metrics["ref_logp_chosen"], abs=tolerance)


def set_margins(run, margins):
    """Give the pairs these margins h by their reference log-probs. Return the policy's, (B, 2)."""
    rows = pack_examples(run.vlm, run.examples)
    policy_logps, _ = response_logps(run.vlm.model, rows)
    policy_logps = policy_logps.detach()
    for example, logps, margin in zip(run.examples, policy_logps, margins, strict=True):
        example.ref_logps = logps - torch.tensor([margin, 0.0])
    return policy_logps


def test_metrics_are_means_over_the_pairs(vlm, records):
    """Worked by hand for h = 2, -1, 0: the margin is beta h, and a tie counts as half right."""
    run = make_run("slic", vlm, records, num_records=3)
    logps = set_margins(run, (2.0, -1.0, 0.0))

    loss, metrics = run.method.loss(run.examples, batch=run.examples)

    chosen_mean, rejected_mean = logps.mean(0).tolist()
    mean_loss = (0.4 + 1.3 + 1) / 3  # of max(0, 1 - beta h)
    assert loss.item() == pytest.approx(mean_loss, abs=1e-4)
    assert metrics["margin"] == pytest.approx(BETA / 3, abs=1e-4)
    assert metrics["accuracy"] == 0.5
    assert metrics["logp_chosen"] == pytest.approx(chosen_mean, rel=1e-5)
    assert metrics["logp_rejected"] == pytest.approx(rejected_mean, rel=1e-5)
    assert metrics["ref_logp_chosen"] == pytest.approx(chosen_mean - 1 / 3, rel=1e-5)
    assert metrics["ref_logp_rejected"] == pytest.approx(rejected_mean, rel=1e-5)


def dpo_loss_by_hand(margin):
    """Return f(h) = -log sigmoid(h / 2), the DPO loss of a margin at beta = 0.5."""
    return math.log(1 + math.exp(-0.5 * margin))


def test_two_rejected_responses_are_averaged_by_eq_5(vlm, records):
    """h = 1 against the first and -3 against the second: 0.7 f(1) + 0.3 f(-3), also in metrics."""
    run = make_run("dpo", vlm, records, num_records=2)
    examples = []
    for example in run.examples:
        texts = [example.record.chosen, example.record.rejected, "A red pen."]
        examples.append(encode_example(vlm, example.record, texts))
    logps, _ = response_logps(vlm.model, pack_examples(vlm, examples))
    logps = logps.detach()
    shift = torch.tensor([0.0, 1.0, -3.0])
    for example, policy_logps in zip(examples, logps, strict=True):
        example.ref_logps = policy_logps + shift

    method = PreferenceMethod(vlm, "dpo", 0.5, rejected_weights=(0.7, 0.3))
    loss, metrics = method.loss(examples, batch=examples)

    average_loss = 0.7 * dpo_loss_by_hand(1) + 0.3 * dpo_loss_by_hand(-3)
    average_margin = 0.7 * 1 + 0.3 * -3
    chosen_mean, first_mean, second_mean = logps.mean(0).tolist()
    rejected_mean = 0.7 * first_mean + 0.3 * second_mean
    assert loss.item() == pytest.approx(average_loss, rel=1e-4)
    assert metrics["margin"] == pytest.approx(0.5 * average_margin, abs=1e-4)
    assert metrics["accuracy"] == pytest.approx(0.7)
    assert metrics["logp_chosen"] == pytest.approx(chosen_mean, rel=1e-5)
    assert metrics["logp_rejected"] == pytest.approx(rejected_mean, rel=1e-5)


def test_label_smoothing_reaches_the_loss(vlm, records):
    """h = 1 at beta = 0.5 with a fifth of the labels flipped: 0.8 f(1) + 0.2 f(-1)."""
    run = make_run("dpo", vlm, records, num_records=2)
    set_margins(run, (1.0, 1.0))

    method = PreferenceMethod(vlm, "dpo", 0.5, smoothing=0.2)
    loss, _ = method.loss(run.examples, batch=run.examples)

    smoothed_loss = 0.8 * dpo_loss_by_hand(1) + 0.2 * dpo_loss_by_hand(-1)
    assert loss.item() == pytest.approx(smoothed_loss, rel=1e-4)
