"""How the time of our warm DPO step grows with one size at a time, beside what arithmetic says.

For each size in turn: the measured time and the step's multiplications and additions (common.step_flops, counted from shapes), both
over those of its first value, and what the machine reached. Where the measured line rises faster, something other than arithmetic is paid for
(what is computed and then masked, memory traffic); where it rises slower, a fixed cost is spread.
"""

import statistics

from bench_dpo import Ours, make_policy
from common import alternate, heading, make_model, make_pairs, parse, step_flops, varied, write

SIZES = {  # name: (values, the sizes that one value sets)
    "response": ((20, 40, 80, 160, 320), lambda value: {"response": value}),
    "picture vectors": (
        (64, 144, 256, 576, 1024),
        lambda value: (
            {name: 14 * round(value**0.5) for name in ("tile", "height", "breadth")} | {"anyres": 0}
        ),
    ),
    "responses k": ((2, 3, 4, 8), lambda value: {"k": value}),
    "pairs": ((1, 2, 4, 8), lambda value: {"pairs": value}),
    "vocabulary": ((4000, 8000, 16000, 32000, 64000), lambda value: {"vocab": value}),
}


def points(options, values, sizes):
    """{value: (step, its arithmetic)} of a row of the table."""
    found = {}
    for value in values:
        at = varied(options, **{"k": 2} | sizes(value))
        pairs = make_pairs(at, at.k)
        found[value] = Ours(make_policy(at, make_model(at)), pairs), step_flops(at, pairs)
    return found


def main():
    options, figures = parse(__doc__, only=""), {}
    print(heading(options))
    print(
        f"{'size':16}{'value':>8}{'ms a step':>11}{'measured':>10}{'arithmetic':>12}{'GFLOP/s':>10}"
    )
    for name, (values, sizes) in SIZES.items():
        if options.only in ("", name):
            found = points(options, values, sizes)
            _, seconds = alternate({value: step for value, (step, _) in found.items()}, options)
            medians = {value: statistics.median(each) for value, each in seconds.items()}
            first, figures[name] = values[0], []
            for value, (_, flops) in found.items():
                own = {
                    "value": value,
                    "seconds": medians[value],
                    "measured": medians[value] / medians[first],
                    "arithmetic": flops / found[first][1],
                    "flops": flops,
                }
                figures[name].append(own)
                print(
                    f"{name:16}{value:8}{1000 * own['seconds']:11.0f}{own['measured']:9.2f}x{own['arithmetic']:11.2f}x{flops / own['seconds'] / 1e9:10.1f}",
                    flush=True,
                )
    write(options, figures)


if __name__ == "__main__":
    main()
