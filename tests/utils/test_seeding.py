"""Seeded generators: the same values give the same random numbers."""

import torch

from minialign.utils.seeding import seeded_generator


def test_a_seeded_generator_depends_on_its_values_alone():
    first = torch.rand(4, generator=seeded_generator(0, "a", 1))
    other = torch.rand(4, generator=seeded_generator(0, "a", 2))
    again = torch.rand(4, generator=seeded_generator(0, "a", 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)
