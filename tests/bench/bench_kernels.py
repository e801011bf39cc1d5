"""Measure what other kernels would gain in a warm DPO step.

All sides take the same step, on the same pairs and weights. They differ in functions of the
decoder:

as it is         Ours: hand-written ops (`minialign/models/fused_ops.py`) and torch's own kernels.
norm             RMSNorm, compiled from its equation.
rope             `rope_plain`, compiled.
gate             `swiglu_plain` and its gradients, compiled.
norm, rope, gate All three.
cuDNN            Attention by cuDNN's kernel where it can, on CUDA alone.
compiled layer   LoRA, RoPE and gate in their plain forms, and the whole layer compiled by torch:
                 what the compiler makes of textbook code. Attention stays ours.

"gain" is the share of the time that a side saves. "difference" is the length (L2 norm) of its
gradient minus that of "as it is", over the length of the latter. Compiling takes a while before the
first step. On a CPU it needs a C++ compiler.

--skip is a regular expression. It leaves out the sides whose names it matches, except the first.
"""

import statistics
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from common import is_skipped, make_model, make_pairs, parse_options
from dpo_steps import WARM, OurStep, gpu_peak_of, make_policy
from report import heading, write_figures
from timing import alternate, time_ratio
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from minialign.models import decoder
from minialign.models.fused_ops import lora_linears_plain, rope_plain, swiglu_plain
from minialign.utils.memory import keep_freed_memory

AS_IT_IS = "as it is"

# --- What is compiled


def rms_norm_plain(x, weight, eps):
    """Divide x (..., D) by its root mean square in fp32, and multiply it by weight (D)."""
    x32 = x.float()
    mean_square = x32.square().mean(dim=-1, keepdim=True)
    normed = x32 * torch.rsqrt(mean_square + eps)
    return (normed * weight.float()).to(x.dtype)


def swiglu_gradients_plain(gate, up, grad_product):
    """Return the gradients of gate and up, given that of silu(gate) * up."""
    sigmoid = torch.sigmoid(gate)
    silu_slope = sigmoid * (1 + gate * (1 - sigmoid))
    return grad_product * up * silu_slope, grad_product * gate * sigmoid


compiled_norm = torch.compile(rms_norm_plain)
compiled_rope = torch.compile(rope_plain)
compiled_swiglu = torch.compile(swiglu_plain)
compiled_swiglu_gradients = torch.compile(swiglu_gradients_plain)
compiled_layer = torch.compile(decoder.DecoderLayer.forward)


class CompiledSwiGLU(torch.autograd.Function):
    """`SwiGLU` with a compiled forward and a compiled backward pass."""

    @staticmethod
    def forward(ctx, gate, up):
        """Compute silu(gate) * up."""
        ctx.save_for_backward(gate, up)
        return compiled_swiglu(gate, up)

    @staticmethod
    def backward(ctx, grad_product):
        """Return the gradients of gate and up."""
        gate, up = ctx.saved_tensors
        return compiled_swiglu_gradients(gate, up, grad_product)


class PlainSwiGLU:
    """`swiglu_plain` under the name by which the decoder calls `SwiGLU`."""

    apply = staticmethod(swiglu_plain)


def norm_forward(self, x):
    """Apply a module `nn.RMSNorm` by the compiled function."""
    return compiled_norm(x, self.weight, self.eps)


def lora_linears_without_recomputing(x, layers, recompute_from=None):
    """Apply the layers one after the other. What autograd needs is stored."""
    return lora_linears_plain(x, layers)


# --- The exchanges


@contextmanager
def exchange_norm():
    """Exchange the norm of all layers."""
    with patch.object(nn.RMSNorm, "forward", norm_forward):
        yield


@contextmanager
def exchange_rope():
    """Exchange the rotation of queries and keys."""
    with patch.object(decoder, "apply_rope", compiled_rope):
        yield


