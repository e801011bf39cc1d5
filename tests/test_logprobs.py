"""These tests compare fast log-probs with log_softmax, with its gradients and with the reference.

Two files hold the functions of logprobs.py: this one token_logps, test_response_logps.py the rest.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minialign.logprobs import token_logps, token_logps_plain

N = 23  # positions
D = 16  # hidden size
V = 300  # vocabulary


def make_inputs():
    """Return random hidden (N, D), weight (V, D), targets (N,) and gradients of log-probs (N,).

    float64, so that the gradients can be compared closely. The log-probs are fp32 in any case.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64)
    grad_logps = torch.randn(N, generator=generator, dtype=torch.float64)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, grad_logps


def exact_logps(hidden, weight, targets):
    """Return log p(targets) (N,) by log_softmax, in the dtype of the inputs.

    This is not token_logps_plain, which rounds the logits to fp32.
    """
    logits = hidden @ weight.T
    vocab_logps = torch.log_softmax(logits, dim=-1)
    target_logps = vocab_logps.gather(1, targets[:, None])
    return target_logps.squeeze(1)


def relative_distance(actual, expected) -> float:
    """Return |actual - expected| / |expected|."""
    difference = actual - expected
    return float(difference.norm() / expected.norm())


@pytest.mark.parametrize("function", [token_logps_plain, token_logps])
def test_log_prob_worked_by_hand(function):
    """Logits ln 1, ln 2, ln 5: the second token has probability 2/8, and ln 0.25 = -1.386."""
    weight = torch.tensor([1.0, 2.0, 5.0]).log()[:, None]

    logps = function(torch.ones(1, 1), weight, torch.tensor([1]))

    assert logps.item() == pytest.approx(-1.3862943611)


@pytest.mark.parametrize("max_logits", [1, 23 * 128, 23 * 300, 1 << 20])
def test_log_probs_and_gradients_equal_those_of_log_softmax(max_logits):
    """The budgets make 5, 3, 2 and 1 blocks. Log-probs are fp32, hence the tolerance of 1e-6."""
    hidden, weight, targets, grad_logps = make_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()

    logps = token_logps(hidden, weight, targets, max_logits=max_logits)
    gradients = torch.autograd.grad((logps * grad_logps).sum(), [hidden, weight])

    expected = exact_logps(hidden, weight, targets)
    expected_gradients = torch.autograd.grad((expected * grad_logps).sum(), [hidden, weight])
    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    assert relative_distance(gradients[0], expected_gradients[0]) <= 1e-6
    assert relative_distance(gradients[1], expected_gradients[1]) <= 1e-6


def test_plain_and_blockwise_log_probs_are_equal():
    hidden, weight, targets, _ = make_inputs()

    logps = token_logps(hidden, weight, targets, max_logits=1)

    expected = token_logps_plain(hidden, weight, targets)
    torch.testing.assert_close(logps, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_only_what_is_trained_gets_a_gradient(trained):
    """The trained one gets the same gradient, to the bit, as when both are trained."""
    hidden, weight, targets, grad_logps = make_inputs()
    both = {"hidden": hidden.clone(), "weight": weight.clone()}
    both["hidden"].requires_grad_()
    both["weight"].requires_grad_()
    logps = token_logps(both["hidden"], both["weight"], targets, max_logits=5)
    (logps * grad_logps).sum().backward()
    frozen = "weight" if trained == "hidden" else "hidden"

    inputs = {"hidden": hidden, "weight": weight}
    inputs[trained].requires_grad_()
    logps = token_logps(inputs["hidden"], inputs["weight"], targets, max_logits=5)
    (logps * grad_logps).sum().backward()

    assert inputs[frozen].grad is None
    assert torch.equal(inputs[trained].grad, both[trained].grad)


@pytest.mark.parametrize("trained", ["hidden", "weight"])
def test_second_derivatives_are_refused(trained):
    """The backward pass is written by hand, so that differentiating it would be silently wrong."""
    hidden, weight, targets, _ = make_inputs()
    inputs = {"hidden": hidden, "weight": weight}
    inputs[trained].requires_grad_()
    logps = token_logps(hidden, weight, targets)
    (gradient,) = torch.autograd.grad(logps.sum(), inputs[trained], create_graph=True)

    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), inputs[trained])


