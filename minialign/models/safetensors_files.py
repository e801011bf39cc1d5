"""Read and write safetensors files. What is missing or damaged is refused by file and tensor."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minialign.models.checkpoint_checks import check_finite, check_stored_dtype
from minialign.models.split import cut_dimension, local_slices, whole_shape, whole_tensor
from minialign.utils.distributed import is_main_process
from minialign.utils.files import (
    InputError,
    atomic_write,
    check,
    friendly_errors,
    read_errors,
    read_json,
)

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Weights in other formats: their file names, and what to do about them.
OTHER_FORMATS = {
    ("*.bin", "*.pt", "*.pth", "*.ckpt"): (
        "a pickled checkpoint can run code and is never opened; convert it with transformers: "
        "model.save_pretrained(DIR, safe_serialization=True)"
    ),
    ("*.gguf", "*.ggml"): "quantized weights are not supported; take the original checkpoint",
    ("*.h5", "*.msgpack", "*.onnx"): "not the weights of PyTorch; take the safetensors files",
    ("*-of-*.safetensors",): f"a shard without its {INDEX_FILE}; download that too",
    ("*.safetensors",): f"weights are read from {WEIGHTS_FILE} alone; is this their folder?",
}


class TensorHeader(NamedTuple):
    """What the header of a safetensors file says about a tensor, without reading the tensor."""

    dtype: str  # as in the file, such as "BF16"
    shape: tuple


# --- finding the files ---


def tensor_files(directory) -> dict[str, Path]:
    """Return the safetensors file that holds each tensor of a checkpoint, by the tensor's name.

    Raises InputError for a missing directory, file or shard, and for weights in another format.
    """
    directory = Path(directory)
    check(directory.is_dir(), f"{directory}: no such model directory")
    weights_file = directory / WEIGHTS_FILE
    index = directory / INDEX_FILE
    if index.exists():
        files = _sharded_tensor_files(index)
        check(
            not weights_file.exists() or weights_file in files.values(),
            f"{directory}: holds both {WEIGHTS_FILE} and {INDEX_FILE}, which names other files; "
            "remove the one that is not meant",
        )
        return files

    if not weights_file.exists():
        _refuse_other_formats(directory)
    check(weights_file.exists(), f"{weights_file}: no such file, and no {index.name} beside it")
    with open_tensors(weights_file) as tensors:
        return dict.fromkeys(tensors.keys(), weights_file)


def _sharded_tensor_files(index):
    """Return the shard that holds each tensor, after comparing every shard with the index."""
    # 1. Read the index. It is parsed a second time to find a name that occurs twice, of which a
    #    dict keeps only the last.
    files = {}
    with friendly_errors(index, "download it again"):
        weight_map = read_json(index, dict)["weight_map"]
        json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_check_distinct)
        for name, shard in weight_map.items():
            check(
                Path(shard).name == shard and shard.endswith(".safetensors"),
                f"{index}: the shard {shard!r:.60} is no safetensors file beside it; download it "
                "again",
            )
            files[name] = index.parent / shard
    check(files, f"{index}: weight_map names no tensor; download it again")

    # 2. Compare the shards with it. Of a tensor in two shards the index can name only one, so the
    #    other shard differs from the index.
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


def _check_distinct(pairs):
    """Raise ValueError if a key occurs twice among the (key, value) pairs of a JSON object."""
    keys = set()
    for key, _ in pairs:
        if key in keys:
            raise ValueError(f"names {key} twice")
        keys.add(key)


def _refuse_other_formats(directory):
    """Raise InputError if `directory` holds weights, but not as safetensors of a known name."""
    for patterns, remedy in OTHER_FORMATS.items():
        for pattern in patterns:
            others = sorted(directory.glob(pattern))
            if others:
                raise InputError(f"{others[0]}: {remedy}")


# --- reading ---


def open_tensors(path, device="cpu"):
    """Open a safetensors file, which is then mapped into memory, not read.

    Raises InputError if the file is missing, truncated or of another format.
    """
    # torch takes "cuda" for the current GPU of this process, safetensors takes it for the first.
    device_name = str(device)
    if device_name == "cuda":
        device_name = f"cuda:{torch.cuda.current_device()}"
    # Of a file that it may not open, safetensors says that it is missing.
    with read_errors(path):
        open(path, "rb").close()
    try:
        return safe_open(path, framework="pt", device=device_name)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from None


def read_headers(files) -> dict[str, TensorHeader]:
    """Return the header of every tensor, given the file that holds each. No tensor is read."""
    headers = {}
    for file in sorted(set(files.values())):
        with open_tensors(file) as stored:
            for name in stored.keys():
                if files.get(name) == file:
                    headers[name] = _read_header(stored, name)
    return headers


def _read_header(stored, name):
    """Return the header of a tensor of an open file."""
    tensor_slice = stored.get_slice(name)
    return TensorHeader(dtype=tensor_slice.get_dtype(), shape=tuple(tensor_slice.get_shape()))


def read_tensors(source, files, wanted, *, device="cpu", dtype=None):
    """Read the `wanted` tensors from `files`, which must hold all of them and nothing else.

    source: the file or directory that an error names if no file holds the tensor.
    files: name in the file -> path of the file that holds this tensor.
    wanted: name in the file -> (our name, shape).
    dtype: what the tensors are converted to, or None to keep the dtype of each.
    Returns our name -> tensor. On a CPU a tensor is the mapped file, without a copy. Of a tensor
    that is cut (split.py), `shape` is that of this process's part, and only this part is read.
    Raises InputError that names the first tensor that is missing, unused, of another shape, of a
    dtype that is not supported, or not finite.
    """
    # 1. Compare the names.
    missing = sorted(wanted.keys() - files.keys())
    if missing:
        raise InputError(f"{source}: tensor {missing[0]} is missing{and_more(missing)}")
    unused = sorted(files.keys() - wanted.keys())
    if unused:
        file = files[unused[0]]
        raise InputError(f"{file}: tensor {unused[0]} has no place in this model{and_more(unused)}")

    # 2. Read one file after the other. Before a tensor is read, its header is checked.
    tensors = {}
    for file in sorted(set(files.values())):
        with open_tensors(file, device) as stored:
            for stored_name in sorted(wanted.keys() & stored.keys()):
                our_name, shape = wanted[stored_name]
                header = _read_header(stored, stored_name)
                needed_shape = whole_shape(stored_name, shape)
                check(
                    header.shape == needed_shape,
                    f"{file}: tensor {stored_name} has shape {header.shape}, "
                    f"this model needs {needed_shape}",
                )
                check_stored_dtype(file, stored_name, header.dtype)
                if cut_dimension(stored_name, header.shape) is None:
                    tensor = stored.get_tensor(stored_name)
                else:
                    tensor = _read_part(file, stored_name, header.shape, device)
                if dtype is not None:
                    tensor = tensor.to(dtype)
                check_finite(file, stored_name, tensor)
                tensors[our_name] = tensor
    return tensors


def _read_part(file, name, shape, device):
    """Read this process's part of a tensor that is cut. Of the other parts nothing is kept."""
    # The file is mapped anew for each tensor. Rows remain the mapped file. Columns are copied, and
    # then the mapping ends, and with it the pages of the other columns.
    with open_tensors(file, device) as stored:
        part = stored.get_slice(name)[local_slices(name, shape)]
    return part.contiguous()


def and_more(names):
    """Return the end of an error message that names only the first of `names`."""
    if len(names) == 1:
        return ""
    return f" (and {len(names) - 1} more)"


# --- writing ---


def save_tensors(tensors, path, metadata=None):
    """Write named tensors to a safetensors file, either completely or not at all.

    Of a tensor that is cut (split.py) the parts of all processes are put together.
    """
    cpu_tensors = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(name, tensor.detach())
        if is_main_process():  # the only one whose file is kept
            cpu_tensors[name] = whole.cpu().contiguous()
    # transformers reads in the metadata which framework the tensors are for.
    metadata = {"format": "pt"} | (metadata or {})
    with atomic_write(path) as temporary_path:
        save_file(cpu_tensors, temporary_path, metadata=metadata)
