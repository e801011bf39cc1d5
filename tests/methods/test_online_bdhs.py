"""Test online BDHS: the sampled rejected response joins the example, unless it is unusable."""

from dataclasses import replace

import pytest
from method_runs import (
    BETA,
    GAMMA,
    assert_equal_loss_and_gradient,
    assert_policy_has_moved,
    encode_text,
    make_run,
)

from minialign import reference


def test_loss_and_gradient_equal_the_reference(vlm, records):
    """With the sampled response alone, by the slow DPO loss."""
    run = make_run("online-bdhs", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    slow_loss = reference.dpo_loss(vlm.model, run.ref_model, run.pairs(examples), BETA)
    assert len(examples) == 2
    assert_policy_has_moved(metrics)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def test_averaged_loss_and_gradient_equal_the_reference(vlm, records):
    """With the data's rejected response as well, averaged by Eq. 5."""
    run = make_run("averaged-bdhs", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    data_pairs = run.pairs(examples, rejected=1)
    sampled_pairs = run.pairs(examples, rejected=2)
    data_loss = reference.dpo_loss(vlm.model, run.ref_model, data_pairs, BETA)
    sampled_loss = reference.dpo_loss(vlm.model, run.ref_model, sampled_pairs, BETA)
    slow_loss = GAMMA * data_loss + (1 - GAMMA) * sampled_loss
    assert len(examples) == 2
    assert_policy_has_moved(metrics)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


class ScriptedSampler:
    """A sampler with given rejected responses, one a record."""

    def __init__(self, rejected_texts):
        self.rejected_texts = rejected_texts

    def pairs(self, records, step):
        """Return the pairs; each took 3 rounds more than the step."""
        pairs = []
        for record, text in zip(records, self.rejected_texts, strict=True):
            pairs.append({"chosen": record.chosen, "rejected": text, "rounds": 3 + step})
        return pairs


def test_unusable_rejected_responses_are_left_out(vlm, records):
    """One is the chosen one, one is empty, and one is too long for the context.

    The others become the third response, after the data's own pair.
    """
    run = make_run("averaged-bdhs", vlm, records)
    first = run.examples[0]
    fifth = replace(first, record=replace(first.record, id="long"))
    examples = [*run.examples, fifth]
    texts = [first.record.chosen, "A red cup.", "", "Two dogs.", "No. " * 300]
    run.method.collector.sampler = ScriptedSampler(texts)

    collected, metrics = run.method.collect(examples, step=2)

    assert metrics == {"rounds": 5.0, "same": pytest.approx(0.6)}
    assert len(collected) == 2
    for example, i in zip(collected, (1, 3), strict=True):
        assert example.responses == [*examples[i].responses, encode_text(vlm, texts[i])]
        assert example.ref_logps.shape == (3,)
    assert len(examples[1].responses) == 2  # the example itself stays as it was


def test_a_sampled_response_may_fill_the_context_exactly(vlm, records):
    """A rejected response of as many tokens as are left is learned from, one of one more is not."""
    run = make_run("averaged-bdhs", vlm, records, num_records=1)
    (example,) = run.examples
    text = "No red dog is in it."
    num_tokens = len(encode_text(vlm, text))

    for num_left, num_collected in ((num_tokens, 1), (num_tokens - 1, 0)):
        prompt_length = len(example.prompt_ids) - 1 + example.num_image_tokens
        config = replace(vlm.model.config.text, max_position_embeddings=prompt_length + num_left)
        vlm.model.config = replace(vlm.model.config, text=config)
        run.method.collector.sampler = ScriptedSampler([text])

        collected, _ = run.method.collect([example], step=0)

        assert len(collected) == num_collected
