"""Check that an adapter of PEFT is one that is supported, and say why if it is not."""

import math
import re

from minialign.models.lora import LORA_TARGETS
from minialign.utils.files import InputError, check

# Fields of adapter_config.json whose value is read elsewhere, or changes nothing here. Every other
# field must be switched off or have a value of SUPPORTED_VALUES, so that an adapter that needs
# something unknown is refused rather than loaded wrongly.
UNRESTRICTED_FIELDS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",  # which layers have tensors is compared with the model
    "layers_pattern",
    "eva_config",  # how the first matrix was initialized
    "lora_dropout",
    "base_model_name_or_path",
    "revision",
    "task_type",
    "auto_mapping",
    "inference_mode",
    "peft_version",
    "qalora_group_size",
    "megatron_core",
}
SUPPORTED_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva", "mica"),
}
SWITCHED_OFF = (None, False, {}, [])
# Why a field is not supported, where its name alone does not say it.
REASONS = {
    "use_dora": "DoRA also scales the rows of the weights",
    "bias": "biases of the base model were trained too",
    "rank_pattern": "modules have different ranks",
    "alpha_pattern": "modules have different scales",
    "lora_bias": "the second matrix has a bias",
    "init_lora_weights": "this initialization also changes the weights of the base model",
    "fan_in_fan_out": "the base model stores its weights transposed",
    "layer_replication": "the base model has repeated layers",
    "trainable_token_indices": "embeddings of single tokens were trained too",
    "target_parameters": "parameters that are no linear layers were adapted",
    "alora_invocation_tokens": "the adapter is on for a part of the text only",
}
# Our name of a LoRA matrix of the decoder: the layer, and the projection.
DECODER_LORA = re.compile(r"language_model\.layers\.(\d+)\.\w+\.(\w+)\.lora_[AB]")
MERGE = "merge it into its base with PEFT (merge_and_unload, save_pretrained) and load the result"
# Part of the name of a tensor -> why the tensor has no place in an adapter of the decoder.
TENSOR_REASONS = {
    "vision_tower": (
        "adapts the vision tower, which is frozen here (target modules given by suffix, such as "
        "q_proj, match its layers too)"
    ),
    "multi_modal_projector": "adapts the projector by LoRA, which is trained in full here",
    "lm_head": "trains the vocabulary head, which is frozen here",
    "embed_tokens": "trains the embedding table, which is frozen here",
    "magnitude_vector": "belongs to DoRA",
    "lora_embedding": "adapts an embedding table, which is frozen here",
}


def check_adapter_config(config, path):
    """Raise InputError unless everything that an adapter_config.json asks for is supported."""
    # 1. Check the fields that change what the adapter computes.
    for key, value in config.items():
        supported = SUPPORTED_VALUES.get(key, (False,))
        reason = f" ({REASONS[key]})" if key in REASONS else ""
        check(
            key in UNRESTRICTED_FIELDS or value in supported or value in SWITCHED_OFF,
            f"{path}: {key} {value!r:.80} is not supported, only {supported[0]!r}{reason}; {MERGE}",
        )
    saved_modules = config.get("modules_to_save") or []
    check(
        saved_modules in ([], ["multi_modal_projector"]),
        f"{path}: modules_to_save {saved_modules!r:.80} is not supported, only "
        f"multi_modal_projector; {MERGE}",
    )

    # 2. Check rank and scale.
    rank = config.get("r")
    alpha = config.get("lora_alpha")
    # type() rather than isinstance(): to Python, True is an integer too.
    has_rank = type(rank) is int and rank > 0
    has_alpha = type(alpha) in (int, float) and 0 < alpha < math.inf
    check(
        has_rank and has_alpha,
        f"{path}: no r or no lora_alpha that is a number above 0 ({rank!r:.40}, {alpha!r:.40}); "
        "is this the file of a LoRA adapter?",
    )
    rslora = config.get("use_rslora")
    check(
        rslora is None or isinstance(rslora, bool),
        f"{path}: use_rslora is {rslora!r:.40}, not true or false",
    )


def check_adapter_tensors(file, peft_name_of, headers, config):
    """Raise InputError that says why, if a tensor is no part of an adapter of the decoder.

    peft_name_of: PEFT's name of each tensor by ours.
    headers: the header of each tensor by PEFT's name.
    """
    # 1. Refuse tensors of other parts of the model, told by their names.
    saves_projector = bool(config.get("modules_to_save"))
    refused = {}  # reason -> PEFT's names of the tensors
    for name, peft_name in peft_name_of.items():
        if saves_projector and ".lora_" not in name and name.startswith("multi_modal_projector"):
            continue
        reason = _reason_against(name)
        if reason is not None:
            refused.setdefault(reason, []).append(peft_name)
    if refused:
        reason, peft_names = next(iter(refused.items()))
        raise InputError(
            f"{file}: tensor {min(peft_names)} ({len(peft_names)} of its kind) has no place in "
            f"this model: the adapter {reason}; {MERGE}"
        )

    # 2. Check the rank, before matrices of that rank are made.
    rank = config["r"]
    for name, peft_name in peft_name_of.items():
        shape = headers[peft_name].shape
        check(
            not name.endswith("lora_A") or shape[:1] == (rank,),
            f"{file}: tensor {peft_name} has shape {shape}, which is not of the rank {rank} that "
            f"adapter_config.json gives as r (its shape would be {(rank, *shape[1:])})",
        )


def _reason_against(name):
    """Return why a tensor, under our name, is no part of a supported adapter, or None."""
    for text, reason in TENSOR_REASONS.items():
        if text in name:
            return reason
    return None


def find_targets(file, peft_name_of, num_layers) -> tuple[str, ...]:
    """Return which projections of the decoder an adapter is for.

    peft_name_of: PEFT's name of each tensor by ours.
    Raises InputError if the adapter leaves out some layers of the decoder. PEFT makes such ones by
    layers_to_transform, or by a pattern of target modules.
    """
    # 1. Collect the layers in which each projection is adapted.
    layers_of = {}
    for name in peft_name_of:
        match = DECODER_LORA.fullmatch(name)
        if match:
            layer_idx, target = match.groups()
            layers_of.setdefault(target, set()).add(int(layer_idx))

    # 2. Return the projections in the order of LORA_TARGETS, if they are adapted in all layers.
    targets = tuple(target for target in LORA_TARGETS if target in layers_of)
    check(targets, f"{file}: holds no LoRA matrices of the decoder; is this the right adapter?")
    for target in targets:
        adapted_layers = layers_of[target].intersection(range(num_layers))
        check(
            len(adapted_layers) == num_layers,
            f"{file}: adapts {target} in {len(adapted_layers)} of {num_layers} layers "
            f"(layers_to_transform, or a pattern of target modules); only adapters of all layers "
            f"are supported: {MERGE}",
        )
    return targets
