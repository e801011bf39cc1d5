"""Check that checkpoints or adapters come from one base, before their mean is taken."""

import math
from pathlib import Path

from minialign.data.tokenizer import Tokenizer
from minialign.models.adapters import AdapterFiles
from minialign.models.checkpoint import sample_values
from minialign.utils.files import check

# The modules of a model that are averaged. All others are kept from one model.
DECODER_MODULES = ("language_model.", "lm_head.")
# Decoders with one base have a cosine near 1 here, also after long training. Unrelated ones have
# one near 0.
MIN_COSINE = 0.5


# --- checkpoints ---


def check_checkpoints(directories, models):
    """Raise InputError unless the decoders of models come from one base, so far as can be seen."""
    first = directories[0]
    first_model = models[0]
    for other, other_model in zip(directories[1:], models[1:], strict=True):
        check_same_shape(first, first_model.config, other, other_model.config)
        check_same_tokens(first, other)
        check_same_origin(first, first_model, other, other_model)


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


def check_adapters(opened: list[AdapterFiles]):
    """Raise InputError unless adapters are for the same base and the same layers."""
    first = opened[0]
    first_layers = adapted_layers(first)
    for other in opened[1:]:
        check_same_base(first, other)
        check_same_layers(first, first_layers, other, adapted_layers(other))


def is_lora(name) -> bool:
    """Return whether a tensor is one of the matrices A and B, rather than of the projector."""
    return ".lora_" in name


def adapted_layers(files: AdapterFiles) -> dict[str, tuple[int, int]]:
    """Return the layers of an adapter, each with the shape (out, in) of its product B A."""
    # 1. The shapes of the matrices, whose names end with the layer's and lora_A or lora_B.
    shapes = {}
    for name, peft_name in files.peft_name_of.items():
        if is_lora(name):
            shapes[name] = files.headers[peft_name].shape
    check(shapes, f"{files.weights_file}: holds no LoRA matrices; is this the right adapter?")

    # 2. Those of one layer must fit each other: A is (rank, in), and B is (out, rank).
    layers = {}
    for name in shapes:
        layer = name.rpartition(".")[0]
        a_shape = shapes.get(f"{layer}.lora_A", ())
        b_shape = shapes.get(f"{layer}.lora_B", ())
        are_matrices = len(a_shape) == len(b_shape) == 2
        check(
            are_matrices and a_shape[0] == b_shape[1],
            f"{files.weights_file}: the matrices lora_A and lora_B of {layer} do not fit each "
            f"other (shapes {a_shape or 'missing'} and {b_shape or 'missing'}); is it damaged?",
        )
        layers[layer] = (b_shape[0], a_shape[1])
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
    first_name = base_name(first)
    other_name = base_name(other)
    if first.base_hash is not None and other.base_hash is not None:
        is_same = first.base_hash == other.base_hash
    else:
        is_same = first_name == other_name
    check(
        is_same,
        f"{other.directory}: was trained on another base ({other_name}) than {first.directory} "
        f"({first_name}); only adapters of one base can be merged",
    )


def base_name(files: AdapterFiles) -> str | None:
    """Return the last part of the name of an adapter's base, or None if only its hash is known."""
    name = files.config.get("base_model_name_or_path")
    if isinstance(name, str) and name != "":
        return Path(name).name
    check(
        files.base_hash is not None,
        f"{files.directory}: does not say what its base is; give base_model_name_or_path in "
        "adapter_config.json",
    )
    return None
