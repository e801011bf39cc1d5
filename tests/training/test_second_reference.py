"""Test a second reference: its log-probs, the loss over the merged one, and its stored file."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from short_runs import make_run

from minialign import reference_neighbors
from minialign.methods.base import add_reference_logps
from minialign.models.adapters import load_adapter, save_adapter
from minialign.models.policy import Policy
from minialign.training.run import read_or_add_reference_logps
from minialign.training.second_reference import AdaptedModel, adapter_digests, merge_references

BETA = 0.3


def moved_adapter(vlm, folder, seed):
    """Write a random adapter of the shipped model, and return its folder."""
    policy = Policy(copy.deepcopy(vlm.model), 2, 4, seed=1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in policy.parameters().values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    save_adapter(policy, folder, "elsewhere")
    return folder


@pytest.fixture
def second_reference(vlm, tmp_path):
    """Return the model with an adapter that was written and read."""
    model = copy.deepcopy(vlm.model)
    load_adapter(model, moved_adapter(vlm, tmp_path / "adapter", seed=2))
    return AdaptedModel(model)


def stacked_logps(examples):
    """Return the reference log-probs of all examples, (N, 2)."""
    return torch.stack([example.ref_logps for example in examples])


def short_examples(run):
    """Return two examples whose chosen response is cut short: the slow form runs every token."""
    examples = run.examples[:2]
    for example in examples:
        example.responses = [response[:4] for response in example.responses]
    return examples


def test_loss_and_gradient_equal_the_slow_form(vlm, records, second_reference):
    """DPO against the merged reference, through the adapters and the projector."""
    base_model = copy.deepcopy(vlm.model)
    run = make_run(vlm, records)
    for parameter in run.policy.parameters().values():
        parameter.data += 0.01
    examples = short_examples(run)
    add_reference_logps(run.policy, vlm, examples)
    base_logps = stacked_logps(examples)
    add_reference_logps(second_reference, vlm, examples)
    extra_logps = stacked_logps(examples)
    merge_references(examples, base_logps, extra_logps)

    loss, _ = run.method.loss(examples, batch=examples)
    pairs = []
    for example in examples:
        features = vlm.encode_images(example.record.paths)
        pairs.append((example.prompt_ids, features, *example.responses))
    slow_loss = reference_neighbors.mrpo_loss(
        vlm.model, base_model, second_reference.model, pairs, BETA
    )

    parameters = list(run.policy.parameters().values())
    gradients = torch.autograd.grad(loss, parameters)
    slow_gradients = torch.autograd.grad(slow_loss, parameters)
    gradient = torch.cat([gradient.flatten() for gradient in gradients])
    slow_gradient = torch.cat([gradient.flatten() for gradient in slow_gradients])
    assert (extra_logps - base_logps).abs().max() > 0.1
    assert loss.item() == pytest.approx(slow_loss.item(), rel=1e-5)
    assert (gradient - slow_gradient).norm() <= 1e-5 * slow_gradient.norm()


def test_two_equal_references_give_dpo(vlm, records):
    """Loss and gradient to the bit."""
    run = make_run(vlm, records)
    for parameter in run.policy.parameters().values():
        parameter.data += 0.01
    expected_loss, expected_metrics = run.method.loss(run.examples, batch=run.examples)
    base_logps = stacked_logps(run.examples)

    merge_references(run.examples, base_logps, base_logps)
    loss, metrics = run.method.loss(run.examples, batch=run.examples)

    assert loss.item() == expected_loss.item()
    assert metrics == expected_metrics


def test_stored_log_probs_are_read_again(vlm, records, second_reference, tmp_path):
    """A resumed run has the same bits, and another adapter is another key."""
    other_adapter = moved_adapter(vlm, tmp_path / "other", seed=3)
    run = make_run(vlm, records)
    path = tmp_path / "second_reference.safetensors"
    key = adapter_digests(tmp_path / "adapter")
    read_or_add_reference_logps(second_reference, vlm, run.examples, path=path, key=key)
    logps = stacked_logps(run.examples)

    # Nothing is computed now: there is no reference that could be asked.
    read_or_add_reference_logps(None, vlm, run.examples, path=path, key=key)

    assert torch.equal(stacked_logps(run.examples), logps)
    assert torch.equal(load_file(path)["logps"], logps)
    assert adapter_digests(other_adapter) != key
