"""Build a model without memory from its config.json, and count its weights.

The model is built on torch's "meta" device, where parameters have shapes and dtypes but take no
memory, and it is made a Policy as in a run. So weights, adapters, and the copy that is the
reference are counted by the very code that makes them.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from minialign.generation.cache_limits import CacheLimits, limits_that_fit
from minialign.methods.registry import METHODS
from minialign.models import memory
from minialign.models.adapter_checks import check_adapter_config
from minialign.models.checkpoint import DTYPE_FIELDS
from minialign.models.config import LlavaConfig
from minialign.models.config_json import read_config
from minialign.models.llava import Llava
from minialign.models.policy import Policy
from minialign.models.split import part_config
from minialign.pairs.annotators import annotator_kind, model_folder_of
from minialign.utils.files import check, read_json

# What config.json may call a dtype, and what the model then computes in.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The parts of a model in the table, and the names of their parameters. The first that fits counts.
MODEL_PARTS = {
    "vision tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.", "image_newline"),
    "embeddings and head": ("language_model.embed_tokens.", "lm_head."),
    "decoder layers": ("language_model.",),
}
TRAINED = "trained parameters, fp32"
REFERENCE_COPY = "frozen copy (reference)"


@dataclass
class PlannedModel:
    """A model without memory, before and after it is made a Policy, and what it computes in."""

    config: LlavaConfig
    dtype: torch.dtype  # of the checkpoint
    loaded: dict[str, int]  # bytes of each of MODEL_PARTS, as they are loaded
    frozen: dict[str, int]  # the same after it is made a Policy, of what is not trained
    policy: Policy
    device_memory: int | None  # bytes, None for a device without limit

    @property
    def held(self) -> dict[str, int]:
        """Return the bytes of each part that the policy holds between two steps."""
        return {
            **self.frozen,
            TRAINED: memory.trained_bytes(self.policy),
            REFERENCE_COPY: memory.reference_copy_bytes(self.policy),
        }

    def loaded_limits(self) -> CacheLimits:
        """Return the limits on caches while the model is as it was loaded."""
        return self.limits_beside(sum(self.loaded.values()), self.dtype)

    def policy_limits(self) -> CacheLimits:
        """Return the limits on caches while the policy is trained."""
        return self.limits_beside(memory.module_bytes(self.policy.model), self.trained_dtype)

    def reference_limits(self) -> CacheLimits:
        """Return the limits on caches inside `policy.reference()`, with the frozen copies."""
        with self.policy.reference() as reference_model:
            return self.limits_beside(memory.module_bytes(reference_model), self.dtype)

    def limits_beside(self, weight_bytes: int, dtype: torch.dtype) -> CacheLimits:
        """Return the limits on caches in `dtype`, beside weights of so many bytes."""
        return limits_that_fit(
            self.config.text,
            dtype,
            weight_bytes=weight_bytes,
            device_memory=self.device_memory,
        )

    @property
    def trained_dtype(self) -> torch.dtype:
        """Return what the policy computes in: fp32 if its decoder is trained in place."""
        return self.policy.model.vocab_head.dtype


def plan_model(directory, *, dtype, num_parts, rank, device_memory=None) -> PlannedModel:
    """Build the model that a directory's config.json describes, and make it a Policy.

    dtype: the name of a torch dtype, or None for that of config.json.
    num_parts: how many processes hold the model together.
    device_memory: bytes of the device, which limit the caches, or None for a device without limit.
    """
    config, raw = read_config(directory)
    torch_dtype = planned_dtype(directory, raw, dtype)
    config = part_config(config, directory, num_parts)
    with torch.device("meta"):  # the adapters too, so that no random numbers are drawn
        model = Llava(config).to(torch_dtype)
        loaded = bytes_by_part(model)
        policy = Policy(model, rank, alpha=1)
    return PlannedModel(
        config=config,
        dtype=torch_dtype,
        loaded=loaded,
        frozen=bytes_by_part(model, only_frozen=True),
        policy=policy,
        device_memory=device_memory,
    )


def planned_dtype(directory, raw, dtype) -> torch.dtype:
    """Return the dtype that a model is loaded in: that of --dtype, or the one of config.json.

    A run without --dtype takes that of most weights, which are not read here.
    """
    # 1. The first of these that is not None counts. Newer checkpoints write "dtype".
    candidates = [dtype]
    for section in (raw, raw.get("text_config", {})):
        for field in DTYPE_FIELDS:
            candidates.append(section.get(field))
    candidates.append("float32")
    name = next(name for name in candidates if name is not None)

    # 2. It must be one that a model computes in, or float64, which is converted.
    check(
        isinstance(name, str) and name in DTYPES,
        f"{Path(directory) / 'config.json'}: the dtype {name!r:.40} is not supported; "
        "give --dtype float32 or bfloat16",
    )
    return DTYPES[name]


def bytes_by_part(model, only_frozen=False) -> dict[str, int]:
    """Return the bytes of the parameters of each of MODEL_PARTS, all or only frozen ones."""
    totals = dict.fromkeys(MODEL_PARTS, 0)
    for name, parameter in model.named_parameters():
        if only_frozen and parameter.requires_grad:
            continue
        totals[part_of(name)] += parameter.nbytes
    return totals


def part_of(name) -> str:
    """Return which of MODEL_PARTS a parameter belongs to."""
    for part, prefixes in MODEL_PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"{name} is not a parameter of Llava")


def other_model_bytes(options, num_parts) -> int:
    """Return the bytes of the annotator or the reward model that stays loaded during training."""
    spec = METHODS[options.method]
    if spec.needs_annotator() and annotator_kind(options.annotator) != "truth":
        folder = Path(model_folder_of(options))
        if annotator_kind(options.annotator) == "reward:DIR":
            return reward_model_bytes(options, folder, num_parts)
        # An annotator has no adapter. The rank does not matter to the weights as they are loaded.
        annotator = plan_model(folder, dtype=options.dtype, num_parts=num_parts, rank=1)
        return sum(annotator.loaded.values())
    if spec.needs_reward_model():
        return reward_model_bytes(options, options.reward, num_parts)
    return 0


def reward_model_bytes(options, folder, num_parts) -> int:
    """Return the bytes of the reward model in a folder, or of the one that is trained first."""
    # 1. A folder with a whole model. Nothing is trained in it, so its rank does not matter.
    if folder is not None and (Path(folder) / "model").is_dir():
        model_folder = Path(folder) / "model"
        reward = plan_model(model_folder, dtype=options.dtype, num_parts=num_parts, rank=1)
        return sum(reward.loaded.values())

    # 2. Otherwise an adapter on the model of the run. Without a folder it will have the rank of the
    #    run, and with rank 0 it will be a whole model.
    rank = options.lora_rank
    if folder is not None:
        config_file = Path(folder) / "adapter" / "adapter_config.json"
        adapter_config = read_json(config_file, dict)
        check_adapter_config(adapter_config, config_file)
        rank = adapter_config["r"]
    reward = plan_model(options.model, dtype=options.dtype, num_parts=num_parts, rank=rank)
    if rank == 0:  # it was written as a model in the dtype of its checkpoint
        return sum(reward.loaded.values())
    return sum(reward.held.values())


def similarity_bytes(options, config) -> int:
    """Return the bytes of what BDHS compares responses by: an encoder, or a table of embeddings."""
    if options.similarity:
        weights = Path(options.similarity) / "model.safetensors"
        check(weights.is_file(), f"{weights}: no such file; give another --similarity")
        return weights.stat().st_size
    text = config.text
    return text.vocab_size * text.hidden_size * memory.FP32_BYTES
