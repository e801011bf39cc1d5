"""Test how responses are sampled from the policy: by which random numbers, and where they end."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import set_device_memory
from method_runs import encode_text, make_as_likely, make_run

from minialign import reference
from minialign.generation.decoding import SamplingParams
from minialign.logprobs import response_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.methods.responses import generate_responses, split_to_fit_cache
from minialign.utils.files import InputError
from minialign.utils.seeding import seeded_generator


def test_responses_are_sampled_by_record_and_step(vlm, records):
    """They equal the reference's from uniforms of (seed, record id, step, i) alone.

    The end token is kept.
    """
    run = make_run("online-dpo", vlm, records, num_records=2)
    run.move_policy()
    sampling = SamplingParams(max_new_tokens=5, seed=7)

    responses = generate_responses(vlm, run.examples, 2, sampling=sampling, step=11)

    stop_ids = {vlm.tokenizer.eos}
    questions = run.questions(run.examples)
    for example, question, sampled in zip(run.examples, questions, responses, strict=True):
        for i in range(2):
            generator = seeded_generator(7, example.record.id, 11, i)
            uniforms = torch.rand(5, generator=generator)
            slow = reference.generate(vlm.model, *question, [], uniforms, stop_ids)
            assert sampled[i] == slow
    assert responses[0][0] != responses[0][1]
    assert responses[0][0] != responses[1][0]


def test_sampling_is_independent_of_batch_composition(vlm, records):
    """A record's responses are the same in any batch; another step, seed or id changes them."""
    run = make_run("online-dpo", vlm, records)
    sampling = SamplingParams(max_new_tokens=6, seed=3)
    sample = partial(generate_responses, vlm, sampling=sampling, step=5)

    together = sample(run.examples, 2)

    assert sample(run.examples[::-1], 2) == together[::-1]
    for example, responses in zip(run.examples, together, strict=True):
        assert sample([example], 2) == [responses]
    # A third response changes nothing of the first two.
    assert sample(run.examples[1:3], 3)[0][:2] == together[1]

    renamed = []
    for example in run.examples:
        other_record = replace(example.record, id=f"{example.record.id}a")
        renamed.append(replace(example, record=other_record))
    other_step = sample(run.examples, 2, step=6)
    other_seed = sample(run.examples, 2, sampling=replace(sampling, seed=4))
    other_ids = sample(renamed, 2)
    for others in (other_step, other_seed, other_ids):
        for other_responses, responses in zip(others, together, strict=True):
            assert other_responses != responses


def test_chunks_of_any_size_give_the_same_responses(vlm, records, monkeypatch):
    """One prompt at a time, as on a device without memory, or all together.

    The responses are equal, and each has the log-probs of its own tokens in its place.
    """
    run = make_run("rloo", vlm, records)
    run.move_policy()
    sampling = SamplingParams(max_new_tokens=4)

    together = generate_responses(vlm, run.examples, 2, sampling=sampling, step=0)
    rollouts_together = run.method.sample_rollouts(run.examples, step=0)
    assert len(split_to_fit_cache(vlm.model, run.examples, 2, 4)) == 1
    set_device_memory(monkeypatch, 0)
    assert len(split_to_fit_cache(vlm.model, run.examples, 2, 4)) == len(run.examples)
    one_by_one = generate_responses(vlm, run.examples, 2, sampling=sampling, step=0)
    rollouts_one_by_one = run.method.sample_rollouts(run.examples, step=0)

    assert one_by_one == together
    for example, other in zip(rollouts_together, rollouts_one_by_one, strict=True):
        assert example.responses == other.responses
        for ids, logps, other_logps in zip(
            example.responses, example.rollout.old_logps, other.rollout.old_logps, strict=True
        ):
            assert logps.shape == (len(ids),)
            torch.testing.assert_close(logps, other_logps, rtol=1e-5, atol=1e-5)


def test_a_response_ends_with_its_end_token_or_at_the_limit(vlm, records):
    """With an end token as likely as " is", responses have many lengths, each ending properly."""
    make_as_likely(vlm, vlm.tokenizer.eos, " is")
    run = make_run("online-dpo", vlm, records)
    sampling = SamplingParams(max_new_tokens=8)

    responses = []
    for step in range(4):
        for sampled in generate_responses(vlm, run.examples, 4, sampling=sampling, step=step):
            responses += sampled

    assert len({len(ids) for ids in responses}) > 2
    for ids in responses:
        assert vlm.tokenizer.eos not in ids[:-1]
        assert ids[-1] == vlm.tokenizer.eos or len(ids) == 8


def test_responses_that_fill_the_context_exactly_are_sampled_and_scored(vlm, records):
    """With 4 tokens left 4 are sampled, and the data's own response may have 4 as well."""
    make_run("online-dpo", vlm, records)  # softens the vocabulary head
    record = replace(records[0], chosen="A cup.")
    num_left = len(encode_text(vlm, record.chosen))
    prompt_length = len(encode_example(vlm, record, ["A cup."]).prompt_ids) - 1 + 64
    set_context_length(vlm, prompt_length + num_left)
    example = encode_example(vlm, record, [record.chosen])

    sampling = SamplingParams(max_new_tokens=num_left + 3, temperature=3.0)
    ((first, second),) = generate_responses(vlm, [example], 2, sampling=sampling, step=0)

    assert max(len(first), len(second)) == num_left
    sampled = replace(example, responses=[first, second])
    logps, token_counts = response_logps(vlm.model, pack_examples(vlm, [sampled]))
    assert token_counts.tolist() == [[len(first), len(second)]]
    assert logps.isfinite().all()
    set_context_length(vlm, prompt_length + num_left - 1)
    with pytest.raises(InputError, match=f"{prompt_length + num_left} tokens together"):
        encode_example(vlm, record, [record.chosen])
    # The longest of several responses counts, wherever it stands.
    for texts in (["No", record.chosen], [record.chosen, "No"]):
        with pytest.raises(InputError, match=f"{prompt_length + num_left} tokens together"):
            encode_example(vlm, record, texts)


def set_context_length(vlm, context_length):
    """Change the context of a model, in tokens."""
    text = replace(vlm.model.config.text, max_position_embeddings=context_length)
    vlm.model.config = replace(vlm.model.config, text=text)
