"""Random generators that depend on a key alone, so that results do not depend on batches."""

import hashlib

import torch


def seeded_generator(*key):
    """Return a generator seeded with a hash of `key`, such as (seed, record id, round).

    The draws for a record are then the same in every batch, in every order and after a restart.
    """
    text = repr(key)
    digest = hashlib.sha256(text.encode()).digest()
    seed = int.from_bytes(digest[:8], "little")
    seed = seed >> 1  # 63 bits, because torch takes a signed 64-bit integer
    generator = torch.Generator()
    generator.manual_seed(seed)
    return generator
