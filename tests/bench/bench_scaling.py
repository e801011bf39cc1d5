"""Measure how the time of our warm DPO step grows with one size at a time, beside its arithmetic.

For each size the table shows the measured time and the step's multiplications and additions
(`step_flops`, counted from shapes), both over those of the first value, and the speed that the
machine reached. Where the time grows faster, it is spent on something else than this arithmetic:
on what is computed and then masked, or on memory traffic. Where it grows slower, a fixed cost is
spread over more work.
"""

import statistics

from common import PATCH_SIZE, make_model, make_pairs, parse_options, with_sizes
from dpo_steps import OurStep, make_policy
from report import heading, write_figures
from timing import alternate, step_flops

# The values of each size. `--only` takes one of these names.
VALUES = {
    "response": (20, 40, 80, 160, 320),
    "picture vectors": (64, 144, 256, 576, 1024),  # image tokens
    "responses k": (2, 3, 4, 8),
    "pairs": (1, 2, 4, 8),
    "vocabulary": (4000, 8000, 16000, 32000, 64000),
}


def sizes_for(name, value):
    """Return the sizes of the shape that give one value of a row of VALUES."""
    if name == "picture vectors":
        # A square image of one tile has as many image tokens as patches.
        side = PATCH_SIZE * round(value**0.5)
        return {"tile": side, "height": side, "breadth": side, "anyres": 0}
    if name == "responses k":
        return {"k": value}
    if name == "vocabulary":
        return {"vocab": value}
    return {name: value}


def make_steps(options, name):
    """Return a step and its arithmetic for each value of a size, both by value."""
    steps = {}
    flops = {}
    for value in VALUES[name]:
        sizes = {"k": 2}
        sizes.update(sizes_for(name, value))
        value_options = with_sizes(options, **sizes)
        pairs = make_pairs(value_options, value_options.k)
        policy = make_policy(value_options, make_model(value_options))
        steps[value] = OurStep(policy, pairs)
        flops[value] = step_flops(value_options, pairs)
    return steps, flops


def measure_growth(options, name):
    """Measure the step at all values of a size; print a line for each, and return its figures."""
    steps, flops = make_steps(options, name)
    _, seconds = alternate(steps, options)
    first_value = VALUES[name][0]
    first_seconds = statistics.median(seconds[first_value])
    figures = []
    for value in VALUES[name]:
        step_seconds = statistics.median(seconds[value])
        time_growth = step_seconds / first_seconds
        flops_growth = flops[value] / flops[first_value]
        gigaflops_per_second = flops[value] / step_seconds / 1e9
        print(
            f"{name:16}{value:8}{1000 * step_seconds:11.0f}{time_growth:9.2f}x"
            f"{flops_growth:11.2f}x{gigaflops_per_second:10.1f}",
            flush=True,
        )
        figures.append(
            {
                "value": value,
                "seconds": step_seconds,
                "measured": time_growth,
                "arithmetic": flops_growth,
                "flops": flops[value],
            }
        )
    return figures


def main():
    """Run the benchmark."""
    options = parse_options(__doc__, only="")
    print(heading(options))
    print(
        f"{'size':16}{'value':>8}{'ms a step':>11}{'measured':>10}{'arithmetic':>12}{'GFLOP/s':>10}"
    )
    figures = {}
    for name in VALUES:
        if options.only in ("", name):
            figures[name] = measure_growth(options, name)
    write_figures(options, figures)


if __name__ == "__main__":
    main()
