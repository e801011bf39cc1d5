"""Test that reference log-probs reach the examples they belong to."""

import torch
from method_runs import make_run

from minialign.logprobs import response_logps
from minialign.methods.base import add_reference_logps, pack_examples


def test_reference_logps_reach_their_own_examples(vlm, records):
    """They are computed in micro-batches of another order. The tolerance is that of log-probs."""
    run = make_run("online-dpo", vlm, records)

    add_reference_logps(run.policy, vlm, run.examples, max_tokens=200)

    for example in run.examples:
        logps, _ = response_logps(vlm.model, pack_examples(vlm, [example]))
        torch.testing.assert_close(example.ref_logps, logps[0], rtol=1e-6, atol=1e-4)
