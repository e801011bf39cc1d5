"""Checkpoint directories in and out, strictly: every tensor of the files is used, every parameter is found, shapes agree."""
import hashlib
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .config import read_config
from .files import BadInput, read_json, replacing, write_json
from .images import Preparation, count_vectors, picture_size, open_picture, prepare
from .lora import TARGETS, Policy
from .mllm import MLLM
from .prompts import TEMPLATES, default_template
from .tokenizer import Tokenizer

# Our parameter prefixes, and what four layouts of the same checkpoint call them (FORMATS.md section 2).
OURS = ("language_model.", "lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline")
LAYOUTS = {
    "hub": ("language_model.model.", "language_model.lm_head.", "vision_tower.vision_model.", "multi_modal_projector.", "image_newline"),
    "flat": ("model.language_model.", "lm_head.", "model.vision_tower.vision_model.", "model.multi_modal_projector.", "model.image_newline"),
    "memory": ("model.language_model.", "lm_head.", "model.vision_tower.", "model.multi_modal_projector.", "model.image_newline"),
    "fresh": ("language_model.model.", "language_model.lm_head.", "vision_tower.", "multi_modal_projector.", "image_newline"),
}
COMPANIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.json", "chat_template.jinja", "added_tokens.json")


def layout_of(names):
    """Which of LAYOUTS the tensor names of a checkpoint follow."""
    flat = any(name.startswith("model.") for name in names)
    inner = any(".vision_model." in name for name in names)
    return {(True, True): "flat", (True, False): "memory", (False, True): "hub", (False, False): "fresh"}[flat, inner]


def outward(name, layout):
    """The name that `layout` gives to our parameter `name`."""
    for ours, theirs in zip(OURS, LAYOUTS[layout]):
        if name.startswith(ours):
            return theirs + name[len(ours):]
    raise KeyError(name)


def tensor_files(directory):
    """Map of tensor name to its safetensors file. Raises BadInput for a missing file, shard or a checkpoint in pickle form."""
    directory = Path(directory)
    if not directory.is_dir():
        raise BadInput(f"{directory}: no such model directory")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        files = {name: directory / file for name, file in read_json(index).get("weight_map", {}).items()}
        for file in sorted(set(files.values())):
            if not file.exists():
                raise BadInput(f"{file}: this shard is named by {index.name} and missing; download it again")
        for file in sorted(set(files.values())):
            with open_tensors(file) as tensors:
                held = set(tensors.keys())
            named = {name for name, where in files.items() if where == file}
            if held != named:
                raise BadInput(f"{file}: tensor {min(held ^ named)} is in the shard or in {index.name}, but not in both; download both again")
        return files
    single = directory / "model.safetensors"
    if not single.exists():
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern))
        if pickles:
            raise BadInput(f"{directory / pickles[0]}: a pickle can run code and is never opened; convert it with transformers: "
                           "model.save_pretrained(DIR, safe_serialization=True)")
        raise BadInput(f"{single}: no such file, and no {index.name} beside it")
    with open_tensors(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def open_tensors(path, device="cpu"):
    """A memory-mapped safetensors file. Raises BadInput when it is missing, truncated or none."""
    try:
        return safe_open(path, framework="pt", device=str(device))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{path}: not a whole safetensors file ({error}); copy or download it again") from None


def load_model(directory, dtype=None, device="cpu"):
    """MLLM from a checkpoint directory, in evaluation mode and frozen; `dtype` None keeps each tensor's own.

    Tensors are mapped and assigned rather than copied. Raises BadInput naming the first missing, unused or mis-shaped tensor.
    """
    config, _ = read_config(directory)
    with torch.device("meta"):
        model = MLLM(config)
    files = tensor_files(directory)
    layout = layout_of(files)
    wanted = {outward(name, layout): (name, parameter.shape) for name, parameter in model.named_parameters()}
    missing = sorted(set(wanted) - set(files))
    if config.text.tied:  # the head may be stored once more
        wanted[outward("lm_head.weight", layout)] = "lm_head.weight", model.head.shape
    # Old files carry buffers that can be worked out again.
    unused = sorted(name for name in set(files) - set(wanted) if not name.endswith((".position_ids", ".inv_freq")))
    if missing:
        raise BadInput(f"{directory}: tensor {missing[0]} is missing" + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""))
    if unused:
        raise BadInput(f"{files[unused[0]]}: tensor {unused[0]} has no place in this model" + (f" (and {len(unused) - 1} more)" if len(unused) > 1 else ""))
    state = {}
    for file in sorted(set(files.values())):
        with open_tensors(file, device) as tensors:
            for theirs in tensors.keys():
                if theirs in wanted:
                    name, shape = wanted[theirs]
                    tensor = tensors.get_tensor(theirs)
                    if tensor.shape != shape:
                        raise BadInput(f"{file}: tensor {theirs} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}")
                    state[name] = tensor.to(dtype) if dtype else tensor
    if config.text.tied and not torch.equal(state.pop("lm_head.weight", table := state["language_model.embed_tokens.weight"]), table):
        raise BadInput(f"{directory}: tensor {outward('lm_head.weight', layout)} is not the embedding table, though config.json ties the two; "
                       "set tie_word_embeddings to false, in text_config too")
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


