"""Count the arithmetic of a model, and measure how much of it a device does in a second.

Nearly all of it is in matrix products. A product of a weight with the states of T tokens takes a
multiplication and an addition for each weight and each token. With P weights that is 2 P T
operations. Training multiplies with the same P weights up to three times:

    forward      2 P T   the output of each layer
    backward     2 P T   the gradient of what the layer reads
                 2 P T   the gradient of the weights, if they are trained

So full fine-tuning takes 6 P T operations, training of adapters beside frozen weights 4 P T (and 6
for each weight of an adapter, of which there are few), and reading without a gradient 2 P T. The
functions below count a packed row by these rules, and add the attention, which has no weights.

What is not needed is not counted: padding, keys that a mask hides, and activations that are
computed again to save memory. Norms, softmax and activations take less than a hundredth.
"""

import time
from dataclasses import dataclass

import torch

from minialign.models.config import LlavaConfig, TextConfig

READ = 1  # how often a pass without gradients multiplies with a weight
TRAIN_THROUGH = 2  # forward and backward, with a weight that stays frozen
TRAIN = 3  # forward, and backward with a gradient for the weight
NUM_TIMED_PRODUCTS = 5


@dataclass(frozen=True)
class RowLengths:
    """The lengths of a packed row (data/packing.py) in tokens."""

    prefix: int  # what all responses share, image tokens included
    responses: list[int]
    num_image_tokens: int


@dataclass(frozen=True)
class Multiplications:
    """The multiplications of one forward pass, by what is multiplied with the states."""

    decoder: int  # the projections of all layers
    adapters: int  # LoRA's A and B
    attention: int  # keys and values
    projector: int
    vocab_head: int


def read_flops(config: LlavaConfig, rows: list[RowLengths]) -> int:
    """Count the operations of a pass without gradients, such as that of the reference."""
    forward = count_multiplications(config, rows, rank=0)
    num_multiplications = READ * (
        forward.decoder + forward.attention + forward.projector + forward.vocab_head
    )
    return 2 * num_multiplications


def learn_flops(config: LlavaConfig, rows: list[RowLengths], rank: int) -> int:
    """Count the operations of a forward and a backward pass with adapters of a rank.

    The projector is trained too. With rank 0 the decoder and the vocabulary head are trained
    instead of adapters.
    """
    forward = count_multiplications(config, rows, rank)
    uses_of_decoder = TRAIN_THROUGH if rank else TRAIN
    num_multiplications = (
        uses_of_decoder * (forward.decoder + forward.vocab_head)
        + TRAIN * (forward.adapters + forward.projector)
        # Queries, keys and values are no weights, but all of them get a gradient.
        + TRAIN * forward.attention
    )
    return 2 * num_multiplications


def count_multiplications(config: LlavaConfig, rows, rank) -> Multiplications:
    """Count the multiplications of a forward pass over packed rows.

    The last layer computes its queries, and what follows them, where a response token is predicted.
    All layers before it compute everything at every position.
    """
    text = config.text
    vision_width = config.vision.hidden_size

    # 1. Tokens that are read, tokens that are predicted, and image tokens.
    num_predicted = sum(sum(row.responses) for row in rows)
    num_tokens = sum(row.prefix for row in rows) + num_predicted
    num_image_tokens = sum(row.num_image_tokens for row in rows)

    # 2. Weights of a layer, and how many tokens each is multiplied with, summed over the layers: k
    #    and v with all tokens, the others with those that have a query.
    key_value_weights, other_weights = layer_weights(text)
    key_value_adapters, other_adapters = layer_adapter_weights(text, rank)
    num_all_tokens = text.num_layers * num_tokens
    num_queries = (text.num_layers - 1) * num_tokens + num_predicted

    # 3. At each position that it sees, a query is multiplied with a key, and its weight with a
    #    value. The last layer has no queries in the prefix.
    num_seen_in_prefix = sum(count_causal(row.prefix) for row in rows)
    num_seen_by_responses = sum(count_seen_by_responses(row) for row in rows)
    num_seen = (text.num_layers - 1) * num_seen_in_prefix + text.num_layers * num_seen_by_responses

    return Multiplications(
        decoder=num_all_tokens * key_value_weights + num_queries * other_weights,
        adapters=num_all_tokens * key_value_adapters + num_queries * other_adapters,
        attention=2 * num_seen * text.num_heads * text.head_dim,
        projector=num_image_tokens * (vision_width + text.hidden_size) * text.hidden_size,
        vocab_head=num_predicted * text.hidden_size * text.vocab_size,
    )


def layer_weights(text: TextConfig) -> tuple[int, int]:
    """Return the numbers of weights of a decoder layer: those of k and v, and all others."""
    query_width = text.num_heads * text.head_dim
    key_width = text.num_kv_heads * text.head_dim
    key_value_weights = 2 * text.hidden_size * key_width
    other_weights = (
        2 * text.hidden_size * query_width  # q and o
        + 3 * text.hidden_size * text.intermediate_size  # gate, up and down
    )
    return key_value_weights, other_weights


def layer_adapter_weights(text: TextConfig, rank: int) -> tuple[int, int]:
    """Return the same numbers for adapters: r (in + out) of a projection from `in` to `out`."""
    query_width = text.num_heads * text.head_dim
    key_width = text.num_kv_heads * text.head_dim
    key_value_weights = 2 * rank * (text.hidden_size + key_width)
    other_weights = 2 * rank * (text.hidden_size + query_width) + 3 * rank * (
        text.hidden_size + text.intermediate_size
    )
    return key_value_weights, other_weights


def count_causal(length: int) -> int:
    """Count the positions that the tokens of a text see, themselves included: 1 + 2 + ... ."""
    return length * (length + 1) // 2


def count_seen_by_responses(row: RowLengths) -> int:
    """Count the positions that response tokens see: the prefix, and their own response causally."""
    total = 0
    for length in row.responses:
        total += length * row.prefix + count_causal(length)
    return total


def tower_flops(config: LlavaConfig, num_tiles: int) -> int:
    """Count the operations of the vision tower, which is frozen, on a number of tiles."""
    vision = config.vision
    width = vision.hidden_size
    num_patches = vision.patches_per_side**2
    num_features = num_patches + int(vision.family == "clip")  # and the class token

    # 1. The patches, which are a layer on their pixels.
    patches = num_patches * 3 * vision.patch_size**2 * width

    # 2. Each layer: q, k, v and out, the two of the MLP, and every feature sees every other.
    weights_of_layer = 4 * width**2 + 2 * width * vision.intermediate_size
    layer = num_features * weights_of_layer + 2 * num_features**2 * width
    return 2 * num_tiles * READ * (patches + config.vision_layers_used * layer)


def measure_peak(device, dtype, size=8192, *, clock=time.perf_counter) -> float:
    """Measure the operations a second of a large matrix product: what the device does at best.

    It takes well under a second on a GPU, and the memory of two matrices. `clock` gives seconds.
    """
    # A generator of its own leaves all other random numbers as they are.
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(size, size, device=device, dtype=dtype, generator=generator)
    torch.mm(matrix, matrix)  # the first product also loads the kernel
    synchronize(device)
    started = clock()
    for _ in range(NUM_TIMED_PRODUCTS):
        torch.mm(matrix, matrix)
    synchronize(device)
    seconds = clock() - started
    return NUM_TIMED_PRODUCTS * 2 * size**3 / seconds


def synchronize(device):
    """Wait until a GPU has done what it was asked for. A CPU is never behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
