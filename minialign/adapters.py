"""LoRA adapters in and out, in PEFT's layout and names."""
from pathlib import Path

from .checkpoint import inward, open_tensors, outward, save_tensors
from .files import BadInput, read_json, write_json
from .lora import TARGETS, Policy

ADAPTER_PREFIX = "base_model.model."
# Fields of adapter_config.json that are read, or change nothing here; any other must be off or have one of the values below.
ADAPTER_FIELDS = {"r", "lora_alpha", "use_rslora", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
                  "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version", "qalora_group_size", "megatron_core"}
ADAPTER_VALUES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


def save_adapter(policy, directory, base):
    """Write a Policy's LoRA weights and trained projector in PEFT's layout; `base` is the directory that it belongs to."""
    tensors = {}
    for name, tensor in policy.parameters().items():
        if name.startswith("score."):  # no part of the model; see rewards
            continue
        name = ADAPTER_PREFIX + outward(name, "memory")
        tensors[name + ".weight" if name.endswith(("lora_A", "lora_B")) else name] = tensor
    save_tensors(tensors, Path(directory) / "adapter_model.safetensors")
    write_json(Path(directory) / "adapter_config.json", {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": policy.rank, "lora_alpha": policy.alpha,
        "lora_dropout": 0.0, "bias": "none", "use_rslora": policy.rslora, "use_dora": False, "fan_in_fan_out": False, "inference_mode": True,
        # A pattern rather than suffixes: the vision tower's layers have a q_proj too.
        "target_modules": rf".*language_model.*\.({'|'.join(policy.targets)})",
        "modules_to_save": ["multi_modal_projector"] if policy.trained else None})


def load_adapter(model, directory):
    """Put a PEFT adapter onto `model` in place, as a Policy. Raises BadInput for what is not supported, by name."""
    path = Path(directory) / "adapter_config.json"
    config = read_json(path)
    for key, value in config.items():
        supported = ADAPTER_VALUES.get(key, (False,))
        if key not in ADAPTER_FIELDS and value not in (*supported, None, False, {}, []):
            raise BadInput(f"{path}: {key} {value!r} is not supported, only {supported[0]!r}")
    saved = config.get("modules_to_save") or []
    if set(saved) - {"multi_modal_projector"}:
        raise BadInput(f"{path}: modules_to_save {saved} is not supported, only multi_modal_projector")
    if not config.get("r") or not config.get("lora_alpha"):
        raise BadInput(f"{path}: no r or no lora_alpha; is this the file of a LoRA adapter?")
    file = Path(directory) / "adapter_model.safetensors"
    with open_tensors(file) as tensors:
        targets = tuple(target for target in TARGETS if any(f".{target}.lora_A" in name for name in tensors.keys()))
    policy = Policy(model, config["r"], config["lora_alpha"], train_projector=bool(saved), rslora=bool(config.get("use_rslora")), targets=targets)
    parameters = policy.parameters()
    with open_tensors(file, model.device) as tensors:
        for theirs in tensors.keys():
            bare = theirs.removeprefix(ADAPTER_PREFIX).removesuffix(".weight") if ".lora_" in theirs else theirs.removeprefix(ADAPTER_PREFIX)
            name = inward(bare)
            if name not in parameters:
                raise BadInput(f"{file}: tensor {theirs} has no place in this model")
            tensor = tensors.get_tensor(theirs)
            if tensor.shape != parameters[name].shape:
                raise BadInput(f"{file}: tensor {theirs} has shape {tuple(tensor.shape)}, this model needs {tuple(parameters[name].shape)}")
            parameters.pop(name).data.copy_(tensor)
    if parameters:
        raise BadInput(f"{file}: no tensor for {next(iter(parameters))}")
    return policy
