"""One model held by several processes, each with a part of every decoder layer (`--split N`).

A decoder layer is two blocks, attention and MLP. A block is two steps of matrix products. What
happens between them (attention, the gate) treats each head, or each channel, by itself. So the
heads and the channels are dealt out:

1. q, k, v, gate and up are cut by their outputs. A process computes its own heads and channels.
2. o and down are cut by their inputs. A process reads its own heads and channels, and no others.
3. A product is a sum over its inputs: W x = W0 x0 + W1 x1. So each process ends a block with a term
   of the output, and the sum over the processes is the output (`leave_cut`).
4. In the backward pass it is the other way round. The gradient of the output is the same for all
   terms. Each process computes a term of the gradient of the block's input, and the sum over the
   processes is that gradient (`enter_cut`).
5. A LoRA adapter is cut like its layer: B (out, r) by outputs, or A (r, in) by inputs. The other
   matrix is whole in every process. Its gradient is a sum over all outputs or inputs, of which a
   process has only its own. So each process computes a term of it (`sum_gradients_of_parts`).
6. All the rest is whole in every process: embeddings, norms, the residual stream, projector, vision
   tower, vocabulary head. Every process computes it from the same numbers to the same bits.

Megatron-LM (arXiv 1909.08053) calls the two cuts column and row parallel. Files hold whole tensors:
a part is cut out when they are read, and the parts are put together when they are written.
"""

import math
import re
from dataclasses import replace

import torch
from torch import Tensor

from minialign.models.config import LlavaConfig
from minialign.utils.distributed import (
    copy_from_first_part,
    gather_parts,
    group_processes,
    num_parts,
    num_processes,
    part_index,
    sum_over_parts,
)
from minialign.utils.files import check

# The projections of a layer, and the dimension along which each of their tensors is cut. A tensor
# that is missing here is whole in every process.
CUT_BY_OUTPUTS = {"weight": 0, "bias": 0, "lora_B": 0}  # (out, in), (out,), (out, r)
CUT_BY_INPUTS = {"weight": 1, "lora_A": 1}  # (out, in), (r, in)
CUTS = {
    "q_proj": CUT_BY_OUTPUTS,
    "k_proj": CUT_BY_OUTPUTS,
    "v_proj": CUT_BY_OUTPUTS,
    "gate_proj": CUT_BY_OUTPUTS,
    "up_proj": CUT_BY_OUTPUTS,
    "o_proj": CUT_BY_INPUTS,
    "down_proj": CUT_BY_INPUTS,
}
# How the name of a projection's tensor ends, in any layout of files: (projection, tensor).
TENSOR_OF_PROJECTION = re.compile(r"(\w+_proj)\.(?:base\.)?(weight|bias|lora_A|lora_B)")


# --- which processes hold a model, and which part of it ---


def split_models(num_processes_per_model):
    """Let every N neighboring processes hold one model together, as --split N says.

    It is called after `init_distributed`, and before any model is loaded. It raises InputError if
    the number of processes is no multiple of N.
    """
    N = num_processes_per_model
    if N == 1:
        return
    check(
        num_processes() % N == 0,
        f"--split {N}: the number of processes is {num_processes()}, no multiple of {N}; start the "
        f"command by torchrun --nproc-per-node {N}, or a multiple of {N}",
    )
    group_processes(N)


def local_config(config: LlavaConfig, source) -> LlavaConfig:
    """Return the config of this process's part of a model: its share of the heads and channels."""
    return part_config(config, source, num_parts())


def part_config(config: LlavaConfig, source, num_processes_per_model) -> LlavaConfig:
    """Return the config of a part of a model that so many processes hold together.

    Raises InputError, with the numbers, if the model cannot be split among so many processes.
    source: the directory of the model, which the error names.
    """
    N = num_processes_per_model
    if N == 1:
        return config

    # 1. Heads and channels must be dealt out evenly. The error names the numbers that can do it.
    text = config.text
    sizes = {
        "attention heads": text.num_heads,
        "key-value heads": text.num_kv_heads,
        "channels in its MLP": text.intermediate_size,
    }
    common_divisor = math.gcd(*sizes.values())
    possible = [str(n) for n in range(2, common_divisor + 1) if common_divisor % n == 0]
    remedy = f"give --split {' or '.join(possible)}" if possible else "leave --split out"
    for name, size in sizes.items():
        check(
            size % N == 0,
            f"--split {N}: {source} has {size} {name}, which {N} does not divide; {remedy}",
        )

    # 2. Every process would add the bias of o_proj to its own term of the sum.
    check(not text.out_bias, f"--split {N}: {source} has a bias on o_proj; leave --split out")

    # 3. All other sizes stay those of the whole model.
    return replace(
        config,
        text=replace(
            text,
            num_heads=text.num_heads // N,
            num_kv_heads=text.num_kv_heads // N,
            intermediate_size=text.intermediate_size // N,
        ),
    )


def cut_dimension(name, shape) -> int | None:
    """Return along which dimension a tensor is cut, or None if every process holds all of it.

    name: in any layout of files.
    """
    match = TENSOR_OF_PROJECTION.search(name)
    if num_parts() == 1 or match is None or "vision_tower" in name:
        return None
    if len(shape) == 0:  # the number of steps that Adam keeps for each tensor
        return None
    projection, tensor = match.groups()
    return CUTS[projection].get(tensor)


