"""Test supervised fine-tuning against the reference implementation."""

import pytest
from method_runs import assert_equal_loss_and_gradient, make_run

from minialign import reference


@pytest.mark.parametrize("rank, move_size, num_records", [(4, 0.02, 2), (0, 0.003, 3)])
def test_loss_and_gradient_equal_the_reference(vlm, records, rank, move_size, num_records):
    """Rank 4 trains adapters, rank 0 all weights. The rejected response plays no part."""
    run = make_run("sft", vlm, records, rank=rank, num_records=num_records)
    run.move_policy(move_size)
    examples, _ = run.method.collect(run.examples, step=0)

    loss, _ = run.method.loss(examples, batch=examples)

    slow_examples = [pair[:3] for pair in run.pairs(examples)]  # prompt, images, chosen
    slow_loss = reference.sft_loss(vlm.model, slow_examples)
    assert_equal_loss_and_gradient(run, loss, slow_loss)
