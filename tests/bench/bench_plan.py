"""Compare the memory that `train.py --plan` counts with the peak of each phase of a run.

python tests/bench/bench_plan.py                    SMALL on the CPU, two minutes
python tests/bench/bench_plan.py --shape 7b --device cuda --dtype bfloat16

Each phase runs in a process of its own, on a random model. Its peak is measured above what is there
before the model is made, after a warm-up on a tiny model, which imports what torch imports late. So
the peak holds everything: weights, adapters, gradients, moments, image features, activations.
bench_memory.py says how a peak is measured on a CPU.

The phases are those of the plan: "sampling" is a round of it, "training" two steps of DPO with
AdamW, each of two micro-batches, and "reference" a pass without gradients.
"""

import json
import os
import subprocess
import sys

import torch
from bench_memory import PROCESS_INFO, resident_bytes
from common import (
    make_model,
    make_pairs,
    option_flag,
    parse_options,
    prefix_length,
    torch_dtype,
    with_sizes,
)
from dpo_steps import OurStep, make_policy
from report import heading, write_figures

from minialign.data.packing import PackedExample
from minialign.generation.decoding import SamplingParams, generate
from minialign.models import memory
from minialign.models.memory import BatchShape, Computation, SamplingShape

CONTINUATIONS = 4  # of a prompt, in sampling
WARM_UP = dict(width=64, layers=2, inner=96, vocab=1000, tower=64, tower_layers=2, pairs=2, tile=56)
# What the rows of the table change: options of this script, and which phase they run.
POINTS = {
    "sampling": {"phase": "sampling", "pairs": 8},
    "reference, 16 pairs": {"phase": "reference", "pairs": 16},
    "training": {"phase": "training"},
    "training, --checkpoint-layers": {"phase": "training", "checkpoint_layers": 1},
    "training, 640-token responses": {"phase": "training", "response": 640},
    "training, --lora-rank 0": {"phase": "training", "rank": 0},
}

# --- what is measured ---


def sample(options, policy, pairs):
    """Write some responses to each prompt, in one round."""
    features = policy.model.encode_images([pair.image for pair in pairs])
    examples = []
    for pair, image_features in zip(pairs, features, strict=True):
        examples.append(PackedExample.of(pair.prompt, [image_features], [[]] * CONTINUATIONS))
    generator = torch.Generator().manual_seed(0)
    uniforms = []
    for _ in range(CONTINUATIONS * len(pairs)):
        uniforms.append(torch.rand(options.response, generator=generator))
    sampling = SamplingParams(max_new_tokens=options.response)
    generate(policy.model, examples, sampling, stop_ids=set(), uniforms=uniforms)


def score_by_reference(options, policy, pairs):
    """Compute the image features and the log-probs of the reference."""
    OurStep(policy, pairs)


def train(options, policy, pairs):
    """Take two steps of AdamW, of two micro-batches each."""
    step = OurStep(policy, pairs, start="cold")
    step.ref_logps = torch.zeros(len(pairs), 2, device=options.device)
    step.start = "warm"
    optimizer = torch.optim.AdamW(policy.parameters().values(), lr=1e-6)
    for _ in range(2):
        step()  # clears the gradients first
        step.add_gradients()
        optimizer.step()
        optimizer.zero_grad()


PHASES = {"sampling": sample, "reference": score_by_reference, "training": train}


def measure(options):
    """Return the peak of a phase and what the plan counts for it, in bytes."""
    # 1. Warm up.
    run_phase(with_sizes(options, **WARM_UP, height=56, breadth=56))

    # 2. Measure.
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        policy = run_phase(options)
        measured = torch.cuda.max_memory_allocated() - before
    else:
        (PROCESS_INFO / "clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = resident_bytes("VmRSS")
        policy = run_phase(options)
        measured = resident_bytes("VmHWM") - before
    return {"measured": measured, "planned": planned_bytes(options, policy)}


def run_phase(options):
    """Make a random model and run the phase on it. Return the policy."""
    policy = make_policy(options, make_model(options))
    PHASES[options.phase](options, policy, make_pairs(options))
    return policy


# --- what is planned ---


def planned_bytes(options, policy):
    """Return what the formulas of the plan count for the phase, at the sizes of this script."""
    # 1. What is held in every phase.
    config = policy.model.config
    held = memory.module_bytes(policy.model) + memory.reference_copy_bytes(policy)
    pairs = make_pairs(options)
    num_tiles = len(pairs[0].image[0])
    dtype = torch_dtype(options)
    held += options.pairs * memory.image_feature_bytes(config, num_tiles, dtype)
    shape = batch_shape(options, pairs, num_tiles)

    # 2. What the phase adds.
    if options.phase == "training":
        computation = Computation(
            dtype=policy.model.vocab_head.dtype,
            rank=options.rank,
            device=options.device,
            checkpointing=bool(options.checkpoint_layers),
        )
        gradients_and_moments = 3 * memory.trained_bytes(policy)
        activations = memory.training_activation_bytes(config, policy, shape, computation)
        return held + gradients_and_moments + activations
    if options.phase == "reference":
        working = memory.forward_bytes(config.text, shape, dtype)
        return held + working + memory.logits_bytes(shape.num_scored, config.text, dtype)
    sampling_shape = SamplingShape(
        num_prompts=options.pairs,
        prompt_length=prefix_length(options),
        num_continuations=CONTINUATIONS * options.pairs,
        context_length=prefix_length(options),
        max_new_tokens=options.response,
    )
    caches = memory.sampling_cache_bytes(config.text, sampling_shape, dtype)
    return held + caches + memory.decoding_bytes(config.text, sampling_shape, dtype)


def batch_shape(options, pairs, num_tiles):
    """Return the shape of all pairs, packed and padded to the longest."""
    lengths = [sum(len(response) for response in pair.responses) for pair in pairs]
    return BatchShape(
        num_rows=len(pairs),
        prefix_length=prefix_length(options),
        num_response_tokens=max(lengths),
        num_features=num_tiles * (options.tile // 14) ** 2,
    )


# --- the table ---


def measure_in_process(options, point):
    """Measure a phase in a process of its own."""
    values = vars(options) | point
    arguments = []
    for name, value in values.items():
        if name != "out":
            arguments.append(f"{option_flag(name)}={value}")
    process = subprocess.run(
        [sys.executable, __file__, *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ, MALLOC_MMAP_THRESHOLD_="262144"),
        check=False,
    )
    if process.returncode != 0:
        print(f"{point}: {process.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    return json.loads(process.stdout.splitlines()[-1])


def main():
    """Run the benchmark."""
    options = parse_options(__doc__, phase="")
    if options.phase:
        print(json.dumps(measure(options)))
        return

    print(heading(options) + "; MB in all")
    print(f"{'phase':32}{'planned':>10}{'measured':>10}{'ratio':>8}")
    figures = {}
    for name, point in POINTS.items():
        sizes = measure_in_process(options, point)
        if sizes is None:
            continue
        figures[name] = sizes
        ratio = sizes["planned"] / sizes["measured"]
        planned = sizes["planned"] / 1e6
        print(f"{name:32}{planned:10.0f}{sizes['measured'] / 1e6:10.0f}{ratio:8.2f}", flush=True)
    write_figures(options, {"phases": figures})


if __name__ == "__main__":
    main()
