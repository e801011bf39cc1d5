"""Read and write LoRA adapters in the files and under the names of PEFT."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch

from minialign.models.adapter_checks import (
    check_adapter_config,
    check_adapter_tensors,
    find_targets,
)
from minialign.models.checkpoint import sample_values, to_layout_name, to_our_name
from minialign.models.policy import Policy
from minialign.models.safetensors_files import (
    TensorHeader,
    open_tensors,
    read_headers,
    read_tensors,
    save_tensors,
)
from minialign.models.split import whole_shape
from minialign.utils.files import check, read_json, write_json
from minialign.utils.messages import print_message

# PEFT wraps the model in two modules, whose names stand before each tensor's name.
ADAPTER_PREFIX = "base_model.model."
# In the metadata of a file that save_adapter writes: the key of the hash of the base model.
BASE_KEY = "base_weights"


class AdapterFiles(NamedTuple):
    """The files of a PEFT adapter: all that can be known without reading its tensors."""

    directory: Path
    config: dict
    weights_file: Path
    peft_name_of: dict[str, str]  # our name of a tensor -> PEFT's
    headers: dict[str, TensorHeader]  # by PEFT's name
    base_hash: str | None  # of the base model's weights, in the files of save_adapter

    def read(self, wanted, *, dtype=None, device="cpu"):
        """Read all tensors. `wanted` and the rest are as in `read_tensors`, under PEFT's names."""
        files = dict.fromkeys(self.headers, self.weights_file)
        return read_tensors(self.weights_file, files, wanted, device=device, dtype=dtype)


def save_adapter(policy, directory, base):
    """Write the LoRA weights and the trained projector of a Policy as PEFT would.

    base: the directory of the model that the adapter belongs to.
    """
    # 1. Write the tensors, except the scalar head: PEFT knows none, and reward_model.py saves it.
    #    The hash is that of the reference, whose projector is the one from before training.
    tensors = {}
    for name, parameter in policy.parameters().items():
        if not name.startswith("score."):
            tensors[to_peft_name(name)] = parameter
    with policy.reference() as reference_model:
        metadata = {BASE_KEY: hash_base_weights(reference_model)}
    save_tensors(tensors, Path(directory) / "adapter_model.safetensors", metadata)

    # 2. Write the configuration. The pattern matches layers of the decoder only. A plain list of
    # names would also match layers of the vision tower, which has a q_proj too.
    target_modules = rf".*language_model.*\.({'|'.join(policy.targets)})"
    modules_to_save = None
    if policy.trained_in_place:
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


def load_adapter(model, directory, base=None) -> Policy:
    """Add a PEFT adapter to `model` in place, and return the two as a Policy.

    base: the directory of `model`. If the adapter was trained on other weights, or names another
        base model, a warning is printed.
    Raises InputError that names the first field or tensor that is not supported.
    """
    # 1. Check the files, and which projections they adapt.
    adapter = open_adapter(directory)
    config = adapter.config
    targets = find_targets(adapter.weights_file, adapter.peft_name_of, model.config.text.num_layers)
    _warn_of_other_base(adapter, model, base)

    # 2. Add adapters of that rank to those projections.
    policy = Policy(
        model,
        config["r"],
        config["lora_alpha"],
        train_projector=bool(config.get("modules_to_save")),
        rslora=bool(config.get("use_rslora")),
        targets=targets,
    )

    # 3. Copy the tensors into them.
    parameters = policy.parameters()
    wanted = {}
    for name, parameter in parameters.items():
        # If the file lacks a tensor, the error shows our name of it.
        wanted[adapter.peft_name_of.get(name, name)] = (name, parameter.shape)
    tensors = adapter.read(wanted, device=model.device)
    for name, tensor in tensors.items():
        parameters[name].data.copy_(tensor)
    return policy


