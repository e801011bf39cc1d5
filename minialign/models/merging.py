"""Average models or adapters that come from one base (NaiveMC, arXiv 2402.12750).

Models that were trained further from one base lie near each other, so the mean of their weights is
a model, too. It has something of what each was trained for. With shares s_i that add up to 1:

    W = sum_i s_i W_i

The mean of the decoders alone is taken. Each model has an encoder of images and a projector of its
own. Those of one model are kept, because image tokens mean something to a decoder only if encoder
and projector fit each other.

For adapters on one base, the mean of W + scale_i B_i A_i is W plus the mean of the products. That
mean is again a product. Its A has the rows of all A_i, its B the columns of all s_i scale_i B_i. So
its rank is the sum of the ranks. (The product of the mean B and the mean A is something else.)

Limits: merging measures nothing. The mean may be worse than each of the models. Weights alone
cannot prove that checkpoints have one base: two decoders pass if their weights point in a similar
direction, which those of unrelated models do not.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from minialign.models.adapters import BASE_KEY, AdapterFiles, open_adapter, to_peft_name
from minialign.models.checkpoint import load_model, save_model
from minialign.models.merging_checks import (
    DECODER_MODULES,
    adapted_layers,
    check_adapters,
    check_checkpoints,
    is_lora,
)
from minialign.models.safetensors_files import save_tensors
from minialign.utils.files import write_json


def average(tensors, shares) -> torch.Tensor:
    """Return the mean of tensors, weighted with `shares` that add up to 1, in fp32.

    mean = W_1 + sum_i s_i (W_i - W_1)

    This is sum_i s_i W_i, in a form that gives equal tensors back to the bit, whatever the shares.
    """
    first = tensors[0].float()
    mean = first.clone()
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        mean += share * (tensor.float() - first)
    return mean


# --- checkpoints ---


@torch.no_grad()
def merge_checkpoints(directories, weights, *, vision_of, out):
    """Write to `out` the checkpoint whose decoder is the weighted mean of several decoders.

    vision_of: the one of `directories` whose vision tower, projector, image settings, chat template
        and tensor names are kept.
    Raises InputError if the decoders differ in shape, in their tokens, or in their base.
    """
    # 1. Load all models, which maps their files into memory, and compare them.
    models = [load_model(directory) for directory in directories]
    check_checkpoints(directories, models)

    # 2. Put the mean of the decoders into the model whose images are kept, tensor by tensor. All
    #    models have one shape, so the tensors of one name belong together.
    shares = [weight / sum(weights) for weight in weights]
    parameters_of_models = [dict(model.named_parameters()) for model in models]
    merged = models[directories.index(vision_of)]
    for name, parameter in merged.named_parameters():
        if name.startswith(DECODER_MODULES):
            tensors = [parameters[name] for parameters in parameters_of_models]
            parameter.data = average(tensors, shares).to(parameter.dtype)

    # 3. Write it.
    save_model(merged, vision_of, out)


# --- adapters ---


@dataclass
class WeightedAdapter:
    """An adapter with its tensors in fp32, under our names, and its weight in the mean."""

    config: dict
    tensors: dict[str, torch.Tensor]
    weight: float

    @property
    def scale(self) -> float:
        """Return what the product B A is multiplied with."""
        if self.config.get("use_rslora"):
            return self.config["lora_alpha"] / math.sqrt(self.config["r"])
        return self.config["lora_alpha"] / self.config["r"]

    def equals(self, other) -> bool:
        """Return whether two adapters, which are for the same layers, add the same products."""
        lora_names = filter(is_lora, self.tensors)
        has_same_matrices = all(
            torch.equal(self.tensors[name], other.tensors[name]) for name in lora_names
        )
        has_same_rank = self.config["r"] == other.config["r"]
        return has_same_matrices and has_same_rank and self.scale == other.scale


def merge_adapters(directories, weights, *, vision_of, out):
    """Write to `out` the adapter whose products are the weighted mean of several adapters'.

    vision_of: the one of `directories` whose projector is kept. If it trained none, the merged
        adapter leaves the projector of the base model as it is.
    Raises InputError if the adapters are not for the same base and the same layers.
    """
    # 1. Compare the adapters by their configurations and headers, then read them.
    opened = [open_adapter(directory) for directory in directories]
    check_adapters(opened)
    adapters = []
    for files, weight in zip(opened, weights, strict=True):
        adapters.append(read_adapter(files, weight))

    # 2. Keep the projector of one of them, and stack the matrices of all.
    tensors = {}
    projector_adapter = adapters[directories.index(vision_of)]
    for name, tensor in projector_adapter.tensors.items():
        if not is_lora(name):
            tensors[name] = tensor
    distinct = combine_equal(adapters)
    for layer in adapted_layers(opened[0]):
        lora_A, lora_B = stack_products(layer, distinct, sum(weights))
        tensors[f"{layer}.lora_A"] = lora_A
        tensors[f"{layer}.lora_B"] = lora_B

    # 3. Write it.
    peft_tensors = {to_peft_name(name): tensor for name, tensor in tensors.items()}
    metadata = {}
    if opened[0].base_hash is not None:
        metadata[BASE_KEY] = opened[0].base_hash
    save_tensors(peft_tensors, Path(out) / "adapter_model.safetensors", metadata)
    config = merged_config(distinct)
    config["modules_to_save"] = projector_adapter.config.get("modules_to_save")
    write_json(Path(out) / "adapter_config.json", config)


def stack_products(layer, adapters, total_weight) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B of a layer, whose product is the weighted mean of the adapters' products.

    A column of B meets one row of A, so what is stacked is added up:

        [f_1 B_1, f_2 B_2] [A_1; A_2] = f_1 B_1 A_1 + f_2 B_2 A_2

    The merged adapter multiplies this with the scale of the first one. Hence the factors
    f_i = s_i scale_i / scale_1, with the shares s_i = weight_i / total_weight.
    """
    lora_As = []
    lora_Bs = []
    for adapter in adapters:
        share = adapter.weight / total_weight
        factor = share * adapter.scale / adapters[0].scale
        lora_As.append(adapter.tensors[f"{layer}.lora_A"])
        lora_Bs.append(factor * adapter.tensors[f"{layer}.lora_B"])
    lora_A = torch.cat(lora_As, dim=0)  # (sum of the ranks, in)
    lora_B = torch.cat(lora_Bs, dim=1)  # (out, sum of the ranks)
    return lora_A, lora_B


