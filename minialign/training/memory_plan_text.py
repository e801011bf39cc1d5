"""Print the memory plan of a run: a table of its phases, the peak, and what would lower it."""

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
    plan = plan_memory(options, records=records)
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
    print(assumptions_line(options, model.config, records))


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
    """Say the smallest --split with which the run fits GPUs of common sizes."""
    peaks = {}
    for num_parts in SPLITS:
        try:
            peaks[num_parts] = plan_memory(options, num_parts, records).peak().total()
        except InputError:  # the heads or the channels cannot be divided by it
            continue
    texts = []
    for size in GPU_SIZES:
        fitting = [n for n in peaks if peaks[n] <= size * UNITS["GB"]]
        if fitting:
            smallest = f"--split {fitting[0]}"  # SPLITS grow, so the first is the smallest
        else:
            smallest = f"more than --split {max(peaks)}"
        texts.append(f"{size} GB: {smallest}")
    return f"smallest split that fits GPUs of {', '.join(texts)}"


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
