"""Checkpoint directories in and out, strictly: every tensor of the files is used, every parameter is found, shapes agree."""

import hashlib
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minialign.models.config import read_config
from minialign.models.llava import Llava
from minialign.utils.files import InputError, atomic_write, check, friendly_errors, read_json

# Our parameter prefixes, and what four layouts of the same checkpoint call them (FORMATS.md section 2).
OUR_PREFIXES = (
    "language_model.",
    "lm_head.",
    "vision_tower.",
    "multi_modal_projector.",
    "image_newline",
)
LAYOUTS = {
    "hub": (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.vision_model.",
        "multi_modal_projector.",
        "image_newline",
    ),
    "flat": (
        "model.language_model.",
        "lm_head.",
        "model.vision_tower.vision_model.",
        "model.multi_modal_projector.",
        "model.image_newline",
    ),
    "memory": (
        "model.language_model.",
        "lm_head.",
        "model.vision_tower.",
        "model.multi_modal_projector.",
        "model.image_newline",
    ),
    "fresh": (
        "language_model.model.",
        "language_model.lm_head.",
        "vision_tower.",
        "multi_modal_projector.",
        "image_newline",
    ),
}
# Buffers that old files store, although the model computes them.
COMPUTED_BUFFERS = (".position_ids", ".inv_freq")
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


def detect_layout(names):
    """Which of LAYOUTS the tensor names of a checkpoint follow."""
    flat, inner = (
        any(name.startswith("model.") for name in names),
        any(".vision_model." in name for name in names),
    )
    return {
        (True, True): "flat",
        (True, False): "memory",
        (False, True): "hub",
        (False, False): "fresh",
    }[flat, inner]


def to_layout_name(name, layout):
    """The name that `layout` gives to our parameter `name`."""
    ours, theirs = next(
        pair for pair in zip(OUR_PREFIXES, LAYOUTS[layout]) if name.startswith(pair[0])
    )
    return theirs + name[len(ours) :]


def to_our_name(name):
    """Our name of a parameter that any of LAYOUTS names."""
    pairs = (
        pair
        for layout in LAYOUTS.values()
        for pair in zip(OUR_PREFIXES, layout)
        if name.startswith(pair[1])
    )
    ours, theirs = next(pairs, ("", ""))
    return ours + name[len(theirs) :]


def tensor_files(directory):
    """Map of tensor name to its safetensors file. Raises BadInput for a missing file, shard or a pickled checkpoint."""
    directory = Path(directory)
    check(directory.is_dir(), f"{directory}: no such model directory")
    index = directory / "model.safetensors.index.json"
    if index.exists():
        with friendly_errors(index, "download it again"):
            files = {
                name: directory / file
                for name, file in read_json(index, dict)["weight_map"].items()
            }
        for file in sorted(set(files.values())):
            check(
                file.exists(),
                f"{file}: this shard is named by {index.name} and missing; download it again",
            )
            with open_tensors(file) as tensors:
                stray = {name for name, where in files.items() if where == file} ^ set(
                    tensors.keys()
                )
            check(
                not stray,
                f"{file}: tensor {min(stray, default='')} is in the shard or in {index.name}, but not in both; download both again",
            )
        return files
    single, pickles = (
        directory / "model.safetensors",
        sorted(file for pattern in ("*.bin", "*.pt", "*.pth") for file in directory.glob(pattern)),
    )
    if pickles and not single.exists():
        raise InputError(
            f"{pickles[0]}: a pickled checkpoint can run code and is never opened; convert it with transformers: "
            "model.save_pretrained(DIR, safe_serialization=True)"
        )
    check(single.exists(), f"{single}: no such file, and no {index.name} beside it")
    with open_tensors(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def open_tensors(path, device="cpu"):
    """A memory-mapped safetensors file. Raises BadInput when it is missing, truncated or none. To safetensors "cuda" is the first GPU, to torch the process's own."""
    try:
        return safe_open(
            path,
            framework="pt",
            device=f"cuda:{torch.cuda.current_device()}" if str(device) == "cuda" else str(device),
        )
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a whole safetensors file ({error}); copy or download it again"
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
    return model.eval()


def save_model(model, source, directory):
    """Write `model` to `directory` in the layout that `source` has, with the files that go with it."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in COMPANION_FILES:
        if (Path(source) / name).exists():
            shutil.copyfile(Path(source) / name, directory / name)
    layout = detect_layout(tensor_files(source))
    save_tensors(
        {to_layout_name(name, layout): tensor for name, tensor in model.state_dict().items()},
        directory / "model.safetensors",
    )


def save_tensors(tensors, path, metadata=None):
    """Write tensors as safetensors, whole or not at all."""
    with atomic_write(path) as beside:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            beside,
            metadata={"format": "pt"} | (metadata or {}),
        )


def fingerprint(model):
    """Short hash of a model's weights: of up to 4,096 values, evenly spread, of each tensor, so that 7B take a second."""
    digest = hashlib.sha256()
    for name, tensor in model.named_parameters():
        values = tensor.detach().flatten()
        values = values[:: max(1, len(values) // 4096)].cpu().contiguous()
        digest.update(
            f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            + values.view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]
