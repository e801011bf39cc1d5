"""Bound the key-value caches of decoding by the memory of the device.

Decoding holds two caches: the rows that `prefill` reads together, and the rows that are forked from
them and decoded together. A long list of requests is cut into chunks whose caches fit.

The limits follow from the whole memory of the device and the weights, never from what is free at
the moment. A batch changes logits in their last bits. So a run decodes in the same batches whenever
it is repeated on the same device, with the same number of processes.

Of what the weights leave, forked rows get 1/3 and prefilled rows 1/5. While a cache is forked, all
values are copied once more. They are half of the forked rows: 1/6. The rest, 3/10, is for image
features, activations, Adam's moments and what CUDA takes.
"""

import os
from dataclasses import dataclass
from fractions import Fraction

import torch

from minialign.models.config import TextConfig
from minialign.models.llava import Llava
from minialign.models.memory import kv_cache_bytes, module_bytes
from minialign.utils.distributed import gather_parts, num_parts

FORKED_SHARE = Fraction(1, 3)
PREFILLED_SHARE = Fraction(1, 5)

# The most cache positions, however large the device is. A position of a 7B in bfloat16 takes half a
# megabyte.
MAX_FORKED = 1 << 16
MAX_PREFILLED = 1 << 16
MAX_WITH_RESPONSES = 1 << 15


@dataclass(frozen=True)
class CacheLimits:
    """The most cache positions that are held at once, over all rows.

    A single row, or a contrasted pair, is always held, however long it is.
    """

    forked: int = MAX_FORKED  # positions of the continuations that are decoded together
    prefilled: int = MAX_PREFILLED  # positions of the prompts that are read together
    # Positions of prompts that are sampled from together and of all their responses, as they are
    # packed to be scored. At most `prefilled`, so that the cache of the prompts alone fits too.
    with_responses: int = MAX_WITH_RESPONSES


def cache_limits(model: Llava) -> CacheLimits:
    """Return the limits of a model on the device that it is on."""
    return limits_that_fit(
        model.config.text,
        model.vocab_head.dtype,
        weight_bytes=module_bytes(model),
        device_memory=total_memory(model.device),
    )


def limits_that_fit(
    text: TextConfig, dtype: torch.dtype, *, weight_bytes: int, device_memory: int | None
) -> CacheLimits:
    """Return the limits of a model on a device.

    text: config of the part of the model that one process holds. It counts that part's key-value
        heads.
    dtype: of the keys and values.
    weight_bytes: bytes of that part's weights.
    device_memory: bytes of the device's memory, or None for a device without limit.
    """
    if device_memory is None:
        return CacheLimits()
    bytes_left = max(0, device_memory - weight_bytes)
    bytes_per_position = kv_cache_bytes(text, num_rows=1, num_positions=1, dtype=dtype)
    forked = int(FORKED_SHARE * bytes_left // bytes_per_position)
    prefilled = int(PREFILLED_SHARE * bytes_left // bytes_per_position)
    return CacheLimits(
        forked=min(MAX_FORKED, forked),
        prefilled=min(MAX_PREFILLED, prefilled),
        with_responses=min(MAX_WITH_RESPONSES, prefilled),
    )


def total_memory(device: torch.device) -> int | None:
    """Return the bytes of a device's memory, or None if the system does not report them.

    The processes of a split model must decode in the same batches. So all of them get the smallest
    memory that one of them has, and all of them must call this.
    """
    if device.type == "cuda":
        num_bytes = torch.cuda.get_device_properties(device).total_memory
    else:
        num_bytes = physical_memory()
    if num_parts() == 1 or num_bytes is None:
        return num_bytes
    bytes_of_processes = gather_parts(torch.tensor([num_bytes], device=device))
    return int(torch.cat(bytes_of_processes).min())


def physical_memory() -> int | None:
    """Return the bytes of the machine's memory, or None if the system does not report them."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # no such function, or no such names
        return None


def rows_that_fit(max_positions: int, row_length: int) -> int:
    """Return how many rows of a length fit in so many positions: at least one."""
    # The length may be 0 where image tokens are counted and there is no image.
    return max(1, max_positions // max(1, row_length))


def requests_that_fit(max_positions: int, row_length: int, *, are_pairs: bool = False) -> int:
    """Return how many requests are decoded at once: a single one, or an even number.

    row_length: positions of the forked row that a request gets.
    are_pairs: whether two neighbors are a contrasted pair, which stays together. So there are two
        requests at least, even if they do not fit.
    """
    num_rows = rows_that_fit(max_positions, row_length)
    if num_rows == 1 and not are_pairs:
        return 1
    num_pairs = max(1, num_rows // 2)
    return 2 * num_pairs
