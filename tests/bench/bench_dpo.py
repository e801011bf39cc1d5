"""Measure a DPO step (forward, loss, backward) on the same pairs, weights and LoRA adapter.

All sides run in one process and take turns:

ours   One packed row a pair. The vocabulary head is applied at response positions, in blocks.
       warm: image features and reference log-probs are at hand, as from the second epoch on.
       reference: reference log-probs are at hand, the vision tower runs in the step.
       cold: the vision tower and the reference run in the step.
distillation
       A warm step of contrastive distillation, which reads one response where DPO reads two. Its
       loss is another one and is not compared.
naive  Chosen and rejected are two whole padded sequences, each with its image and prompt. Logits
       and log-softmax are computed at every position. Warm, reference and cold as ours.
TRL    `training_step` of TRL's DPOTrainer around transformers and PEFT. The adapter is switched off
       for the reference. There is no gradient checkpointing. Batches are made beforehand, as ours.
       As it is, the vision tower and the reference run in every step, so our cold step is its
       match: TRL refuses precomputed reference log-probs for images and keeps no image features.
       "reference given" hands it these log-probs all the same, by the switch that it has for text.
       Its tower still runs, so our step with the reference at hand is its match.
       On a CPU, TRL applies the head at every position, on CUDA at response positions alone. Here
       it is measured both ways.

On a CPU, much of the naive way's time goes into fresh memory pages for its logits. To measure the
arithmetic alone, keep the pages, as CUDA's allocator does (glibc), with
MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=17179869184 before the command.

Losses of ours and TRL are compared over several AdamW steps that each side makes by itself, and
log-probs and gradients at step 0. With --dtype bfloat16, ours is also compared with ours in float32
on the same weights. On CUDA the table shows the peak memory of each side, above the weights,
adapters and gradients that lie there between steps.

--skip is a regular expression. It leaves out the sides whose names it matches, except ours. Where
it matches "TRL", TRL is not even loaded.
"""

import statistics
import tempfile

from agreement import compare_with_float32, compare_with_trl
from common import is_skipped, make_model, make_pairs, parse_options
from dpo_steps import (
    STARTS,
    WARM,
    DistillationStep,
    OurStep,
    TrlStep,
    gpu_peak_of,
    make_policy,
    naive_logps,
)
from peers import make_peer, make_trainer, make_trl_batch, missing_packages
from report import heading, write_figures
from timing import alternate, measure_peak_of, step_flops, time_ratio

DISTILLATION = "distillation, warm"


def make_our_sides(options, policy, pairs):
    """Return the steps of our way and of the naive way by name."""
    sides = {}
    for start in STARTS:
        sides[f"ours, {start}"] = OurStep(policy, pairs, start=start)
    if not is_skipped(options, DISTILLATION):
        sides[DISTILLATION] = DistillationStep(policy, pairs)
    for start in STARTS:
        name = f"naive, {start}"
        if not is_skipped(options, name):
            sides[name] = OurStep(
                policy, pairs, start=start, compute_logps=naive_logps, encodings_per_image=2
            )
    return sides


def make_trl_sides(options, trainer, pairs):
    """Return TRL's steps by name, and the one of them whose head and reference match ours."""
    is_cuda = options.device == "cuda"
    batch = make_trl_batch(options, pairs)
    ref_logps = trainer.compute_ref_log_probs(trainer.model, batch)
    given = TrlStep(trainer, batch, ref_logps=ref_logps, compact=not is_cuda)
    sides = {"TRL as it is": TrlStep(trainer, batch)}
    if is_cuda:
        sides["TRL, reference given"] = given
    else:
        sides["TRL, reference given, head as on CUDA"] = given
        sides["TRL, head as on CUDA"] = TrlStep(trainer, batch, compact=True)
    kept = {name: side for name, side in sides.items() if not is_skipped(options, name)}
    return kept, given


def print_table(options, sides, seconds, flops):
    """Print a line for each side, and return its figures.

    On CUDA it includes pairs a second, the share of a large product's speed that the step's
    arithmetic reaches, and the peak memory.
    """
    # 1. The head of the table.
    ceiling = None
    columns = f"{'side':36}{'ms a step':>10}{'warm':>10}{'reference':>11}{'cold':>10}"
    if options.device == "cuda":
        ceiling = measure_peak_of(options)
        columns += f"{'pairs/s':>10}{'of peak':>9}{'memory':>11}"
    print(f"{'times ours:':>56}\n{columns}")

    # 2. A line for each side.
    figures = {}
    for name in sides:
        step_seconds = statistics.median(seconds[name])
        times_ours = {}
        for start in STARTS:
            times_ours[start] = time_ratio(seconds, name, f"ours, {start}")
        figures[name] = {"seconds": step_seconds, "times_ours": times_ours}
        line = (
            f"{name:36}{1000 * step_seconds:10.0f}{times_ours['warm']:9.2f}x"
            f"{times_ours['reference']:10.2f}x{times_ours['cold']:9.2f}x"
        )
        if ceiling is not None:
            pairs_per_second = options.pairs / step_seconds
            utilisation = flops / step_seconds / ceiling
            peak_bytes = gpu_peak_of(sides[name])
            figures[name]["pairs_per_second"] = pairs_per_second
            figures[name]["utilisation"] = utilisation
            figures[name]["peak_bytes"] = peak_bytes
            line += f"{pairs_per_second:10.2f}{utilisation:9.1%}{peak_bytes / 1e9:8.1f} GB"
        print(line)

    # 3. What the share of the peak means.
    if ceiling is not None:
        print(
            f"peak: {ceiling / 1e12:.0f} TFLOP/s in a product of 8192; the arithmetic counted is "
            f"that of the warm row ({flops / 1e12:.1f} TFLOP), for every side"
        )
    return {"sides": figures, "step_flops": flops, "matmul_flops": ceiling}


def main():
    """Run the benchmark."""
    # 1. The model. The peer shares its tensors, so it is made before adapters change their names.
    options = parse_options(__doc__, steps=4, skip="")
    model = make_model(options)
    pairs = make_pairs(options)
    missing = missing_packages("transformers", "peft", "trl", "datasets")
    uses_trl = not missing and not is_skipped(options, "TRL")
    if uses_trl:
        peer = make_peer(options, model)
    policy = make_policy(options, model)
    rounding = None
    if options.dtype == "bfloat16":
        rounding = compare_with_float32(policy, pairs)
    print(heading(options))

    # 2. How far TRL is from ours.
    trl_sides = {}
    agreement = {}
    with tempfile.TemporaryDirectory() as folder:
        if missing:
            print(f"TRL is left out: {', '.join(missing)} not installed")
        if uses_trl:
            trainer = make_trainer(options, peer, policy, folder=folder)
            trl_sides, matching_side = make_trl_sides(options, trainer, pairs)
            our_step = OurStep(policy, pairs, start=WARM)
            agreement = compare_with_trl(our_step, matching_side, options.steps)

        # 3. All sides in turn.
        sides = make_our_sides(options, policy, pairs)
        sides.update(trl_sides)
        results, seconds = alternate(sides, options)

    # 4. The tables.
    losses = {name: float(loss) for name, loss in results.items() if name != DISTILLATION}
    spread = max(losses.values()) - min(losses.values())
    print(f"losses of all sides within {spread:.1e} of each other")
    figures = print_table(options, sides, seconds, step_flops(options, pairs))
    figures.update({"losses": losses, "agreement": agreement, "bfloat16": rounding})
    write_figures(options, figures)


if __name__ == "__main__":
    main()
