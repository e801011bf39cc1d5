"""Count the bytes that a model computes with: activations, key-value caches, image features.

Weights are not counted here: a module that is built on torch's "meta" device knows their sizes.
What autograd keeps follows from the forward pass of decoder.py and from what the ops of
fused_ops.py store, so each formula names the tensors that it adds up. A test compares them with
what autograd really keeps.

Shapes: B rows, P positions of a prefix, R positions of a row's responses, T = P + R, N = B T
tokens, Q queries (N in all layers but the last, B R there), D hidden size, H heads, K key-value
heads, d head width, F inner width of the MLP, r rank of LoRA, L layers, V vocabulary. In a split
model H, K and F are those of one process.
"""

from dataclasses import dataclass

import torch
from torch import nn

from minialign.models.config import LlavaConfig, TextConfig, VisionConfig
from minialign.models.policy import Policy

FP32_BYTES = 4
FP64_BYTES = 8
MAX_LOGITS = 1 << 22  # of a block of the vocabulary, in logprobs.token_logps


@dataclass(frozen=True)
class BatchShape:
    """The sizes of a packed batch, whose rows are padded to the longest one."""

    num_rows: int  # B
    prefix_length: int  # P, image tokens included
    num_response_tokens: int  # R, of all responses of a row together
    num_features: int  # of the vision tower for the images of a row

    @property
    def row_length(self) -> int:
        """Return T, the positions of a row."""
        return self.prefix_length + self.num_response_tokens

    @property
    def num_tokens(self) -> int:
        """Return N, the positions of all rows."""
        return self.num_rows * self.row_length

    @property
    def num_scored(self) -> int:
        """Return B R, the positions of all rows that predict a response token."""
        return self.num_rows * self.num_response_tokens


@dataclass(frozen=True)
class Computation:
    """How a policy computes: what its activations depend on besides their shapes."""

    dtype: torch.dtype  # of the activations
    rank: int  # of LoRA, 0 if the decoder itself is trained
    device: str  # "cpu" or "cuda"
    checkpointing: bool = False  # of the decoder's layers

    @property
    def itemsize(self) -> int:
        """Return the bytes of an activation."""
        return self.dtype.itemsize


# --- weights ---


