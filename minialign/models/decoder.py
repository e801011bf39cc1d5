"""The Llama-style decoder (Llama, Mistral, Qwen2) and its key-value cache. It returns hidden states; heads live elsewhere."""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minialign.models.fused_ops import Rope, SharedPrefix, SwiGLU, concat_pieces, swiglu
from minialign.models.lora import lora_linears


def rope_frequencies(config):
    """Angles per position for each pair of channels, (d/2,), fp32; Llama 3's scaling stretches the slow ones."""
    frequency = 1.0 / config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    )
    if config.rope_scaling is None:
        return frequency
    s = config.rope_scaling
    low, high, factor, old = (
        s[key]
        for key in (
            "low_freq_factor",
            "high_freq_factor",
            "factor",
            "original_max_position_embeddings",
        )
    )
    turns = old * frequency / (2 * math.pi)  # full turns over the context of the first training
    blend = ((turns - low) / (high - low)).clamp(0, 1)  # 0: slow, stretched; 1: fast, left alone
    return frequency * (blend + (1 - blend) / factor)


def gather_positions(x, positions):
    """x (B, T, D) at `positions` (B, R): (B, R, D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


def attention(q, k, v, mask):
    """What queries (B, H, T, d) read from keys and values (B, H, S, d), in pieces (B, T', H d) that follow one another.

    mask (B, 1, T', S), added, is that of the last T' queries. Those before see all keys up to their own: said as such, the kernel
    skips the half of the square that a mask would have it compute and then hide.
    """
    n = q.shape[2] - mask.shape[2]
    pieces = []
    if n:
        (first, q), (k, early_k), (v, early_v) = (
            q.split([n, mask.shape[2]], 2),
            SharedPrefix.apply(k, n),
            SharedPrefix.apply(v, n),
        )
        pieces = [F.scaled_dot_product_attention(first, early_k, early_v, is_causal=True)]
    return [
        y.transpose(1, 2).flatten(2)
        for y in (*pieces, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    ]


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads, self.num_kv_heads, self.d = (
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
        )
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_heads * config.head_dim, bias=config.qkv_bias
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias
        )
        self.v_proj = nn.Linear(
            config.hidden_size, config.num_kv_heads * config.head_dim, bias=config.qkv_bias
        )
        self.o_proj = nn.Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.out_bias
        )

    def forward(self, x, norm, cos, sin, mask, store, read):
        """norm(x), x (B, T, D), to (B, T, D); `store` takes this call's k and v and gives those to look at, the cache's included.

        The norm comes along so that the backward pass can apply it again to x, which is kept anyway, instead of keeping what it gives.
        With `read` (B, R) only those positions ask, (B, R, D) comes out.
        """
        B, T, _ = x.shape
        normed, inward = norm(x), (self.q_proj, self.k_proj, self.v_proj)
        *q, k, v = lora_linears(normed, *(inward if read is None else inward[1:]), again=(norm, x))
        k = Rope.apply(k.view(B, T, self.num_kv_heads, self.d), cos, sin).transpose(
            1, 2
        )  # (B, K, T, d)
        k, v = store(
            k, v.view(B, T, self.num_kv_heads, self.d).transpose(1, 2)
        )  # with a cache: (B, K, S, d)
        if read is not None:
            q, cos, sin = (
                [self.q_proj(gather_positions(normed, read))],
                *(gather_positions(part[:, :, 0], read)[:, :, None] for part in (cos, sin)),
            )
        q = Rope.apply(q[0].view(B, -1, self.heads, self.d), cos, sin).transpose(
            1, 2
        )  # (B, H, T, d)
        if self.heads != self.num_kv_heads:
            k, v = (t.repeat_interleave(self.heads // self.num_kv_heads, 1) for t in (k, v))
        pieces = attention(q, k, v, mask)
        return lora_linears(concat_pieces(*pieces), self.o_proj, again=(concat_pieces, *pieces))[0]


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj, self.up_proj = (
            nn.Linear(config.hidden_size, config.intermediate_size, bias=False) for _ in range(2)
        )
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, norm):
        gate, up = lora_linears(norm(x), self.gate_proj, self.up_proj, again=(norm, x))
        return lora_linears(SwiGLU.apply(gate, up), self.down_proj, again=(swiglu, gate, up))[0]


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Attention(config), MLP(config)
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(config.hidden_size, config.norm_eps),
            nn.RMSNorm(config.hidden_size, config.norm_eps),
        )

    def forward(self, x, cos, sin, mask, store, read=None):
        y = self.self_attn(x, self.input_layernorm, cos, sin, mask, store, read)
        x = y + (x if read is None else gather_positions(x, read))
        return x + self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embeddings in, hidden states out; the token embedding table lives here, the vocabulary head does not.

    With `checkpointing` the backward pass computes every layer a second time instead of keeping its activations: about a third
    more time for a memory that holds one layer's activations and each layer's input.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing, self.frequencies = config, False, None
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x, positions, mask, cache=None, slots=None, read=None):
        """Hidden states (B, T, D) after the last norm, or at the positions `read` (B, R) alone, (B, R, D): the last layer is then
        computed there only, since nothing else reads it.

        x (B, T, D) embeddings; positions (B, T); mask (B, 1, T', S) bool, True where one of the last T' queries may see key s
        (S = T without a cache); earlier queries see every key up to their own, and `read` names none of them but as padding.
        With a cache the new keys go to `slots` (B, T), of which those before the mask's are 0, 1, ..., and the queries look at the whole
        buffer through the mask.
        """
        if self.frequencies is None or self.frequencies.device != x.device:
            self.frequencies = rope_frequencies(self.config).to(
                x.device
            )  # once, for a CUDA graph must not copy from the CPU
        angles = (positions[..., None].float() * self.frequencies)[
            :, :, None
        ]  # (B, T, 1, d/2), fp32
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        before = x.shape[1] - mask.shape[2]
        mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device).masked_fill(
            ~mask, -math.inf
        )  # once for all layers
        for number, layer in enumerate(self.layers):
            store = (
                (lambda k, v, n=number: cache.write(n, slots, k, v))
                if cache
                else (lambda k, v: (k, v))
            )
            last = read if layer is self.layers[-1] else None
            if last is not None:
                mask = mask.gather(
                    2,
                    (read - before)
                    .clamp(min=0)[:, None, :, None]
                    .expand(-1, -1, -1, mask.shape[-1]),
                )  # (B, 1, R, S)
            keep = self.checkpointing and torch.is_grad_enabled()
            x = (
                checkpoint(layer, x, cos, sin, mask, store, last, use_reentrant=False)
                if keep
                else layer(x, cos, sin, mask, store, last)
            )
        return self.norm(x)
