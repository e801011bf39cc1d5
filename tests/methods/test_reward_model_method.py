"""Test the training of a reward model against the reference implementation."""

from method_runs import assert_equal_loss_and_gradient, make_run

from minialign import reference


def test_loss_and_gradient_equal_the_reference(vlm, records):
    """Adapters, projector and scalar head have the gradient of Eq. 1."""
    run = make_run("reward", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    head = run.policy.scalar_head
    slow_loss = reference.reward_model_loss(vlm.model, head, run.pairs(examples))
    assert abs(metrics["margin"]) > 1e-4  # the scores differ: not a comparison of ln 2 with ln 2
    assert_equal_loss_and_gradient(run, loss, slow_loss)