def read_adapter(files: AdapterFiles, weight) -> WeightedAdapter:
    """Read the tensors of an adapter, whose weight in the mean is `weight`."""
    wanted = {}
    for name, peft_name in files.peft_name_of.items():
        wanted[peft_name] = (name, files.headers[peft_name].shape)
    tensors = files.read(wanted, dtype=torch.float32)
    return WeightedAdapter(config=files.config, tensors=tensors, weight=weight)


def combine_equal(adapters) -> list[WeightedAdapter]:
    """Return the adapters that differ. Of equal ones the first has the weight of all.

    It saves rank: without it an adapter that is merged with itself would have twice the rank.
    """
    distinct = []
    for adapter in adapters:
        earlier = [candidate for candidate in distinct if candidate.equals(adapter)]
        if earlier:
            earlier[0].weight += adapter.weight
        else:
            distinct.append(adapter)
    return distinct


def merged_config(distinct) -> dict:
    """Return the first adapter's configuration with the rank of all, and alpha for its scale."""
    config = distinct[0].config
    rank = sum(adapter.config["r"] for adapter in distinct)
    growth = rank / config["r"]
    if config.get("use_rslora"):
        growth = math.sqrt(growth)
    alpha = float(config["lora_alpha"] * growth)
    if alpha.is_integer():
        alpha = int(alpha)
    return config | {"r": rank, "lora_alpha": alpha}
