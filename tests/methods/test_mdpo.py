"""Test mDPO: the slow form, what it is without its added losses, and the damaged images."""

import math

import pytest
import torch
from method_runs import BETA, assert_equal_loss_and_gradient, assert_policy_has_moved, make_run

from minialign import reference_neighbors
from minialign.methods.mdpo import ImageDamage
from minialign.methods.preference import PreferenceMethod

STEP = 5


def damaged_pairs(run, examples):
    """Return the pairs of the examples for the slow form, with their damaged images."""
    pairs = []
    for pair, example in zip(run.pairs(examples), examples, strict=True):
        packed = run.method.damage.pack(run.vlm, example, STEP)
        pairs.append((*pair, packed.image_features, packed.visible))
    return pairs


@pytest.mark.parametrize("noise_steps", [0, 500])
def test_loss_and_gradient_equal_the_slow_form(vlm, records, noise_steps):
    """The slow form masks the tokens that the fast one leaves out."""
    run = make_run("mdpo", vlm, records, num_records=2)
    run.method.damage = ImageDamage(noise_steps=noise_steps)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=STEP)

    loss, metrics = run.method.loss(examples, batch=examples)

    slow_loss = reference_neighbors.mdpo_loss(
        vlm.model, run.ref_model, damaged_pairs(run, examples), BETA
    )
    assert_policy_has_moved(metrics)
    assert abs(metrics["image_margin"]) > 1e-4
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def test_loss_and_image_margin_by_hand(vlm, records):
    """Log ratios of 3 for both responses, and of 1 for y+ with the damaged image, in both pairs.

    So the margin is 0, and the image raises the reward of y+ by beta (3 - 1).
    """
    run = make_run("mdpo", vlm, records, num_records=2)
    examples, _ = run.method.collect(run.examples, step=STEP)
    for example in examples:
        example.ref_logps = example.ref_logps - 3
        example.damaged.ref_chosen_logp -= 1

    loss, metrics = run.method.loss(examples, batch=examples)

    conditional_loss = math.log(1 + math.exp(-2 * BETA))
    anchor_loss = math.log(1 + math.exp(-3 * BETA))
    assert metrics["margin"] == pytest.approx(0, abs=1e-5)
    assert metrics["image_margin"] == pytest.approx(2 * BETA, abs=1e-5)
    assert loss.item() == pytest.approx(math.log(2) + conditional_loss + anchor_loss, rel=1e-5)


def test_without_its_added_losses_it_is_dpo(vlm, records):
    """A reference to which y+ is 1,000 nats less likely than to the policy makes the anchor vanish.

    It does not change the margin, if y- is as much less likely. A reference to which y+ is certain
    with the damaged image makes the conditional loss vanish as well.
    """
    run = make_run("mdpo", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=STEP)
    for example in examples:
        example.ref_logps = example.ref_logps - 1000
        example.damaged.ref_chosen_logp = 0.0
    dpo = PreferenceMethod(vlm, "dpo", BETA)

    loss, metrics = run.method.loss(examples, batch=examples)
    expected_loss, expected_metrics = dpo.loss(examples, batch=examples)

    del metrics["image_margin"]
    assert metrics == expected_metrics
    assert loss.item() == expected_loss.item()
    assert torch.equal(run.gradient(loss), run.gradient(expected_loss))


def test_damage_depends_on_seed_record_and_step_alone(vlm, records):
    """A tenth of the image tokens stays, others at every step."""
    run = make_run("mdpo", vlm, records, num_records=2)
    first, second = run.examples
    damage = ImageDamage(share=0.9, seed=1)

    visible = damage.pack(vlm, first, 0).visible

    assert 0 < len(visible) < 0.3 * first.num_image_tokens
    assert visible == damage.pack(vlm, first, 0).visible
    others = (
        damage.pack(vlm, first, 1),
        damage.pack(vlm, second, 0),
        ImageDamage(share=0.9, seed=2).pack(vlm, first, 0),
    )
    assert all(visible != other.visible for other in others)
    assert ImageDamage(share=1.0).pack(vlm, first, 0).visible == []


def test_two_processes_compute_the_damaged_images_of_one(vlm, records, monkeypatch):
    """Each scores its share of the micro-batches, and both get all log-probs."""
    run = make_run("mdpo", vlm, records)
    monkeypatch.setattr("minialign.methods.mdpo.MAX_TOKENS", 1)
    run.method.collect(run.examples, step=STEP)
    expected = [example.damaged for example in run.examples]

    shares = []

    def keep_share(results, num_items):
        shares.append(results)
        return [[0.0]] * num_items

    for rank in range(2):
        monkeypatch.setattr(
            "minialign.methods.mdpo.local_share", lambda items, rank=rank: items[rank::2]
        )
        monkeypatch.setattr("minialign.methods.mdpo.gather_results", keep_share)
        run.method.collect(run.examples, step=STEP)
    interleaved = [shares[0][0], shares[1][0], shares[0][1], shares[1][1]]
    monkeypatch.setattr("minialign.methods.mdpo.gather_results", lambda *_, **__: interleaved)
    run.method.collect(run.examples, step=STEP)

    assert [example.damaged for example in run.examples] == expected
