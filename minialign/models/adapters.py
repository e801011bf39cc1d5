"""Read and write LoRA adapters in the files and under the names of PEFT."""

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

# PEFT wraps the model in two modules, whose names stand before each tensor's name.
ADAPTER_PREFIX = "base_model.model."
# Fields of adapter_config.json that may have any value: load_adapter reads them, or they change
# nothing here. Every other field must be switched off or have a value of ADAPTER_VALUES, so that
# an adapter that needs something unknown is refused rather than loaded wrongly.
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
SWITCHED_OFF = (None, False, {}, [])


def save_adapter(policy, directory, base):
    """Write the LoRA weights and the trained projector of a Policy as PEFT would.

    base: the directory of the model that the adapter belongs to.
    """
    # 1. Write the tensors, except the scalar head: PEFT knows none, and reward_model.py saves it.
    tensors = {}
    for name, parameter in policy.parameters().items():
        if not name.startswith("score."):
            tensors[_to_peft_name(name)] = parameter
    save_tensors(tensors, Path(directory) / "adapter_model.safetensors")

    # 2. Write the configuration. The pattern matches layers of the decoder only. A plain list of
    # names would also match layers of the vision tower, which has a q_proj too.
    target_modules = rf".*language_model.*\.({'|'.join(policy.targets)})"
    modules_to_save = None
    if policy.reference_modules:
        modules_to_save = ["multi_modal_projector"]
    config = {
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
        "target_modules": target_modules,
        "modules_to_save": modules_to_save,
    }
    write_json(Path(directory) / "adapter_config.json", config)


def load_adapter(model, directory) -> Policy:
    """Add a PEFT adapter to `model` in place, and return the two as a Policy.

    Raises InputError that names the first field or tensor that is not supported.
    """
    # 1. Check the configuration.
    config_file = Path(directory) / "adapter_config.json"
    config = read_json(config_file, dict)
    _check_adapter_config(config, config_file)

    # 2. Translate the tensor names. The tensors that are there tell which layers are adapted.
    file = Path(directory) / "adapter_model.safetensors"
    with open_tensors(file) as tensors:
        peft_names = list(tensors.keys())
    peft_name_of = {_from_peft_name(name): name for name in peft_names}
    targets = []
    for target in LORA_TARGETS:
        if any(f".{target}.lora_A" in name for name in peft_name_of):
            targets.append(target)

    # 3. Add adapters of that rank to those layers.
    policy = Policy(
        model,
        config["r"],
        config["lora_alpha"],
        train_projector=bool(config.get("modules_to_save")),
        rslora=bool(config.get("use_rslora")),
        targets=tuple(targets),
    )

    # 4. Copy the tensors into them.
    parameters = policy.parameters()
    wanted = {}
    for name, parameter in parameters.items():
        wanted[peft_name_of.get(name, name)] = (name, parameter.shape)
    files = dict.fromkeys(peft_names, file)
    tensors = read_tensors(file, files, wanted, device=model.device)
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
    return policy


def _check_adapter_config(config, path):
    """Raise InputError unless everything that an adapter_config.json asks for is supported."""
    for key, value in config.items():
        supported = ADAPTER_VALUES.get(key, (False,))
        check(
            key in ADAPTER_FIELDS or value in supported or value in SWITCHED_OFF,
            f"{path}: {key} {value!r} is not supported, only {supported[0]!r}",
        )
    saved_modules = config.get("modules_to_save") or []
    check(
        saved_modules in ([], ["multi_modal_projector"]),
        f"{path}: modules_to_save {saved_modules} is not supported, only multi_modal_projector",
    )
    rank = config.get("r")
    # type() rather than isinstance(): to Python, True is an integer too.
    has_rank = type(rank) is int and rank > 0
    has_alpha = isinstance(config.get("lora_alpha"), (int, float))
    check(
        has_rank and has_alpha,
        f"{path}: no r or no lora_alpha that is a number above 0; "
        "is this the file of a LoRA adapter?",
    )


def _to_peft_name(name):
    """Return PEFT's name of one of our parameters."""
    peft_name = ADAPTER_PREFIX + to_layout_name(name, "memory")
    # Our lora_A and lora_B are parameters. PEFT's are linear layers, which have a weight.
    if name.endswith(("lora_A", "lora_B")):
        peft_name += ".weight"
    return peft_name


def _from_peft_name(peft_name):
    """Return our name of a parameter, given PEFT's name under any layout of the base model."""
    name = peft_name.removeprefix(ADAPTER_PREFIX)
    if ".lora_" in name:
        name = name.removesuffix(".weight")
    return to_our_name(name)
