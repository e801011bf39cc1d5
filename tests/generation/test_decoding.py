"""Decoding from a cache equals recomputation, in any batch and from any point of the cache."""

from dataclasses import replace

import pytest
import torch
from decoding_helpers import (
    MODELS,
    NEW_TOKENS,
    QUESTIONS,
    SAMPLING,
    generate_rows,
    prompts_of,
    questions_of,
    random_uniforms,
    recomputed,
    with_model,
)

from minialign.data.packing import PackedExample
from minialign.generation import decoding
from minialign.generation.decoding import (
    DecodeRequest,
    SamplingParams,
    branch_requests,
    decode,
    generate_continuations,
    prefill,
    share_prefix,
)
from minialign.methods.base import encode_example


@pytest.fixture(params=MODELS)
def any_vlm(request, vlm):
    """Return a VLM with each of the models in turn."""
    return with_model(vlm, request.param)


# --- equal to recomputation ---


def test_greedy_decoding_equals_recomputation(any_vlm, records):
    """Two prompts of different length as one batch."""
    questions = questions_of(any_vlm, records[2:4])

    responses = generate_rows(any_vlm, [q.row for q in questions], SamplingParams(64))

    for question, response in zip(questions, responses, strict=True):
        expected = recomputed(any_vlm, question.prompt_ids, question.features, None)
        assert response == expected


def test_sampling_equals_recomputation(any_vlm, records):
    """The same random numbers give the same tokens.

    A number would have to lie within rounding (1e-6) of a boundary for the two to differ.
    """
    questions = questions_of(any_vlm, records[:4])
    uniforms = random_uniforms(4)

    responses = generate_rows(any_vlm, [q.row for q in questions], uniforms=uniforms)

    assert len({tuple(response) for response in responses}) > 1
    for question, numbers, response in zip(questions, uniforms, responses, strict=True):
        expected = recomputed(any_vlm, question.prompt_ids, question.features, numbers)
        assert response == expected


