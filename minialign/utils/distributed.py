"""Several processes that work as one, under torchrun. One process alone needs none of this.

Every process holds the whole model and runs the same program. Where the work is a list of items,
each process does its share of the items, and then all processes receive all results. Only the main
process prints and writes files.
"""

import contextlib
import functools
import json
import os
import re
import sys
import traceback

import torch
import torch.distributed as dist

from minialign.utils.messages import printable


class LostProcessError(RuntimeError):
    """Another process of this run has ended, so that nothing can be exchanged with it."""


def init_distributed(device):
    """Join the processes that torchrun started, if any, and silence all but the main process."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "nccl"
    else:
        backend = "gloo"
    with lost_process_errors():
        dist.init_process_group(backend)
        error_store()  # connect while all processes are there
    if not is_main_process():
        sys.excepthook = _print_exception  # an error of this process alone must still be seen
        silent = open(os.devnull, "w", encoding="utf-8")
        sys.stdout = silent
        sys.stderr = silent


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
        reason = re.sub(r"^\[\S+\] ", "", str(error)).splitlines()[0].split(". ")[0]
        raise LostProcessError(f"another process of this run has ended ({reason})") from None


def print_error(line):
    """Print the line that says why the command ends. Of several processes the first one prints.

    Any process may be the one that meets the error, and any may be the one that is lost. So they
    agree by a counter of errors in the store: the process that raises it to 1 is the first.
    """
    stream = sys.stderr
    if dist.is_initialized():
        stream = sys.__stderr__  # sys.stderr is silent in all but the main process
        try:
            num_errors = error_store().add("errors", 1)
        except RuntimeError:  # the process that held the store is the one that is lost
            num_errors = 1
        if num_errors > 1:
            return
    print(printable(line), file=stream, flush=True)


def world_size() -> int:
    """Return the number of processes."""
    if not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Return the index of this process, counted from 0."""
    if not dist.is_initialized():
        return 0
    return dist.get_rank()


def is_main_process() -> bool:
    """Return whether this is the process that prints and writes files."""
    return rank() == 0


def local_share(items: list) -> list:
    """Return the items that this process works on: item i belongs to process i % world_size."""
    return items[rank() :: world_size()]


def gather_results(results: list, num_items: int) -> list:
    """Return the results of all processes, in the order of the items that `local_share` dealt out.

    results: this process's own, one JSON value an item.
    num_items: length of the whole list of items.
    """
    if world_size() == 1:
        return results

    # 1. Encode this process's results as bytes. NCCL can only send tensors that are on a GPU.
    encoded = json.dumps(results).encode()
    message = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    if dist.get_backend() == "nccl":
        message = message.cuda()

    # 2. Tell all processes how long each message is.
    length = torch.tensor([len(message)], device=message.device)
    lengths = _all_gather(length)

    # 3. Exchange the messages, padded to one length as all_gather demands.
    max_length = max(int(length) for length in lengths)
    padded = message.new_zeros(max_length)
    padded[: len(message)] = message
    messages = _all_gather(padded)

    # 4. Decode them, and put the results back into the order of the items.
    results_by_rank = []
    for message, length in zip(messages, lengths, strict=True):
        encoded = bytes(message[: int(length)].tolist())
        results_by_rank.append(json.loads(encoded))
    in_order = []
    for i in range(num_items):
        in_order.append(results_by_rank[i % world_size()][i // world_size()])
    return in_order


def _all_gather(tensor):
    """Return the tensors of all processes, which have the same shape."""
    tensors = [torch.zeros_like(tensor) for _ in range(world_size())]
    with lost_process_errors():
        dist.all_gather(tensors, tensor)
    return tensors


def map_across_ranks(items, work):
    """Return work(items), with the items shared out over all processes.

    `work` takes a list of items and returns a list with one JSON value an item.
    """
    share = local_share(items)
    results = []
    if share:
        results = work(share)
    return gather_results(results, len(items))


def broadcast_from_main(value):
    """Return the JSON value that the main process has."""
    results = local_share([value])  # of one item, the main process has the only share
    return gather_results(results, num_items=1)[0]


def join_lists(values: list) -> list:
    """Return the lists of JSON values of all processes as one list, in the order of the ranks."""
    joined = []
    # To gather_results each process gives one result, which is its list.
    for values_of_rank in gather_results([values], num_items=world_size()):
        joined += values_of_rank
    return joined


def all_reduce_sum(tensors):
    """Replace each tensor by its sum over all processes."""
    if world_size() > 1:
        with lost_process_errors():
            for tensor in tensors:
                dist.all_reduce(tensor)


def barrier():
    """Wait until all processes have arrived here."""
    if world_size() > 1:
        with lost_process_errors():
            dist.barrier()