@contextmanager
def exchange_gate():
    """Exchange the gate of the MLP, and what the backward pass computes again of it."""
    with (
        patch.object(decoder, "SwiGLU", CompiledSwiGLU),
        patch.object(decoder, "swiglu", compiled_swiglu),
    ):
        yield


@contextmanager
def exchange_norm_rope_and_gate():
    """Exchange all three."""
    with exchange_norm(), exchange_rope(), exchange_gate():
        yield


@contextmanager
def prefer_cudnn():
    """Let attention take cuDNN's kernel, and the others only where it cannot."""
    backends = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(backends, set_priority=True):
        yield


@contextmanager
def compile_plain_layer():
    """Exchange LoRA, RoPE and gate by their plain forms, and compile the layer around them."""
    with (
        patch.object(decoder, "lora_linears", lora_linears_without_recomputing),
        patch.object(decoder, "apply_rope", rope_plain),
        patch.object(decoder, "SwiGLU", PlainSwiGLU),
        patch.object(decoder.DecoderLayer, "forward", compiled_layer),
    ):
        yield


EXCHANGES = {
    AS_IT_IS: ExitStack,  # exchanges nothing
    "norm": exchange_norm,
    "rope": exchange_rope,
    "gate": exchange_gate,
    "norm, rope, gate": exchange_norm_rope_and_gate,
    "cuDNN": prefer_cudnn,
    "compiled layer": compile_plain_layer,
}


class ExchangedStep:
    """A DPO step with some functions exchanged."""

    def __init__(self, step, exchange):
        self.step = step
        self.exchange = exchange

    def __call__(self):
        """Take the step and return its loss."""
        with self.exchange():
            return self.step()

    def gradient(self):
        """Take the step and return the gradient of all trained weights as one vector."""
        self()
        parameters = self.step.policy.parameters().values()
        return torch.cat([parameter.grad.flatten() for parameter in parameters])


def make_sides(options):
    """Return the steps to be measured by name."""
    policy = make_policy(options, make_model(options))
    step = OurStep(policy, make_pairs(options), start=WARM)
    sides = {}
    for name, exchange in EXCHANGES.items():
        needs_cuda = name == "cuDNN"
        is_left_out = is_skipped(options, name) or (needs_cuda and options.device != "cuda")
        if name == AS_IT_IS or not is_left_out:
            sides[name] = ExchangedStep(step, exchange)
    return sides


def print_table(options, sides, seconds, differences):
    """Print a line for each side, and return the figures."""
    columns = f"{'side':20}{'ms a step':>10}{'gain':>8}{'difference':>12}"
    if options.device == "cuda":
        columns += f"{'memory':>11}"
    print(columns)
    figures = {}
    for name, side in sides.items():
        step_seconds = statistics.median(seconds[name])
        gain = 1 - time_ratio(seconds, name, AS_IT_IS)
        figures[name] = {"seconds": step_seconds, "gain": gain, "difference": differences[name]}
        line = f"{name:20}{1000 * step_seconds:10.1f}{gain:8.1%}{differences[name]:12.1e}"
        if options.device == "cuda":
            peak_bytes = gpu_peak_of(side)
            figures[name]["peak_bytes"] = peak_bytes
            line += f"{peak_bytes / 1e9:8.1f} GB"
        print(line)
    return figures


def main():
    """Run the benchmark."""
    # 1. The sides, and how far their gradients are from ours.
    options = parse_options(__doc__, skip="")
    keep_freed_memory()  # as train.py does
    sides = make_sides(options)
    our_gradient = sides[AS_IT_IS].gradient()
    differences = {}
    for name, side in sides.items():
        difference = side.gradient() - our_gradient
        differences[name] = float(difference.norm() / our_gradient.norm())

    # 2. The times.
    _, seconds = alternate(sides, options)
    print(heading(options))
    write_figures(options, {"sides": print_table(options, sides, seconds, differences)})


if __name__ == "__main__":
    main()
