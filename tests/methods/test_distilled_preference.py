"""Test that a loss on pairs and distillation are added, and what each of them sees."""

from dataclasses import replace

import pytest
from method_runs import (
    BETA,
    DISTILL_WEIGHT,
    assert_policy_has_moved,
    make_distillation,
    make_run,
    relative_distance,
    short_records,
)

from minialign.methods.base import encode_example
from minialign.methods.mpo import MpoMethod
from minialign.methods.preference import PreferenceMethod


def test_loss_and_gradient_are_the_weighted_sum_of_both(vlm, records):
    """Distillation alone has examples that never had a rejected response."""
    run = make_run("dpo-distill", vlm, records, num_records=2)
    run.move_policy()
    dpo = PreferenceMethod(vlm, "dpo", BETA)
    distill = make_distillation("distill", run.policy, vlm)
    chosen = []
    for record in short_records(records)[:2]:
        chosen.append(encode_example(vlm, record, [record.chosen]))
    chosen = distill.prepare(chosen)

    loss, metrics = run.method.loss(run.examples, batch=run.examples)
    pair_loss, pair_metrics = dpo.loss(run.examples, batch=run.examples)
    divergence, _ = distill.loss(chosen, batch=chosen)

    assert_policy_has_moved(metrics)
    assert loss.item() == pytest.approx(pair_loss.item() + DISTILL_WEIGHT * divergence.item())
    assert metrics["divergence"] == pytest.approx(divergence.item())
    assert metrics["margin"] == pair_metrics["margin"]
    expected = run.gradient(pair_loss) + DISTILL_WEIGHT * run.gradient(divergence)
    assert relative_distance(run.gradient(loss), expected) <= 1e-5


def test_it_keeps_what_the_loss_on_pairs_keeps(vlm, records):
    """MPO counts rewards when it collects, and a saved state needs its sums. It has pairs."""
    run = make_run("dpo-distill", vlm, records, num_records=2)
    mpo = MpoMethod(vlm, "mpo", BETA)
    method = replace(run.method, preference=mpo)
    examples = [replace(example, ref_logps=example.ref_logps - 1) for example in run.examples]

    _, metrics = method.collect(examples, step=0)

    assert metrics["shift"] == mpo.shift == pytest.approx(BETA)  # each log ratio is 1
    assert method.state_tensors() == {"reward_sums": mpo.reward_sums}
    assert method.unit == mpo.unit == "pairs"
