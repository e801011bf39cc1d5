"""Read and write checkpoint directories. Every tensor must be used, and every shape must agree."""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minialign.models.config_json import read_config
from minialign.models.llava import Llava
from minialign.utils.files import InputError, atomic_write, check, friendly_errors, read_json

# The same checkpoint is stored under four sets of tensor names, depending on the version of
# transformers that saved it. They differ only in prefixes: the keys are the prefixes of our
# parameters, the values what the layout writes instead.
LAYOUTS = {
    # the llava-hf checkpoints of the Hugging Face hub
    "hub": {
        "language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "vision_tower.": "vision_tower.vision_model.",
        "multi_modal_projector.": "multi_modal_projector.",
        "image_newline": "image_newline",
    },
    # as "memory", with the module vision_model that the vision tower had in transformers 4
    "flat": {
        "language_model.": "model.language_model.",
        "lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    # the modules of transformers 5 in memory, and so the adapters of PEFT
    "memory": {
        "language_model.": "model.language_model.",
        "lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    },
    # what transformers 5 saves
    "fresh": {
        "language_model.": "language_model.model.",
        "lm_head.": "language_model.lm_head.",
        "vision_tower.": "vision_tower.",
        "multi_modal_projector.": "multi_modal_projector.",
        "image_newline": "image_newline",
    },
}
# Buffers that old files store although the model computes them.
COMPUTED_BUFFERS = (".position_ids", ".inv_freq")
# The files of a checkpoint directory that are copied when a model is saved.
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "added_tokens.json",
)


def detect_layout(names) -> str:
    """Return which of LAYOUTS the tensor names of a checkpoint follow."""
    has_model_prefix = any(name.startswith("model.") for name in names)
    has_vision_model = any(".vision_model." in name for name in names)
    if has_model_prefix:
        return "flat" if has_vision_model else "memory"
    return "hub" if has_vision_model else "fresh"


def to_layout_name(name, layout) -> str:
    """Return the name that `layout` gives to our parameter `name`."""
    for our_prefix, layout_prefix in LAYOUTS[layout].items():
        if name.startswith(our_prefix):
            return layout_prefix + name.removeprefix(our_prefix)
    raise ValueError(f"{name} is not a parameter of Llava")


def to_our_name(name) -> str:
    """Return our name of a parameter, given its name in any of LAYOUTS."""
    for prefixes in LAYOUTS.values():
        for our_prefix, layout_prefix in prefixes.items():
            if name.startswith(layout_prefix):
                return our_prefix + name.removeprefix(layout_prefix)
    return name  # not a parameter of Llava; read_tensors reports it


def tensor_files(directory) -> dict[str, Path]:
    """Return the safetensors file that holds each tensor of a checkpoint, by the tensor's name.

    Raises InputError for a missing directory, file or shard, and for a pickled checkpoint.
    """
    directory = Path(directory)
    check(directory.is_dir(), f"{directory}: no such model directory")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return _sharded_tensor_files(index)

    file = directory / "model.safetensors"
    if not file.exists():
        _refuse_pickles(directory)
    check(file.exists(), f"{file}: no such file, and no {index.name} beside it")
    with open_tensors(file) as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _sharded_tensor_files(index):
    """Return the shard that holds each tensor, after comparing every shard with the index."""
    with friendly_errors(index, "download it again"):
        files = {}
        for name, shard in read_json(index, dict)["weight_map"].items():
            files[name] = index.parent / shard

    for shard in sorted(set(files.values())):
        check(
            shard.exists(),
            f"{shard}: this shard is named by {index.name} and missing; download it again",
        )
        indexed_names = {name for name, file in files.items() if file == shard}
        with open_tensors(shard) as tensors:
            differing_names = sorted(indexed_names ^ set(tensors.keys()))
        if differing_names:
            raise InputError(
                f"{shard}: tensor {differing_names[0]} is in the shard or in {index.name}, "
                "but not in both; download both again"
            )
    return files


def _refuse_pickles(directory):
    """Raise InputError if the weights of `directory` are pickled."""
    pickles = []
    for pattern in ("*.bin", "*.pt", "*.pth"):
        pickles.extend(directory.glob(pattern))
    if pickles:
        raise InputError(
            f"{min(pickles)}: a pickled checkpoint can run code and is never opened; convert it "
            "with transformers: model.save_pretrained(DIR, safe_serialization=True)"
        )


def open_tensors(path, device="cpu"):
    """Open a safetensors file, which is then mapped into memory, not read.

    Raises InputError if the file is missing, truncated or of another format.
    """
    # torch takes "cuda" for the current GPU of this process, safetensors takes it for the first.
    device_name = str(device)
    if device_name == "cuda":
        device_name = f"cuda:{torch.cuda.current_device()}"
    try:
        return safe_open(path, framework="pt", device=device_name)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from None


def read_tensors(source, files, wanted, *, device="cpu", dtype=None):
    """Read the `wanted` tensors from `files`, which must hold all of them and nothing else.

    files: name in the file -> path of the file that holds this tensor.
    wanted: name in the file -> (our name, shape).
    dtype: what the tensors are converted to, or None to keep the dtype of each.
    Returns our name -> tensor. On a CPU a tensor is the mapped file, without a copy.
    Raises InputError that names the first tensor that is missing, unused or of another shape.
    """
    # 1. The names must agree. An error names the first tensor, and `source` if no file holds it.
    missing = sorted(wanted.keys() - files.keys())
    if missing:
        raise InputError(f"{source}: tensor {missing[0]} is missing{_and_more(missing)}")
    unused = sorted(files.keys() - wanted.keys())
    if unused:
        file = files[unused[0]]
        raise InputError(
            f"{file}: tensor {unused[0]} has no place in this model{_and_more(unused)}"
        )

    # 2. Read one file after the other. The shapes must agree, too.
    tensors = {}
    for file in sorted(set(files.values())):
        with open_tensors(file, device) as stored:
            for stored_name in sorted(wanted.keys() & stored.keys()):
                our_name, shape = wanted[stored_name]
                tensor = stored.get_tensor(stored_name)
                check(
                    tensor.shape == shape,
                    f"{file}: tensor {stored_name} has shape {tuple(tensor.shape)}, "
                    f"this model needs {tuple(shape)}",
                )
                if dtype is not None:
                    tensor = tensor.to(dtype)
                tensors[our_name] = tensor
    return tensors


def _and_more(names):
    """Return the end of an error message that names only the first of `names`."""
    if len(names) == 1:
        return ""
    return f" (and {len(names) - 1} more)"


def load_model(directory, dtype=None, device="cpu") -> Llava:
    """Load a checkpoint directory as a frozen Llava in evaluation mode.

    `dtype` None keeps the dtype of each tensor. Raises InputError that names the first tensor that
    is missing, unused or of another shape.
    """
    # 1. Build the model on the "meta" device: its parameters have shapes but take no memory.
    config, _ = read_config(directory)
    with torch.device("meta"):
        model = Llava(config)

    # 2. Pair each tensor of the files with the parameter that it is for.
    files = tensor_files(directory)
    layout = detect_layout(files)
    for name in list(files):
        if name.endswith(COMPUTED_BUFFERS):
            del files[name]
    wanted = {}
    for name, parameter in model.named_parameters():
        wanted[to_layout_name(name, layout)] = (name, parameter.shape)

    # A tied vocabulary head is the embedding table, but some files store it a second time.
    head_name = to_layout_name("lm_head.weight", layout)
    stores_tied_head = config.text.tie_word_embeddings and head_name in files
    if stores_tied_head:
        wanted[head_name] = ("lm_head.weight", model.vocab_head.shape)

    # 3. Read the tensors, and assign them to the model without copying them.
    state_dict = read_tensors(directory, files, wanted, device=device, dtype=dtype)
    if stores_tied_head:
        head = state_dict.pop("lm_head.weight")
        embeddings = state_dict["language_model.embed_tokens.weight"]
        check(
            torch.equal(head, embeddings),
            f"{directory}: tensor {head_name} is not the embedding table, though config.json ties "
            "the two; set tie_word_embeddings to false, in text_config too",
        )
    model.load_state_dict(state_dict, strict=True, assign=True)
    model.requires_grad_(False)
    return model.train(False)


def save_model(model, source, directory):
    """Write `model` to `directory`, in the layout and with the companion files of `source`."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)

    # 1. Copy the configuration and the tokenizer.
    for name in COMPANION_FILES:
        source_file = Path(source) / name
        if source_file.exists():
            shutil.copyfile(source_file, directory / name)

    # 2. Write the weights under the names that the source uses.
    layout = detect_layout(tensor_files(source))
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[to_layout_name(name, layout)] = tensor
    save_tensors(tensors, directory / "model.safetensors")


def save_tensors(tensors, path, metadata=None):
    """Write named tensors to a safetensors file, either completely or not at all."""
    cpu_tensors = {}
    for name, tensor in tensors.items():
        cpu_tensors[name] = tensor.detach().cpu().contiguous()
    # Readers look in the metadata for the framework that the tensors come from.
    metadata = {"format": "pt"} | (metadata or {})
    with atomic_write(path) as temporary_path:
        save_file(cpu_tensors, temporary_path, metadata=metadata)


def fingerprint(model) -> str:
    """Return a short hash of a model's weights.

    It covers up to about 8,000 evenly spaced values of each tensor, so a 7B model takes a second.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        stride = max(1, len(values) // 4096)
        values = values[::stride].cpu().contiguous()
        header = f"{name} {tuple(parameter.shape)} {parameter.dtype}"
        digest.update(header.encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
