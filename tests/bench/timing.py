"""Time sides that take turns, and give the arithmetic of a DPO step to compare the times with."""

import statistics
import time

import torch
from common import num_image_tokens, prefix_length, raw_config, torch_dtype

from minialign.models.arithmetic import RowLengths, learn_flops, measure_peak
from minialign.models.config_json import parse_config

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


def measure_peak_of(options, size=8192):
    """Measure the speed of a large square product in this dtype: what the device gives at best."""
    return measure_peak(options.device, torch_dtype(options), size, clock=choose_clock(options))


def rows_of(options, pairs):
    """Return the lengths of the packed rows of pairs."""
    rows = []
    for pair in pairs:
        row = RowLengths(
            prefix=prefix_length(options),
            responses=[len(response) for response in pair.responses],
            num_image_tokens=num_image_tokens(options),
        )
        rows.append(row)
    return rows


def step_flops(options, pairs):
    """Count the arithmetic of a warm DPO step: image features and reference are at hand."""
    config = parse_config(raw_config(options), "bench")
    return learn_flops(config, rows_of(options, pairs), options.rank)
