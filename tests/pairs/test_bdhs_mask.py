"""Masking image tokens (Eq. 6): dropping them is exact, and each is masked with probability rho."""

from collections import Counter

import pytest
import torch
from conftest import token_logps_per_response

from minialign import reference
from minialign.data.packing import PackedExample
from minialign.methods.base import encode_example
from minialign.models.policy import Policy
from minialign.pairs.bdhs import BdhsConfig, choose_round
from minialign.utils.seeding import seeded_generator


def gradient_vector(policy, value):
    """Return the gradients of all trained parameters as one vector."""
    parameters = list(policy.parameters().values())
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    flat = []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is None:
            gradient = torch.zeros_like(parameter)
        flat.append(gradient.flatten())
    return torch.cat(flat)


@pytest.mark.parametrize("visible", [[], [0], [63], [3, 17, 40], list(range(64))])
def test_dropping_image_tokens_equals_masking_them(vlm, records, visible):
    """Token log-probs and gradients equal those of the reference, which masks."""
    # Arrange
    record = records[1]
    policy = Policy(vlm.model, 0, 1)
    example = encode_example(vlm, record, [record.chosen])
    (response,) = example.responses
    features = vlm.encode_images(record.paths)

    # Act: without the tokens, and with all tokens behind a mask.
    row = PackedExample.of(example.prompt_ids, features, [response], visible)
    (dropped_logps,) = token_logps_per_response(vlm.model, [row])
    logits = reference.next_token_logits(
        vlm.model, example.prompt_ids, features, response[:-1], set(visible)
    )
    logits = logits[-len(response) :]
    targets = torch.tensor(response)[:, None]
    masked_logps = torch.log_softmax(logits, -1).gather(1, targets)[:, 0]

    # Assert
    torch.testing.assert_close(dropped_logps, masked_logps, rtol=1e-5, atol=1e-5)
    dropped_gradient = gradient_vector(policy, dropped_logps.sum())
    masked_gradient = gradient_vector(policy, masked_logps.sum())
    distance = (dropped_gradient - masked_gradient).norm()
    assert distance / masked_gradient.norm() <= 1e-5


def visible_tokens(rho, num_image_tokens, *key):
    config = BdhsConfig(rho=rho)
    choices = choose_round("A.", num_image_tokens, config, generator=seeded_generator(*key))
    return choices.visible


@pytest.mark.parametrize("rho", [0.5, 0.97, 0.99])
def test_the_share_of_visible_tokens_is_1_minus_rho(rho):
    """100 records of 640 tokens: within 5 standard deviations of the binomial distribution.

    False alarm for another seed: 5.7e-7.
    """
    n = 100 * 640

    num_visible = sum(len(visible_tokens(rho, 640, 0, record, 1)) for record in range(100))

    deviation = (n * rho * (1 - rho)) ** 0.5
    assert abs(num_visible - n * (1 - rho)) <= 5 * deviation


def test_every_token_has_the_same_chance():
    """1,000 draws of 64 tokens at rho 0.5: each token's count within 5 standard deviations.

    False alarm: 64 * 5.7e-7 = 3.7e-5.
    """
    counts = Counter()

    for record in range(1000):
        counts.update(visible_tokens(0.5, 64, 1, record, 1))

    for i in range(64):
        assert abs(counts[i] - 500) <= 5 * 250**0.5


def test_rho_0_masks_nothing_and_rho_1_everything():
    assert visible_tokens(0.0, 64, 0) == list(range(64))
    assert visible_tokens(1.0, 64, 0) == []
