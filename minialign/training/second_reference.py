"""Give fixed pairs a merged reference: the base, and the base with an adapter (MRPO)."""

import contextlib
from pathlib import Path

import torch

from minialign.models.adapters import load_adapter
from minialign.models.llava import Llava
from minialign.neighbor_losses import merged_reference_logps
from minialign.training.inputs import load_model
from minialign.utils.digests import file_digest


class AdaptedModel:
    """A model with an adapter that is never switched off, to compute reference log-probs with."""

    def __init__(self, model: Llava):
        self.model = model

    @contextlib.contextmanager
    def reference(self):
        """Yield the model, as `Policy.reference` does. No gradient is recorded in the block."""
        with torch.no_grad():
            yield self.model


def load_second_reference(options, vlm) -> AdaptedModel:
    """Load the model of --model with the adapter of --reference-adapter."""
    adapted_vlm = load_model(options, vlm.feature_cache)
    load_adapter(adapted_vlm.model, options.reference_adapter, options.model)
    return AdaptedModel(adapted_vlm.model)


def adapter_digests(directory) -> str:
    """Return what stored log-probs of an adapter depend on: the content of its files."""
    paths = sorted(Path(directory).glob("adapter_*"))
    return repr([file_digest(path) for path in paths])


def merge_references(examples, base_logps, extra_logps):
    """Set `ref_logps` of every example to those of the merged reference. Both are (N, 2)."""
    merged_logps = merged_reference_logps(base_logps, extra_logps)
    for example, logps in zip(examples, merged_logps, strict=True):
        example.ref_logps = logps
