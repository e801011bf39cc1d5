"""Test Online-DPO: pairs of sampled responses, ranked by an annotator, without ties."""

import json
from dataclasses import replace

import torch
from conftest import token_logps_per_response
from method_runs import (
    BETA,
    FixedAnnotator,
    assert_equal_loss_and_gradient,
    assert_policy_has_moved,
    encode_text,
    load_random_reward_model,
    make_as_likely,
    make_collector,
    make_run,
    script_responses,
)

from minialign import reference
from minialign.generation.decoding import SamplingParams
from minialign.logprobs import response_logps
from minialign.methods.base import microbatches, pack_examples
from minialign.pairs.annotators import RewardAnnotator
from minialign.training.loop import Schedule, train


def test_loss_and_gradient_equal_the_reference(vlm, records):
    """Of the pairs that were collected, by the slow DPO loss."""
    run = make_run("online-dpo", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=0)

    loss, metrics = run.method.loss(examples, batch=examples)

    slow_loss = reference.dpo_loss(vlm.model, run.ref_model, run.pairs(examples), BETA)
    assert len(examples) == 2
    assert_policy_has_moved(metrics)
    assert_equal_loss_and_gradient(run, loss, slow_loss)


def test_pairs_are_what_the_annotator_says(vlm, records, monkeypatch):
    """Verdict 0 keeps the order, 1 swaps it, and None, a tie, is left out.

    A prompt that gave the same text twice is not even shown to the annotator, although one of its
    responses was cut off before its end token.
    """
    run = make_run("online-dpo", vlm, records)
    first, second, third, fourth = (example.record.id for example in run.examples)
    texts = {
        first: ["A pen.", "A cup."],
        second: ["A dog.", "[No cat"],
        third: ["Yes.", "No."],
        fourth: ["A lamp.", "[A lamp."],
    }
    script_responses(monkeypatch, vlm, texts)
    annotator = FixedAnnotator({first: 0, second: 1, third: None})
    collector = make_collector("online-dpo", run.policy, vlm, annotator=annotator)

    pairs, metrics = collector.collect(run.examples, step=0)

    assert [pair.record.id for pair in pairs] == [first, second]
    assert pairs[0].responses == [encode_text(vlm, "A pen."), encode_text(vlm, "A cup.")]
    assert pairs[1].responses == [encode_text(vlm, "No cat")[:-1], encode_text(vlm, "A dog.")]
    assert annotator.questions == [
        (first, "A pen.", "A cup."),
        (second, "A dog.", "No cat"),
        (third, "Yes.", "No."),
    ]
    assert metrics == {"same": 0.25, "tied": 0.25, "offline": 0.0, "annotator: asked": 3}


def test_the_log_has_the_annotators_counts_of_the_step(vlm, records, monkeypatch):
    """They are differences, so that the counts of all steps add up after a restart too."""
    run = make_run("online-dpo", vlm, records, num_records=2)
    texts = {example.record.id: ["A pen.", "A cup."] for example in run.examples}
    script_responses(monkeypatch, vlm, texts)
    annotator = FixedAnnotator(dict.fromkeys(texts, 0))
    collector = make_collector("online-dpo", run.policy, vlm, annotator=annotator)

    counts = []
    for step in range(2):
        _, metrics = collector.collect(run.examples, step)
        counts.append(metrics["annotator: asked"])

    assert counts == [2, 2]


def test_collected_pairs_have_the_reference_logps(vlm, records, monkeypatch):
    """They are those of one micro-batch to the bit, if it has the same order.

    Another order changes the last bit on some CPUs.
    """
    run = make_run("online-dpo", vlm, records)
    texts = {example.record.id: ["A pen.", "No cat"] for example in run.examples}
    script_responses(monkeypatch, vlm, texts)

    pairs, _ = run.method.collect(run.examples, step=0)

    (micro_batch,) = microbatches(pairs, 16384)
    with run.policy.reference() as model:
        logps, _ = response_logps(model, pack_examples(vlm, micro_batch))
    assert [pair.ref_logps.tolist() for pair in micro_batch] == logps.tolist()


class TiesAfterFirstStep:
    """A collector whose annotator is undecided from step 1 on. It notes each step's weights."""

    def __init__(self, run):
        ties = FixedAnnotator({example.record.id: None for example in run.examples})
        self.policy = run.policy
        self.online = run.method.collector
        self.tied = make_collector("online-dpo", run.policy, run.vlm, annotator=ties, seed=3)
        self.weights_before = []

    def collect(self, batch, step):
        """Return pairs in step 0, and nothing later."""
        self.weights_before.append(copy_weights(self.policy))
        if step == 0:
            return self.online.collect(batch, step)
        return self.tied.collect(batch, step)


def copy_weights(policy):
    """Return copies of the trainable weights by name."""
    return {name: weight.detach().clone() for name, weight in policy.parameters().items()}


def test_a_step_without_a_pair_leaves_the_weights_alone(vlm, records, tmp_path):
    """Steps 1 and 2 find only ties: loss and gradient are 0, and Adam's momentum moves nothing."""
    run = make_run("online-dpo", vlm, records)
    collector = TiesAfterFirstStep(run)
    run.method.collector = collector

    train(run.policy, run.method, run.examples, Schedule(3, 4, 1e-2, 1e-2, 0), tmp_path)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    for line in lines[1:]:
        metrics = json.loads(line)
        assert metrics["loss"] == 0.0
        assert metrics["grad_norm"] == 0.0
        assert metrics["tied"] + metrics["same"] == 1.0
    assert len(lines) == 3
    before_step_0, before_step_1, _ = collector.weights_before
    weights = run.policy.parameters()
    assert all(torch.equal(weight, before_step_1[name]) for name, weight in weights.items())
    assert not all(torch.equal(weight, before_step_0[name]) for name, weight in weights.items())


def test_a_reward_model_may_get_nothing_to_rank(vlm, records, monkeypatch):
    """Every prompt gave the same text twice, so the annotator gets empty lists."""
    run = make_run("online-dpo", vlm, records, num_records=2)
    texts = {example.record.id: ["A cup.", "A cup."] for example in run.examples}
    script_responses(monkeypatch, vlm, texts)
    annotator = RewardAnnotator(load_random_reward_model())
    collector = make_collector("online-dpo", run.policy, vlm, annotator=annotator)

    pairs, metrics = collector.collect(run.examples, step=0)

    assert pairs == []
    assert metrics == {"same": 1.0, "tied": 0.0, "offline": 0.0}


def test_a_sampled_image_placeholder_is_an_ordinary_token(vlm, records):
    """The placeholder has a logit as every token has. Sampled, it is scored where it stands.

    Here it is made as likely as " is", so some responses hold it.
    """
    image_token_id = vlm.model.config.image_token_id
    make_as_likely(vlm, image_token_id, " is")
    run = make_run("online-dpo", vlm, records)
    run.method.collector.sampling = SamplingParams(max_new_tokens=8)

    pairs, _ = run.method.collect(run.examples, step=0)

    num_found = 0
    for pair in pairs:
        for ids in pair.responses:
            if image_token_id in ids:
                num_found += 1
                alone = replace(pair, responses=[ids], ref_logps=None)
                (logps,) = token_logps_per_response(vlm.model, pack_examples(vlm, [alone]))
                assert len(logps) == len(ids)
                assert logps.max() < 0
                assert logps[ids.index(image_token_id)] > -8  # likely, as it was made
    assert num_found > 0
