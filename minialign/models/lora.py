"""Low-rank adapters (LoRA), and the context in which the policy is its own reference."""

import copy
import math

import torch
from torch import nn

from minialign.models.fused_ops import FusedLoRALinears

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora_linears(x, *layers, again=None):
    """[(..., out_i)] of linear layers that read the same x (..., in); where all of them are adapters they share work and memory (`_Adapted`)."""
    if not all(isinstance(layer, LoRALinear) and layer.active for layer in layers):
        return [layer(x) for layer in layers]
    outputs = FusedLoRALinears.apply(
        x.flatten(0, -2),
        layers,
        again,
        *(layer.lora_A for layer in layers),
        *(layer.lora_B for layer in layers),
    )
    return [y.unflatten(0, x.shape[:-1]) for y in outputs]


class LoRALinear(nn.Module):
    """A frozen linear layer plus `scale * B A x`; with `active` False it is the frozen layer to the bit.

    The adapter's weights are fp32 masters whatever the layer's dtype.
    """

    def __init__(self, base, rank, alpha, generator, rslora=False):
        super().__init__()
        self.base, self.active, self.scale = (
            base,
            True,
            alpha / (math.sqrt(rank) if rslora else rank),
        )
        out, width = base.weight.shape
        bound = (
            1 / math.sqrt(width)
        )  # Kaiming uniform with a = sqrt(5), as PEFT starts A; B starts at zero, so step 0 is the base
        A = torch.empty(rank, width).uniform_(-bound, bound, generator=generator)
        self.lora_A, self.lora_B = (
            nn.Parameter(A.to(base.weight.device)),
            nn.Parameter(torch.zeros(out, rank, device=base.weight.device)),
        )

    def forward(self, x):
        """(..., in) to (..., out)."""
        return lora_linears(x, self)[0] if self.active else self.base(x)

    def merged(self):
        """The plain linear layer whose weight includes the adapter."""
        merged = copy.deepcopy(self.base)
        merged.weight.data = (
            (self.base.weight.float() + self.scale * self.lora_B @ self.lora_A)
            .to(self.base.weight.dtype)
            .detach()
        )
        return merged
