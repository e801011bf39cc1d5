"""Test that reference log-probs reach the examples they belong to."""

from dataclasses import replace

import torch
from method_runs import make_run

from minialign.logprobs import response_logps
from minialign.methods.base import add_reference_logps, encode_example, pack_examples
from minialign.training.run import reference_key


def test_reference_logps_reach_their_own_examples(vlm, records):
    """They are computed in micro-batches of another order. The tolerance is that of log-probs."""
    run = make_run("online-dpo", vlm, records)

    add_reference_logps(run.policy, vlm, run.examples, max_tokens=200)

    for example in run.examples:
        logps, _ = response_logps(vlm.model, pack_examples(vlm, [example]))
        torch.testing.assert_close(example.ref_logps, logps[0], rtol=1e-6, atol=1e-4)


def test_the_key_of_stored_logps_depends_on_the_system_text(vlm, records):
    """Under another system text the same response has another log-prob."""
    keys = set()
    logps = set()
    for system in (None, "Answer briefly.", "Name positions."):
        record = replace(records[0], system=system)
        example = encode_example(vlm, record, [record.chosen])
        keys.add(reference_key("weights", vlm, [example]))
        logps.add(response_logps(vlm.model, pack_examples(vlm, [example]))[0].item())

    assert len(keys) == 3
    assert len(logps) == 3


def test_the_key_of_stored_logps_depends_on_all_that_they_depend_on(vlm, records):
    """The weights, the template, image settings, the content of images, turns and responses.

    It does not depend on the objects that hold them.
    """
    first, second = records[:2]
    example = encode_example(vlm, first, [first.chosen])
    settings = replace(vlm.image_processor, mean=(0.1, 0.2, 0.3))
    changed = {
        "weights": reference_key("others", vlm, [example]),
        "template": reference_key("weights", replace(vlm, template="chatml"), [example]),
        "image settings": reference_key(
            "weights", replace(vlm, image_processor=settings), [example]
        ),
        "settings": reference_key("weights", vlm, [example], "contrast 2"),
        "examples": reference_key("weights", vlm, [example, example]),
    }
    for name, field in (
        ("image", {"paths": second.paths}),
        ("turns", {"turns": ("<image>\nWhat?",)}),
        ("id", {"id": "another"}),
    ):
        other = replace(example, record=replace(first, **field))
        changed[name] = reference_key("weights", vlm, [other])
    changed["responses"] = reference_key("weights", vlm, [replace(example, responses=[[5, 2]])])

    key = reference_key("weights", vlm, [example])

    assert len({key, *changed.values()}) == 1 + len(changed)
    assert reference_key("weights", vlm, [encode_example(vlm, first, [first.chosen])]) == key
