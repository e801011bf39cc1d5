"""Several processes as one, under torchrun: each does its share of a list, and all know all results. One process needs none of it."""

import json
import os
import sys
import traceback

import torch
import torch.distributed as dist


def init_distributed(device):
    """Join the group that torchrun made, if it did; everyone but the first process falls silent."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not is_main_process():  # but for what breaks this process alone
        sys.excepthook = lambda kind, error, trace: traceback.print_exception(
            kind, error, trace, file=sys.__stderr__
        )
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def world_size():
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main_process():
    """Whether this process is the one that writes results."""
    return rank() == 0


def map_across_ranks(items, work):
    """work(items), a list of JSON values, one an item: each process does every world-th of the items, and all get the whole, in order."""
    share = items[rank() :: world_size()]
    own = work(share) if share else []
    if world_size() == 1:
        return own
    data = torch.frombuffer(bytearray(json.dumps(own).encode()), dtype=torch.uint8)
    data = data.cuda() if dist.get_backend() == "nccl" else data
    sizes = [torch.zeros(1, dtype=torch.long, device=data.device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(data)], device=data.device))
    parts = [data.new_zeros(max(map(int, sizes))) for _ in range(world_size())]
    dist.all_gather(parts, torch.cat([data, data.new_zeros(len(parts[0]) - len(data))]))
    lists = [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes)]
    return [lists[i % world_size()][i // world_size()] for i in range(len(items))]


def all_reduce_sum(tensors):
    """Sum each tensor over all processes, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def barrier():
    """Go on when all processes have come here."""
    if world_size() > 1:
        dist.barrier()
