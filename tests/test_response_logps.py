"""These tests check the log-probs of whole responses of the shipped model.

They are compared with the reference, which runs each sequence anew for every token.
"""

from dataclasses import replace

import pytest
import torch
from conftest import token_logps_per_response

from minialign import reference
from minialign.data.packing import PackedExample, pack
from minialign.generation.decoding import prefill
from minialign.logprobs import (
    batches_that_fit,
    left_align,
    response_hidden_states,
    response_logps,
    token_logps,
)
from minialign.methods.base import encode_example, pack_examples
from minialign.models.policy import Policy
from minialign.utils.files import InputError


def close(actual, expected, num_tokens) -> bool:
    """Tell whether summed log-probs agree within max(1e-6 |x|, 1e-5 tokens) nats."""
    tolerance = max(1e-6 * abs(float(expected)), 1e-5 * num_tokens)
    return abs(float(actual) - float(expected)) <= tolerance


def without_responses(rows):
    """Return the rows as they are before anything is generated, every response empty."""
    prompts = []
    for row in rows:
        branches = [(lead, []) for lead, _ in row.branches]
        prompts.append(replace(row, branches=branches))
    return prompts


def test_left_align_returns_each_rows_scored_positions_first():
    """The rows of the docstring of left_align."""
    is_scored = torch.tensor(
        [
            [False, False, True, True, False, True, True, False],
            [False, False, False, True, False, False, True, False],
        ]
    )

    assert left_align(is_scored).tolist() == [[2, 3, 5, 6], [3, 6, 0, 1]]


def test_batched_log_probs_equal_the_reference(vlm, records):
    """A padded batch of three pairs. The reference runs each sequence anew for each token."""
    examples = []
    for record in records[3:6]:
        examples.append(encode_example(vlm, record, [record.chosen, "A red cup is here."]))

    with torch.no_grad():
        logps, token_counts = response_logps(vlm.model, pack_examples(vlm, examples))

    for row, example in enumerate(examples):
        features = vlm.encode_images(example.record.paths)
        for column, response in enumerate(example.responses):
            with torch.no_grad():
                expected = reference.response_logp(
                    vlm.model, example.prompt_ids, features, response
                )
            assert token_counts[row, column] == len(response)
            assert close(logps[row, column], expected, len(response))


def test_token_log_probs_sum_to_the_response(vlm, records):
    examples = []
    for record in records[:2]:
        examples.append(encode_example(vlm, record, [record.chosen, "No."]))
    rows = pack_examples(vlm, examples)

    with torch.no_grad():
        summed_logps, token_counts = response_logps(vlm.model, rows)
        per_response = token_logps_per_response(vlm.model, rows)

    assert [len(logps) for logps in per_response] == token_counts.flatten().tolist()
    for logps, summed in zip(per_response, summed_logps.flatten(), strict=True):
        assert close(logps.sum(), summed, len(logps))


def test_rows_that_differ_in_their_number_of_responses_give_flat_results(vlm, records):
    pair = encode_example(vlm, records[0], [records[0].chosen, "No."])
    single = encode_example(vlm, records[1], [records[1].chosen])

    with torch.no_grad():
        logps, token_counts = response_logps(vlm.model, pack_examples(vlm, [pair, single]))
        pair_logps, _ = response_logps(vlm.model, pack_examples(vlm, [pair]))
        single_logps, _ = response_logps(vlm.model, pack_examples(vlm, [single]))

    responses = pair.responses + single.responses
    assert token_counts.tolist() == [len(response) for response in responses]
    expected = torch.cat([pair_logps.flatten(), single_logps.flatten()])
    for i, response in enumerate(responses):
        assert close(logps[i], expected[i], len(response))


