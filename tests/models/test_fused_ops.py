"""Each fused op equals its plain form, in outputs and in gradients."""

import math

import pytest
import torch

from minialign.models.fused_ops import (
    SharedPrefix,
    SwiGLU,
    apply_rope,
    concat_pieces,
    lora_linears_plain,
    rope_plain,
    shared_prefix_plain,
    swiglu_plain,
)
from minialign.models.lora import LoRALinear, lora_linears


@pytest.fixture(autouse=True)
def seed():
    """Draw the same random tensors in each run."""
    torch.manual_seed(0)


def random_tensor(*shape):
    """Return a tensor of standard normal values in float64."""
    return torch.randn(*shape, dtype=torch.float64)


def assert_all_close(tensors, expected_tensors, **tolerances):
    """Compare two lists of tensors one by one."""
    for tensor, expected in zip(tensors, expected_tensors, strict=True):
        torch.testing.assert_close(tensor, expected, **tolerances)


# --- RoPE, whose backward pass rotates back ---


def test_rope_by_hand():
    """Channels 0 and 2 are one pair, 1 and 3 the other, each with its own angle.

    (1, 0) turned by 90 degrees is (0, 1). (3, 4) turned by 180 degrees is (-3, -4).
    """
    angles = torch.tensor([math.pi / 2, math.pi], dtype=torch.float64).view(1, 1, 2)
    x = torch.tensor([1.0, 3.0, 0.0, 4.0], dtype=torch.float64).view(1, 1, 1, 4)

    rotated = apply_rope(x, angles.cos(), angles.sin())

    expected = torch.tensor([0.0, -3.0, 1.0, -4.0], dtype=torch.float64)
    torch.testing.assert_close(rotated.flatten(), expected, rtol=0, atol=1e-12)


def test_rope_equals_its_plain_form():
    x = random_tensor(2, 3, 2, 6).requires_grad_()
    angles = random_tensor(2, 3, 3)
    cos = angles.cos()
    sin = angles.sin()
    grad_rotated = random_tensor(2, 3, 2, 6)

    rotated = apply_rope(x, cos, sin)
    (grad,) = torch.autograd.grad(rotated, x, grad_rotated)

    expected = rope_plain(x, cos, sin)
    (expected_grad,) = torch.autograd.grad(expected, x, grad_rotated)
    assert_all_close([rotated, grad], [expected, expected_grad], rtol=0, atol=1e-12)


def test_the_gradient_of_rope_is_its_slope():
    """Finite differences in float64, which know neither of the two forms."""
    x = random_tensor(2, 3, 2, 6).requires_grad_()
    angles = random_tensor(2, 3, 3)
    assert torch.autograd.gradcheck(apply_rope, (x, angles.cos(), angles.sin()))


