"""The vision tower: tiles of a picture to patch features (CLIP and SigLIP)."""

import torch
from torch import nn
from torch.nn import functional as F

from .config import ACTIVATIONS


class _Attention(nn.Module):
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


class _MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c.width, c.inner), nn.Linear(c.inner, c.width)
        self.activation = ACTIVATIONS[c.activation]

    def forward(self, x):
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = _Attention(c.width, c.heads), _MLP(c)
        self.layer_norm1, self.layer_norm2 = (
            nn.LayerNorm(c.width, c.eps),
            nn.LayerNorm(c.width, c.eps),
        )

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, c):
        super().__init__()
        clip = c.family == "clip"
        self.class_embedding = nn.Parameter(torch.zeros(c.width)) if clip else None
        self.patch_embedding = nn.Conv2d(3, c.width, c.patch_size, c.patch_size, bias=not clip)
        self.position_embedding = nn.Embedding(c.side**2 + clip, c.width)

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
        c = config.vision
        self.used, self.drop_first = config.vision_layers_used, config.drop_cls
        self.embeddings, self.encoder = (
            _Embeddings(c),
            nn.ModuleDict({"layers": nn.ModuleList(_Layer(c) for _ in range(c.layers))}),
        )
        if c.family == "clip":
            self.pre_layrnorm = nn.LayerNorm(c.width, c.eps)  # spelt so in every CLIP checkpoint
        self.post_layernorm = nn.LayerNorm(c.width, c.eps)

    def forward(self, tiles):
        """Tiles (N, 3, S, S), normalised, to features (N, I, D): the hidden state of the feature layer, CLS dropped if so configured."""
        x = self.embeddings(tiles)
        if hasattr(self, "pre_layrnorm"):
            x = self.pre_layrnorm(x)
        for layer in self.encoder["layers"][: self.used]:
            x = layer(x)
        return x[:, 1:] if self.drop_first else x
