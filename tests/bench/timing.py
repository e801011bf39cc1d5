"""Time sides that take turns, and count the arithmetic of a DPO step to compare the times with."""

import statistics
import time

import torch
from common import num_image_tokens, prefix_length, torch_dtype

# --- Time


def synchronize(options):
    """Wait for the GPU if there is one."""
    if options.device == "cuda":
        torch.cuda.synchronize()


def choose_clock(options):
    """Return the timer.

    On one CPU thread it is the CPU time of the process, which other jobs hardly move. Else it is
    the wall clock.
    """
    if options.device == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def alternate(sides, options):
    """Call several functions in turn; return their results and their times, both by name.

    sides: functions without arguments, by name.
    A first round warms up, and gives the results. Then come `--repeats` rounds, each of which adds
    one time in seconds to the list of each side.
    """
    # 1. Warm up.
    results = {}
    seconds = {}
    for name, side in sides.items():
        results[name] = side()
        seconds[name] = []

    # 2. Measure. Because the sides take turns, a busy machine slows all of them alike.
    clock = choose_clock(options)
    for _ in range(options.repeats):
        for name, side in sides.items():
            synchronize(options)
            start = clock()
            side()
            synchronize(options)
            seconds[name].append(clock() - start)
    return results, seconds


def time_ratio(seconds, slow, fast):
    """Return how many times as long side `slow` takes as side `fast`: the median over rounds."""
    ratios = []
    for slow_seconds, fast_seconds in zip(seconds[slow], seconds[fast], strict=True):
        ratios.append(slow_seconds / fast_seconds)
    return statistics.median(ratios)


# --- Arithmetic


def matmul_flops_per_second(options, size=8192):
    """Measure the speed of a large square product in this dtype: what the device gives at best."""
    shape = (size, size)
    dtype = torch_dtype(options)
    a = torch.randn(shape, device=options.device, dtype=dtype)
    b = torch.randn(shape, device=options.device, dtype=dtype)

    def multiply():
        return a @ b

    _, seconds = alternate({"matmul": multiply}, options)
    return 2 * size**3 / statistics.median(seconds["matmul"])


def count_visible_keys(options, pairs):
    """Count the keys that each query sees, added up over the queries of one row a pair.

    The prefix sees itself, causally. A response sees the prefix, and itself causally.
    """
    prefix = prefix_length(options)
    total = 0
    for pair in pairs:
        total += prefix**2 / 2
        for response in pair.responses:
            total += len(response) * prefix + len(response) ** 2 / 2
    return total


def step_flops(options, pairs):
    """Count the multiplications and additions (2 each) that a warm DPO step needs.

    It has one row a pair, LoRA on frozen weights, image features and reference log-probs at hand.
    Every weight is used once in the forward pass. The backward pass uses a frozen weight once and a
    trained one twice. Attention counts where it is visible.
    """
    # 1. Tokens that are read, and tokens that are scored.
    num_scored = 0
    for pair in pairs:
        for response in pair.responses:
            num_scored += len(response)
    num_tokens = len(pairs) * prefix_length(options) + num_scored

    # 2. Weights that a token meets: those of the decoder, and those of its adapters.
    width = options.width
    inner = options.inner
    decoder_weights = options.layers * (4 * width**2 + 3 * width * inner)
    adapter_weights = options.layers * options.rank * (8 * width + 3 * (width + inner))

    # 3. Weights that an image token meets: those of the projector.
    projector_weights = options.tower * width + width**2
    all_image_tokens = len(pairs) * num_image_tokens(options)

    # 4. Everything together.
    flops = 4 * decoder_weights * num_tokens
    flops += 6 * adapter_weights * num_tokens
    flops += 12 * options.layers * width * count_visible_keys(options, pairs)
    flops += 4 * num_scored * width * options.vocab
    flops += 6 * projector_weights * all_image_tokens
    return flops