def test_end_token_is_scored(vlm, records):
    """Another last token has another log-prob, and the tokens before it keep theirs."""
    example = encode_example(vlm, records[0], [records[0].chosen])
    response = example.responses[0]
    assert response[-1] == vlm.tokenizer.eos
    other_end = [*response[:-1], response[0]]
    no_end = response[:-1]
    row = PackedExample.of(
        example.prompt_ids,
        vlm.encode_images(example.record.paths),
        [response, other_end, no_end],
    )

    with torch.no_grad():
        logps, other_end_logps, no_end_logps = token_logps_per_response(vlm.model, [row])

    assert len(logps) == len(response)
    assert abs(logps[-1] - other_end_logps[-1]) > 1e-3
    torch.testing.assert_close(logps[:-1], no_end_logps, rtol=1e-5, atol=1e-5)


def test_log_prob_depends_on_the_image(vlm, records):
    example = encode_example(vlm, records[0], [records[0].chosen])
    example_with_other_image = replace(example, record=records[1])

    with torch.no_grad():
        logps, _ = response_logps(vlm.model, pack_examples(vlm, [example]))
        other_logps, _ = response_logps(vlm.model, pack_examples(vlm, [example_with_other_image]))

    assert abs(logps.item() - other_logps.item()) > 1e-3


def test_bfloat16_model_scores_in_fp32_near_the_fp32_model(vlm, records):
    """bfloat16 has three digits: 2 % of the sum and a hundredth of a nat a token are allowed."""
    examples = []
    for record in records[:2]:
        examples.append(encode_example(vlm, record, [record.chosen, "No."]))

    with torch.no_grad():
        exact, token_counts = response_logps(vlm.model, pack_examples(vlm, examples))
        vlm.model.bfloat16()
        vlm.feature_cache.clear()
        rounded, _ = response_logps(vlm.model, pack_examples(vlm, examples))

    assert rounded.dtype == torch.float32
    assert ((rounded - exact).abs() <= 0.02 * exact.abs() + 0.01 * token_counts).all()


# --- With the prompts' cache


@pytest.mark.parametrize("ragged", [False, True])
def test_responses_scored_from_their_prompts_cache_equal_whole_rows_and_reference(
    vlm, records, ragged
):
    """Ragged: prompts of several lengths, one of them with most of its image tokens masked."""
    texts = [
        ["A cup.", "There are two red dogs here."],
        ["No.", "Yes."],
        ["A lamp and a bed.", "No."],
    ]
    prompts_of = records[:3] if ragged else [records[0]] * 3
    examples = []
    for record, responses in zip(prompts_of, texts, strict=True):
        examples.append(encode_example(vlm, record, responses))
    rows = pack_examples(vlm, examples)
    if ragged:
        rows[1] = replace(rows[1], visible=[0, 5, 63])

    with torch.no_grad():
        cache, batch = prefill(vlm.model, without_responses(rows))
        keys_before = cache.keys.clone()
        from_cache = token_logps_per_response(vlm.model, rows, cache)
        from_whole_rows = token_logps_per_response(vlm.model, rows)

    assert (len(set(batch.prefix_lengths)) > 1) == ragged
    assert torch.equal(cache.keys, keys_before)  # the cache can be used again
    for cached, whole in zip(from_cache, from_whole_rows, strict=True):
        torch.testing.assert_close(cached, whole, rtol=1e-6, atol=1e-5)
    i = 0
    for row in rows:
        visible = None if row.visible is None else set(row.visible)
        for lead, response in row.branches:
            with torch.no_grad():
                expected = reference.token_logps(
                    vlm.model, row.prefix + lead, row.image_features, response, visible
                )
            torch.testing.assert_close(from_cache[i], torch.tensor(expected), rtol=1e-6, atol=1e-5)
            i += 1