def whole_shape(name, shape) -> tuple:
    """Return the shape of a whole tensor, given the shape of this process's part."""
    whole = list(shape)
    dimension = cut_dimension(name, shape)
    if dimension is not None:
        whole[dimension] *= num_parts()
    return tuple(whole)


def local_slices(name, shape) -> tuple | None:
    """Return the slices of this process's part of a whole tensor, or None for all of it."""
    dimension = cut_dimension(name, shape)
    if dimension is None:
        return None
    size = shape[dimension] // num_parts()
    slices = [slice(None)] * len(shape)
    slices[dimension] = slice(part_index() * size, (part_index() + 1) * size)
    return tuple(slices)


def local_part(name, tensor: Tensor) -> Tensor:
    """Return a copy of this process's part of a whole tensor, or the tensor if it is not cut."""
    slices = local_slices(name, tensor.shape)
    if slices is None:
        return tensor
    return tensor[slices].clone(memory_format=torch.contiguous_format)


def whole_tensor(name, tensor: Tensor) -> Tensor:
    """Return the whole tensor of which this process has a part. All processes must call it."""
    dimension = cut_dimension(name, tensor.shape)
    if dimension is None:
        return tensor
    return torch.cat(gather_parts(tensor.contiguous()), dim=dimension)


def values_of_whole(name, part: Tensor, indices: Tensor) -> Tensor:
    """Return the values at flat `indices` of a whole tensor that is cut. All processes call it."""
    dimension = cut_dimension(name, part.shape)
    size = part.shape[dimension]
    coordinates = list(torch.unravel_index(indices, whole_shape(name, part.shape)))
    # Each process reads its part at all coordinates, as if all of them lay in it. Only the process
    # in whose part an index lies has the right value there, so that value is kept.
    owners = coordinates[dimension] // size
    coordinates[dimension] = coordinates[dimension] % size
    values_of_parts = torch.stack(gather_parts(part[tuple(coordinates)]))
    return values_of_parts[owners, torch.arange(len(owners), device=owners.device)]


# --- the forward and the backward pass ---


def enter_cut(x: Tensor) -> Tensor:
    """Return x, the input of layers that are cut by their outputs."""
    if num_parts() == 1:
        return x
    return EnterCut.apply(x)


def leave_cut(y: Tensor) -> Tensor:
    """Return the output of a layer that is cut by its inputs: the sum of the processes' terms y."""
    if num_parts() == 1:
        return y
    return LeaveCut.apply(y)


class EnterCut(torch.autograd.Function):
    """Forward: the same x in every process. Backward: the sum of the processes' gradients."""

    @staticmethod
    def forward(ctx, x):
        """Return x."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        """Sum up the gradients, each of which is through the part of one process."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        sum_over_parts(grad)
        return grad


class LeaveCut(torch.autograd.Function):
    """Forward: the sum of the processes' terms. Backward: the same gradient for each term."""

    @staticmethod
    def forward(ctx, y):
        """Sum up the terms."""
        total = y.clone(memory_format=torch.contiguous_format)
        sum_over_parts(total)
        return total

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient of the sum."""
        return grad


def same_in_all_parts(tokens: Tensor) -> Tensor:
    """Return the tokens that the first process of this model has chosen.

    The logits are the same in all its processes. But cumulative sums on a GPU, and all numbers on
    unlike GPUs, may differ in their last bits. Processes that continued from different tokens would
    wait for each other forever.
    """
    if num_parts() > 1:
        copy_from_first_part(tokens)
    return tokens


# --- gradients ---


def sum_gradients_of_parts(parameters):
    """Complete the gradients of the parameters that are whole in every process.

    parameters: all parameters, by name. Gradients of a part are complete already.
    """
    if num_parts() == 1:
        return
    for name, parameter in parameters.items():
        if cut_dimension(name, parameter.shape) is not None:
            continue
        is_adapter = name.endswith(("lora_A", "lora_B"))
        if is_adapter:
            sum_over_parts(parameter.grad)
        else:
            # All processes have computed the same gradient. But some kernels of a GPU add in no
            # fixed order, and weights whose gradients differ in a bit would drift apart.
            copy_from_first_part(parameter.grad)


def gradient_norm(parameters) -> Tensor:
    """Return the norm of the gradients of a whole model.

    parameters: all parameters, by name. The squares of a part are added up over the processes.
    Those of a parameter that is whole in every process count once.
    """
    cut_gradients = []
    whole_gradients = []
    for name, parameter in parameters.items():
        is_cut = cut_dimension(name, parameter.shape) is not None
        gradients = cut_gradients if is_cut else whole_gradients
        gradients.append(parameter.grad)

    norm = torch.nn.utils.get_total_norm(whole_gradients)
    if cut_gradients:
        squares = torch.nn.utils.get_total_norm(cut_gradients) ** 2
        sum_over_parts(squares)
        norm = torch.sqrt(norm**2 + squares)
    return norm
