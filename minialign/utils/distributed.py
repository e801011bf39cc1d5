"""Several processes that work as one, under torchrun. One process alone needs none of this.

Every process runs the same program. Where the work is a list of items, each model does its share of
the items, and then all processes receive all results. Only the main process prints and writes
files.

A model is usually held by one process. With `--split N` it is held by N neighboring processes
(models/split.py). Two groups of processes then exchange what they have: those that hold one model,
and those that hold the same part of all models. For 4 processes and N = 2:

    rank           0  1  2  3
    model_index    0  0  1  1
    part_index     0  1  0  1
"""

import contextlib
import functools
import json
import os
import re
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

from minialign.utils.messages import printable

# The two groups that this process belongs to. Without --split both stay None. Then each process
# holds a whole model, and torch takes a group of None to be all processes.
_groups = {
    "models": None,  # the processes that hold the same part, one of each model
    "parts": None,  # the processes that hold one model, each a part of it
}

# How long a process waits for the others. Where results are exchanged once at the end, such as in
# an evaluation, a slower process may be hours behind. One that is lost is noticed at once: it
# closes its connections, or torchrun ends the others.
PATIENCE = timedelta(days=1)
# What torchrun tells every process, beside WORLD_SIZE.
LAUNCH_VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LostProcessError(RuntimeError):
    """Another process of this run has ended, or does not answer. Nothing can be exchanged."""


class LaunchError(RuntimeError):
    """The processes were started in a way in which they cannot work."""