def module_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters of a module."""
    return sum(parameter.nbytes for parameter in module.parameters())


def trained_bytes(policy: Policy) -> int:
    """Return the bytes of all parameters that are trained, in fp32."""
    return sum(parameter.nbytes for parameter in policy.parameters().values())


def reference_copy_bytes(policy: Policy) -> int:
    """Return the bytes of the frozen copies of what is trained in place."""
    return sum(module_bytes(module) for module in policy.reference_modules.values())


# --- the training step ---


def layer_activation_bytes(
    text: TextConfig, computation: Computation, *, num_tokens: int, num_queries: int
) -> int:
    """Return what autograd keeps of one decoder layer.

    num_tokens: N, the positions that have keys and values.
    num_queries: Q, the positions that attend and run through the MLP.
    """
    D = text.hidden_size
    F = text.intermediate_size
    Hd = text.num_heads * text.head_dim
    r = computation.rank
    is_last_layer = num_queries < num_tokens

    # 1. In every form of the layer: its input x, which the first norm keeps, and what the attention
    #    kernel keeps. Key-value heads are repeated for their query heads, so keys and values have
    #    H heads.
    per_token = D + 2 * Hd  # x, keys, values
    per_query = Hd + Hd  # queries, and the result of the attention

    # 2. The MLP's input, which the second norm keeps, and the two factors of SwiGLU.
    per_query += D + 2 * F

    # 3. The inputs of the projections. Adapters compute them again, and keep x A^T of each layer.
    if r > 0:
        per_token += 2 * r  # of k, v
        per_query += 5 * r  # of q, o, gate, up, down
    else:
        per_token += D  # norm(x), of q, k, v
        per_query += D + F  # norm(x) of gate and up, and the product of SwiGLU
        if not is_last_layer:
            per_query += Hd  # the pieces of the attention's result, side by side

    # 4. The last layer picks the queries' positions out of norm(x).
    if is_last_layer:
        per_query += D
    kept = (num_tokens * per_token + num_queries * per_query) * computation.itemsize

    # 5. On a CPU a norm is computed in steps.
    return kept + (num_tokens + num_queries) * norm_copy_bytes(D, computation)


def norm_copy_bytes(width: int, computation: Computation) -> int:
    """Return what a norm on a CPU keeps of a position beside its input. A GPU has a kernel for it.

    x is converted to fp32. If the weight of the norm is trained, x / rms(x) is kept as well.
    """
    if computation.device == "cuda":
        return 0
    copies = 0
    if computation.dtype != torch.float32:
        copies += 1
    if computation.rank == 0:
        copies += 1
    return copies * width * FP32_BYTES


def adapter_cast_bytes(policy: Policy, dtype: torch.dtype) -> int:
    """Return what autograd keeps of the adapters: A joined over layers, and A and B in `dtype`."""
    num_bytes = 0
    for adapter in policy.adapters:
        num_bytes += adapter.lora_A.numel() * dtype.itemsize
        if dtype != torch.float32:
            num_bytes += adapter.lora_B.numel() * dtype.itemsize
    return num_bytes


def projector_activation_bytes(config: LlavaConfig, num_features: int, dtype: torch.dtype) -> int:
    """Return what autograd keeps of the projector for so many features of the vision tower."""
    D = config.text.hidden_size
    # Its input, and what stands before and behind its activation function.
    kept = num_features * (config.vision.hidden_size + 2 * D) * dtype.itemsize
    if dtype != torch.float32:
        kept += D * D * dtype.itemsize  # the weight of the second layer, converted
    return kept


def mask_bytes(shape: BatchShape, dtype: torch.dtype) -> int:
    """Return the bytes of the attention mask: a row for each response position, of T keys.

    The last layer has a copy of it, with the rows of its queries.
    """
    return 2 * shape.num_scored * shape.row_length * dtype.itemsize


def logits_bytes(num_scored: int, text: TextConfig, dtype: torch.dtype) -> int:
    """Return the working memory of token_logps: a block of logits, and the sums over blocks."""
    tokens_per_block = min(text.vocab_size, max(64, MAX_LOGITS // max(1, num_scored)))
    bytes_per_logit = FP32_BYTES
    if dtype != torch.float32:
        bytes_per_logit += dtype.itemsize  # the product, before it is converted
    sums = 2 * num_scored * text.hidden_size * FP32_BYTES  # weighted rows, and their mean
    return num_scored * tokens_per_block * bytes_per_logit + sums


def backward_bytes(text: TextConfig, computation: Computation, num_tokens: int) -> int:
    """Return the working memory of a layer's backward pass, at its largest: inside SwiGLU."""
    # The gradients of SwiGLU's product and of its two factors, and that of the layer's output.
    per_token = 3 * text.intermediate_size + text.hidden_size
    working = num_tokens * per_token * computation.itemsize
    if computation.rank == 0:  # the gradient of a weight, before it is added to the others
        working += text.intermediate_size * text.hidden_size * FP32_BYTES
    return working


@dataclass(frozen=True)
class KeptActivations:
    """What autograd keeps from the forward pass of a micro-batch, in bytes."""

    num_layers: int  # L
    before_layers: int  # projector and mask, kept to the end of the backward pass
    full_layer: int  # of a layer that is computed at all positions: each but the last
    last_layer: int
    casts: int  # of the adapters of all layers
    after_layers: int  # the last norm's input, and the slopes of the log-probs

    def total(self) -> int:
        """Return all of it."""
        layers = (self.num_layers - 1) * self.full_layer + self.last_layer
        return self.before_layers + layers + self.casts + self.after_layers


def kept_activations(
    config: LlavaConfig, policy: Policy, shape: BatchShape, computation: Computation
) -> KeptActivations:
    """Return what autograd keeps of a micro-batch whose layers are not checkpointed."""
    D = config.text.hidden_size
    N = shape.num_tokens
    Q = shape.num_scored

    num_features = shape.num_rows * shape.num_features
    before_layers = projector_activation_bytes(config, num_features, computation.dtype)
    before_layers += mask_bytes(shape, computation.dtype)

    # The last norm's input, and the slopes of the log-probs. A head that is trained keeps the
    # hidden states as well.
    vectors_per_scored = 2 if computation.rank > 0 else 3
    bytes_per_scored = vectors_per_scored * D * computation.itemsize
    after_layers = Q * (bytes_per_scored + norm_copy_bytes(D, computation))

    return KeptActivations(
        num_layers=config.text.num_layers,
        before_layers=before_layers,
        full_layer=layer_activation_bytes(config.text, computation, num_tokens=N, num_queries=N),
        last_layer=layer_activation_bytes(config.text, computation, num_tokens=N, num_queries=Q),
        casts=adapter_cast_bytes(policy, computation.dtype),
        after_layers=after_layers,
    )


