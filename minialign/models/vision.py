"""The vision tower: a ViT (CLIP or SigLIP) that turns image tiles into one feature per patch.

Shapes: N tiles, P patches a tile, I features a tile, D the tower's width. Inside the tower the
features are the patches and, for CLIP, a class token before them. It is dropped in the end, if
config.json says so.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minialign.models.config import ACTIVATIONS, LlavaConfig, VisionConfig


class VisionAttention(nn.Module):
    """Multi-head self-attention without a mask: every patch sees every other."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        """Attend among the features of each tile, (N, I, D) to (N, I, D)."""
        q = self.split_heads(self.q_proj(x))  # (N, H, I, d)
        k = self.split_heads(self.k_proj(x))  # (N, H, I, d)
        v = self.split_heads(self.v_proj(x))  # (N, H, I, d)
        y = F.scaled_dot_product_attention(q, k, v)  # (N, H, I, d)
        y = y.transpose(1, 2).reshape(x.shape)  # (N, I, D)
        return self.out_proj(y)

    def split_heads(self, x):
        """Split the last dimension into heads: (N, I, D) to (N, H, I, d)."""
        num_tiles, num_features, _ = x.shape
        return x.view(num_tiles, num_features, self.num_heads, -1).transpose(1, 2)


class VisionMLP(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        """Apply the block to x (N, I, D)."""
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    """One pre-norm transformer layer: attention, then the MLP, each added to its input."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.self_attn = VisionAttention(config)
        self.mlp = VisionMLP(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.norm_eps)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.norm_eps)

    def forward(self, x):
        """Apply the layer to x (N, I, D)."""
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    """One embedding per patch, plus learned positions. CLIP puts a class token first."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        has_class_token = config.family == "clip"
        num_positions = config.patches_per_side**2
        self.class_embedding = None
        if has_class_token:
            num_positions += 1
            self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        # A convolution whose stride is its size sees each patch once.
        self.patch_embedding = nn.Conv2d(
            in_channels=3,
            out_channels=config.hidden_size,
            kernel_size=config.patch_size,
            stride=config.patch_size,
            bias=not has_class_token,
        )
        embeddings = torch.zeros(num_positions, config.hidden_size)  # see Decoder
        self.position_embedding = nn.Embedding.from_pretrained(embeddings, freeze=False)

    def forward(self, tiles):
        """Embed tiles (N, 3, S, S) as (N, I, D)."""
        x = self.patch_embedding(tiles)  # (N, D, S/patch, S/patch)
        x = x.flatten(2).transpose(1, 2)  # (N, P, D), row by row
        if self.class_embedding is not None:
            class_token = self.class_embedding.expand(len(x), 1, -1)  # (N, 1, D)
            x = torch.cat([class_token, x], dim=1)
        return x + self.position_embedding.weight


class VisionTower(nn.Module):
    """A ViT that is read at one of its layers, not necessarily the last.

    The checkpoint also holds the layers behind that one and a final norm. They are never computed.
    They are kept so that a saved model is complete.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        vision = config.vision
        self.num_layers_used = config.vision_layers_used
        self.drop_class_token = config.drop_class_token
        self.embeddings = VisionEmbeddings(vision)
        layers = nn.ModuleList(VisionLayer(vision) for _ in range(vision.num_layers))
        self.encoder = nn.ModuleDict({"layers": layers})
        self.pre_layrnorm = None
        if vision.family == "clip":
            # Every CLIP checkpoint spells the name so.
            self.pre_layrnorm = nn.LayerNorm(vision.hidden_size, vision.norm_eps)
        self.post_layernorm = nn.LayerNorm(vision.hidden_size, vision.norm_eps)

    def forward(self, tiles: Tensor) -> Tensor:
        """Encode normalized tiles (N, 3, S, S) as features (N, I, D).

        The features are the hidden states of the configured layer.
        """
        x = self.embeddings(tiles)  # (N, I, D)
        if self.pre_layrnorm is not None:
            x = self.pre_layrnorm(x)
        for layer in self.encoder["layers"][: self.num_layers_used]:
            x = layer(x)
        if self.drop_class_token:
            x = x[:, 1:]  # SigLIP has no class token, and loses its first patch, as in transformers
        return x
