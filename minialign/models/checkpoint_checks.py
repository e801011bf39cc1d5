"""Check that the files of a checkpoint fit together: config.json, weights and tokenizer.

A check comes before the work that would be in vain if it failed. Sizes are compared with the
headers of the weights before a model of these sizes is built, and ids are compared before weights
are read.
"""

import math
from pathlib import Path

import torch

from minialign.utils.files import InputError, check

# The dtypes of weights by their names in safetensors, and what a model of such weights computes in.
SUPPORTED_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float32,
}

# A size in config.json may be at most this many times the largest size in the weights.
MAX_SIZE_RATIO = 100


# --- the folder ---


def check_model_folder(directory, what):
    """Raise InputError unless a folder is there with a config.json, as checkpoints have one.

    what: what the folder should be of, for errors, such as "a checkpoint".
    """
    directory = Path(directory)
    config_file = directory / "config.json"
    check(not directory.is_file(), f"{directory}: is a file; give its folder, {directory.parent}")
    check(
        directory.is_dir(),
        f"{directory}: no such folder; give the folder of {what}, nothing is downloaded",
    )
    check(config_file.exists(), f"{config_file}: no such file; give the folder of {what}")


# --- dtypes and values ---


def check_stored_dtype(file, name, dtype):
    """Raise InputError unless the dtype of a stored tensor is one that a model computes in."""
    check(
        dtype in SUPPORTED_DTYPES,
        f"{file}: tensor {name} has the dtype {dtype}, which is that of quantized or other data; "
        f"supported: {', '.join(SUPPORTED_DTYPES)}; take the checkpoint that is not quantized",
    )


def main_dtype(files, headers) -> torch.dtype:
    """Return the one dtype that a model computes in: that of most of its weights.

    files, headers: file and header of each tensor, by its name. Raises InputError for a dtype that
    is not supported.
    """
    num_values = dict.fromkeys(SUPPORTED_DTYPES.values(), 0)
    for name, header in headers.items():
        check_stored_dtype(files[name], name, header.dtype)
        num_values[SUPPORTED_DTYPES[header.dtype]] += math.prod(header.shape)
    return max(num_values, key=num_values.get)


def check_finite(file, name, tensor):
    """Raise InputError if a tensor has NaN or an infinite value.

    It is enough to check the smallest and the largest value, since torch returns NaN for both if a
    NaN occurs. This takes one pass at the speed of memory. `isfinite` would be 50 times slower in
    bfloat16.
    """
    if tensor.numel() == 0:
        return
    smallest, largest = torch.aminmax(tensor)
    if math.isfinite(smallest) and math.isfinite(largest):
        return
    num_bad = int((~torch.isfinite(tensor)).sum())
    raise InputError(
        f"{file}: tensor {name} has {num_bad} of {tensor.numel()} values that are NaN or infinite "
        f"in {str(tensor.dtype).removeprefix('torch.')}; the file is damaged or its training "
        "failed: take another copy"
    )


# --- sizes ---


def check_sizes(config_file, headers, *, sizes, layers):
    """Raise InputError if a config.json asks for far more than the weights hold.

    Such a model would be too large to be built and compared with the weights. A smaller error is
    found when the shape of each tensor is compared.

    headers: the header of each tensor by its name.
    sizes: name in a message -> number of rows or columns, which some tensor must have.
    layers: name in a message -> number of layers, each of which has a tensor of its own.
    """
    largest = 0
    for header in headers.values():
        largest = max(largest, *header.shape, 0)
    for name, size in sizes.items():
        check(
            size <= MAX_SIZE_RATIO * largest,
            f"{config_file}: {name} is {size}, but no tensor of the weights beside it has more "
            f"than {largest} rows or columns; take both from the same checkpoint",
        )
    for name, num_layers in layers.items():
        check(
            num_layers <= len(headers),
            f"{config_file}: {name} is {num_layers}, but the weights beside it have "
            f"{len(headers)} tensors in all; take both from the same checkpoint",
        )


def check_llava_sizes(config_file, config, headers):
    """Raise InputError if the LlavaConfig `config` asks for far more than the weights hold."""
    text = config.text
    vision = config.vision
    sizes = {
        "vocab_size in text_config": text.vocab_size,
        "hidden_size in text_config": text.hidden_size,
        "intermediate_size in text_config": text.intermediate_size,
        "num_attention_heads times head_dim in text_config": text.num_heads * text.head_dim,
        "hidden_size in vision_config": vision.hidden_size,
        "intermediate_size in vision_config": vision.intermediate_size,
        "patch_size in vision_config": vision.patch_size,
        "the number of patches in vision_config": vision.patches_per_side**2,
    }
    layers = {
        "num_hidden_layers in text_config": text.num_layers,
        "num_hidden_layers in vision_config": vision.num_layers,
    }
    check_sizes(config_file, headers, sizes=sizes, layers=layers)


# --- token ids ---


def check_token_ids(directory, tokenizer, config, *, placeholder):
    """Raise InputError if the ids of tokenizer.json are not those of config.json and the weights.

    config: the LlavaConfig, whose vocab_size is the number of rows of the embedding table.
    placeholder: the token that stands for an image. It is replaced before tokens are embedded, so
        that its id may lie beyond the table.
    """
    tokenizer_file = Path(directory) / "tokenizer.json"
    config_file = Path(directory) / "config.json"

    # 1. Compare the id of the image token.
    placeholder_id = tokenizer.id_of(placeholder)
    image_token_id = config.image_token_id
    check(
        placeholder_id == image_token_id,
        f"{tokenizer_file}: {placeholder} has the id {placeholder_id}, but the image token of "
        f"{config_file} is {image_token_id}; take both from the same checkpoint",
    )

    # 2. Check that all other tokens have embeddings, and the special ones, whose ids may come from
    #    other files.
    ids = dict(tokenizer.ids)
    del ids[placeholder]
    for role in ("bos", "eos", "pad"):
        token_id = getattr(tokenizer, role)
        if token_id is not None:
            ids[f"the {role} token"] = token_id
    vocab_size = config.text.vocab_size
    largest_token = max(ids, key=ids.get)
    largest_id = ids[largest_token]
    check(
        largest_id < vocab_size,
        f"{tokenizer_file}: {largest_token!r:.60} has the id {largest_id}, but vocab_size in "
        f"{config_file} is {vocab_size}, so that it has no embedding; take both from the same "
        "checkpoint",
    )
