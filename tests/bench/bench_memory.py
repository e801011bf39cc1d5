"""Measure the peak memory of one warm DPO step, above what is loaded, over vocabulary and length.

Each side runs in a process of its own. The sides are those of bench_dpo.py, with image features and
reference log-probs at hand. "distill" is a step of contrastive distillation. TRL has the log-probs
alone, and its vision tower keeps no gradient. Its head is applied at response positions, as on
CUDA.

On a CPU (Linux) the peak is the kernel's highest count of resident memory, which is reset after
loading. glibc is told to give each larger tensor pages of its own and to take them back at once, so
that what is resident is what is in use. On CUDA it is torch.cuda.max_memory_allocated. The last
column is the size of the logits of all positions in float32, once.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import (
    make_model,
    make_pairs,
    num_image_tokens,
    option_flag,
    parse_options,
    with_sizes,
)
from dpo_steps import DistillationStep, OurStep, TrlStep, gpu_peak_of, make_policy, naive_logps
from peers import make_peer, make_trainer, make_trl_batch, missing_packages
from report import heading, write_figures

PROCESS_INFO = Path("/", "proc", "self")


def resident_bytes(field):
    """Return the resident memory of this process: VmRSS is now, VmHWM the highest so far."""
    for line in (PROCESS_INFO / "status").read_text().splitlines():
        if line.startswith(field):
            kilobytes = int(line.split()[1])
            return kilobytes * 1024
    raise ValueError(f"the status of this process has no {field}")


def peak_above_load(options, model, step):
    """Return the bytes that a step takes above what is there before it."""
    # 1. A first step, because it imports some modules.
    step()
    model.zero_grad()

    # 2. The step that is measured.
    if options.device == "cuda":
        return gpu_peak_of(step)
    (PROCESS_INFO / "clear_refs").write_text("5")  # resets VmHWM to VmRSS
    before = resident_bytes("VmRSS")
    step()
    return resident_bytes("VmHWM") - before


def measure_side(options):
    """Return the peak of the side that `--side` names. This runs in a process of its own."""
    model = make_model(options)
    pairs = make_pairs(options)
    if options.side == "TRL":
        peer = make_peer(options, model)  # before adapters change the names of the tensors
    policy = make_policy(options, model)

    if options.side == "ours":
        return peak_above_load(options, model, OurStep(policy, pairs))
    if options.side == "distill":
        return peak_above_load(options, model, DistillationStep(policy, pairs))
    if options.side == "naive":
        step = OurStep(policy, pairs, compute_logps=naive_logps, encodings_per_image=2)
        return peak_above_load(options, model, step)
    with tempfile.TemporaryDirectory() as folder:
        # The values of the reference's log-probs do not matter for memory.
        ref_logps = torch.zeros(2, options.pairs, device=options.device)
        trainer = make_trainer(options, peer, policy, folder=folder)
        batch = make_trl_batch(options, pairs)
        step = TrlStep(trainer, batch, ref_logps=ref_logps, compact=True)
        return peak_above_load(options, trainer.model, step)


def measure_in_process(options, side, point):
    """Run one side at some sizes; return its bytes, or None if it fails (out of memory)."""
    # 1. The same command with other sizes.
    values = vars(options) | point | {"side": side}
    arguments = []
    for name, value in values.items():
        if name != "out":
            arguments.append(f"{option_flag(name)}={value}")
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="262144")
    process = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment
    )

    # 2. Its last line of output is the result.
    if process.returncode != 0:
        error = process.stderr.strip().rpartition("\n")[2]
        print(f"{side} {point}: status {process.returncode}; {error}", file=sys.stderr)
        return None
    return json.loads(process.stdout.splitlines()[-1])


def sizes_to_measure(options):
    """Return the sizes of each row of the table."""
    points = []
    for vocab in options.vocabularies.split(","):
        points.append({"vocab": int(vocab)})
    for response in options.responses.split(","):
        points.append({"response": int(response)})
    return points


def all_logits_bytes(options):
    """Return the bytes of the logits (2B, T, V) in float32."""
    sequence_length = num_image_tokens(options) + options.prompt + options.response
    return 4 * 2 * options.pairs * sequence_length * options.vocab


def megabytes(num_bytes):
    """Return a cell of the table."""
    if num_bytes is None:
        return "failed"
    return str(round(num_bytes / 1e6))


def main():
    """Run the benchmark."""
    # 1. The options. With `--side` this is the process of one side.
    options = parse_options(
        __doc__,
        {"pairs": 2},
        vocabularies="8000,32000,128000",
        responses="40,160,640",
        side="",
    )
    if options.side:
        print(json.dumps(measure_side(options)))
        return

    # 2. The head of the table.
    sides = ["ours", "distill", "naive"]
    missing = missing_packages("transformers", "peft", "trl", "datasets")
    if missing:
        print(f"TRL is left out: {', '.join(missing)} not installed")
    else:
        sides.append("TRL")
    print(heading(options) + f", {options.pairs} pairs; MB above load")
    side_columns = "".join(f"{side:>10}" for side in sides)
    print(f"{'vocabulary':>10}{'response':>10}{side_columns}{'B T V':>10}")

    # 3. A row for each point.
    figures = []
    for point in sizes_to_measure(options):
        point_options = with_sizes(options, **point)
        line = f"{point_options.vocab:10}{point_options.response:10}"
        peaks = {}
        for side in sides:
            peaks[side] = measure_in_process(options, side, point)
            line += f"{megabytes(peaks[side]):>10}"
        all_logits = all_logits_bytes(point_options)
        print(f"{line}{megabytes(all_logits):>10}", flush=True)
        figures.append(point | {"bytes": peaks, "all_logits": all_logits})
    write_figures(options, {"points": figures})


if __name__ == "__main__":
    main()