def test_temperature_and_top_p_reach_the_sampling(vlm, records):
    rows = [questions_of(vlm, records[:1])[0].row]
    uniforms = random_uniforms(1)
    greedy = generate_rows(vlm, rows, stop_ids=set())

    for settings in ({"temperature": 0}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        sampling = replace(SAMPLING, **settings)
        assert generate_rows(vlm, rows, sampling, uniforms, stop_ids=set()) == greedy


def test_questions_that_share_a_row_are_answered_as_if_asked_alone(any_vlm, records):
    """Several branches of several rows: sampled as by the reference, greedy as by single rows."""
    # Arrange: three questions about the first image, two of them about the second.
    questions = [QUESTIONS[0], "Where is the dog?", QUESTIONS[1]]
    prompts = prompts_of(any_vlm, questions)
    first_image, second_image = any_vlm.encode_images([record.paths[0] for record in records[:2]])
    rows = [share_prefix(prompts, [first_image]), share_prefix(prompts[:2], [second_image])]
    alone = [(prompt, first_image) for prompt in prompts]
    alone += [(prompt, second_image) for prompt in prompts[:2]]
    uniforms = random_uniforms(5)

    sampled = generate_rows(any_vlm, rows, uniforms=uniforms)
    greedy = generate_rows(any_vlm, rows)

    for i, (prompt, image) in enumerate(alone):
        assert sampled[i] == recomputed(any_vlm, prompt, [image], uniforms[i])
        assert [greedy[i]] == generate_rows(any_vlm, [share_prefix([prompt], [image])])


def test_share_prefix_by_hand():
    """What the prompts have in common goes first, but each branch keeps at least its last token."""
    row = share_prefix([[1, 9, 4, 5], [1, 9, 6, 5, 7]], ["features"])
    single = share_prefix([[1, 9, 4]], [])
    nested = share_prefix([[1, 9], [1, 9, 4]], [])

    assert row.prefix == [1, 9]
    assert row.branches == [([4, 5], []), ([6, 5, 7], [])]
    assert single.branches == [([4], [])]
    assert nested.branches == [([9], []), ([9, 4], [])]


# --- the batch and its steps ---


def test_a_batch_of_requests_equals_single_ones(any_vlm, records):
    """Some requests stop early and leave the batch; each gives the same tokens as alone."""
    # Arrange: without stop tokens first, to choose a different end for each request.
    rows = [question.row for question in questions_of(any_vlm, records[:4])]
    cache, batch = prefill(any_vlm.model, rows)
    requests = branch_requests(batch, rows, random_uniforms(4), stop_ids=set())
    endless = generate_continuations(any_vlm.model, cache, requests, SAMPLING)
    for i, request in enumerate(requests):
        request.stop_ids = {
            endless[i][2 * i]
        }  # token 2i, or earlier where the same token came before

    together = generate_continuations(any_vlm.model, cache, requests, SAMPLING)

    for i, (request, tokens) in enumerate(zip(requests, together, strict=True)):
        alone = generate_continuations(any_vlm.model, cache, [request], SAMPLING)
        assert alone == [tokens]
        (stop_id,) = request.stop_ids
        assert tokens == endless[i][: endless[i].index(stop_id) + 1]
    assert len({len(tokens) for tokens in together}) > 1


@pytest.mark.parametrize("num_spare", [1, 3])
def test_a_cache_that_grows_equals_one_with_all_positions(vlm, records, monkeypatch, num_spare):
    """The tokens are the same. A row never has more spare positions than it gets at a time."""
    rows = [question.row for question in questions_of(vlm, records[:4])]
    cache, batch = prefill(vlm.model, rows)
    requests = branch_requests(batch, rows, random_uniforms(4), stop_ids=set())
    num_begun = max(len(request.cache_positions) for request in requests) + 1
    whole = generate_continuations(vlm.model, cache, requests, SAMPLING)
    monkeypatch.setattr(decoding, "SPARE_POSITIONS_CPU", num_spare)
    num_positions = []
    forward = vlm.model.language_model.forward

    def recording_forward(x, positions, mask, **kwargs):
        num_positions.append(mask.shape[-1])
        return forward(x, positions, mask, **kwargs)

    vlm.model.language_model.forward = recording_forward

    grown = generate_continuations(vlm.model, cache, requests, SAMPLING)

    assert grown == whole
    assert len(num_positions) == NEW_TOKENS
    for step, num in enumerate(num_positions):
        assert num_begun + step <= num <= num_begun + step + num_spare


def test_decode_yields_each_step_as_it_comes(vlm, records):
    """Steps and lists hold the same tokens. A request that has stopped is in no later step."""
    rows = [question.row for question in questions_of(vlm, records[:2])]
    sampling = SamplingParams(max_new_tokens=3)
    cache, batch = prefill(vlm.model, rows)
    requests = branch_requests(batch, rows, None, stop_ids=set())
    first_token = generate_continuations(vlm.model, cache, requests, sampling)[0][0]
    requests[0].stop_ids = {first_token}

    steps = list(decode(vlm.model, cache, requests, sampling))

    assert [[i for i, _ in step] for step in steps] == [[0, 1], [1], [1]]
    second = [token for step in steps for i, token in step if i == 1]
    lists = generate_continuations(vlm.model, cache, requests, sampling)
    assert lists == [[first_token], second]


def test_decoding_leaves_the_cache_as_it_was(vlm, records):
    """A fork is a copy: the same requests give the same tokens again."""
    rows = [questions_of(vlm, records[:1])[0].row]
    cache, batch = prefill(vlm.model, rows)
    keys_before = cache.keys.clone()
    requests = branch_requests(batch, rows, random_uniforms(1), stop_ids=set())

    first = generate_continuations(vlm.model, cache, requests, SAMPLING)
    second = generate_continuations(vlm.model, cache, requests, SAMPLING)

    assert first == second
    assert torch.equal(cache.keys, keys_before)


def test_the_context_limit_ends_a_continuation(vlm, records):
    """With 4 tokens left, 4 are generated, and no position beyond the limit is computed."""
    # Arrange: a model whose context is 4 tokens longer than the prompt.
    (question,) = questions_of(vlm, records[:1])
    (image_tokens,) = vlm.model.project_image_features(question.features)
    context_length = len(question.prompt_ids) - 1 + len(image_tokens) + 4
    text = replace(vlm.model.config.text, max_position_embeddings=context_length)
    vlm.model.config = replace(vlm.model.config, text=text)
    largest_positions = []
    forward = vlm.model.language_model.forward

    def recording_forward(x, positions, *args, **kwargs):
        largest_positions.append(int(positions.max()))
        return forward(x, positions, *args, **kwargs)

    vlm.model.language_model.forward = recording_forward

    responses = generate_rows(vlm, [question.row], stop_ids=set())

    assert len(responses[0]) == 4
    assert max(largest_positions) < context_length


# --- rewinding the cache ---


def test_a_rewound_cache_equals_a_fresh_prefill(any_vlm, records):
    """Prefill image, prompt and response, then rewind to several cuts.

    Keys, values and continuations are those of a prefill that ended at the cut.
    """
    model = any_vlm.model
    example = encode_example(any_vlm, records[0], [records[0].chosen])
    (response,) = example.responses
    features = any_vlm.encode_images(records[0].paths)
    (uniforms,) = random_uniforms(1)
    whole = PackedExample.of(example.prompt_ids, features, [response])
    cache, batch = prefill(model, [whole])
    prefix_length = batch.prefix_lengths[0]
    for cut in (0, 1, 7, len(response) - 1):
        short = PackedExample.of(
            example.prompt_ids, features, [[*response[:cut], any_vlm.tokenizer.eos]]
        )
        fresh_cache, _ = prefill(model, [short])
        request = DecodeRequest(
            row=0,
            cache_positions=range(prefix_length + cut),
            input_ids=[[example.prompt_ids[-1], *response][cut]],
            position=batch.first_positions[0] + cut,
            uniforms=uniforms,
            stop_ids=set(),
        )

        rewound = generate_continuations(model, cache, [request], SAMPLING)
        fresh = generate_continuations(model, fresh_cache, [request], SAMPLING)

        context = response[:cut]
        expected = recomputed(
            any_vlm, example.prompt_ids, features, uniforms, stop_ids=set(), context=context
        )
        assert rewound == fresh == [expected]
        length = prefix_length + 1 + cut
        for name in ("keys", "values"):
            actual = getattr(cache, name)[:, :, :, :length]
            wanted = getattr(fresh_cache, name)[:, :, :, :length]
            torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_several_input_tokens_equal_a_longer_prefill(vlm, records):
    """Tokens that differ from the prefilled response are read together, others one by one."""
    # Arrange: one context agrees with the response for one token only, the other for four.
    example = encode_example(vlm, records[0], [records[0].chosen])
    (response,) = example.responses
    features = vlm.encode_images(records[0].paths)
    uniforms = random_uniforms(2)
    cache, batch = prefill(vlm.model, [PackedExample.of(example.prompt_ids, features, [response])])
    prefix_length, first_position = batch.prefix_lengths[0], batch.first_positions[0]
    differing = [response[0], response[5], response[3], response[5]]
    same = response[:4]
    requests = [
        DecodeRequest(
            row=0,
            cache_positions=range(prefix_length + 1),
            input_ids=differing,
            position=first_position + 1,
            uniforms=uniforms[0],
            stop_ids=set(),
        ),
        DecodeRequest(
            row=0,
            cache_positions=range(prefix_length + 4),
            input_ids=same[3:],
            position=first_position + 4,
            uniforms=uniforms[1],
            stop_ids=set(),
        ),
    ]

    responses = generate_continuations(vlm.model, cache, requests, SAMPLING)

    for context, numbers, tokens in zip((differing, same), uniforms, responses, strict=True):
        expected = recomputed(
            vlm, example.prompt_ids, features, numbers, stop_ids=set(), context=context
        )
        assert tokens == expected
