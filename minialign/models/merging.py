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

from minialign.data.tokenizer import Tokenizer
from minialign.models.adapters import BASE_KEY, AdapterFiles, open_adapter, to_peft_name
from minialign.models.checkpoint import load_model, sample_values, save_model
from minialign.models.safetensors_files import save_tensors
from minialign.utils.files import check, write_json

# The modules of a model that are averaged. All others are kept from one model.
DECODER_MODULES = ("language_model.", "lm_head.")
# Decoders with one base have a cosine near 1 here, also after long training. Unrelated ones have
# one near 0.
MIN_COSINE = 0.5


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
    for directory, model in zip(directories[1:], models[1:], strict=True):
        check_same_shape(directories[0], models[0].config, directory, model.config)
        check_same_tokens(directories[0], directory)
        check_same_origin(directories[0], models[0], directory, model)

    # 2. Put the mean of the decoders into the model that is kept, one tensor after the other.
    shares = [weight / sum(weights) for weight in weights]
    parameters_of_models = [dict(model.named_parameters()) for model in models]
    merged = models[directories.index(vision_of)]
    for name, parameter in merged.named_parameters():
        if name.startswith(DECODER_MODULES):
            tensors = [parameters[name] for parameters in parameters_of_models]
            parameter.data = average(tensors, shares).to(parameter.dtype)

    # 3. Write it.
    save_model(merged, vision_of, out)


def check_same_shape(first, first_config, other, other_config):
    """Raise InputError unless two decoders have the same shape and the same image token."""
    first_fields = vars(first_config.text) | {"image_token_id": first_config.image_token_id}
    other_fields = vars(other_config.text) | {"image_token_id": other_config.image_token_id}
    for name, value in first_fields.items():
        check(
            other_fields[name] == value,
            f"{other}: the {name} of its decoder is {other_fields[name]}, that of {first} is "
            f"{value}; only models that come from one base can be merged",
        )


def check_same_tokens(first, other):
    """Raise InputError unless every id means the same token in two checkpoint directories."""
    first_ids = Tokenizer.load(first).ids
    other_ids = Tokenizer.load(other).ids
    for token in sorted(first_ids | other_ids):
        first_id = first_ids.get(token)
        other_id = other_ids.get(token)
        check(
            first_id == other_id,
            f"{other}: the token {token!r:.40} has the id {other_id}, in {first} {first_id}; only "
            "models with the same tokens can be merged",
        )


def check_same_origin(first, first_model, other, other_model):
    """Raise InputError if the weights of two decoders have nothing to do with each other."""
    cosine = decoder_cosine(first_model, other_model)
    check(
        cosine > MIN_COSINE,
        f"{other}: its decoder does not come from the same base as that of {first} (the cosine of "
        f"their weights is {cosine:.2f}, and near 1 with one base); their mean would be noise",
    )


def decoder_cosine(first_model, other_model) -> float:
    """Return the cosine between the matrices of two decoders, of which it takes a sample.

    Vectors are left out. The scales of norms are near 1 in all models.
    """
    other_parameters = dict(other_model.named_parameters())
    product = 0.0
    first_square = 0.0
    other_square = 0.0
    for name, parameter in first_model.named_parameters():
        if name.startswith(DECODER_MODULES) and parameter.ndim == 2:
            first_values = sample_values(parameter).double()
            other_values = sample_values(other_parameters[name]).double()
            product += float(first_values @ other_values)
            first_square += float(first_values @ first_values)
            other_square += float(other_values @ other_values)
    return product / max(math.sqrt(first_square * other_square), 1e-30)


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
        if self.scale != other.scale or self.config["r"] != other.config["r"]:
            return False
        for name, tensor in self.tensors.items():
            if ".lora_" in name and not torch.equal(tensor, other.tensors[name]):
                return False
        return True


