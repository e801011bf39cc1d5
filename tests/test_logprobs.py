"""Log-probabilities of responses: equal to a token-by-token loop, to the library's log_softmax, and to its gradients."""
from dataclasses import replace

import pytest
import torch

from minialign import plain
from minialign.logprobs import response_logps, token_logps
from minialign.methods import encode_example, rows_of
from minialign.rows import Row


def close(a, b, tokens):
    """Within the tolerance for summed log-probs: max(1e-6 |x|, 1e-5 tokens) nats."""
    a, b = float(a), float(b)
    return abs(a - b) <= max(1e-6 * abs(b), 1e-5 * tokens)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def problem(N=23, D=16, V=37):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, slope = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((N, D), (V, D), (N,)))
    return hidden, weight, torch.randint(V, (N,), generator=generator), slope


def test_a_value_worked_by_hand():
    """Logits (ln 1, ln 2, ln 5): the second token has probability 2/8."""
    weight = torch.tensor([1.0, 2.0, 5.0]).log()[:, None]
    assert token_logps(torch.ones(1, 1), weight, torch.tensor([1])).item() == pytest.approx(-1.3862943611)


@pytest.mark.parametrize("chunk", [1, 5, 23, 1024])
def test_gradients_equal_those_of_log_softmax(chunk):
    """Values and both gradients against autograd through log_softmax, in float64 (log-probs themselves are kept in fp32), for any chunk."""
    hidden, weight, targets, slope = problem()
    ours = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    theirs = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    logps = token_logps(*ours, targets, chunk)
    expected = torch.log_softmax(theirs[0] @ theirs[1].T, -1).gather(1, targets[:, None])[:, 0]
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    (logps * slope).sum().backward()
    (expected * slope).sum().backward()
    for mine, reference in zip(ours, theirs):
        assert distance(mine.grad, reference.grad) <= 1e-6


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained):
    """A frozen head gets none and its trained neighbour the same as when both are trained."""
    hidden, weight, targets, slope = problem()
    tensors = {"hidden": hidden, "weight": weight}
    both = torch.autograd.grad((token_logps(hidden.clone().requires_grad_(), h := weight.clone().requires_grad_(), targets, 5) * slope).sum(), h)[0]
    tensors[trained].requires_grad_()
    (token_logps(hidden, weight, targets, 5) * slope).sum().backward()
    other = "weight" if trained == "hidden" else "hidden"
    assert tensors[other].grad is None and tensors[trained].grad is not None
    if trained == "weight":
        assert torch.equal(weight.grad, both)


def test_the_second_gradient_is_not_silently_wrong():
    """backward is written by hand: asking to differentiate it again must not give a number."""
    hidden, weight, targets, _ = problem()
    hidden.requires_grad_()
    slope, = torch.autograd.grad(token_logps(hidden, weight, targets).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.sum(), hidden)


def test_a_far_too_large_logit_stays_finite():
    weight = torch.tensor([[1e4], [-1e4]])
    hidden = torch.ones(2, 1, requires_grad=True)
    logps = token_logps(hidden, weight, torch.tensor([0, 1]))
    logps.sum().backward()
    assert logps.tolist() == [0.0, -2e4] and hidden.grad.isfinite().all()


def test_batched_equals_token_by_token(subject, records):
    """Every response of a padded batch of pairs against plain.response_logp, which runs a sequence anew for each token."""
    examples = [encode_example(subject, record, [record.chosen, "A red cup is here."]) for record in records[3:6]]
    with torch.no_grad():
        logps, counts = response_logps(subject.model, rows_of(subject, examples))
        for row, example in enumerate(examples):
            for column, response in enumerate(example.responses):
                slow = plain.response_logp(subject.model, example.prompt, subject.look(example.record.paths), response)
                assert counts[row, column] == len(response) and close(logps[row, column], slow, len(response))


def test_per_token_values_sum_to_the_response(subject, records):
    examples = [encode_example(subject, record, [record.chosen, "No."]) for record in records[:2]]
    with torch.no_grad():
        logps, counts = response_logps(subject.model, rows_of(subject, examples))
        tokens = response_logps(subject.model, rows_of(subject, examples), per_token=True)
    assert [len(one) for one in tokens] == counts.flatten().tolist()
    for one, whole in zip(tokens, logps.flatten()):
        assert close(one.sum(), whole, len(one))


def test_the_end_token_is_scored(subject, records):
    """Tokens are counted with it, and another last token gives another value; the tokens before it keep theirs."""
    example = encode_example(subject, records[0], [records[0].chosen])
    ids = example.responses[0]
    assert ids[-1] == subject.tokenizer.eos
    row = Row.of(example.prompt, subject.look(example.record.paths), [ids, [*ids[:-1], ids[0]], ids[:-1]])
    with torch.no_grad():
        ended, other, cut = response_logps(subject.model, [row], per_token=True)
    assert len(ended) == len(ids) and abs(ended[-1] - other[-1]) > 1e-3
    torch.testing.assert_close(ended[:-1], cut, rtol=1e-5, atol=1e-5)


def test_changing_the_picture_changes_the_log_prob(subject, records):
    example = encode_example(subject, records[0], [records[0].chosen])
    with torch.no_grad():
        here, there = (response_logps(subject.model, rows_of(subject, [replace(example, record=record)]))[0].item() for record in records[:2])
    assert abs(here - there) > 1e-3


def test_a_bfloat16_model_scores_in_fp32_near_the_fp32_model(subject, records):
    """Only the model is rounded: log-probs come back in fp32, and within 2 % plus a hundredth of a nat a token of the fp32 model's."""
    examples = [encode_example(subject, record, [record.chosen, "No."]) for record in records[:2]]
    with torch.no_grad():
        exact, counts = response_logps(subject.model, rows_of(subject, examples))
        subject.model.bfloat16()
        subject.kept.clear()
        rough, _ = response_logps(subject.model, rows_of(subject, examples))
    assert rough.dtype == torch.float32
    assert ((rough - exact).abs() <= .02 * exact.abs() + .01 * counts).all()
