"""Compute the states of tokens with the encoders of BERT and of MPNet."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from minialign.models.config import ACTIVATIONS

# MPNet fixes these three in its code, whatever its config.json says.
MPNET_BUCKETS = 32
MPNET_MAX_DISTANCE = 128
PADDING_ID = 1


class EncoderLayer(nn.Module):
    """A transformer layer that normalizes after its attention and after its MLP."""

    def __init__(self, config):
        super().__init__()
        D = config["hidden_size"]
        intermediate_size = config["intermediate_size"]
        norm_eps = config.get("layer_norm_eps", 1e-12)
        self.num_heads = config["num_attention_heads"]
        self.q = nn.Linear(D, D)
        self.k = nn.Linear(D, D)
        self.v = nn.Linear(D, D)
        self.o = nn.Linear(D, D)
        self.up = nn.Linear(D, intermediate_size)
        self.down = nn.Linear(intermediate_size, D)
        self.attention_norm = nn.LayerNorm(D, norm_eps)
        self.norm = nn.LayerNorm(D, norm_eps)
        self.activation = ACTIVATIONS[config["hidden_act"]]

    def forward(self, x, attention_bias):
        """Compute (B, T, D) from (B, T, D). The bias is added to the scores of the attention."""
        q = self._split_heads(self.q(x))  # (B, H, T, d)
        k = self._split_heads(self.k(x))
        v = self._split_heads(self.v(x))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attention_bias)
        attended = attended.transpose(1, 2).reshape(x.shape)  # (B, T, D)
        x = self.attention_norm(x + self.o(attended))
        return self.norm(x + self.down(self.activation(self.up(x))))

    def _split_heads(self, x):
        """Split (B, T, D) into the heads (B, H, T, d)."""
        B, T, _ = x.shape
        return x.view(B, T, self.num_heads, -1).transpose(1, 2)


class EncoderNetwork(nn.Module):
    """The encoder of BERT or of MPNet.

    They differ in how they represent positions. The attention of MPNet also has a bias that
    depends on how far apart two tokens are. It is the same in every layer.
    """

    def __init__(self, config):
        super().__init__()
        D = config["hidden_size"]
        self.is_mpnet = config["model_type"] == "mpnet"
        self.words = nn.Embedding(config["vocab_size"], D)
        self.positions = nn.Embedding(config["max_position_embeddings"], D)
        if self.is_mpnet:
            self.distances = nn.Embedding(MPNET_BUCKETS, config["num_attention_heads"])
        else:
            self.types = nn.Embedding(config["type_vocab_size"], D)
        self.norm = nn.LayerNorm(D, config.get("layer_norm_eps", 1e-12))
        layers = [EncoderLayer(config) for _ in range(config["num_hidden_layers"])]
        self.layers = nn.ModuleList(layers)

    def forward(self, ids, is_token):
        """Compute the states (B, T, D) of ids (B, T). `is_token` (B, T) is False at padding."""
        # 1. Nothing attends to padding.
        attention_bias = torch.zeros(is_token.shape, device=ids.device)
        attention_bias = attention_bias.masked_fill(~is_token, -math.inf)
        attention_bias = attention_bias[:, None, None]  # (B, 1, 1, T)

        # 2. Embed the tokens and their positions.
        T = ids.shape[1]
        if self.is_mpnet:
            # Positions count from 2. The padding token has position 1, also within a text.
            is_counted = (ids != PADDING_ID).long()
            positions = is_counted.cumsum(1) * is_counted + PADDING_ID
            x = self.words(ids) + self.positions(positions)
            buckets = relative_position_buckets(T).to(ids.device)
            distance_bias = self.distances(buckets).permute(2, 0, 1)  # (H, T, T)
            attention_bias = attention_bias + distance_bias  # (B, H, T, T)
        else:
            # A text on its own is of type 0. BERT has other types for pairs of texts.
            x = self.words(ids) + self.types.weight[0] + self.positions.weight[:T]

        # 3. Run the layers.
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, attention_bias)
        return x


def relative_position_buckets(T):
    """Return MPNet's bucket (T query, T key) for the distance between two tokens.

    Each direction has 8 buckets for the distances up to 7, and 8 that grow with the logarithm of
    the distance. They are those of T5 (arXiv 1910.10683).
    """
    buckets_per_direction = MPNET_BUCKETS // 2
    num_exact = MPNET_BUCKETS // 4
    positions = torch.arange(T)
    distance = positions - positions[:, None]
    length = distance.abs()
    log_ratio = torch.log(length.float() / num_exact) / math.log(MPNET_MAX_DISTANCE / num_exact)
    log_bucket = num_exact + (log_ratio * (buckets_per_direction - num_exact)).long()
    log_bucket = log_bucket.clamp(max=buckets_per_direction - 1)
    bucket = torch.where(length < num_exact, length, log_bucket)
    return buckets_per_direction * (distance > 0) + bucket
