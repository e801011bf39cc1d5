"""The line that shows how training goes: what it learns, how fast, and how long it still takes.

    dpo: 12%|██        | 23/188 01:50 left, loss 0.644 margin 0.103, 18 pairs/s, 62 GB, 57% peak

The share of the peak is shown on a GPU. It compares the arithmetic of the last steps with what the
GPU does in a large matrix product in the same time (models/arithmetic.py). Counted are learning,
the reference and the vision tower, each where a step computes it. Sampling is not counted, because
it waits for memory and not for arithmetic. So a method that samples has a low share. Nor is a
second reading of the same responses: MPO's rewards, mDPO's damaged image, --distill-weight, and the
reference without the image in `distill --on policy`.
"""

import resource
import shutil
from collections import deque
from dataclasses import dataclass

import torch
from tqdm import tqdm

from minialign.methods.base import Example
from minialign.models.arithmetic import (
    RowLengths,
    learn_flops,
    measure_peak,
    read_flops,
    tower_flops,
)
from minialign.utils.distributed import num_processes

DECIMALS = {"loss": 3, "margin": 3, "reward": 2, "kl": 2}  # of what is shown, if it is logged
BAR_FORMAT = "{desc}: {percentage:.0f}%|{bar}| {n_fmt}/{total_fmt} {remaining} left{postfix}"
MAX_COLUMNS = 100
NUM_RECENT_STEPS = 10  # over which the speed is a mean
SHORTEST_SECONDS = 1e-4


@dataclass(frozen=True)
class StepWork:
    """What a training step did: how much it learned from, its arithmetic, and how long it took."""

    num_items: int  # pairs, or responses
    flops: int
    seconds: float


class Speedometer:
    """The speed of the last steps: pairs or responses a second, and the share of the GPU's peak."""

    def __init__(self, policy, method):
        """Measure the peak of the GPU, if there is one."""
        self.policy = policy
        self.method = method
        self.recent_steps = deque(maxlen=NUM_RECENT_STEPS)
        self.num_tiles_before = policy.model.num_encoded_tiles
        self.peak = None  # operations a second
        if self.device == "cuda":
            self.peak = measure_peak_if_it_fits(policy.model.device, policy.model.vocab_head.dtype)

    @property
    def device(self) -> str:
        """Return the type of the device that the model is on."""
        return self.policy.model.device.type

    def add_step(self, batch, examples, seconds):
        """Take note of a step.

        batch: the examples that the step began with.
        examples: those that it learned from. Some or all may have been made in the step.
        """
        num_items = len(examples)
        if self.method.unit != "pairs":
            learned = self.method.learned_from(examples)
            num_items = sum(len(example.responses) for example in learned)
        flops = 0
        if self.peak is not None:
            flops = self.count_flops(batch, examples)
        self.recent_steps.append(StepWork(num_items, flops, seconds))

    def count_flops(self, batch, examples) -> int:
        """Count the arithmetic of a step, for each of the processes that share the work."""
        config = self.policy.model.config

        # 1. Learning, in one pass or several.
        learned = self.method.learned_from(examples)
        rows = [row_lengths(example) for example in learned]
        learning = self.method.passes * learn_flops(config, rows, self.policy.rank)

        # 2. The reference reads what the step has made. What it was given has log-probs already.
        #    Objects are compared, because a new example may have the record of one in the batch.
        ids_of_batch = {id(example) for example in batch}
        new_examples = [example for example in examples if id(example) not in ids_of_batch]
        reference = read_flops(config, [row_lengths(example) for example in new_examples])

        # 3. The vision tower encodes the images whose features are not stored. Each process encodes
        #    those of its own share, with the whole tower even if it holds a part of the decoder.
        num_tiles = self.policy.model.num_encoded_tiles - self.num_tiles_before
        self.num_tiles_before = self.policy.model.num_encoded_tiles
        tower = tower_flops(config, num_tiles)

        return (learning + reference) // num_processes() + tower

    def describe(self) -> str:
        """Return the speed, the memory and the share of the peak, such as "18 pairs/s, 62 GB"."""
        seconds = sum(step.seconds for step in self.recent_steps)
        seconds = max(seconds, SHORTEST_SECONDS)  # a clock may not see the step of a tiny model
        num_items = sum(step.num_items for step in self.recent_steps)
        memory = peak_memory_mb(self.device) * 2**20 / 1e9  # GB as in train.py --plan
        parts = [f"{short_number(num_items / seconds)} {self.method.unit}/s"]
        parts.append(f"{short_number(memory)} GB")
        if self.peak is not None:
            flops = sum(step.flops for step in self.recent_steps)
            parts.append(f"{flops / seconds / self.peak:.0%} peak")
        return ", ".join(parts)


def row_lengths(example: Example) -> RowLengths:
    """Return the lengths of the packed row that an example becomes."""
    responses = [len(response) for response in example.responses]
    return RowLengths(
        prefix=example.length - sum(responses),
        responses=responses,
        num_image_tokens=example.num_image_tokens,
    )


def measure_peak_if_it_fits(device, dtype):
    """Measure the peak of a GPU. Return None if its memory is too full for the matrices."""
    try:
        return measure_peak(device, dtype)
    except torch.OutOfMemoryError:
        return None


def make_progress_bar(title, first_step, num_steps):
    """Return a progress bar that begins at a step. It is at most 100 columns wide."""
    columns = shutil.get_terminal_size(fallback=(MAX_COLUMNS, 24)).columns
    return tqdm(
        total=num_steps,
        initial=first_step,
        desc=title,
        bar_format=BAR_FORMAT,
        ncols=min(columns, MAX_COLUMNS),
    )


def describe_step(line, speedometer) -> str:
    """Return what stands beside the progress bar after a step, from its line of the log."""
    metrics = []
    for name, decimals in DECIMALS.items():
        if name in line:
            metrics.append(f"{name} {line[name]:.{decimals}f}")
    return f"{' '.join(metrics)}, {speedometer.describe()}"


def short_number(value) -> str:
    """Return a number of 10 or more without decimals, and a smaller one with one or two."""
    if value >= 10:
        return f"{value:.0f}"
    if value >= 1:
        return f"{value:.1f}"
    return f"{value:.2f}"


def peak_memory_mb(device) -> int:
    """Return the most memory that this process has used, in MiB: on the GPU, or in total."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)  # Linux counts KiB