def init_distributed(device):
    """Join the processes that torchrun started, if any, and silence all but the main process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    check_launch(device)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    else:
        backend = "gloo"
    with lost_process_errors():
        dist.init_process_group(backend, timeout=PATIENCE)
        error_store()  # connect while all processes are there
    if not is_main_process():
        sys.excepthook = _print_exception  # an error of this process alone must still be seen
        silent = open(os.devnull, "w", encoding="utf-8")
        sys.stdout = silent
        sys.stderr = silent


def check_launch(device):
    """Raise LaunchError unless this process can join the others, and has a GPU if it needs one."""
    # 1. Other programs set WORLD_SIZE too.
    for name in LAUNCH_VARIABLES:
        if name not in os.environ:
            raise LaunchError(
                f"WORLD_SIZE is set, but {name} is not; start the command by torchrun, or unset "
                "WORLD_SIZE"
            )

    # 2. The processes of a machine are counted from 0, and so are its GPUs.
    local_rank = int(os.environ["LOCAL_RANK"])
    if device == "cuda" and local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"--device cuda: process {local_rank} of this machine has no GPU (torch sees "
            f"{torch.cuda.device_count()}); lower --nproc-per-node, or leave --device out to "
            "compute on the CPU"
        )


def _print_exception(error_type, error, trace):
    """Print an uncaught exception to the standard error that the process started with."""
    traceback.print_exception(error_type, error, trace, file=sys.__stderr__)


@functools.cache
def error_store():
    """Return the connection to the store through which torchrun's processes found each other.

    The first call connects, and later calls return the same connection.
    """
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"minialign/{attempt}", store)


@contextlib.contextmanager
def lost_process_errors():
    """Raise LostProcessError if an exchange with the other processes fails.

    A process that is killed closes its connections, which the others notice at once.
    """
    try:
        yield
    except RuntimeError as error:  # gloo raises no other type
        # Keep the reason alone: gloo writes a file name before it, and advice after it.
        message = re.sub(r"^\[\S+\] ", "", str(error))
        first_line = message.splitlines()[0]
        reason = first_line.split(". ")[0]
        is_late = re.search(r"timed out|timing out|timeout", message, re.IGNORECASE)
        what = "does not answer" if is_late else "has ended"
        raise LostProcessError(f"another process of this run {what} ({reason})") from None


def print_error(line):
    """Print the line that says why the command ends. Of several processes the first one prints.

    Any process may be the one that meets the error, and any may be the one that is lost. So they
    agree by a counter of errors in the store: the process that raises it to 1 is the first.
    """
    stream = sys.stderr
    # The store of torchrun is there before the processes have joined.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if has_store or dist.is_initialized():
        stream = sys.__stderr__  # sys.stderr is silent in all but the main process
        try:
            num_errors = error_store().add("errors", 1)
        except RuntimeError:  # the process that held the store is the one that is lost
            num_errors = 1
        if num_errors > 1:
            return
    print(printable(line), file=stream, flush=True)


def group_processes(num_parts):
    """Let every `num_parts` neighboring processes hold one model together.

    Neighbors are on one machine, so that the parts of a model have the fastest connection.
    """
    ranks = torch.arange(dist.get_world_size()).view(-1, num_parts)  # (models, parts)
    ranks_of_groups = {"models": ranks.T.tolist(), "parts": ranks.tolist()}
    with lost_process_errors():
        for name, ranks_per_group in ranks_of_groups.items():
            _groups[name], _ = dist.new_subgroups_by_enumeration(ranks_per_group, timeout=PATIENCE)


def num_processes() -> int:
    """Return the number of all processes."""
    if not dist.is_initialized():
        return 1
    return dist.get_world_size()


def num_parts() -> int:
    """Return how many processes hold one model together."""
    if _groups["parts"] is None:
        return 1
    return dist.get_world_size(_groups["parts"])


def part_index() -> int:
    """Return which part of its model this process holds, counted from 0."""
    if _groups["parts"] is None:
        return 0
    return dist.get_rank(_groups["parts"])


def num_models() -> int:
    """Return the number of models, which share the work."""
    return num_processes() // num_parts()


def model_index() -> int:
    """Return the index of the model that this process holds, whole or in part, from 0."""
    if not dist.is_initialized():
        return 0
    return dist.get_rank() // num_parts()


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes files."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local_share(items: list) -> list:
    """Return the items that this model works on."""
    return share_of_model(model_index(), items)


def share_of_model(index: int, items: list) -> list:
    """Return the items that a model works on: item i belongs to model i % num_models."""
    return items[index :: num_models()]


def gather_results(results: list, num_items: int) -> list:
    """Return the results of all models, in the order of the items that `local_share` dealt out.

    results: those of this model, one JSON value an item.
    num_items: length of the whole list of items.
    """
    if num_models() == 1:
        return results
    results_of_models = _exchange(results, _groups["models"])
    in_order = []
    for i in range(num_items):
        in_order.append(results_of_models[i % num_models()][i // num_models()])
    return in_order


def gather_tensors(tensor) -> list:
    """Return the one-dimensional tensors of all models, on the CPU, in the order of the models.

    They have one type, and may differ in length.
    """
    if num_models() == 1:
        return [tensor.cpu()]
    return _gather_padded(tensor, _groups["models"])


def _exchange(value, group) -> list:
    """Return the JSON values of all processes of a group, in the order of their ranks."""
    encoded = json.dumps(value).encode()
    local_message = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    messages = _gather_padded(local_message, group)
    return [json.loads(message.numpy().tobytes()) for message in messages]


def _gather_padded(tensor, group) -> list:
    """Return the one-dimensional tensors of all processes of a group. They may differ in length."""
    # 1. NCCL can only send tensors that are on a GPU.
    if dist.get_backend() == "nccl":
        tensor = tensor.cuda()

    # 2. Tell all processes how long each tensor is.
    local_length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [int(length) for length in _all_gather(local_length, group)]

    # 3. Exchange the tensors, padded to one length as all_gather demands.
    padded = tensor.new_zeros(max(lengths))
    padded[: len(tensor)] = tensor
    padded_tensors = _all_gather(padded, group)

    # 4. Cut the padding off.
    tensors = []
    for padded_tensor, length in zip(padded_tensors, lengths, strict=True):
        tensors.append(padded_tensor[:length].cpu())
    return tensors


def _all_gather(tensor, group):
    """Return the tensors of all processes of a group, which have the same shape."""
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    with lost_process_errors():
        dist.all_gather(tensors, tensor, group=group)
    return tensors


def map_across_ranks(items, work):
    """Return work(items), with the items shared out over all models.

    `work` takes a list of items and returns a list with one JSON value an item.
    """
    share = local_share(items)
    results = []
    if share:
        results = work(share)
    return gather_results(results, len(items))


def broadcast_from_main(value):
    """Return the JSON value that the main process has."""
    if num_processes() == 1:
        return value
    return _exchange(value, group=None)[0]


def value_of_first_part(value):
    """Return the JSON value of the process that holds the first part of the same model.

    The processes of a model compute the same numbers, but those of unlike GPUs may differ in their
    last bits. Where a number decides what is computed next, all of them must decide alike. Else
    they would wait for each other forever.
    """
    if num_parts() == 1:
        return value
    return _exchange(value, _groups["parts"])[0]


def join_lists(values: list) -> list:
    """Return the lists of JSON values of all processes as one list, in the order of the ranks."""
    if num_processes() == 1:
        return values
    joined = []
    for values_of_process in _exchange(values, group=None):
        joined += values_of_process
    return joined


def all_reduce_sum(tensors):
    """Replace each tensor by its sum over all models."""
    if num_models() > 1:
        with lost_process_errors():
            for tensor in tensors:
                dist.all_reduce(tensor, group=_groups["models"])


def sum_over_parts(tensor):
    """Replace a tensor by its sum over the processes that hold one model."""
    with lost_process_errors():
        dist.all_reduce(tensor, group=_groups["parts"])


def copy_from_first_part(tensor):
    """Replace a tensor by that of the process that holds the first part of the same model."""
    first_rank = model_index() * num_parts()
    with lost_process_errors():
        dist.broadcast(tensor, src=first_rank, group=_groups["parts"])


def gather_parts(tensor) -> list:
    """Return the tensors of the processes that hold one model, in the order of the parts."""
    return _all_gather(tensor, _groups["parts"])


def barrier():
    """Wait until all processes have arrived here."""
    if num_processes() > 1:
        with lost_process_errors():
            dist.barrier()
