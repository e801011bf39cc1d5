"""Read and write checkpoint directories. Every tensor must be used, and every shape must agree."""

import copy
import hashlib
import math
import re
import shutil
from pathlib import Path

import torch

from minialign.models.checkpoint_checks import SUPPORTED_DTYPES, check_llava_sizes, main_dtype
from minialign.models.config_json import read_config
from minialign.models.llava import Llava
from minialign.models.safetensors_files import (
    WEIGHTS_FILE,
    open_tensors,
    read_headers,
    read_tensors,
    save_tensors,
    tensor_files,
)
from minialign.models.split import cut_dimension, local_config, values_of_whole, whole_shape
from minialign.utils.files import atomic_write, check, write_json
from minialign.utils.messages import print_message

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
# The head by which SigLIP pools the features of an image into one, in any of LAYOUTS. LLaVA never
# computes it, since it reads the features themselves.
POOLING_HEAD = re.compile(r"(model\.)?vision_tower\.(vision_model\.)?head\.")
# What config.json and its sections call the dtype of the weights, in newer and older files.
DTYPE_FIELDS = ("dtype", "torch_dtype")
# The files of a checkpoint directory beside its weights. They say how the model is built, and how
# texts and images are prepared for it.
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


def pooling_head_files(files, config) -> dict[str, Path]:
    """Return the file of each tensor of SigLIP's pooling head, or {} if there is no such head."""
    if config.vision.family != "siglip":
        return {}
    return {name: file for name, file in files.items() if POOLING_HEAD.match(name)}


def load_model(directory, dtype=None, device="cpu") -> Llava:
    """Load a checkpoint directory as a frozen Llava in evaluation mode.

    dtype: the torch dtype of all weights, or None for that of most of them in the file.
    Raises InputError that names the first tensor that is missing, unused, of another shape, of a
    dtype that is not supported, or not finite.
    """
    # 1. Compare the sizes of config.json with the headers of the weights.
    config, _ = read_config(directory)
    files = tensor_files(directory)
    layout = detect_layout(files)
    head_files = pooling_head_files(files, config)
    for name in list(files):
        if name.endswith(COMPUTED_BUFFERS) or name in head_files:
            del files[name]
    headers = read_headers(files)
    check_llava_sizes(Path(directory) / "config.json", config, headers)
    if dtype is None:
        dtype = main_dtype(files, headers)
        _print_conversions(directory, headers, dtype)

    # 2. Build the model on the "meta" device: its parameters have shapes but take no memory.
    with torch.device("meta"):
        model = Llava(local_config(config, directory))

    # 3. Pair each tensor of the files with the parameter that it is for.
    wanted = {}
    for name, parameter in model.named_parameters():
        wanted[to_layout_name(name, layout)] = (name, parameter.shape)

    # A tied vocabulary head is no parameter of its own, but some files store it all the same.
    head_name = to_layout_name("lm_head.weight", layout)
    stores_tied_head = config.text.tie_word_embeddings and head_name in files
    if stores_tied_head:
        wanted[head_name] = ("lm_head.weight", model.vocab_head.shape)

    # 4. Read the tensors, and assign them to the model. Those that have `dtype` are not copied.
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


def _print_conversions(directory, headers, dtype):
    """Print how many tensors of a checkpoint are converted to `dtype`, if any are."""
    counts = {}
    for header in headers.values():
        counts[header.dtype] = counts.get(header.dtype, 0) + 1
    for stored_dtype, count in counts.items():
        # SUPPORTED_DTYPES gives float32 for F64, which is a conversion, too.
        if stored_dtype == "F64" or SUPPORTED_DTYPES[stored_dtype] != dtype:
            print_message(
                f"{directory}: {count} of {len(headers)} tensors are {stored_dtype} and are "
                f"converted to {dtype}, that of most weights; --dtype names another",
            )


def companion_files(directory) -> list[Path]:
    """Return the COMPANION_FILES that a checkpoint directory has."""
    paths = [Path(directory, name) for name in COMPANION_FILES]
    return [path for path in paths if path.is_file()]


def with_dtype(raw, dtype) -> dict:
    """Return a copy of the dictionary of a config.json, with `dtype` wherever it names a dtype."""
    changed = copy.deepcopy(raw)
    for section in (changed, changed["text_config"], changed["vision_config"]):
        for field in DTYPE_FIELDS:
            if section.get(field) is not None:
                section[field] = str(dtype).removeprefix("torch.")
    return changed


def save_model(model, source, directory):
    """Write `model` to `directory`, in the layout and with the companion files of `source`.

    Only the dtypes in config.json are changed, if they are not that of the weights.
    """
    directory = Path(directory)
    dtype = model.vocab_head.dtype

    # 1. Copy the configuration and the tokenizer.
    for source_file in companion_files(source):
        with atomic_write(directory / source_file.name) as temporary_path:
            shutil.copyfile(source_file, temporary_path)

    _, raw = read_config(source)
    config_of_weights = with_dtype(raw, dtype)
    if config_of_weights != raw:  # else the file remains as it is, to the byte
        write_json(directory / "config.json", config_of_weights)

    # 2. Give the weights the names that the source uses.
    files = tensor_files(source)
    layout = detect_layout(files)
    tensors = {}
    for name, tensor in model.state_dict().items():
        tensors[to_layout_name(name, layout)] = tensor

    # 3. Add SigLIP's pooling head, which the model does not hold, and write all tensors.
    for name, file in pooling_head_files(files, model.config).items():
        with open_tensors(file) as stored:
            tensors[name] = stored.get_tensor(name).to(dtype)
    save_tensors(tensors, directory / WEIGHTS_FILE)


def fingerprint(model) -> str:
    """Return a short hash of a sample of a model's weights.

    It covers what `sample_values` takes of each tensor, so a 7B model takes a second.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = sample_values(parameter, name).cpu().contiguous()
        header = f"{name} {whole_shape(name, parameter.shape)} {parameter.dtype}"
        digest.update(header.encode() + values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def sample_values(parameter, name="") -> torch.Tensor:
    """Return evenly spaced values of a tensor: all of fewer than 8,192, at least 4,096 of more.

    name: of the parameter. If it is cut (split.py), the values are those of the whole tensor.
    """
    values = parameter.detach()
    num_values = math.prod(whole_shape(name, values.shape))
    stride = max(1, num_values // 4096)
    if cut_dimension(name, values.shape) is None:
        return values.flatten()[::stride]
    return values_of_whole(name, values, torch.arange(0, num_values, stride, device=values.device))
