"""Measure scoring a step's rollouts under the policy that sampled them (k responses a prompt).

from the cache  Ours: images and prompts are read from the cache that the responses were sampled
                from (`response_hidden_states`).
whole rows      The same rows are computed anew, images and prompts included.

A step of RLOO goes over the decoder three times: it samples the rollouts, scores them by the
policy, and scores them by the reference. The cache saves most of the second pass.
"""

import statistics
from dataclasses import replace
from functools import partial

import torch
from common import make_model, make_pairs, parse_options
from report import heading, write_figures
from timing import alternate, time_ratio

from minialign.data.packing import PackedExample
from minialign.generation.decoding import prefill
from minialign.logprobs import response_hidden_states, response_logps, token_logps

CACHED = "from the cache"
WHOLE = "whole rows"


def make_rows(model, pairs):
    """Pack a prompt and its k responses into each row."""
    features = model.encode_images([pair.image for pair in pairs])
    rows = []
    for pair, image_features in zip(pairs, features, strict=True):
        rows.append(PackedExample.of(pair.prompt, [image_features], pair.responses))
    return rows


def prefill_prompts(model, rows):
    """Return the cache of the prompts, as it is before responses are sampled."""
    prompts = []
    for row in rows:
        branches = [(lead, []) for lead, _ in row.branches]
        prompts.append(replace(row, branches=branches))
    cache, _ = prefill(model, prompts)
    return cache


def logps_from_cache(model, rows, cache):
    """Return the summed log-probs (B, k), with images and prompts read from the cache."""
    hidden, targets, lengths = response_hidden_states(model, rows, cache)
    logps = token_logps(hidden, model.vocab_head, targets)
    sums = [response.sum() for response in logps.split(lengths)]
    return torch.stack(sums).view(len(rows), -1)


def logps_of_whole_rows(model, rows):
    """Return the summed log-probs (B, k), with everything computed."""
    logps, _ = response_logps(model, rows)
    return logps


@torch.no_grad()
def main():
    """Run the benchmark."""
    # 1. Both sides in turn.
    options = parse_options(__doc__, k=4)
    model = make_model(options)
    rows = make_rows(model, make_pairs(options, options.k))
    cache = prefill_prompts(model, rows)
    sides = {
        CACHED: partial(logps_from_cache, model, rows, cache),
        WHOLE: partial(logps_of_whole_rows, model, rows),
    }
    logps, seconds = alternate(sides, options)

    # 2. The table.
    print(heading(options) + f", {len(rows)} prompts of {options.k} responses")
    medians = {}
    for name in sides:
        medians[name] = statistics.median(seconds[name])
        ratio = time_ratio(seconds, name, CACHED)
        print(f"{name:16}{1000 * medians[name]:10.0f} ms{ratio:9.2f}x")
    difference = float((logps[CACHED] - logps[WHOLE]).abs().max())
    print(f"summed log-probs within {difference:.1e} nats")

    # 3. The figures.
    figures = {
        "seconds": medians,
        "times": time_ratio(seconds, WHOLE, CACHED),
        "apart": difference,
    }
    write_figures(options, figures)


if __name__ == "__main__":
    main()
