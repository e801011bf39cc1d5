"""Test contrastive distillation against the reference, and where its targets come from."""

import tracemalloc

import pytest
import torch
from conftest import TINY
from method_runs import (
    assert_equal_loss_and_gradient,
    make_distillation,
    make_run,
    short_records,
)
from processes import run_in_two

from minialign import reference_distillation
from minialign.methods import distillation
from minialign.methods.base import encode_example
from minialign.methods.distillation import (
    DistillationConfig,
    add_targets,
    hide_image,
    sparse_targets,
)
from minialign.models.loading import load_vlm
from minialign.utils.distributed import init_distributed
from minialign.utils.files import InputError


def prepare(run, divergence="forward", **config):
    """Give a run a method with other settings, and return its examples with targets."""
    run.method = make_distillation("distill", run.policy, run.vlm, **config)
    run.method.divergence = divergence
    return run.method.prepare(run.examples)


def slow_loss(run, examples, contrast=1.0, plausibility=0.1, divergence="forward"):
    """Return the loss of the reference implementation."""
    loss_of = {
        "forward": reference_distillation.distillation_loss,
        "reverse": reference_distillation.reverse_distillation_loss,
    }[divergence]
    slow_examples = []
    for question, example in zip(run.questions(examples), examples, strict=True):
        slow_examples.append((*question, example.responses[0]))
    return loss_of(run.vlm.model, run.ref_model, slow_examples, contrast, plausibility)


@pytest.mark.parametrize("rank, move_size", [(4, 0.02), (0, 0.003)])
def test_loss_and_gradient_equal_the_reference(vlm, records, rank, move_size):
    """Rank 4 trains adapters, rank 0 all weights, the vocabulary head among them."""
    run = make_run("distill", vlm, records, rank=rank, num_records=2)
    run.move_policy(move_size)

    loss, _ = run.method.loss(run.examples, batch=run.examples)

    assert_equal_loss_and_gradient(run, loss, slow_loss(run, run.examples))


@pytest.mark.parametrize("contrast, plausibility", [(2.0, 0.1), (0.5, 0.01), (1.0, 1.0)])
def test_other_settings_equal_the_reference(vlm, records, contrast, plausibility):
    """With plausibility 1 the whole target is on the reference's most likely token."""
    run = make_run("distill", vlm, records, num_records=2)
    run.move_policy()
    examples = prepare(run, contrast=contrast, plausibility=plausibility)

    loss, _ = run.method.loss(examples, batch=examples)

    assert_equal_loss_and_gradient(run, loss, slow_loss(run, examples, contrast, plausibility))


@pytest.mark.parametrize("rank, plausibility", [(4, 0.1), (0, 0.01)])
def test_the_reverse_divergence_equals_the_reference(vlm, records, rank, plausibility):
    """It differs from the forward one, because some targets have several tokens."""
    run = make_run("distill", vlm, records, rank=rank, num_records=2)
    run.move_policy(0.003 if rank == 0 else 0.02)
    examples = prepare(run, divergence="reverse", plausibility=plausibility)

    loss, _ = run.method.loss(examples, batch=examples)
    run.method.divergence = "forward"
    forward_loss, _ = run.method.loss(examples, batch=examples)

    expected = slow_loss(run, examples, plausibility=plausibility, divergence="reverse")
    assert abs(loss.item() - forward_loss.item()) > 1e-3 * forward_loss.item()
    assert_equal_loss_and_gradient(run, loss, expected)


def test_responses_of_the_policy_get_targets_of_the_reference(vlm, records):
    """The moved policy samples the responses. Their targets come from the reference."""
    run = make_run("distill-policy", vlm, records, num_records=2)
    run.move_policy()
    examples, _ = run.method.collect(run.examples, step=3)

    loss, _ = run.method.loss(examples, batch=examples)

    assert examples[0].responses != run.examples[0].responses
    assert_equal_loss_and_gradient(run, loss, slow_loss(run, examples))


def test_without_contrast_there_is_nothing_to_learn_at_step_0(vlm, records):
    """The target is then the reference itself, and the untrained policy equals it."""
    run = make_run("distill", vlm, records)
    examples = prepare(run, contrast=0.0, plausibility=0.0)

    loss, metrics = run.method.loss(examples, batch=examples)

    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert metrics["support"] == pytest.approx(len(vlm.model.vocab_head), rel=0.01)


def responses_of(examples):
    """Return the responses of each example."""
    return [example.responses for example in examples]


def test_responses_of_the_policy_are_new_at_every_step(vlm, records):
    run = make_run("distill-policy", vlm, records)

    first_examples, _ = run.method.collect(run.examples, step=0)
    second_examples, _ = run.method.collect(run.examples, step=1)

    assert responses_of(second_examples) != responses_of(first_examples)


