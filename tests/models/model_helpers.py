"""Helpers that the tests of the model share."""

import torch

from minialign.methods.base import encode_example, pack_examples


def pack_records(vlm, records, *other_responses):
    """Pack each record with its chosen response and with the same other responses."""
    examples = []
    for record in records:
        examples.append(encode_example(vlm, record, [record.chosen, *other_responses]))
    return pack_examples(vlm, examples)


def fill_adapters(policy):
    """Give each lora_B random values. It starts at zero, where lora_A has no gradient."""
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)


def gradients_of(policy, scalar):
    """Return the gradient of a scalar for each parameter of a policy, by name, and clear them."""
    scalar.backward()
    gradients = {}
    for name, parameter in policy.parameters().items():
        gradients[name] = parameter.grad
        parameter.grad = None
    return gradients


def flatten(gradients):
    """Put all gradients into one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def relative_distance(a, b):
    """Return the L2 distance of two tensors relative to the second."""
    return float((a - b).norm() / b.norm())


def move_weights(policy, size=0.02):
    """Move every trainable weight away from where it began, the same way each time."""
    generator = torch.Generator().manual_seed(5)
    for parameter in policy.parameters().values():
        parameter.data += size * torch.randn(parameter.shape, generator=generator)
