"""Low-rank adapters (LoRA), and the context in which the policy is its own reference."""

import contextlib
import copy
import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class _Adapted(torch.autograd.Function):
    """y_i = x W_i^T + b_i + scale (x A_i^T) B_i^T of several frozen layers that read the same x (N, in), each (N, out_i).

    One product gives all x A_i^T, and what comes back to x is added up inside the products of the backward pass, not after them.
    That pass needs x itself for the gradient of A alone: with `again`, a function and its tensors, which are kept anyway and give
    just this x whenever they are asked, x is not kept but made once more. What comes back to x goes on by the graph that x has.
    """

    @staticmethod
    def forward(ctx, x, layers, again, *weights):
        """The outputs; `weights`, all A_i (r, in) and then all B_i (out_i, r), are the layers' own, for autograd to see."""
        ctx.layers, ctx.ranks, ctx.make = (
            layers,
            [layer.lora_A.shape[0] for layer in layers],
            again[0] if again else None,
        )
        A, Bs = (
            torch.cat(weights[: len(layers)]).to(x.dtype),
            [B.to(x.dtype) for B in weights[len(layers) :]],
        )
        low = x @ A.T  # (N, sum of ranks)
        ctx.save_for_backward(
            A, low, *Bs, *([part.detach() for part in again[1:]] if again else [x])
        )
        return tuple(
            layer.base(x).addmm_(own, B.T, alpha=layer.scale)
            for layer, own, B in zip(layers, low.split(ctx.ranks, 1), Bs)
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        """Gradients of x, and of all A_i and B_i in fp32."""
        A, low, *parts = ctx.saved_tensors
        Bs, parts = parts[: len(grads)], parts[len(grads) :]
        each = list(zip(ctx.layers, grads, Bs, low.split(ctx.ranks, 1)))
        # scale dy B, in one call with beta 0, which takes nothing of `own`; dBs below likewise
        d_low = torch.cat(
            [torch.addmm(own, grad, B, beta=0, alpha=layer.scale) for layer, grad, B, own in each],
            1,
        )
        dx = d_low @ A
        for layer, grad, _, _ in each:
            dx.addmm_(grad, layer.base.weight)
        x = ctx.make(*parts).flatten(0, -2) if ctx.make else parts[0]
        dBs = [
            torch.addmm(B, grad.T, own, beta=0, alpha=layer.scale).float()
            for layer, grad, B, own in each
        ]
        return dx, None, None, *(d_low.T @ x).float().split(ctx.ranks), *dBs


def project(x, *layers, again=None):
    """[(..., out_i)] of linear layers that read the same x (..., in); where all of them are adapters they share work and memory (`_Adapted`)."""
    if not all(isinstance(layer, LoRALinear) and layer.active for layer in layers):
        return [layer(x) for layer in layers]
    outputs = _Adapted.apply(
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
        return project(x, self)[0] if self.active else self.base(x)

    def merged(self):
        """The plain linear layer whose weight includes the adapter."""
        merged = copy.deepcopy(self.base)
        merged.weight.data = (
            (self.base.weight.float() + self.scale * self.lora_B @ self.lora_A)
            .to(self.base.weight.dtype)
            .detach()
        )
        return merged


def scalar_head(model):
    """A linear head D -> 1 in fp32 for a model's hidden states; it starts at zero, so that all scores do."""
    head = nn.utils.skip_init(nn.Linear, model.config.text.width, 1, device=model.device)
    head.load_state_dict(
        {name: torch.zeros_like(tensor) for name, tensor in head.state_dict().items()}
    )
    return head


class Policy:
    """A model made trainable: adapters or all weights, and a frozen copy of whatever is trained in place.

    rank > 0: LoRA on the decoder's projections (`targets`) and the projector trained in full. rank 0: all of decoder, head
    and projector. The vision tower is never touched. What is trained is fp32: a bf16 weight does not feel a step of 1e-6.
    """

    def __init__(
        self, model, rank, alpha, seed=0, train_projector=True, rslora=False, targets=TARGETS
    ):
        self.model, self.rank, self.alpha, self.rslora, self.targets = (
            model,
            rank,
            alpha,
            rslora,
            targets,
        )
        self.adapters, self.trained, self.dtype, self.score = [], {}, model.head.dtype, None
        generator = torch.Generator().manual_seed(seed)
        if rank:
            for layer in model.language_model.layers:
                for block in (layer.self_attn, layer.mlp):
                    for name in targets:
                        if hasattr(block, name):
                            setattr(
                                block,
                                name,
                                LoRALinear(getattr(block, name), rank, alpha, generator, rslora),
                            )
                            self.adapters.append(getattr(block, name))
        model.requires_grad_(False)
        for adapter in self.adapters:
            adapter.lora_A.requires_grad_(True)
            adapter.lora_B.requires_grad_(True)
        in_place = ["multi_modal_projector"] if train_projector else []
        if not rank:
            in_place += ["language_model"] + ([] if model.config.text.tied else ["lm_head"])
        for name in in_place:
            module = getattr(model, name).float()
            self.trained[name] = copy.deepcopy(module)  # the reference's frozen copy
            module.requires_grad_(True)

    def add_score(self):
        """Give the policy a scalar head of its own, for rewards or values."""
        self.score = scalar_head(self.model)

    def groups(self, lr, projector_lr):
        """AdamW parameter groups: the projector has its own learning rate."""
        projector = [
            p for name, p in self.parameters().items() if name.startswith("multi_modal_projector.")
        ]
        rest = [
            p
            for name, p in self.parameters().items()
            if not name.startswith("multi_modal_projector.")
        ]
        return [
            group
            for group in (
                dict(params=rest, lr=lr, peak=lr),
                dict(params=projector, lr=projector_lr, peak=projector_lr),
            )
            if group["params"]
        ]

    def parameters(self):
        """The trainable parameters by name, those of the scalar head as `score.*`."""
        score = (
            {f"score.{name}": p for name, p in self.score.named_parameters()} if self.score else {}
        )
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad} | score

    def merge(self):
        """Fold the adapters into the weights, for good: the model is then a plain one again, in the dtype that it came in."""
        for module in list(self.model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, LoRALinear):
                    setattr(module, name, child.merged())
        for name in self.trained:
            getattr(self.model, name).to(self.dtype)
        self.adapters = []

    @contextlib.contextmanager
    def reference(self):
        """Within: the model is the reference policy (adapters off, frozen copies in place) and no gradient is recorded."""
        own = {name: getattr(self.model, name) for name in self.trained}
        try:
            for adapter in self.adapters:
                adapter.active = False
            for name, frozen in self.trained.items():
                setattr(self.model, name, frozen)
            with torch.no_grad():
                yield self.model
        finally:
            for adapter in self.adapters:
                adapter.active = True
            for name, module in own.items():
                setattr(self.model, name, module)