def test_responses_of_the_reference_are_those_of_the_untrained_policy_and_stay(vlm, records):
    """The untrained policy samples them at step 0, the reference after the policy has moved."""
    run = make_run("distill-policy", vlm, records)
    untrained_examples, _ = run.method.collect(run.examples, step=0)
    run.move_policy()
    reference_method = make_distillation("distill-reference", run.policy, vlm)

    prepared_examples = reference_method.prepare(run.examples)
    collected_examples, _ = reference_method.collect(prepared_examples, step=1)

    assert responses_of(prepared_examples) == responses_of(untrained_examples)
    assert collected_examples is prepared_examples


def test_sparse_targets_worked_by_hand():
    """A token of probability 0, such as one that is not plausible, has no entry."""
    targets = sparse_targets(torch.tensor([[0.0, 0.25, 0.75], [0.0, 1.0, 0.0]]))

    assert targets.token_ids.tolist() == [1, 2, 1]
    assert targets.probs.tolist() == [0.25, 0.75, 1.0]
    assert targets.counts.tolist() == [2, 1]
    # H(1/4, 3/4) = ln 4 - 3/4 ln 3, and a certain token has entropy 0.
    assert targets.entropies().tolist() == pytest.approx([0.5623351446, 0.0])


def make_example(vlm, records):
    """Return an example with a short response."""
    record = short_records(records)[0]
    return encode_example(vlm, record, [record.chosen])


def test_the_whole_image_is_hidden_by_default(vlm, records):
    """No image token stays."""
    hidden = hide_image(vlm, make_example(vlm, records), DistillationConfig())

    assert hidden.visible == []


def test_what_stays_visible_depends_on_seed_and_record_alone(vlm, records):
    """About one image token in ten stays with rho = 0.9, and another seed keeps others.

    Of 64 tokens none stays once in 850 seeds, and 22 or more once in 8 * 10^6.
    """
    example = make_example(vlm, records)

    first = hide_image(vlm, example, DistillationConfig(rho=0.9)).visible
    again = hide_image(vlm, example, DistillationConfig(rho=0.9)).visible
    other = hide_image(vlm, example, DistillationConfig(rho=0.9, seed=1)).visible

    assert 0 < len(first) < example.num_image_tokens / 3
    assert first == again
    assert first != other


def test_noise_takes_the_place_of_the_mask(vlm, records):
    """All tokens of a noisy image stay visible, and its features are other ones."""
    example = make_example(vlm, records)

    noisy = hide_image(vlm, example, DistillationConfig(rho=0.0, noise_steps=500))

    clean_features = vlm.encode_images(example.record.paths)[0]
    assert noisy.visible is None
    assert not torch.equal(noisy.image_features[0].tiles, clean_features.tiles)


def test_targets_beyond_the_byte_budget_are_refused(vlm, records, monkeypatch):
    """With plausibility 0 every token of the vocabulary is an entry."""
    monkeypatch.setattr(distillation, "MAX_TARGET_BYTES", 1 << 12)
    run = make_run("distill", vlm, records)

    with pytest.raises(InputError, match="raise --plausibility"):
        prepare(run, plausibility=0.0)


def fill_the_budget_in_two(records):
    """Compute the targets of two responses in two processes that have just enough room or less."""
    init_distributed("cpu")
    vlm = load_vlm(TINY / "model")
    run = make_run("distill", vlm, records, num_records=2)
    config = DistillationConfig(plausibility=0.0)
    add_targets(run.policy, vlm, run.examples, config, max_tokens=1)  # a response a micro-batch
    num_bytes = sum(example.targets.num_bytes() for example in run.examples)

    distillation.MAX_TARGET_BYTES = num_bytes
    add_targets(run.policy, vlm, run.examples, config, max_tokens=1)
    distillation.MAX_TARGET_BYTES = num_bytes - 1
    with pytest.raises(InputError, match="or lower --limit or --batch-size"):
        add_targets(run.policy, vlm, run.examples, config, max_tokens=1)


def test_the_budget_counts_the_targets_of_both_processes_once(records):
    """The longer of the two responses has more than half of the bytes."""
    for outcome in run_in_two(fill_the_budget_in_two, records[:2]):
        assert outcome.status == 0, outcome.stderr


def test_the_budget_counts_the_bytes_that_are_held(vlm, records):
    """An entry is an int32 token and an fp32 probability, a token has an int32 count.

    Python's own objects, such as the numbers of a list, would take ten times as much. The whole
    vocabulary is plausible, and the image features are already cached.
    """
    run = make_run("distill", vlm, records)
    prepare(run, plausibility=0.0)

    tracemalloc.start()
    examples = prepare(run, plausibility=0.0)
    _, python_peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    num_tokens = sum(len(example.responses[0]) for example in examples)
    num_entries = sum(len(example.targets.token_ids) for example in examples)
    num_bytes = sum(example.targets.num_bytes() for example in examples)
    assert num_bytes == 8 * num_entries + 4 * num_tokens
    assert python_peak < num_bytes