def test_a_second_gradient_of_rope_raises_an_error():
    """A backward pass written by hand must not give a wrong second gradient without a word."""
    x = random_tensor(1, 2, 1, 4).requires_grad_()
    rotated = apply_rope(x, cos=random_tensor(1, 2, 2), sin=random_tensor(1, 2, 2))
    (grad,) = torch.autograd.grad((rotated**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# --- the shared prefix of keys and values ---


def test_the_shared_prefix_equals_its_plain_form():
    """The gradient of the slice is added to that of the whole."""
    k = random_tensor(2, 3, 7, 4).requires_grad_()
    weight_of_whole = random_tensor(2, 3, 7, 4)
    weight_of_prefix = random_tensor(2, 3, 5, 4)

    def gradient_of_k(whole, prefix):
        # The products make new gradients, which the op may write to.
        loss = (whole * weight_of_whole).sum() + (prefix * weight_of_prefix).sum()
        return torch.autograd.grad(loss, k)[0]

    whole, prefix = SharedPrefix.apply(k, 5)
    grad = gradient_of_k(whole, prefix)

    expected_whole, expected_prefix = shared_prefix_plain(k, 5)
    expected_grad = gradient_of_k(expected_whole, expected_prefix)
    assert torch.equal(whole, expected_whole)
    assert torch.equal(prefix, expected_prefix)
    assert torch.equal(grad, expected_grad)


def test_pieces_are_concatenated_along_the_positions():
    first = random_tensor(2, 3, 4)
    second = random_tensor(2, 5, 4)
    assert concat_pieces(first) is first
    assert torch.equal(concat_pieces(first, second), torch.cat([first, second], dim=1))


# --- SwiGLU, which computes silu(gate) a second time ---


@pytest.mark.parametrize("trained", [("gate", "up"), ("gate",), ("up",)], ids="+".join)
def test_swiglu_equals_its_plain_form(trained):
    """Ordinary values and ones where silu is flat, with a gradient for both factors and for one."""
    gate = 3 * torch.randn(2, 5, 9)
    up = 3 * torch.randn(2, 5, 9)
    grad_product = torch.randn(2, 5, 9)
    gate[0, 0, :3] = torch.tensor([0.0, 90.0, -90.0])
    gate.requires_grad_("gate" in trained)
    up.requires_grad_("up" in trained)
    sources = [tensor for tensor in (gate, up) if tensor.requires_grad]

    product = SwiGLU.apply(gate, up)
    gradients = torch.autograd.grad(product, sources, grad_product)

    expected = swiglu_plain(gate, up)
    expected_gradients = torch.autograd.grad(expected, sources, grad_product)
    assert torch.equal(product, expected)
    assert_all_close(gradients, expected_gradients, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_swiglu_is_its_slope():
    """Finite differences in float64, which do not know the derivative of silu."""
    gate = random_tensor(3, 4).requires_grad_()
    up = random_tensor(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(SwiGLU.apply, (gate, up))


# --- LoRA layers that read the same input ---


def lora_layer(out_features, bias, rank):
    """Make a frozen layer of 6 inputs with an adapter whose weights are all random."""
    linear = torch.nn.Linear(6, out_features, bias=bias).requires_grad_(False)
    layer = LoRALinear(linear, rank, 4, torch.default_generator).double()
    torch.nn.init.normal_(layer.lora_B)
    return layer


@pytest.fixture()
def layers():
    """Make three layers of one input, one of them with a bias, with adapters of two ranks."""
    return [
        lora_layer(out_features=5, bias=True, rank=2),
        lora_layer(out_features=7, bias=False, rank=3),
        lora_layer(out_features=5, bias=False, rank=2),
    ]


@pytest.mark.parametrize("recompute", [False, True])
def test_lora_linears_equal_their_plain_form(layers, recompute):
    """Outputs and all gradients of three layers of one x, which is stored or computed again.

    The gradients of A and B are rounded to fp32 on their way, hence the tolerance.
    """
    h = random_tensor(2, 4, 6).requires_grad_()
    weights = [h]
    grad_outputs = []
    for layer in layers:
        weights += [layer.lora_A, layer.lora_B]
        grad_outputs.append(random_tensor(2, 4, len(layer.lora_B)))

    recompute_from = (torch.tanh, h) if recompute else None
    outputs = lora_linears(h.tanh(), layers, recompute_from=recompute_from)
    gradients = torch.autograd.grad(outputs, weights, grad_outputs)

    expected_outputs = lora_linears_plain(h.tanh(), layers)
    expected_gradients = torch.autograd.grad(expected_outputs, weights, grad_outputs)
    assert_all_close(outputs, expected_outputs, rtol=1e-6, atol=1e-6)
    assert_all_close(gradients, expected_gradients, rtol=1e-6, atol=1e-6)


def test_layers_with_and_without_adapters_may_be_mixed(layers):
    """A plain layer and one whose adapter is off are computed by themselves, the others fused."""
    layers[0] = layers[0].base
    layers[1].enabled = False
    x = random_tensor(2, 4, 6)

    outputs = lora_linears(x, layers)

    assert_all_close(outputs, lora_linears_plain(x, layers), rtol=1e-6, atol=1e-6)
    assert torch.equal(outputs[1], layers[1].base(x))


def test_a_second_gradient_of_lora_raises_an_error():
    """A backward pass written by hand must not give a wrong second gradient without a word."""
    layer = LoRALinear(torch.nn.Linear(6, 5), 2, 4, torch.Generator())
    (output,) = lora_linears(torch.randn(3, 6), [layer])
    loss = output.square().sum()
    (grad,) = torch.autograd.grad(loss, layer.lora_B, create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), layer.lora_A)


@pytest.mark.parametrize("recompute", [False, True])
def test_an_input_that_can_be_recomputed_is_not_stored(recompute):
    """With `recompute_from`, the graph holds what x is computed from and not x."""
    layer = LoRALinear(torch.nn.Linear(64, 8), 2, 4, torch.Generator())
    h = torch.randn(50, 64, requires_grad=True)
    x = h.tanh()
    stored = []

    def remember(tensor):
        stored.append(tensor.data_ptr())
        return tensor

    recompute_from = (torch.tanh, h) if recompute else None
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        lora_linears(x, [layer], recompute_from=recompute_from)

    assert (x.data_ptr() in stored) == (not recompute)
    assert (h.data_ptr() in stored) == recompute
