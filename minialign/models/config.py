"""The shapes of a LLaVA-type model: its decoder, its vision tower, and its image tokens."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


def gelu_tanh(x: Tensor) -> Tensor:
    """Apply GELU in its tanh approximation."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """Apply x * sigmoid(1.702 x), the GELU of CLIP."""
    gate = (1.702 * x).sigmoid_()  # in place, since nothing else reads the product
    return gate * x


# The activation functions by the names that checkpoints give them.
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
}


@dataclass(frozen=True)
class VisionConfig:
    """The shape of a CLIP or SigLIP vision tower."""

    family: str  # "clip" or "siglip"
    hidden_size: int
    intermediate_size: int
    num_layers: int  # all layers of the checkpoint, used or not
    num_heads: int
    image_size: int  # side of a square tile, in pixels
    patch_size: int  # side of a patch, in pixels
    norm_eps: float
    activation: str  # a key of ACTIVATIONS

    @property
    def patches_per_side(self) -> int:
        """Return the number of patches along one side of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """The shape of a Llama-style decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int  # fewer than num_heads where query heads share keys and values
    head_dim: int
    norm_eps: float
    max_position_embeddings: int  # the longest context, in tokens
    rope_theta: float
    rope_scaling: dict | None  # the values of LLAMA3_SCALING, or None
    qkv_bias: bool
    out_bias: bool
    tie_word_embeddings: bool


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-type checkpoint: its decoder, its vision tower, and how images enter the text."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_feature_layer: int  # hidden state that is read: 0 the embeddings, negative from the end
    drop_class_token: bool
    projector_activation: str  # a key of ACTIVATIONS
    projector_bias: bool
    image_grid_pinpoints: tuple | None  # sizes (height, width) of AnyRes, None without AnyRes

    @property
    def extra_image_tokens(self) -> int:
        """Return how many more image tokens a tile has than patches.

        CLIP has a class token, which adds 1 unless it is dropped. SigLIP has none, and loses its
        first patch instead where the checkpoint says to drop it (-1).
        """
        num_class_tokens = int(self.vision.family == "clip")
        num_dropped = int(self.drop_class_token)
        return num_class_tokens - num_dropped

    @property
    def vision_layers_used(self) -> int:
        """Return how many layers of the vision tower are computed, for example 23 of 24 for -2."""
        if self.vision_feature_layer >= 0:
            return self.vision_feature_layer
        return self.vision.num_layers + 1 + self.vision_feature_layer
