"""Test MPO: the slow form, step 0, and the running mean of its rewards."""

import math

import pytest
from method_runs import BETA, assert_equal_loss_and_gradient, make_run

from minialign import reference, reference_neighbors
from minialign.methods.base import add_reference_logps, encode_example


def rewards_of(metrics):
    """Return the mean rewards of the chosen and of the rejected responses of a batch."""
    chosen_reward = BETA * (metrics["logp_chosen"] - metrics["ref_logp_chosen"])
    rejected_reward = BETA * (metrics["logp_rejected"] - metrics["ref_logp_rejected"])
    return [chosen_reward, rejected_reward]


def test_loss_and_gradient_equal_the_slow_form_in_the_second_step(vlm, records):
    """The shift is the mean over one pair of the first step and two of the second.

    It is counted before the loss uses it.
    """
    run = make_run("mpo", vlm, records, num_records=3)
    run.move_policy()
    first_batch, second_batch = run.examples[:1], run.examples[1:]
    run.method.collect(first_batch, step=0)
    _, first_metrics = run.method.loss(first_batch, batch=first_batch)

    examples, metrics = run.method.collect(second_batch, step=1)
    loss, second_metrics = run.method.loss(examples, batch=examples)

    # The mean of the second batch stands for two pairs.
    first_rewards = rewards_of(first_metrics)
    all_rewards = first_rewards + 2 * rewards_of(second_metrics)
    assert metrics["shift"] == pytest.approx(sum(all_rewards) / 6, rel=1e-4)
    assert abs(metrics["shift"]) > 1e-3
    slow_loss = reference_neighbors.mpo_loss(
        vlm.model, run.ref_model, run.pairs(examples), BETA, earlier_rewards=first_rewards
    )
    assert_equal_loss_and_gradient(run, loss, slow_loss)


@pytest.mark.parametrize("rank", [0, 4])
def test_loss_at_step_0(vlm, records, rank):
    """1.2 ln 2 and the supervised loss."""
    run = make_run("mpo", vlm, records, rank=rank, num_records=2)
    examples, metrics = run.method.collect(run.examples, step=0)

    loss, loss_metrics = run.method.loss(examples, batch=examples)

    chosen_examples = [pair[:3] for pair in run.pairs(examples)]
    sft_loss = reference.sft_loss(run.ref_model, chosen_examples).item()
    assert metrics["shift"] == 0.0
    assert loss_metrics["margin"] == 0.0
    assert loss.item() == pytest.approx(1.2 * math.log(2) + sft_loss, rel=1e-5)


def test_the_rewards_of_two_rejected_responses_count_by_their_weights(vlm, records):
    """Eq. 5: (r+ + 0.4 r- + 0.6 r~-) / 2, and the chosen response is learned from once."""
    run = make_run("mpo", vlm, records, num_records=1)
    run.method.rejected_weights = (0.4, 0.6)
    record = run.examples[0].record
    example = encode_example(vlm, record, [record.chosen, record.rejected, "A red pen."])
    add_reference_logps(run.policy, vlm, [example])
    example.ref_logps -= example.ref_logps.new_tensor([1.0, 2.0, 3.0])  # log ratios 1, 2 and 3

    _, metrics = run.method.collect([example], step=0)
    loss, _ = run.method.loss([example], batch=[example])

    assert metrics["shift"] == pytest.approx(BETA * (1 + 0.4 * 2 + 0.6 * 3) / 2, rel=1e-4)
    shift = metrics["shift"]
    sft_loss = -(example.ref_logps[0] + 1).item() / len(example.responses[0])
    expected_loss = sft_loss
    for log_ratio, weight in ((2, 0.4), (3, 0.6)):
        dpo = math.log(1 + math.exp(-BETA * (1 - log_ratio)))
        bco = math.log(1 + math.exp(shift - BETA)) + math.log(
            1 + math.exp(BETA * log_ratio - shift)
        )
        expected_loss += weight * (0.8 * dpo + 0.2 * bco)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)


def test_two_processes_count_the_rewards_of_one(vlm, records, monkeypatch):
    """Each scores its share of the micro-batches, and the shares are all rewards."""
    run = make_run("mpo", vlm, records)
    run.move_policy()
    monkeypatch.setattr("minialign.methods.mpo.MAX_TOKENS", 1)
    expected = run.method.mean_rewards(run.examples)
    shares = []

    def keep_share(results, num_items):
        shares.append(results)
        return results

    monkeypatch.setattr("minialign.methods.mpo.gather_results", keep_share)
    for rank in range(2):
        monkeypatch.setattr(
            "minialign.methods.mpo.local_share", lambda items, rank=rank: items[rank::2]
        )
        run.method.mean_rewards(run.examples)
    first_share, second_share = shares

    assert [[reward] for reward in expected] == [
        first_share[0],
        second_share[0],
        first_share[1],
        second_share[1],
    ]