def test_only_positions_after_the_shortest_prefix_are_computed_from_a_cache(vlm, records):
    """A hook counts positions. A cache with other values gives other numbers, so it is read."""
    examples = []
    for record in records[:3]:
        examples.append(encode_example(vlm, record, ["A cup.", "No."]))
    rows = pack_examples(vlm, examples)
    row_length = pack(vlm.model, rows).ids.shape[1]
    computed = []

    def count_positions(module, inputs):
        computed.append(inputs[0].shape[1])

    with torch.no_grad():
        cache, batch = prefill(vlm.model, without_responses(rows))
        from_whole_rows = torch.cat(token_logps_per_response(vlm.model, rows))
        hook = vlm.model.language_model.layers[0].register_forward_pre_hook(count_positions)
        token_logps_per_response(vlm.model, rows, cache)
        hook.remove()
        cache.values[:, :, :, 3] += 1.0
        from_changed_cache = torch.cat(token_logps_per_response(vlm.model, rows, cache))

    assert min(batch.prefix_lengths) > 64
    assert computed == [row_length - min(batch.prefix_lengths)]
    assert not torch.allclose(from_changed_cache, from_whole_rows, atol=1e-2)


# --- With fewer logits at a time


def sums_and_gradient(vlm, rows, policy, max_logits):
    """Return each response's log-prob, the gradient of their weighted sum, and response lengths."""
    hidden, targets, lengths = response_hidden_states(vlm.model, rows)
    logps = token_logps(hidden, vlm.model.vocab_head, targets, max_logits=max_logits)
    sums = torch.stack([response.sum() for response in logps.split(lengths)])
    weights = torch.linspace(-1, 1, len(sums))
    gradients = torch.autograd.grad((sums * weights).sum(), list(policy.parameters().values()))
    flat_gradient = torch.cat([gradient.flatten() for gradient in gradients])
    return sums.detach(), flat_gradient, lengths


def test_fewer_logits_at_a_time_change_no_sum_and_no_gradient(vlm, records):
    """The budgets go down to the smallest block. The last block is not always full."""
    policy = Policy(vlm.model, 4, 8)
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)  # at 0, lora_A would have no gradient
    examples = []
    for record in records[:3]:
        examples.append(encode_example(vlm, record, [record.chosen, "No."]))
    rows = pack_examples(vlm, examples)
    expected_sums, expected_gradient, lengths = sums_and_gradient(vlm, rows, policy, 1 << 22)
    vocab_size = len(vlm.model.vocab_head)
    num_tokens = sum(lengths)
    assert num_tokens * vocab_size < 1 << 22
    assert vocab_size % 192 != 0
    assert expected_gradient.norm() > 0

    for max_logits in (1, 192 * num_tokens + 5, 320 * num_tokens, 639 * num_tokens):
        sums, gradient, _ = sums_and_gradient(vlm, rows, policy, max_logits)

        for actual, expected, length in zip(sums, expected_sums, lengths, strict=True):
            assert close(actual, expected, length)
        distance = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert distance < 1e-5


def test_an_empty_response_is_refused(vlm, records):
    """It has no token whose log-prob counts, and a sum over nothing would be 0, the best of all."""
    example = encode_example(vlm, records[0], [records[0].chosen, "No."])
    example.responses[1] = []

    with pytest.raises(InputError, match="a response is empty"):
        response_logps(vlm.model, pack_examples(vlm, [example]))


@pytest.mark.parametrize(
    "lengths, expected",
    [
        ([3, 3, 3], [(0, 2), (2, 3)]),  # three rows are more than a batch
        ([3, 4, 5, 1], [(0, 2), (2, 3), (3, 4)]),  # 2 * 4 positions fit, 2 * 5 do not
        ([5, 3, 3], [(0, 1), (1, 3)]),
        ([9, 9], [(0, 1), (1, 2)]),  # a row that does not fit is read alone
        ([], []),
    ],
)
def test_neighbors_that_fit_are_read_together(lengths, expected):
    """At most two rows, and at most 8 positions with padding."""
    batches = batches_that_fit(lengths, batch_size=2, max_tokens=8)

    assert [(batch.start, batch.stop) for batch in batches] == expected


def test_only_positions_bound_a_batch_without_a_number_of_rows():
    assert batches_that_fit([2, 2, 2, 2, 2], max_tokens=8) == [slice(0, 4), slice(4, 5)]
