"""Scoring a step's rollouts under the policy that wrote them (RLOO, k responses a prompt), side by side in one process.

from the cache  ours (logprobs.scored_states): pictures and prompts are read from the cache that the responses were written from.
whole rows      the same rows computed anew, pictures and prompts included.
The saving is that of one pass of three over the decoder: rollouts are written, scored by the policy, scored by the reference.
"""

import statistics
from dataclasses import replace

import torch
from common import alternate, heading, make_model, make_pairs, parse, ratio, write

from minialign.data.packing import PackedExample
from minialign.generation.decoding import prefill
from minialign.logprobs import response_hidden_states, response_logps, token_logps


@torch.no_grad()
def main():
    options = parse(__doc__, k=4)
    model, pairs = make_model(options), make_pairs(options, options.k)
    rows = [
        PackedExample.of(pair.prompt, [feature], pair.responses)
        for pair, feature in zip(pairs, model.encode_images([pair.picture for pair in pairs]))
    ]
    cache, _ = prefill(
        model, [replace(row, branches=[(lead, []) for lead, _ in row.branches]) for row in rows]
    )

    def cached():
        hidden, targets, lengths = response_hidden_states(model, rows, cache)
        return torch.stack(
            [part.sum() for part in token_logps(hidden, model.vocab_head, targets).split(lengths)]
        ).view(len(rows), -1)

    found, seconds = alternate(
        {"from the cache": cached, "whole rows": lambda: response_logps(model, rows)[0]}, options
    )
    apart = float((found["from the cache"] - found["whole rows"]).abs().max())
    print(heading(options) + f", {len(rows)} prompts of {options.k} responses")
    for name, values in seconds.items():
        print(
            f"{name:16}{1000 * statistics.median(values):10.0f} ms{ratio(seconds, name, 'from the cache'):9.2f}x"
        )
    print(f"summed log-probs within {apart:.1e} nats")
    write(
        options,
        {
            "seconds": {name: statistics.median(values) for name, values in seconds.items()},
            "times": ratio(seconds, "whole rows", "from the cache"),
            "apart": apart,
        },
    )


if __name__ == "__main__":
    main()
