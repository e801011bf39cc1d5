"""Sample responses to prompts from the current policy."""

from dataclasses import replace

import torch

from minialign.data.chat_templates import stop_ids
from minialign.generation.cache_limits import CacheLimits, cache_limits, rows_that_fit
from minialign.generation.decoding import generate, prefill
from minialign.methods.base import pack_examples
from minialign.utils.distributed import gather_results, local_share
from minialign.utils.seeding import seeded_generator


def generate_responses(vlm, examples, k, *, sampling, step):
    """Sample k responses to the prompt of every example, and return their ids: k lists an example.

    A response keeps its end token if it reached one. The random numbers of response i depend on
    (seed, record id, step, i) alone. So the other examples of the batch do not change it, up to
    rounding of the logits.
    """
    # 1. The processes share the examples. Each samples for its share, a chunk at a time.
    local_examples = local_share(examples)
    local_responses = []
    for chunk in split_to_fit_cache(vlm.model, local_examples, k, sampling.max_new_tokens):
        sampled_chunk, _ = sample_chunk(vlm, chunk, k, sampling=sampling, step=step)
        local_responses += [example.responses for example in sampled_chunk]

    # 2. All processes get all responses.
    return gather_results(local_responses, num_items=len(examples))


def split_to_fit_cache(model, examples, k, max_new_tokens):
    """Split examples into chunks that are sampled together within the limits on caches."""
    longest_prompt = 0
    for example in examples:
        # With the placeholders of the images, so that it is slightly longer than the cached prompt.
        prompt_length = example.num_image_tokens + len(example.prompt_ids)
        longest_prompt = max(longest_prompt, prompt_length)
    chunk_size = prompts_that_fit(cache_limits(model), longest_prompt, k, max_new_tokens)
    return [examples[start : start + chunk_size] for start in range(0, len(examples), chunk_size)]


def prompts_that_fit(limits: CacheLimits, prompt_length, k, max_new_tokens) -> int:
    """Return how many prompts are answered together, k times each."""
    # Where the responses are scored, a row is a prompt and its k responses.
    row_length = prompt_length + k * max_new_tokens
    return rows_that_fit(limits.with_responses, row_length)


def sample_chunk(vlm, examples, k, *, sampling, step):
    """Sample k responses to each of a few prompts, all of them in one batch.

    Returns the examples with their new responses, and the KV cache of the prompts. As long as the
    policy does not change, the responses can be scored with that cache.
    """
    # 1. Compute the prompts once for all k responses, which are still empty.
    prompts = [replace(example, responses=[[]] * k) for example in examples]
    packed_prompts = pack_examples(vlm, prompts)
    cache, batch = prefill(vlm.model, packed_prompts)

    # 2. Draw the random numbers of every response, one a token.
    uniforms = []
    for example in examples:
        for i in range(k):
            generator = seeded_generator(sampling.seed, example.record.id, step, i)
            uniforms.append(torch.rand(sampling.max_new_tokens, generator=generator))

    # 3. Decode: the first k responses answer the first prompt, the next k the second, and so on.
    responses = generate(
        vlm.model,
        packed_prompts,
        sampling,
        stop_ids=stop_ids(vlm.tokenizer, vlm.template),
        uniforms=uniforms,
        prefilled=(cache, batch),
    )
    sampled_examples = []
    for i, example in enumerate(examples):
        sampled_examples.append(replace(example, responses=responses[i * k : (i + 1) * k]))
    return sampled_examples, cache
