"""Low-rank adapters (LoRA), and the context in which the policy is its own reference."""

import contextlib
import copy

import torch
from torch import nn

from minialign.models.lora import LORA_TARGETS, LoRALinear


def scalar_head(model):
    """A linear head D -> 1 in fp32 for a model's hidden states; it starts at zero, so that all scores do."""
    head = nn.utils.skip_init(nn.Linear, model.config.text.hidden_size, 1, device=model.device)
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
        self, model, rank, alpha, seed=0, train_projector=True, rslora=False, targets=LORA_TARGETS
    ):
        self.model, self.rank, self.alpha, self.rslora, self.targets = (
            model,
            rank,
            alpha,
            rslora,
            targets,
        )
        self.adapters, self.trained, self.dtype, self.scalar_head = (
            [],
            {},
            model.vocab_head.dtype,
            None,
        )
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
            in_place += ["language_model"] + (
                [] if model.config.text.tie_word_embeddings else ["lm_head"]
            )
        for name in in_place:
            module = getattr(model, name).float()
            self.trained[name] = copy.deepcopy(module)  # the reference's frozen copy
            module.requires_grad_(True)

    def add_scalar_head(self):
        """Give the policy a scalar head of its own, for rewards or values."""
        self.scalar_head = scalar_head(self.model)

    def parameter_groups(self, lr, projector_lr):
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
            {f"score.{name}": p for name, p in self.scalar_head.named_parameters()}
            if self.scalar_head
            else {}
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
