"""One function per method: how a step comes by its responses, and what it minimises."""

from dataclasses import replace

import torch

from minialign.data.chat_templates import IMAGE_PLACEHOLDER, decode_response, end_token_id
from minialign.generation.decoding import generate, prefill
from minialign.methods.base import pack_examples
from minialign.utils.distributed import map_across_ranks
from minialign.utils.seeding import seeded_generator


def generate_responses(
    vlm, examples, k, sampling, step, tell=lambda rows, cache: (), slots=1 << 15
):
    """k responses (ids, end token included if reached) to each example's prompt by the current policy; draws by (seed, record, step).

    A list of tuples: an example's responses, then, as lists of theirs, what `tell` says of the rows that hold them: the policy has not
    changed, so that the prompts' cache that they were written from serves once more.
    """

    def some(own):
        """Those of a few examples together."""
        rows, stops = (
            pack_examples(vlm, [replace(example, responses=[[]] * k) for example in own]),
            {end_token_id(vlm.tokenizer, vlm.template)},
        )
        generators = [
            seeded_generator(sampling.seed, example.record.id, step, number)
            for example in own
            for number in range(k)
        ]
        uniforms = [
            torch.rand(sampling.max_new_tokens, generator=generator) for generator in generators
        ]
        prefilled = prefill(vlm.model, rows)
        ids = generate(
            vlm.model,
            rows,
            sampling,
            stop_ids=stops,
            uniforms=uniforms,
            prefilled=prefilled,
        )
        with_responses = [
            replace(example, responses=ids[number * k : (number + 1) * k])
            for number, example in enumerate(own)
        ]
        told = tell(pack_examples(vlm, with_responses), prefilled[0])
        return [
            tuple(column[first : first + k] for column in (ids, *told))
            for first in range(0, len(ids), k)
        ]

    def write(own):
        """Those of this process's share, as many together as fill so many slots of the cache: 16 GB of it for a 7B in bfloat16."""
        longest = (
            max(example.num_image_tokens + len(example.prompt_ids) for example in own)
            + k * sampling.max_new_tokens
        )
        several = max(1, slots // longest)
        return [
            one
            for first in range(0, len(own), several)
            for one in some(own[first : first + several])
        ]

    return map_across_ranks(examples, write)


def response_text(vlm, ids):
    """A response's ids as text, without its end token, and without an <image> that the policy may have spelt out."""
    return decode_response(vlm.tokenizer, vlm.template, ids).replace(IMAGE_PLACEHOLDER, "")
