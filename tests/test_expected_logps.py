"""These tests compare log-probs of several tokens, and their means, with those of all tokens."""

import pytest
import torch

from minialign.logprobs import expected_token_logps, sparse_token_logps

D = 16  # hidden size
V = 300  # vocabulary
COUNTS = [1, 3, 2, 40]  # tokens that each of four distributions supports


def make_inputs(dtype=torch.float32):
    """Return hidden (N, D), weight (V, D), and the same distributions as entries and as (N, V)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(COUNTS), D, generator=generator).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    dense = torch.zeros(len(COUNTS), V)
    token_ids = []
    probs = []
    for position, count in enumerate(COUNTS):
        tokens = torch.randperm(V, generator=generator)[:count]
        token_probs = torch.rand(count, generator=generator).softmax(0)
        dense[position, tokens] = token_probs
        token_ids.append(tokens)
        probs.append(token_probs)
    return hidden, weight, (torch.cat(token_ids), torch.cat(probs), torch.tensor(COUNTS)), dense


def dense_expected_logps(hidden, weight, dense):
    """Return the same from the log-probs of all tokens at every position."""
    vocab_logps = torch.log_softmax((hidden @ weight.T).float(), dim=-1)
    return (dense * vocab_logps).sum(dim=1)


def test_expected_log_prob_worked_by_hand():
    """Logits ln 1, ln 2, ln 5 with q = (0, .5, .5): half of ln 2/8 and half of ln 5/8."""
    weight = torch.tensor([1.0, 2.0, 5.0]).log()[:, None]

    logps = expected_token_logps(
        torch.ones(1, 1),
        weight,
        torch.tensor([1, 2]),
        torch.tensor([0.5, 0.5]),
        counts=torch.tensor([2]),
    )

    assert logps.item() == pytest.approx(0.5 * (-1.3862943611) + 0.5 * (-0.4700036292))


def test_values_and_gradients_equal_those_of_all_logits():
    """Hidden states and the vocabulary head both get the gradient of the dense sum."""
    results = []
    for is_sparse in (True, False):
        hidden, weight, (token_ids, probs, counts), dense = make_inputs()
        hidden.requires_grad_()
        weight.requires_grad_()
        if is_sparse:
            logps = expected_token_logps(hidden, weight, token_ids, probs, counts=counts)
        else:
            logps = dense_expected_logps(hidden, weight, dense)
        (logps * torch.tensor([1.0, -2.0, 0.5, 3.0])).sum().backward()
        results.append((logps.detach(), hidden.grad, weight.grad))

    for actual, expected in zip(*results, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 1e-6


def test_bfloat16_weights_lose_nothing_beyond_their_own_rounding():
    """Mean rows of the head are formed in fp32, so the result is that of the rounded weights."""
    hidden, weight, (token_ids, probs, counts), dense = make_inputs(torch.bfloat16)

    logps = expected_token_logps(hidden, weight, token_ids, probs, counts=counts)

    expected = dense_expected_logps(hidden.float(), weight.float(), dense)
    # Logits of up to 15 are rounded to 8 bits by the product of the denominator.
    assert torch.allclose(logps, expected, atol=0.06)
    assert logps.dtype == torch.float32


def test_log_probs_of_several_tokens_equal_those_of_all_logits():
    """So do their gradients, where every entry counts differently."""
    results = []
    for is_sparse in (True, False):
        hidden, weight, (token_ids, _, counts), _ = make_inputs()
        hidden.requires_grad_()
        weight.requires_grad_()
        if is_sparse:
            logps = sparse_token_logps(hidden, weight, token_ids, counts=counts)
        else:
            vocab_logps = torch.log_softmax(hidden @ weight.T, dim=-1)
            rows = vocab_logps.repeat_interleave(counts, dim=0)
            logps = rows.gather(1, token_ids[:, None]).squeeze(1)
        (logps * torch.linspace(-1, 2, len(token_ids))).sum().backward()
        results.append((logps.detach(), hidden.grad, weight.grad))

    for actual, expected in zip(*results, strict=True):
        assert float((actual - expected).norm() / expected.norm()) < 1e-6