def test_target_outside_the_vocabulary_gives_nan():
    """NaN is better than a wrong number, which nobody would notice where no gradient is needed."""
    hidden, weight, targets, _ = make_inputs()
    targets[:3] = torch.tensor([V, -3, -100])

    with torch.no_grad():
        logps = token_logps(hidden, weight, targets, max_logits=1)

    assert logps.isnan().tolist() == [True] * 3 + [False] * 20


def test_far_too_large_logit_stays_finite():
    weight = torch.tensor([[1e4], [-1e4]])
    hidden = torch.ones(2, 1, requires_grad=True)

    logps = token_logps(hidden, weight, torch.tensor([0, 1]))
    logps.sum().backward()

    assert logps.tolist() == [0.0, -2e4]
    assert hidden.grad.isfinite().all()


@pytest.fixture(scope="module")
def extreme_inputs():
    """Return hidden (40, 4), weight (90, 4) and targets (40,) with logits from -10,000 to 10,000.

    All are whole numbers that fp32 holds exactly, and probabilities of 0 and 1 occur.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(-10, 11, (40, 4), generator=generator).float()
    weight = torch.randint(-250, 251, (90, 4), generator=generator).float()
    targets = torch.randint(90, (40,), generator=generator)
    # Row 0 has the logits 10,000, -10,000 and 10,000 at tokens 0 to 2.
    hidden[0] = 10
    weight[:3] = torch.tensor([[250.0], [-250.0], [250.0]])
    # Half of the targets have the largest logit. Row 1 has the target with the logit -10,000.
    targets[:20] = (hidden @ weight.T).argmax(dim=-1)[:20]
    hidden[1] = 10
    targets[1] = 1
    return hidden, weight, targets


@pytest.mark.parametrize("max_logits", [1, 70 * 40, 1 << 22])
def test_logits_of_ten_thousand_give_the_values_and_gradients_of_float64(
    extreme_inputs, max_logits
):
    hidden, weight, targets = extreme_inputs
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_()
    exact_hidden = hidden.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    expected = exact_logps(exact_hidden, exact_weight, targets)
    expected.sum().backward()
    assert (exact_hidden @ exact_weight.T).abs().max() == 1e4
    assert expected.min() < -2e4 + 1
    assert expected.max() > -1e-9

    logps = token_logps(hidden, weight, targets, max_logits=max_logits)
    logps.sum().backward()

    torch.testing.assert_close(logps.double(), expected, rtol=1e-6, atol=1e-6)
    assert hidden.grad.isfinite().all()
    assert weight.grad.isfinite().all()
    assert relative_distance(hidden.grad, exact_hidden.grad) < 1e-6
    assert relative_distance(weight.grad, exact_weight.grad) < 1e-6


class LargestProduct(TorchDispatchMode):
    """While active, notes the most numbers in any matrix product with N rows or columns."""

    def __init__(self):
        super().__init__()
        self.most_numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and N in result.shape:
            self.most_numbers = max(self.most_numbers, result.numel())
        return result


@pytest.mark.parametrize(
    "max_logits, most_logits",
    [
        (1, 64 * N),  # a block has at least 64 tokens
        (65 * N - 1, 64 * N),
        (128 * N, 128 * N),
        (192 * N - 1, 128 * N),
        (1 << 20, V * N),
    ],
)
def test_no_more_logits_than_the_budget_exist_at_a_time(max_logits, most_logits):
    """In the forward and the backward pass, with the vocabulary head trained too."""
    hidden, weight, targets, grad_logps = make_inputs()
    hidden.requires_grad_()
    weight.requires_grad_()

    with LargestProduct() as largest_product:
        logps = token_logps(hidden, weight, targets, max_logits=max_logits)
        (logps * grad_logps).sum().backward()

    assert largest_product.most_numbers == most_logits