def open_adapter(directory) -> AdapterFiles:
    """Read what a PEFT adapter is, without its tensors.

    Raises InputError that names the first field or tensor that is not supported.
    """
    # 1. Check the configuration.
    directory = Path(directory)
    check_adapter_directory(directory)
    config_file = directory / "adapter_config.json"
    config = read_json(config_file, dict)
    check_adapter_config(config, config_file)

    # 2. Translate the tensor names, and check what they are for.
    file = directory / "adapter_model.safetensors"
    with open_tensors(file) as tensors:
        peft_names = list(tensors.keys())
        metadata = tensors.metadata() or {}
    headers = read_headers(dict.fromkeys(peft_names, file))
    peft_name_of = {from_peft_name(name): name for name in peft_names}
    check_adapter_tensors(file, peft_name_of, headers, config)
    return AdapterFiles(
        directory=directory,
        config=config,
        weights_file=file,
        peft_name_of=peft_name_of,
        headers=headers,
        base_hash=metadata.get(BASE_KEY),
    )


def check_adapter_directory(directory):
    """Raise InputError that says what to give instead, if a directory holds no adapter."""
    directory = Path(directory)
    check(not directory.is_file(), f"{directory}: is a file; give its folder, {directory.parent}")
    check(directory.is_dir(), f"{directory}: no such folder; give the folder of an adapter")
    if (directory / "adapter_config.json").exists():
        torch_file = directory / "adapter_model.bin"
        check(
            (directory / "adapter_model.safetensors").exists() or not torch_file.exists(),
            f"{torch_file}: a pickled adapter can run code and is never opened; convert it with "
            "PEFT: model.save_pretrained(DIR, safe_serialization=True)",
        )
        return
    for name, option in (("adapter", "--adapter"), ("model", "--model")):
        inner = directory / name
        check(
            not inner.is_dir(),
            f"{directory}: the folder of a run, not of an adapter; give {option} {inner}",
        )
    check(
        not (directory / "config.json").exists(),
        f"{directory}: a model, not an adapter; give it with --model",
    )


def _warn_of_other_base(adapter, model, base):
    """Print a warning if an adapter belongs to other weights than those of `model`.

    A file that save_adapter wrote has a hash of a sample of the weights. Other files only have the
    name of the base model, of which the last part is compared.
    """
    # 1. Compare the hash, or else the name.
    named_base = adapter.config.get("base_model_name_or_path")
    if adapter.base_hash is not None:
        is_same = adapter.base_hash == hash_base_weights(model)
        reason = "was trained on other weights than those of"
    else:
        if base is None or not isinstance(named_base, str) or not named_base:
            return  # there are no two names to compare
        is_same = Path(named_base).name == Path(base).resolve().name
        reason = "names another base model than"

    # 2. Warn.
    if not is_same:
        this_model = "this model" if base is None else base
        print_message(
            f"{adapter.directory}: warning: this adapter {reason} {this_model} (its base is "
            f"{named_base!r:.100}); results with it may mean nothing",
        )


def hash_base_weights(model) -> str:
    """Return a short hash of a sample of a model's weights without its adapters.

    It covers what `sample_values` takes of each tensor, rounded to bfloat16. So it is the same for
    a model in float32 and in bfloat16, and before and after adapters are added.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        plain_name = name.replace(".base.", ".")  # a LoRA layer holds the linear layer as `base`
        values = sample_values(parameter, name).to(torch.bfloat16).cpu().contiguous()
        digest.update(f"{plain_name} {whole_shape(name, parameter.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def to_peft_name(name):
    """Return PEFT's name of one of our parameters."""
    peft_name = ADAPTER_PREFIX + to_layout_name(name, "memory")
    # Our lora_A and lora_B are parameters. PEFT's are linear layers, which have a weight.
    if name.endswith(("lora_A", "lora_B")):
        peft_name += ".weight"
    return peft_name


def from_peft_name(peft_name):
    """Return our name of a parameter, given PEFT's name under any layout of the base model."""
    name = peft_name.removeprefix(ADAPTER_PREFIX)
    if ".lora_" in name:
        name = name.removesuffix(".weight")
    return to_our_name(name)
