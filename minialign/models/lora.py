"""Low-rank adapters (LoRA): a frozen linear layer plus a trained product of two thin matrices."""

import copy
import math

import torch
from torch import Tensor, nn

from minialign.models.fused_ops import FusedLoRALinears
from minialign.models.split import local_part, whole_shape

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer W, b with an adapter: y = x W^T + b + scaling * (x A^T) B^T.

    A (r, in) and B (out, r) are trained. With a small rank r they hold r (in + out) numbers, far
    fewer than the in * out of W. They are stored in fp32 whatever the dtype of the layer is.
    If `enabled` is False, the module is the frozen layer, to the bit.
    """

    def __init__(
        self,
        base: nn.Linear,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        *,
        rslora: bool = False,
        name: str = "",
    ):
        """Put an adapter on the layer `base`.

        name: that of the projection, such as "q_proj". It decides how a split model cuts the
            adapter (split.py). An adapter without a name is never cut.
        """
        super().__init__()
        self.base = base
        self.enabled = True
        if rslora:
            self.scaling = alpha / math.sqrt(rank)
        else:
            self.scaling = alpha / rank

        # A starts as in PEFT: Kaiming uniform with a = sqrt(5), which is this bound.
        # B starts at zero, so that training starts from the base model.
        # In a split model `base` is a part of its layer. Every process draws the whole A and keeps
        # its part, so that the numbers are those of a model in one process.
        out_features, in_features = whole_shape(f"{name}.weight", base.weight.shape)
        device = base.weight.device
        bound = 1 / math.sqrt(in_features)
        lora_A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
        lora_B = torch.zeros(out_features, rank)
        self.lora_A = nn.Parameter(local_part(f"{name}.lora_A", lora_A).to(device))
        self.lora_B = nn.Parameter(local_part(f"{name}.lora_B", lora_B).to(device))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer and its adapter to x (..., in), which gives (..., out).

        This is the plain form. The decoder calls `lora_linears`, which computes the same in fewer
        steps.
        """
        if not self.enabled:
            return self.base(x)
        lora_A = self.lora_A.to(x.dtype)
        lora_B = self.lora_B.to(x.dtype)
        return self.base(x) + self.scaling * (x @ lora_A.T) @ lora_B.T

    def merged(self) -> nn.Linear:
        """Return a plain linear layer whose weight is W + scaling * B A."""
        linear = copy.deepcopy(self.base)
        weight = self.base.weight.float() + self.scaling * self.lora_B @ self.lora_A  # fp32
        linear.weight.data = weight.to(linear.weight.dtype).detach()
        return linear


def lora_linears(x: Tensor, layers: list, recompute_from=None) -> list[Tensor]:
    """Return [layer(x) for layer in layers], in one product where all layers have adapters.

    Same result as the list. It saves time, because all adapters share one product x A^T, and
    memory, because with `recompute_from` the backward pass computes x again (see
    `FusedLoRALinears`).
    """
    if all(_is_adapted(layer) for layer in layers):
        return _apply_fused(x, layers, recompute_from)

    # Some layers are plain, or their adapters are off. Then each layer is computed by itself.
    outputs = []
    for layer in layers:
        if _is_adapted(layer):
            outputs += _apply_fused(x, [layer])
        else:
            outputs.append(layer(x))
    return outputs


def _is_adapted(layer):
    """Tell whether a layer has an adapter that is on."""
    return isinstance(layer, LoRALinear) and layer.enabled


def _apply_fused(x, layers, recompute_from=None):
    """Apply `FusedLoRALinears`, which reads x as a matrix, to x (..., in)."""
    lora_As = [layer.lora_A for layer in layers]
    lora_Bs = [layer.lora_B for layer in layers]
    flat_x = x.flatten(0, -2)  # (N, in)
    outputs = FusedLoRALinears.apply(flat_x, layers, recompute_from, *lora_As, *lora_Bs)
    return [output.unflatten(0, x.shape[:-1]) for output in outputs]
