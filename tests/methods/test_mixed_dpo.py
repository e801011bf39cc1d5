"""Test Mixed-DPO (Eq. 4): each record keeps the pair of the data with probability p."""

import math
from collections import Counter
from dataclasses import replace

import pytest
from method_runs import (
    BETA,
    assert_equal_loss_and_gradient,
    assert_policy_has_moved,
    encode_text,
    make_collector,
    make_run,
    script_responses,
)

from minialign import reference
from minialign.methods import online


def test_loss_and_gradient_equal_the_reference(vlm, records):
    """One pair of the data and one that was sampled, by the slow DPO loss."""
    run = make_run("mixed-dpo", vlm, records, num_records=2)
    run.move_policy()
    examples, collected_metrics = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    slow_loss = reference.dpo_loss(vlm.model, run.ref_model, run.pairs(examples), BETA)
    assert len(examples) == 2
    assert collected_metrics["offline"] == 0.5
    assert_policy_has_moved(metrics)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def kept_ids(examples, collected):
    """Return the ids of the records whose own example was collected, not a sampled pair."""
    ids = set()
    for example in examples:
        if any(pair is example for pair in collected):
            ids.add(example.record.id)
    return ids


def collect_kept(vlm, run, examples, p):
    """Collect 50 steps, check the pairs of each, and return (record id, step) of the kept ones."""
    collector = make_collector("mixed-dpo", run.policy, vlm, seed=9)
    collector.mix = p
    kept = []
    for step in range(50):
        pairs, metrics = collector.collect(examples, step)
        ids = kept_ids(examples, pairs)
        assert len(pairs) == len(examples)
        for pair in pairs:
            if pair.record.id not in ids:  # a sampled pair, ranked by the alphabet
                assert pair.responses[0] == encode_text(vlm, "A cup.")
        assert metrics["offline"] == pytest.approx(len(ids) / len(examples))
        assert metrics["same"] == 0.0
        assert metrics["tied"] == 0.0
        kept += [(record_id, step) for record_id in ids]
    return kept


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_a_record_keeps_its_pair_with_probability_p(vlm, records, monkeypatch, p):
    """1,000 draws, of 20 records in 50 steps: within 4 standard deviations (false alarm 6e-5).

    With p = 0 or 1 none or all are kept. Neither the record nor the step decides alone. The model
    is not run: responses of known texts take the place of sampled ones.
    """
    run = make_run("mixed-dpo", vlm, records)
    examples = []
    for i in range(5):
        for example in run.examples:
            record = replace(example.record, id=f"{example.record.id}-{i}")
            examples.append(replace(example, record=record))
    responses = [encode_text(vlm, "A pen."), encode_text(vlm, "A cup.")]

    def known_responses(vlm, prompts, k, *, sampling, step):
        return [responses] * len(prompts)

    monkeypatch.setattr(online, "generate_responses", known_responses)
    monkeypatch.setattr(online, "add_reference_logps", lambda policy, vlm, examples: None)

    kept = collect_kept(vlm, run, examples, p)

    assert abs(len(kept) - 1000 * p) <= 4 * math.sqrt(1000 * p * (1 - p))
    if p == 0.3:
        steps_of_record = Counter(record_id for record_id, _ in kept)
        records_of_step = Counter(step for _, step in kept)
        assert max(steps_of_record.values()) < 40  # of 50 steps
        assert max(records_of_step.values()) < 19  # of 20 records
        assert len(set(steps_of_record.values())) > 2
        assert len(set(records_of_step.values())) > 2


def test_whether_a_pair_is_kept_is_independent_of_batch_composition(vlm, records, monkeypatch):
    """It depends on (seed, record id, step) alone."""
    run = make_run("mixed-dpo", vlm, records)
    texts = {example.record.id: ["A pen.", "A cup."] for example in run.examples}
    script_responses(monkeypatch, vlm, texts)
    collector = make_collector("mixed-dpo", run.policy, vlm, seed=9)

    kept_by_step = []
    for step in range(6):
        together = kept_ids(run.examples, collector.collect(run.examples, step)[0])
        alone = set()
        for example in run.examples:
            alone |= kept_ids([example], collector.collect([example], step)[0])
        assert together == alone
        kept_by_step.append(frozenset(together))
    assert len(set(kept_by_step)) > 2