def training_activation_bytes(
    config: LlavaConfig, policy: Policy, shape: BatchShape, computation: Computation
) -> int:
    """Return the largest sum of kept activations and working memory in a micro-batch."""
    text = config.text
    kept = kept_activations(config, policy, shape, computation)
    L = kept.num_layers

    # 1. What is held when the forward pass reaches the head, and when the backward pass is in the
    #    first layer that is computed at all positions. The last layer is free by then.
    if computation.checkpointing:
        # Of a layer only its input is kept, until the backward pass computes the layer again.
        layer_input = shape.num_tokens * text.hidden_size * computation.itemsize
        at_head = kept.before_layers + L * layer_input + kept.after_layers
        # The layer that is computed again keeps all of its activations, its input among them. The
        # inputs of the layers before it wait.
        layers = max(0, L - 2) * layer_input + kept.full_layer
        in_layer = kept.before_layers + layers + kept.casts // L
    else:
        at_head = kept.total()
        in_layer = kept.before_layers + (L - 1) * kept.full_layer + kept.casts

    # 2. The working memory of both moments. A head that is trained has a gradient, in blocks and as
    #    a whole.
    at_head += logits_bytes(shape.num_scored, text, computation.dtype)
    if computation.rank == 0:
        at_head += 2 * text.vocab_size * text.hidden_size * FP32_BYTES
    in_layer += backward_bytes(text, computation, shape.num_tokens)
    return max(at_head, in_layer)


# --- forward passes without gradients ---


def forward_bytes(text: TextConfig, shape: BatchShape, dtype: torch.dtype) -> int:
    """Return the working memory of a forward pass without gradients, at its largest: in the MLP."""
    # The layer's input, the MLP's input, norm(x), the output; gate, up and their product.
    per_token = 4 * text.hidden_size + 3 * text.intermediate_size
    return shape.num_tokens * per_token * dtype.itemsize + mask_bytes(shape, dtype)


def vision_tower_bytes(vision: VisionConfig, num_tiles: int, dtype: torch.dtype) -> int:
    """Return the working memory of the vision tower, at its largest: in the MLP."""
    num_features = num_tiles * (vision.patches_per_side**2 + 1)  # and the class token
    # The layer's input, its sum with the attention, and norm(x); fc1's output and the two factors
    # of its activation function.
    per_feature = 3 * vision.hidden_size + 3 * vision.intermediate_size
    return num_features * per_feature * dtype.itemsize


def image_feature_bytes(config: LlavaConfig, num_tiles: int, dtype: torch.dtype) -> int:
    """Return the bytes of the vision tower's features of an image, as the cache keeps them."""
    features_per_tile = config.vision.patches_per_side**2 + config.extra_image_tokens
    return num_tiles * features_per_tile * config.vision.hidden_size * dtype.itemsize


# --- sampling ---


@dataclass(frozen=True)
class SamplingShape:
    """The sizes of a round of sampling: a prefill, and the continuations that fork its cache."""

    num_prompts: int  # rows of the prefill
    prompt_length: int  # positions of each
    num_continuations: int  # that are decoded together
    context_length: int  # positions that the longest continuation attends to
    max_new_tokens: int

    @property
    def continuation_length(self) -> int:
        """Return the cache positions of a continuation."""
        return self.context_length + self.max_new_tokens


def kv_cache_bytes(text: TextConfig, num_rows: int, num_positions: int, dtype: torch.dtype) -> int:
    """Return the bytes of a KVCache: 2 (keys, values) x L x B x K x S x d numbers."""
    num_numbers = 2 * text.num_layers * num_rows * text.num_kv_heads * num_positions * text.head_dim
    return num_numbers * dtype.itemsize


def sampling_cache_bytes(text: TextConfig, shape: SamplingShape, dtype: torch.dtype) -> int:
    """Return the bytes of both caches of a round: of the prefill, and of the continuations."""
    prompts = kv_cache_bytes(text, shape.num_prompts, shape.prompt_length, dtype)
    continuations = kv_cache_bytes(text, shape.num_continuations, shape.continuation_length, dtype)
    return prompts + continuations


def decoding_bytes(
    text: TextConfig, shape: SamplingShape, dtype: torch.dtype, *, top_p: float = 1.0
) -> int:
    """Return the working memory of decoding beside the caches: to fork, or to sample a token."""
    # 1. A fork gathers the positions of the values before it copies them to their place.
    keys_and_values = kv_cache_bytes(text, shape.num_continuations, shape.context_length, dtype)
    gathered_values = keys_and_values // 2

    # 2. Logits in fp32, then in fp64: the logits, their softmax and its cumulative sum. To cut out
    #    a nucleus, probabilities are sorted. Then seven tensors of 8 bytes a number are held.
    num_logits = shape.num_continuations * text.vocab_size
    num_tensors = 3 if top_p == 1 else 7
    logits = num_logits * (FP32_BYTES + num_tensors * FP64_BYTES)
    return max(gathered_values, logits)