def merge_adapters(directories, weights, *, vision_of, out):
    """Write to `out` the adapter whose products are the weighted mean of several adapters'.

    vision_of: the one of `directories` whose projector is kept. If it trained none, the merged
        adapter leaves the projector of the base model as it is.
    Raises InputError if the adapters are not for the same base and the same layers.
    """
    # 1. Compare the adapters by their configurations and headers, then read them.
    opened = [open_adapter(directory) for directory in directories]
    layers = adapted_layers(opened[0])
    for files in opened[1:]:
        check_same_base(opened[0], files)
        check_same_layers(opened[0], layers, files, adapted_layers(files))
    adapters = []
    for files, weight in zip(opened, weights, strict=True):
        adapters.append(read_adapter(files, weight))
    kept = adapters[directories.index(vision_of)]

    # 2. Stack the matrices. The merged adapter has the scale of the first one.
    tensors = {name: tensor for name, tensor in kept.tensors.items() if ".lora_" not in name}
    distinct = combine_equal(adapters)
    for layer in layers:
        lora_As = [adapter.tensors[f"{layer}.lora_A"] for adapter in distinct]
        lora_Bs = []
        for adapter in distinct:
            share = adapter.weight / sum(weights)
            factor = share * adapter.scale / distinct[0].scale
            lora_Bs.append(factor * adapter.tensors[f"{layer}.lora_B"])
        tensors[f"{layer}.lora_A"] = torch.cat(lora_As, dim=0)  # (sum of the ranks, in)
        tensors[f"{layer}.lora_B"] = torch.cat(lora_Bs, dim=1)  # (out, sum of the ranks)

    # 3. Write it.
    peft_tensors = {to_peft_name(name): tensor for name, tensor in tensors.items()}
    metadata = {}
    if opened[0].base_hash is not None:
        metadata[BASE_KEY] = opened[0].base_hash
    save_tensors(peft_tensors, Path(out) / "adapter_model.safetensors", metadata)
    config = merged_config(distinct) | {"modules_to_save": kept.config.get("modules_to_save")}
    write_json(Path(out) / "adapter_config.json", config)


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
        equal = [earlier for earlier in distinct if earlier.equals(adapter)]
        if equal:
            equal[0].weight += adapter.weight
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


def adapted_layers(files: AdapterFiles) -> dict:
    """Return the layers of an adapter, each with the shape (out, in) of its product B A."""
    shapes = {}
    for name, peft_name in files.peft_name_of.items():
        if ".lora_" in name:
            shapes[name] = files.headers[peft_name].shape
    layers = {}
    for name in shapes:
        layer = name.rpartition(".")[0]
        a_shape = shapes.get(f"{layer}.lora_A", ())
        b_shape = shapes.get(f"{layer}.lora_B", ())
        check(
            len(a_shape) == len(b_shape) == 2 and a_shape[0] == b_shape[1],
            f"{files.weights_file}: the matrices lora_A and lora_B of {layer} do not fit each "
            f"other (shapes {a_shape or 'missing'} and {b_shape or 'missing'}); is it damaged?",
        )
        layers[layer] = (b_shape[0], a_shape[1])
    check(layers, f"{files.weights_file}: holds no LoRA matrices; is this the right adapter?")
    return layers


def check_same_layers(first, first_layers, other, other_layers):
    """Raise InputError unless two adapters are for the same layers of the same shapes."""
    for layer in first_layers | other_layers:
        first_shape = first_layers.get(layer, "not adapted")
        other_shape = other_layers.get(layer, "not adapted")
        check(
            first_shape == other_shape,
            f"{other.directory}: the layer {layer} is {other_shape}, in {first.directory} "
            f"{first_shape}; only adapters of the same layers can be merged",
        )


def check_same_base(first, other):
    """Raise InputError unless two adapters were trained on one base model.

    The hashes of its weights are compared, which save_adapter writes. For adapters without a hash
    it is the last part of the names of their bases.
    """
    names = []
    for files in (first, other):
        name = files.config.get("base_model_name_or_path")
        is_known = isinstance(name, str) and name != ""
        check(
            is_known or files.base_hash is not None,
            f"{files.directory}: does not say what its base is; give base_model_name_or_path in "
            "adapter_config.json",
        )
        names.append(Path(name).name if is_known else None)

    has_hashes = first.base_hash is not None and other.base_hash is not None
    if has_hashes:
        is_same = first.base_hash == other.base_hash
    else:
        is_same = names[0] == names[1]
    check(
        is_same,
        f"{other.directory}: was trained on another base ({names[1]}) than {first.directory} "
        f"({names[0]}); only adapters of one base can be merged",
    )
