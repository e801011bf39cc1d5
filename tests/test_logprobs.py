"""Log-probabilities of responses: equal to a token-by-token loop, to the library's log_softmax, and to its gradients."""

from dataclasses import replace

import pytest
import torch
from conftest import each_token
from torch.utils._python_dispatch import TorchDispatchMode

from minialign import reference
from minialign.data.packing import PackedExample, pack
from minialign.generation.decoding import prefill
from minialign.logprobs import response_hidden_states, response_logps, token_logps
from minialign.methods.base import encode_example, pack_examples
from minialign.models.policy import Policy


def close(a, b, tokens):
    """Within the tolerance for summed log-probs: max(1e-6 |x|, 1e-5 tokens) nats."""
    a, b = float(a), float(b)
    return abs(a - b) <= max(1e-6 * abs(b), 1e-5 * tokens)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def problem(N=23, D=16, V=300):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, slope = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((N, D), (V, D), (N,))
    )
    return hidden, weight, torch.randint(V, (N,), generator=generator), slope


def test_a_value_worked_by_hand():
    """Logits (ln 1, ln 2, ln 5): the second token has probability 2/8."""
    weight = torch.tensor([1.0, 2.0, 5.0]).log()[:, None]
    assert token_logps(torch.ones(1, 1), weight, torch.tensor([1])).item() == pytest.approx(
        -1.3862943611
    )


@pytest.mark.parametrize("budget", [1, 23 * 128, 23 * 300, 1 << 20])
def test_gradients_equal_those_of_log_softmax(budget):
    """Values and both gradients against autograd through log_softmax, in float64 (log-probs themselves are kept in fp32), in 5, 3, 2 and 1 blocks."""
    hidden, weight, targets, slope = problem()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logps = token_logps(*ours, targets, budget)
    expected = torch.log_softmax(theirs[0] @ theirs[1].T, -1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    (logps * slope).sum().backward()
    (expected * slope).sum().backward()
    for mine, expected_parameter in zip(ours, theirs):
        assert distance(mine.grad, expected_parameter.grad) <= 1e-6


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained):
    """A frozen head gets none and its trained neighbour the same as when both are trained."""
    hidden, weight, targets, slope = problem()
    tensors = {"hidden": hidden, "weight": weight}
    both = torch.autograd.grad(
        (
            token_logps(
                hidden.clone().requires_grad_(), h := weight.clone().requires_grad_(), targets, 5
            )
            * slope
        ).sum(),
        h,
    )[0]
    tensors[trained].requires_grad_()
    (token_logps(hidden, weight, targets, 5) * slope).sum().backward()
    other = "weight" if trained == "hidden" else "hidden"
    assert tensors[other].grad is None and tensors[trained].grad is not None
    if trained == "weight":
        assert torch.equal(weight.grad, both)


@pytest.mark.parametrize("trained", [0, 1])
def test_the_second_gradient_is_not_silently_wrong(trained):
    """backward is written by hand: asking to differentiate it again must not give a number."""
    *tensors, targets, _ = problem()
    own = tensors[trained].requires_grad_()
    (slope,) = torch.autograd.grad(token_logps(*tensors, targets).sum(), own, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.sum(), own)


def test_a_token_outside_the_vocabulary_has_no_log_prob():
    """Neither above nor below: not a number rather than a wrong one, which would pass unseen where no gradient is asked for."""
    hidden, weight, targets, _ = problem()
    targets[:3] = torch.tensor([300, -3, -100])
    with torch.no_grad():
        assert token_logps(hidden, weight, targets, 1).isnan().tolist() == [True] * 3 + [False] * 20


def test_a_far_too_large_logit_stays_finite():
    weight = torch.tensor([[1e4], [-1e4]])
    hidden = torch.ones(2, 1, requires_grad=True)
    logps = token_logps(hidden, weight, torch.tensor([0, 1]))
    logps.sum().backward()
    assert logps.tolist() == [0.0, -2e4] and hidden.grad.isfinite().all()


