"""The policy: a model made trainable, which is also its own frozen reference."""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from minialign.models.llava import Llava
from minialign.models.lora import LORA_TARGETS, LoRALinear


def scalar_head(model: Llava) -> nn.Linear:
    """Make a linear head D -> 1 in fp32. Its weights are zero at first, and so are all scores."""
    hidden_size = model.config.text.hidden_size
    head = nn.utils.skip_init(nn.Linear, hidden_size, 1, device=model.device)
    zeros = {}
    for name, tensor in head.state_dict().items():
        zeros[name] = torch.zeros_like(tensor)
    head.load_state_dict(zeros)
    return head


class Policy:
    """A model made trainable, and the reference that it is compared with.

    With rank > 0, LoRA adapters are put on the projections `targets` of the decoder, and the
    projector is trained in full. With rank 0, decoder, vocabulary head and projector are trained in
    full. The vision tower is never trained. What is trained is stored in fp32, because a step of
    1e-6 would be rounded away in a bf16 weight.

    One model is both policy and reference. Frozen weights are the same in both. The two differ in
    the adapters, which can be switched off, and in the modules trained in place, of which a frozen
    copy is kept (`reference_modules`). So `reference()` gives the model as it was loaded, to the
    bit, however far training has gone. With LoRA the copy is the small projector. With rank 0 it is
    nearly a whole second model, which a method that reads no reference can forget.

    The copy keeps the dtype of the checkpoint, and computes in it. Before the first step the policy
    computes the same in these cases:

    - fp32 checkpoint, any rank: to the bit.
    - bf16 checkpoint with LoRA: to the bit. The decoder is the frozen one, B is zero, and the
      projector rounds its fp32 weights to the dtype of the decoder, which gives those loaded.
    - bf16 checkpoint with rank 0: up to the rounding of bf16. The policy has the same weights, but
      computes in fp32. A DPO loss starts near log 2, not at it.

        logps, _ = response_logps(policy.model, rows)
        with policy.reference() as reference_model:
            ref_logps, _ = response_logps(reference_model, rows)
    """

    def __init__(
        self,
        model: Llava,
        rank: int,
        alpha: float,
        seed: int = 0,
        *,
        train_projector: bool = True,
        rslora: bool = False,
        targets: tuple[str, ...] = LORA_TARGETS,
    ):
        self.model = model
        self.rank = rank
        self.alpha = alpha
        self.rslora = rslora
        self.targets = targets
        self.dtype = model.vocab_head.dtype  # that of the checkpoint, before anything becomes fp32
        self.adapters = []
        self._adapted = []  # (block, name) of each adapter
        self.trained_in_place = []  # names of modules in the model
        self.reference_modules = {}  # name in the model -> frozen copy
        self.scalar_head = None

        # 1. Adapters on the decoder.
        if rank:
            self._add_adapters(torch.Generator().manual_seed(seed))

        # 2. Freeze everything but the adapters.
        model.requires_grad_(False)
        for adapter in self.adapters:
            adapter.lora_A.requires_grad_(True)
            adapter.lora_B.requires_grad_(True)

        # 3. Modules trained in place.
        if train_projector:
            self._train_in_place("multi_modal_projector")
        if not rank:
            self._train_in_place("language_model")
            if not model.config.text.tie_word_embeddings:
                self._train_in_place("lm_head")

    def _add_adapters(self, generator: torch.Generator) -> None:
        """Replace each target projection of the decoder by a LoRALinear around it."""
        for layer in self.model.language_model.layers:
            for block in (layer.self_attn, layer.mlp):
                for name in self.targets:
                    if not hasattr(block, name):
                        continue  # the target belongs to the other block
                    projection = getattr(block, name)
                    adapter = LoRALinear(
                        projection,
                        self.rank,
                        self.alpha,
                        generator,
                        rslora=self.rslora,
                        name=name,
                    )
                    setattr(block, name, adapter)
                    self.adapters.append(adapter)
                    self._adapted.append((block, name))

    def _train_in_place(self, name: str) -> None:
        """Make a module of the model trainable, in fp32, and keep a frozen copy for the reference.

        The copy is made first, so that it has the dtype of the checkpoint: the reference of a 7B in
        bf16 takes 14 GB, where one in fp32 would take 27.
        """
        module = getattr(self.model, name)
        self.reference_modules[name] = copy.deepcopy(module)
        self.trained_in_place.append(name)
        module.float()  # in place
        module.requires_grad_(True)

    def forget_reference(self) -> None:
        """Free the frozen copies of a policy with rank 0. `reference()` is an error from then on.

        With LoRA the copy is kept. It is small, and `save_adapter` needs it for the hash of the
        weights that the adapter was trained on.
        """
        if self.rank == 0:
            self.reference_modules = {}

    def add_scalar_head(self) -> None:
        """Add a scalar head, for rewards or values, which is trained with the policy."""
        self.scalar_head = scalar_head(self.model)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name, those of the scalar head as `score.*`."""
        parameters = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameters[name] = parameter
        if self.scalar_head is not None:
            for name, parameter in self.scalar_head.named_parameters():
                parameters[f"score.{name}"] = parameter
        return parameters

    def parameter_groups(self, lr: float, projector_lr: float) -> list[dict]:
        """Return the parameter groups of AdamW. The projector has a learning rate of its own.

        `peak` remembers the learning rate that the schedule scales. A group without parameters is
        left out.
        """
        projector = []
        others = []
        for name, parameter in self.parameters().items():
            if name.startswith("multi_modal_projector."):
                projector.append(parameter)
            else:
                others.append(parameter)

        groups = []
        if others:
            groups.append(dict(params=others, lr=lr, peak=lr))
        if projector:
            groups.append(dict(params=projector, lr=projector_lr, peak=projector_lr))
        return groups

    def merge(self) -> None:
        """Fold the adapters into the weights for good.

        The model is then a plain one again, in the dtype of its checkpoint, and this policy has no
        adapters.
        """
        for block, name in self._adapted:
            adapter = getattr(block, name)
            setattr(block, name, adapter.merged())
        for name in self.trained_in_place:
            getattr(self.model, name).to(self.dtype)
        self.adapters = []
        self._adapted = []

    @contextlib.contextmanager
    def reference(self) -> Iterator[Llava]:
        """Make the model the reference inside a `with` block, where no gradient is recorded.

        Adapters are off and the frozen copies are in place. Afterwards the policy is back, also
        after an exception.
        """
        if len(self.reference_modules) < len(self.trained_in_place):
            raise RuntimeError("this policy has forgotten its reference")
        trained_modules = {}
        for name in self.reference_modules:
            trained_modules[name] = getattr(self.model, name)
        try:
            self._switch(adapters_enabled=False, modules=self.reference_modules)
            with torch.no_grad():
                yield self.model
        finally:
            self._switch(adapters_enabled=True, modules=trained_modules)

    def _switch(self, *, adapters_enabled: bool, modules: dict[str, nn.Module]) -> None:
        """Turn all adapters on or off, and put modules into the model by name."""
        for adapter in self.adapters:
            adapter.enabled = adapters_enabled
        for name, module in modules.items():
            setattr(self.model, name, module)
