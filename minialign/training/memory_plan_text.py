"""Print the memory plan of a run: a table of its phases, the peak, and what would lower it."""

import copy

import torch

from minialign.generation.cache_limits import total_memory
from minialign.options import read_data
from minialign.training import planned_shapes as shapes
from minialign.training.memory_plan import (
    ACTIVATIONS,
    ROWS,
    MemoryPlan,
    plan_memory,
    training_parts,
)
from minialign.training.planned_model import plan_model
from minialign.utils.files import InputError
from minialign.utils.text_tables import aligned_table

SPLITS = (1, 2, 4, 8)
GPU_SIZES = (24, 40, 80)  # GB
UNITS = {"GB": 1e9, "MB": 1e6}


def print_plan(options):
    """Print what the run of these options needs. Nothing is loaded, and nothing is written."""
    # 1. The number of images is that of the data, if any is named.
    records = None
    if options.data is not None:
        records = read_data(options)
    device_memory = planned_device_memory(options)
    plan = plan_memory(options, records=records, device_memory=device_memory)
    peak = plan.peak()
    unit = "MB"
    if peak.total() >= UNITS["GB"]:
        unit = "GB"

    # 2. The table, and the peak.
    model = plan_model(
        options.model, dtype=options.dtype, num_parts=options.split, rank=options.lora_rank
    )
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{options.model} in {dtype}, --method {options.method}: {unit} of memory by phase\n")
    print(plan_table(plan, unit))
    processes = "in one process"
    if options.split > 1:
        processes = f"in each of {options.split} processes"
    print(f"\npeak: {in_unit(peak.total(), unit)} {unit} {processes}, in the phase {peak.name!r}")

    # 3. What else would be possible.
    print(checkpointing_line(options, model, plan, unit))
    print(fitting_line(options, records))
    print(caches_line(options, device_memory))
    print(assumptions_line(options, model.config, records))


def planned_device_memory(options) -> int | None:
    """Return the bytes of memory of the device that the run would use, or None without a GPU."""
    if options.device == "cuda" and not torch.cuda.is_available():
        return None
    return total_memory(torch.device(options.device))


def in_unit(num_bytes, unit) -> str:
    """Return a number of bytes as it stands in the table."""
    return f"{num_bytes / UNITS[unit]:.2f}"


def plan_table(plan: MemoryPlan, unit) -> str:
    """Return the table: a row for each part that some phase holds, a column for each phase."""
    rows = []
    for part in ROWS:
        sizes = [phase.bytes_of.get(part, 0) for phase in plan.phases]
        if any(sizes):
            rows.append([part, *cells(sizes, unit)])
    totals = [phase.total() for phase in plan.phases]
    rows.append(["total", *cells(totals, unit)])
    return aligned_table(["", *(phase.name for phase in plan.phases)], rows)


def cells(sizes, unit) -> list[str]:
    """Return sizes as cells of the table, with a dash for none."""
    texts = []
    for size in sizes:
        if size:
            texts.append(in_unit(size, unit))
        else:
            texts.append("-")
    return texts


def checkpointing_line(options, model, plan: MemoryPlan, unit) -> str:
    """Say what the activations are with and without --checkpoint-layers."""
    sizes = {}
    for checkpointing in (False, True):
        parts = training_parts(options, model, checkpointing)
        sizes[checkpointing] = in_unit(parts[ACTIVATIONS], unit)
    return (
        f"activations of a micro-batch: {sizes[False]} {unit}, "
        f"with --checkpoint-layers {sizes[True]} {unit}"
    )


def fitting_line(options, records) -> str:
    """Say the smallest --split with which the run fits GPUs of common sizes.

    It is planned for a GPU, whatever --device says.
    """
    gpu_options = copy.copy(options)
    gpu_options.device = "cuda"
    texts = []
    for size in GPU_SIZES:
        device_memory = int(size * UNITS["GB"])
        texts.append(f"{size} GB: {smallest_split(gpu_options, records, device_memory)}")
    return f"smallest split that fits GPUs of {', '.join(texts)}"


def smallest_split(options, records, device_memory) -> str:
    """Return the smallest --split with which the run fits a device, with the caches of that device.

    device_memory: in bytes.
    """
    largest_tried = None
    for num_parts in SPLITS:
        try:
            plan = plan_memory(options, num_parts, records, device_memory=device_memory)
        except InputError:  # the heads or the channels cannot be divided by it
            continue
        if plan.peak().total() <= device_memory:
            return f"--split {num_parts}"
        largest_tried = num_parts
    return f"more than --split {largest_tried}"


def caches_line(options, device_memory) -> str:
    """Say for which device the key-value caches of the table are planned."""
    if device_memory is None:
        return "the table has the largest key-value caches; a small GPU gets smaller ones"
    device = "this GPU" if options.device == "cuda" else "this machine"
    size = in_unit(device_memory, "GB")
    return f"the table has the key-value caches of {device}, which has {size} GB of memory"


def assumptions_line(options, config, records) -> str:
    """Say which numbers are assumed, since no text is tokenized."""
    image = shapes.largest_image(config)
    shape = shapes.training_shape(options, config)
    data = ""
    if records is not None:
        data = f"{len(records)} records, "
    return (
        f"assumed: {data}{image.num_tokens} image tokens, prompts of {shapes.PROMPT_TOKENS} and "
        f"responses of {shapes.RESPONSE_TOKENS} tokens, {shape.num_rows} examples a micro-batch; "
        "CUDA takes about 1 GB more"
    )