def test_logits_of_ten_thousand_stay_finite_in_fp32():
    """Whole numbers up to 10,000 either way, which fp32 holds exactly: values and gradients are float64's, every probability of 0 and 1 included."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randint(-10, 11, (40, 4), generator=generator).float(),
        torch.randint(-250, 251, (90, 4), generator=generator).float(),
    )
    hidden[0], weight[:3] = (
        10,
        torch.tensor([[250.0], [-250.0], [250.0]]),
    )  # one row with both ends, and the upper one twice
    targets = torch.randint(90, (40,), generator=generator)
    targets[:20] = (hidden @ weight.T).argmax(-1)[:20]
    hidden[1], targets[1] = 10, 1
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    expected = torch.log_softmax(exact[0] @ exact[1].T, -1).gather(1, targets[:, None])[:, 0]
    expected.sum().backward()
    assert (
        (hidden @ weight.T).abs().max() == 1e4
        and expected.min() < -2e4 + 1
        and expected.max() > -1e-9
    )
    for budget in (1, 70 * 40, 1 << 22):
        ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logps = token_logps(*ours, targets, budget)
        logps.sum().backward()
        torch.testing.assert_close(logps.double(), expected.detach(), rtol=1e-6, atol=1e-6)
        for mine, expected_parameter in zip(ours, exact):
            assert (
                mine.grad.isfinite().all() and distance(mine.grad, expected_parameter.grad) < 1e-6
            )


def scored(vlm, rows, policy, budget):
    """Summed log-probs and the gradient of a weighted sum of them, of adapters and projector in one vector, with at most so many logits at a time."""
    hidden, targets, lengths = response_hidden_states(vlm.model, rows)
    sums = torch.stack(
        [
            part.sum()
            for part in token_logps(hidden, vlm.model.vocab_head, targets, budget).split(lengths)
        ]
    )
    (sums * torch.linspace(-1, 1, len(sums))).sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters().values()])
    for p in policy.parameters().values():
        p.grad = None
    return sums.detach(), gradient, lengths


def test_the_budget_of_logits_changes_no_sum_and_no_gradient(vlm, records):
    """Down to the smallest blocks of the vocabulary; the last one is not always full."""
    policy = Policy(vlm.model, 4, 8)
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=0.02)
    rows = pack_examples(
        vlm, [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:3]]
    )
    whole, slope, lengths = scored(vlm, rows, policy, 1 << 22)
    assert (
        sum(lengths) * len(vlm.model.vocab_head) < 1 << 22
        and len(vlm.model.vocab_head) % 192
        and slope.norm() > 0
    )
    for budget in (1, 192 * sum(lengths) + 5, 320 * sum(lengths), 639 * sum(lengths)):
        sums, gradient, _ = scored(vlm, rows, policy, budget)
        assert (
            all(close(a, b, n) for a, b, n in zip(sums, whole, lengths))
            and distance(gradient, slope) < 1e-5
        )


@pytest.mark.parametrize("ragged", [False, True])
def test_responses_are_scored_from_the_cache_of_their_prompts(vlm, records, ragged):
    """As whole rows are, and token by token as in `plain`: prompts of one length or several, responses of several, one with its picture partly hidden."""
    examples = [
        encode_example(vlm, record, texts)
        for record, texts in zip(
            records[:3] if ragged else records[:1] * 3,
            (
                ["A cup.", "There are two red dogs here."],
                ["No.", "Yes."],
                ["A lamp and a bed.", "No."],
            ),
        )
    ]
    rows = pack_examples(vlm, examples)
    rows[1] = replace(rows[1], visible=[0, 5, 63] if ragged else None)
    prompts = [replace(row, branches=[(lead, []) for lead, _ in row.branches]) for row in rows]
    with torch.no_grad():
        cache, batch = prefill(vlm.model, prompts)
        assert (len(set(batch.prefix_lengths)) > 1) == ragged
        kept = cache.keys.clone()
        found, whole = each_token(vlm.model, rows, cache), each_token(vlm.model, rows)
        slow = [
            None
            if row.visible
            else torch.tensor(
                reference.token_logps(vlm.model, row.prefix + lead, row.image_features, response)
            )
            for row in rows
            for lead, response in row.branches
        ]
    assert torch.equal(cache.keys, kept)  # it may be forked again
    assert slow.count(None) == 2 * ragged
    for own, packed, one in zip(found, whole, slow, strict=True):
        assert all(
            torch.allclose(own, other, rtol=1e-6, atol=1e-5)
            for other in (packed, one)
            if other is not None
        )


def test_the_prefix_is_computed_once(vlm, records):
    """From the cache only what lies behind the shortest prefix goes through the layers; another cache gives other numbers."""
    examples = [encode_example(vlm, record, ["A cup.", "No."]) for record in records[:3]]
    rows, widths, layer = (
        pack_examples(vlm, examples),
        [],
        vlm.model.language_model.layers[0],
    )
    with torch.no_grad():
        cache, batch = prefill(
            vlm.model,
            [replace(row, branches=[(lead, []) for lead, _ in row.branches]) for row in rows],
        )
        whole, T = each_token(vlm.model, rows), pack(vlm.model, rows).ids.shape[1]
        layer.register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
        each_token(vlm.model, rows, cache)
        assert widths == [T - min(batch.prefix_lengths)] and min(batch.prefix_lengths) > 64
        cache.values[:, :, :, 3] += 1.0
        assert not torch.allclose(
            torch.cat(each_token(vlm.model, rows, cache)), torch.cat(whole), atol=1e-2
        )


class Widest(TorchDispatchMode):
    """The most numbers in any matrix product with N rows or columns, (N, v) or (v, N)."""

    def __init__(self, N):
        super().__init__()
        self.N, self.most = N, 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        y = function(*arguments, **(named or {}))
        if function is torch.ops.aten.mm.default and self.N in y.shape:
            self.most = max(self.most, y.numel())
        return y


@pytest.mark.parametrize(
    "budget, most",
    [
        (1, 64 * 23),
        (65 * 23 - 1, 64 * 23),
        (128 * 23, 128 * 23),
        (192 * 23 - 1, 128 * 23),
        (1 << 20, 300 * 23),
    ],
)
def test_no_more_logits_than_the_budget_are_formed_at_a_time(budget, most):
    """Forward and backward, with the head trained too; but always those of 64 tokens."""
    hidden, weight, targets, slope = problem()
    with Widest(len(hidden)) as seen:
        (
            token_logps(hidden.requires_grad_(), weight.requires_grad_(), targets, budget) * slope
        ).sum().backward()
    assert seen.most == most


def test_batched_equals_token_by_token(vlm, records):
    """Every response of a padded batch of pairs against plain.response_logp, which runs a sequence anew for each token."""
    examples = [
        encode_example(vlm, record, [record.chosen, "A red cup is here."])
        for record in records[3:6]
    ]
    with torch.no_grad():
        logps, counts = response_logps(vlm.model, pack_examples(vlm, examples))
        for row, example in enumerate(examples):
            for column, response in enumerate(example.responses):
                slow = reference.response_logp(
                    vlm.model, example.prompt_ids, vlm.encode_images(example.record.paths), response
                )
                assert counts[row, column] == len(response) and close(
                    logps[row, column], slow, len(response)
                )


def test_per_token_values_sum_to_the_response(vlm, records):
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:2]]
    with torch.no_grad():
        logps, counts = response_logps(vlm.model, pack_examples(vlm, examples))
        tokens = each_token(vlm.model, pack_examples(vlm, examples))
    assert [len(one) for one in tokens] == counts.flatten().tolist()
    for one, whole in zip(tokens, logps.flatten()):
        assert close(one.sum(), whole, len(one))


def test_the_end_token_is_scored(vlm, records):
    """Tokens are counted with it, and another last token gives another value; the tokens before it keep theirs."""
    example = encode_example(vlm, records[0], [records[0].chosen])
    ids = example.responses[0]
    assert ids[-1] == vlm.tokenizer.eos
    row = PackedExample.of(
        example.prompt_ids,
        vlm.encode_images(example.record.paths),
        [ids, [*ids[:-1], ids[0]], ids[:-1]],
    )
    with torch.no_grad():
        ended, other, cut = each_token(vlm.model, [row])
    assert len(ended) == len(ids) and abs(ended[-1] - other[-1]) > 1e-3
    torch.testing.assert_close(ended[:-1], cut, rtol=1e-5, atol=1e-5)


def test_changing_the_picture_changes_the_log_prob(vlm, records):
    example = encode_example(vlm, records[0], [records[0].chosen])
    with torch.no_grad():
        here, there = (
            response_logps(vlm.model, pack_examples(vlm, [replace(example, record=record)]))[
                0
            ].item()
            for record in records[:2]
        )
    assert abs(here - there) > 1e-3


def test_a_bfloat16_model_scores_in_fp32_near_the_fp32_model(vlm, records):
    """Only the model is rounded: log-probs come back in fp32, and within 2 % plus a hundredth of a nat a token of the fp32 model's."""
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:2]]
    with torch.no_grad():
        exact, counts = response_logps(vlm.model, pack_examples(vlm, examples))
        vlm.model.bfloat16()
        vlm.feature_cache.clear()
        rough, _ = response_logps(vlm.model, pack_examples(vlm, examples))
    assert rough.dtype == torch.float32
    assert ((rough - exact).abs() <= 0.02 * exact.abs() + 0.01 * counts).all()
