"""The vision tower: tiles of a picture to patch features (CLIP and SigLIP)."""

import torch
from torch import nn
from torch.nn import functional as F

from minialign.models.config import ACTIVATIONS


class VisionAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )

    def forward(self, x):
        N, I, D = x.shape
        q, k, v = (
            project(x).view(N, I, self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )  # (N, H, I, d)
        return self.out_proj(
            F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, I, D)
        )


class VisionMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.fc1, self.fc2 = (
            nn.Linear(config.hidden_size, config.intermediate_size),
            nn.Linear(config.intermediate_size, config.hidden_size),
        )
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class VisionLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = (
            VisionAttention(config.hidden_size, config.num_heads),
            VisionMLP(config),
        )
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(config.hidden_size, config.norm_eps),
            nn.LayerNorm(config.hidden_size, config.norm_eps),
        )

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class VisionEmbeddings(nn.Module):
    def __init__(self, config):
        super().__init__()
        clip = config.family == "clip"
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size)) if clip else None
        self.patch_embedding = nn.Conv2d(
            3, config.hidden_size, config.patch_size, config.patch_size, bias=not clip
        )
        self.position_embedding = nn.Embedding(
            config.patches_per_side**2 + clip, config.hidden_size
        )

    def forward(self, tiles):
        """(N, 3, S, S) to (N, I, D), the class embedding first where there is one."""
        x = self.patch_embedding(tiles).flatten(2).transpose(1, 2)  # (N, I, D)
        if self.class_embedding is not None:
            x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        return x + self.position_embedding.weight


class VisionTower(nn.Module):
    """A ViT. Layers after the one that is read, and the final norm, are kept for the checkpoint's sake and never computed."""

    def __init__(self, config):
        super().__init__()
        self.used, self.drop_first = config.vision_layers_used, config.drop_class_token
        self.embeddings, self.encoder = (
            VisionEmbeddings(config.vision),
            nn.ModuleDict(
                {
                    "layers": nn.ModuleList(
                        VisionLayer(config.vision) for _ in range(config.vision.num_layers)
                    )
                }
            ),
        )
        if config.vision.family == "clip":
            self.pre_layrnorm = nn.LayerNorm(
                config.vision.hidden_size, config.vision.norm_eps
            )  # spelt so in every CLIP checkpoint
        self.post_layernorm = nn.LayerNorm(config.vision.hidden_size, config.vision.norm_eps)

    def forward(self, tiles):
        """Tiles (N, 3, S, S), normalised, to features (N, I, D): the hidden state of the feature layer, CLS dropped if so configured."""
        x = self.embeddings(tiles)
        if hasattr(self, "pre_layrnorm"):
            x = self.pre_layrnorm(x)
        for layer in self.encoder["layers"][: self.used]:
            x = layer(x)
        return x[:, 1:] if self.drop_first else x