@dataclass
class Subject:
    """A loaded checkpoint with everything needed to ask it: tokenizer, prompt template, how pictures are prepared."""
    model: MLLM
    tokenizer: Tokenizer
    template: str
    preparation: Preparation
    directory: str

    kept: dict = field(default_factory=dict)
    budget: int = 2 << 30  # bytes of features kept

    def count(self, path):
        """Picture vectors that the picture at `path` becomes, told from its header. Raises BadInput if it is no picture."""
        return count_vectors(picture_size(path), self.preparation, self.model.config.vision.side) + self.model.config.extra_vectors

    def look(self, paths, batch=32):
        """Features of the pictures at `paths`. The tower is frozen: what was seen is kept, oldest dropped, within the byte budget."""
        paths = list(map(str, paths))
        missing = [path for path in dict.fromkeys(paths) if path not in self.kept]
        fresh = {}
        for first in range(0, len(missing), batch):
            some = missing[first:first + batch]
            fresh.update(zip(some, self.model.look([prepare(open_picture(path), self.preparation) for path in some])))
        features = [fresh[path] if path in fresh else self.kept[path] for path in paths]
        self.kept.update(fresh)
        while sum(f.tiles.numel() * f.tiles.element_size() for f in self.kept.values()) > self.budget:
            del self.kept[next(iter(self.kept))]
        return features


def load_subject(directory, template=None, dtype=None, device="cpu", kept=None):
    """Subject from a checkpoint directory. `template` and `dtype` (a name) None take the checkpoint's own; `kept`: features of this tower."""
    config, raw = read_config(directory)
    if template is not None and template not in TEMPLATES:
        raise BadInput(f"template {template!r} is unknown; choose one of {', '.join(TEMPLATES)}")
    tokenizer = Tokenizer.load(directory)
    preparation = Preparation.load(directory, config.vision.image_size, config.vision.patch_size, config.pinpoints)
    template = template or default_template(directory, raw)
    return Subject(load_model(directory, dtype and getattr(torch, dtype), device), tokenizer, template, preparation, str(directory), kept if kept is not None else {})


def save_model(model, source, directory):
    """Write `model` to `directory` in the layout that `source` has, with the files that go with it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in COMPANIONS:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, directory / name)
    save_tensors({outward(name, layout_of(tensor_files(source))): tensor for name, tensor in model.state_dict().items()}, directory / "model.safetensors")


def save_tensors(tensors, path, metadata=None):
    """Write tensors as safetensors, whole or not at all."""
    with replacing(path) as beside:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside, metadata={"format": "pt"} | (metadata or {}))


def fingerprint(directory):
    """Short hash of a checkpoint: its config and the sizes and bytes of its weight files (a 14 GB one is read once)."""
    digest = hashlib.sha256(json.dumps(read_config(directory)[1], sort_keys=True).encode())
    for file in sorted(set(tensor_files(directory).values())):
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


ADAPTER_PREFIX = "base_model.model."
# Fields of adapter_config.json that are read, or change nothing here; any other must be off or have one of the values below.
ADAPTER_FIELDS = {"r", "lora_alpha", "use_rslora", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout",
                  "base_model_name_or_path", "revision", "task_type", "auto_mapping", "inference_mode", "peft_version", "qalora_group_size", "megatron_core"}
ADAPTER_VALUES = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": (True, "gaussian")}


def save_adapter(policy, directory, base):
    """Write a Policy's LoRA weights and trained projector in PEFT's layout; `base` is the directory that it belongs to."""
    tensors = {}
    for name, tensor in policy.parameters().items():
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


def inward(name):
    """Our name of a parameter that any of LAYOUTS names."""
    for layout in ("hub", "flat", "memory", "fresh"):
        for ours, theirs in zip(OURS, LAYOUTS[layout]):
            if name.startswith(theirs):
                return ours + name[len(theirs):]
    return name
