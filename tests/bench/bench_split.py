"""Memory that each process needs to load its part of a model (`--split N`).

python tests/bench/bench_split.py --split 2
python tests/bench/bench_split.py --width 2048 --inner 5632 --head 128 --layers 29 --vocab 4096 \
    --dtype bfloat16        3,000 MB of weights

It writes a checkpoint of random weights, and starts the processes with torchrun. Each of them
reports how far the peak of its resident memory rises while it loads, beside the size of its part.
Pages of the mapped file count as resident.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import parse_options, raw_config, torch_dtype

from minialign.models.checkpoint import fingerprint, load_model, to_layout_name
from minialign.models.config_json import parse_config
from minialign.models.llava import Llava
from minialign.models.safetensors_files import WEIGHTS_FILE, save_tensors
from minialign.models.split import split_models
from minialign.utils.distributed import init_distributed, join_lists

MB = 1e6


def write_checkpoint(options, folder):
    """Write a checkpoint of random weights, and return its size in bytes."""
    config = raw_config(options)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = Llava(parse_config(config, "bench"))
    tensors = {}
    for name, parameter in model.state_dict().items():
        values = torch.empty(parameter.shape, dtype=torch_dtype(options))
        tensors[to_layout_name(name, "hub")] = values.uniform_(-0.02, 0.02)
    save_tensors(tensors, folder / WEIGHTS_FILE)
    return (folder / WEIGHTS_FILE).stat().st_size


def peak_bytes():
    """Return the peak of the memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def load_part(folder, num_parts):
    """Load this process's part, and print what each process needed for it."""
    # 1. Load it, and take the hash of the weights, for which tensors are put together.
    init_distributed("cpu")
    split_models(num_parts)
    before = peak_bytes()
    model = load_model(folder)
    load_peak = peak_bytes() - before
    fingerprint(model)
    peak = peak_bytes() - before

    # 2. Print the rows of all processes. Those that are not the first print nothing.
    part = sum(parameter.nbytes for parameter in model.parameters())
    for index, row in enumerate(join_lists([[part, load_peak, peak]])):
        part, load_peak, peak = row
        print(
            f"process {index}: part {part / MB:,.0f} MB, peak while loading {load_peak / MB:,.0f} "
            f"MB ({load_peak / part:.2f} of the part), with the hash of the weights "
            f"{peak / MB:,.0f} MB ({peak / part:.2f})"
        )


def main():
    """Write the checkpoint, then start the processes."""
    options = parse_options(__doc__, split=2)
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(options, Path(folder))
        print(f"{size / MB:,.0f} MB of weights, split {options.split}", flush=True)
        words = ["--standalone", "--nproc-per-node", str(options.split), __file__]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", *words, folder, str(options.split)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=True,
        )


if __name__ == "__main__":
    is_part = "RANK" in os.environ
    if is_part:
        load_part(sys.argv[1], int(sys.argv[2]))
    else:
        main()
