"""LoRA adapters in and out, in PEFT's layout and names."""

from pathlib import Path

from minialign.models.checkpoint import (
    open_tensors,
    read_tensors,
    save_tensors,
    to_layout_name,
    to_our_name,
)
from minialign.models.lora import LORA_TARGETS
from minialign.models.policy import Policy
from minialign.utils.files import check, read_json, write_json

ADAPTER_PREFIX = "base_model.model."
# Fields of adapter_config.json that are read, or change nothing here; any other must be off or have one of the values below.
ADAPTER_FIELDS = {
    "r",
    "lora_alpha",
    "use_rslora",
    "modules_to_save",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
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
ADAPTER_VALUES = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian"),
}


def save_adapter(policy, directory, base):
    """Write a Policy's LoRA weights and trained projector in PEFT's layout; `base` is the directory that it belongs to."""
    own = {
        name: tensor
        for name, tensor in policy.parameters().items()
        if not name.startswith("score.")
    }  # the head is no part of the model; see rewards
    tensors = {
        ADAPTER_PREFIX
        + to_layout_name(name, "memory")
        + ".weight" * name.endswith(("lora_A", "lora_B")): tensor
        for name, tensor in own.items()
    }
    save_tensors(tensors, Path(directory) / "adapter_model.safetensors")
    write_json(
        Path(directory) / "adapter_config.json",
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(base),
            "r": policy.rank,
            "lora_alpha": policy.alpha,
            "lora_dropout": 0.0,
            "bias": "none",
            "use_rslora": policy.rslora,
            "use_dora": False,
            "fan_in_fan_out": False,
            "inference_mode": True,
            # A pattern rather than suffixes: the vision tower's layers have a q_proj too.
            "target_modules": rf".*language_model.*\.({'|'.join(policy.targets)})",
            "modules_to_save": ["multi_modal_projector"] if policy.trained else None,
        },
    )


def load_adapter(model, directory):
    """Put a PEFT adapter onto `model` in place, as a Policy. Raises BadInput for what is not supported, by name."""
    path = Path(directory) / "adapter_config.json"
    config = read_json(path, dict)
    for key, value in config.items():
        supported = ADAPTER_VALUES.get(key, (False,))
        fits = key in ADAPTER_FIELDS or value in (*supported, None, False, {}, [])
        check(fits, f"{path}: {key} {value!r} is not supported, only {supported[0]!r}")
    saved = config.get("modules_to_save") or []
    check(
        saved in ([], ["multi_modal_projector"]),
        f"{path}: modules_to_save {saved} is not supported, only multi_modal_projector",
    )
    numbers = (
        type(config.get("r")) is int
        and config["r"] > 0
        and isinstance(config.get("lora_alpha"), (int, float))
    )
    check(
        numbers,
        f"{path}: no r or no lora_alpha that is a number above 0; is this the file of a LoRA adapter?",
    )
    file = Path(directory) / "adapter_model.safetensors"
    with open_tensors(file) as tensors:
        files = dict.fromkeys(tensors.keys(), file)
    theirs = {
        to_our_name(
            name.removeprefix(ADAPTER_PREFIX).removesuffix(".weight" if ".lora_" in name else "")
        ): name
        for name in files
    }
    targets = tuple(
        target for target in LORA_TARGETS if any(f".{target}.lora_A" in name for name in theirs)
    )
    policy = Policy(
        model,
        config["r"],
        config["lora_alpha"],
        train_projector=bool(saved),
        rslora=bool(config.get("use_rslora")),
        targets=targets,
    )
    parameters = policy.parameters()
    wanted = {
        theirs.get(name, name): (name, parameter.shape) for name, parameter in parameters.items()
    }
    for name, tensor in read_tensors(file, files, wanted, device=model.device).items():
        parameters[name].data.copy_(tensor)
    return policy
