"""These tests hold every loss that needs no sampling equal to its reference, gradients included.

The fast side scores padded, packed batches of the shipped model, the reference one sequence for
each token. They add the same fp32 numbers in another order. The relative distance of two gradients
that this makes is near 1e-6, and 1e-5 is allowed.
"""

import copy
from dataclasses import replace

import pytest
import torch

from minialign import reference
from minialign.losses import PAIR_LOSSES
from minialign.methods.base import add_reference_logps, encode_example
from minialign.methods.preference import PreferenceMethod, RewardModelMethod, SupervisedMethod
from minialign.models.policy import Policy

BETA = 0.3
MAX_DISTANCE = 1e-5

REFERENCE_LOSSES = {
    "dpo": reference.dpo_loss,
    "ipo": reference.ipo_loss,
    "ipo-mean": reference.ipo_mean_loss,
    "slic": reference.slic_loss,
}


@pytest.fixture()
def short_records(records):
    """Return records with short responses of different lengths, since the reference is slow."""
    texts = [
        ("A cup.", "No red dog."),
        ("Yes, a dog.", "No."),
        ("There is a lamp.", "Two pens."),
    ]
    short_records = []
    for record, (chosen, rejected) in zip(records, texts, strict=False):
        short_records.append(replace(record, chosen=chosen, rejected=rejected))
    return short_records


@pytest.fixture()
def policy_and_reference(vlm):
    """Return a policy that has moved away from its reference, and the reference as a model."""
    ref_model = copy.deepcopy(vlm.model)
    policy = Policy(vlm.model, 4, 8, seed=1)
    policy.add_scalar_head()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in policy.parameters().items():
        size = 0.3 if name.startswith("score.") else 0.02  # the scalar head starts at zero
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
    return policy, ref_model


@pytest.fixture()
def examples(policy_and_reference, vlm, short_records):
    """Return the records as ids, with the reference's log-probs."""
    policy, _ = policy_and_reference
    examples = []
    for record in short_records:
        examples.append(encode_example(vlm, record, [record.chosen, record.rejected]))
    add_reference_logps(policy, vlm, examples)
    return examples


@pytest.fixture()
def pairs(vlm, examples):
    """Return the examples as the reference takes them."""
    pairs = []
    for example in examples:
        image_features = vlm.encode_images(example.record.paths)
        pairs.append((example.prompt_ids, image_features, *example.responses))
    return pairs


def gradient(policy, loss):
    """Return the gradient of all trainable parameters as one vector, zeros where there is none."""
    parameters = list(policy.parameters().values())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = []
    for parameter, parameter_gradient in zip(parameters, gradients, strict=True):
        if parameter_gradient is None:
            parameter_gradient = torch.zeros_like(parameter)
        flat.append(parameter_gradient.flatten())
    return torch.cat(flat)


def check_equal(policy, fast_loss, slow_loss):
    """Compare the values and the gradients of two losses."""
    assert fast_loss.item() == pytest.approx(slow_loss.item(), rel=1e-5)
    fast_gradient = gradient(policy, fast_loss)
    slow_gradient = gradient(policy, slow_loss)
    assert slow_gradient.norm() > 0
    distance = (fast_gradient - slow_gradient).norm() / slow_gradient.norm()
    assert distance <= MAX_DISTANCE


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_pair_loss_equals_the_reference(policy_and_reference, vlm, examples, pairs, name):
    policy, ref_model = policy_and_reference
    method = PreferenceMethod(vlm=vlm, loss_name=name, beta=BETA)

    fast_loss, _ = method.loss(examples, examples)

    if name == "slic-calibration":
        slow_loss = reference.slic_calibration_loss(vlm.model, pairs, BETA)
    else:
        slow_loss = REFERENCE_LOSSES[name](vlm.model, ref_model, pairs, BETA)
    check_equal(policy, fast_loss, slow_loss)


def test_sft_loss_equals_the_reference(policy_and_reference, vlm, examples, pairs):
    policy, _ = policy_and_reference
    method = SupervisedMethod(vlm)

    fast_loss, _ = method.loss(examples, examples)

    chosen_only = [pair[:3] for pair in pairs]
    check_equal(policy, fast_loss, reference.sft_loss(vlm.model, chosen_only))


def test_reward_model_loss_equals_the_reference(policy_and_reference, vlm, examples, pairs):
    policy, _ = policy_and_reference
    method = RewardModelMethod(policy, vlm)

    fast_loss, _ = method.loss(examples, examples)

    slow_loss = reference.reward_model_loss(vlm.model, policy.scalar_head, pairs)
    check_equal(policy, fast_loss, slow_loss)
