"""Peak memory above load of one warm DPO step, each in a process of its own, over vocabularies and response lengths.

ours, naive and TRL are those of bench_dpo.py: features and reference log-probs at hand (TRL: log-probs alone; its head at response
positions, as on CUDA; its tower keeps no gradient). On a CPU the peak is the kernel's high-water mark of resident memory, set back
after loading (Linux), glibc told to give every larger tensor pages of its own and to take them back at once, so that resident is
what is alive; on CUDA torch.cuda.max_memory_allocated. The last column is what the logits of all positions take in fp32, once.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from bench_dpo import TRL, Ours, make_policy, naive_logps, peak_of
from common import heading, make_model, make_pairs, parse, varied, vectors_of, write
from peers import missing, peer_model, trainer_of, trl_batch


def resident(name):
    """A line of this process's status in bytes: VmRSS now, VmHWM at most."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/", "proc", "self", "status").read_text().splitlines()
        if line.startswith(name)
    )


def peak_above_load(options, model, step):
    """Bytes that a step takes above what lies there before it; of a second one, for the first imports some modules."""
    step()
    model.zero_grad()
    if options.device == "cuda":
        return peak_of(step)
    Path("/", "proc", "self", "clear_refs").write_text(
        "5"
    )  # the high-water mark back to what is resident now
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def measure(options):
    """The peak of the side asked for; runs in a process of its own."""
    model, pairs = make_model(options), make_pairs(options)
    peer = peer_model(options, model) if options.side == "TRL" else None
    policy = make_policy(options, model)
    if peer is None:
        return peak_above_load(
            options,
            model,
            Ours(policy, pairs)
            if options.side == "ours"
            else Ours(policy, pairs, naive_logps, copies=2),
        )
    with tempfile.TemporaryDirectory() as folder:
        reference = torch.zeros(
            2, options.pairs, device=options.device
        )  # any numbers take the same room
        trainer = trainer_of(options, peer, policy, folder)
        return peak_above_load(
            options, trainer.model, TRL(trainer, trl_batch(options, pairs), reference, compact=True)
        )


def in_process(options, side, **sizes):
    """Bytes that one side takes at some sizes, or None if it fails (as a rule for want of memory)."""
    arguments = [
        f"--{name.replace('_', '-')}={value}"
        for name, value in (vars(options) | sizes | {"side": side}).items()
        if name != "out"
    ]
    done = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144"},
    )
    if done.returncode:
        print(
            f"{side} {sizes}: status {done.returncode}; {(done.stderr.splitlines() or [''])[-1]}",
            file=sys.stderr,
        )
        return None
    return json.loads(done.stdout.splitlines()[-1])


def main():
    options = parse(
        __doc__, {"pairs": 2}, vocabularies="8000,32000,128000", responses="40,160,640", side=""
    )
    if options.side:
        print(json.dumps(measure(options)))
        return
    absent = missing("transformers", "peft", "trl", "datasets")
    if absent:
        print(f"TRL is left out: {', '.join(absent)} not installed")
    sides = ["ours", "naive"] + ["TRL"] * (not absent)
    points = [{"vocab": int(size)} for size in options.vocabularies.split(",")] + [
        {"response": int(size)} for size in options.responses.split(",")
    ]
    print(heading(options) + f", {options.pairs} pairs; MB above load")
    print(
        f"{'vocabulary':>10}{'response':>10}"
        + "".join(f"{side:>10}" for side in sides)
        + f"{'B T V':>10}"
    )
    figures = []
    for point in points:
        at = varied(options, **point)
        found = {side: in_process(options, side, **point) for side in sides}
        all_logits = 4 * 2 * at.pairs * (vectors_of(at) + at.prompt + at.response) * at.vocab
        cells = [
            "failed" if value is None else round(value / 1e6)
            for value in (*found.values(), all_logits)
        ]
        print(
            f"{at.vocab:10}{at.response:10}" + "".join(f"{cell:>10}" for cell in cells), flush=True
        )
        figures.append(point | {"bytes": found, "all_logits": all_logits})
    write(options, {"points": figures})


if __name__ == "__main__":
    main()
