"""The Llama-style decoder (Llama, Mistral, Qwen2) and its key-value cache. It returns hidden states; heads live elsewhere."""

import math

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .lora import project


def rope_frequencies(c):
    """Angles per position for each pair of channels, (d/2,), fp32; Llama 3's scaling stretches the slow ones."""
    frequency = 1.0 / c.theta ** (
        torch.arange(0, c.head_dim, 2, dtype=torch.int64).float() / c.head_dim
    )
    if c.rope_scaling is None:
        return frequency
    s = c.rope_scaling
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


class _Rotated(torch.autograd.Function):
    """RoPE in the half-split layout: x (B, T, H, d) by angles given as cos and sin (B, T, 1, d/2).

    The gradient is rotated back, by the same few passes: no half is negated, nothing concatenated, as autograd would do for each.
    """

    @staticmethod
    def forward(ctx, x, cos, sin, sign=1):
        """The rotated x, or with `sign` -1 the x that was."""
        ctx.save_for_backward(cos, sin)
        (a, b), y = x.chunk(2, -1), torch.empty_like(x)
        c, d = y.chunk(2, -1)
        torch.mul(a, cos, out=c).addcmul_(b, sin, value=-sign)
        torch.mul(b, cos, out=d).addcmul_(a, sin, value=sign)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        """The gradient of x."""
        return _Rotated.apply(grad, *ctx.saved_tensors, -1), None, None, None


class _Shared(torch.autograd.Function):
    """k (B, H, S, d) and its first n slots; what comes back to those is added in place to what comes back to the whole.

    Autograd would first lay it out in a tensor of zeros of the whole's size.
    """

    @staticmethod
    def forward(ctx, k, n):
        """Two views."""
        ctx.n = n
        return k.view_as(k), k[:, :, :n]

    @staticmethod
    def backward(ctx, whole, part):
        """The gradient of k."""
        whole[:, :, : ctx.n] += part  # nobody else holds it: an attention has just made it
        return whole, None


def taken(x, positions):
    """x (B, T, D) at `positions` (B, R): (B, R, D)."""
    return x.gather(1, positions[..., None].expand(-1, -1, x.shape[-1]))


class Cache:
    """Keys and values of every layer in static buffers: `keys` and `values` (L, B, K, S, d).

    Who may look at which of the S slots is the caller's mask; the cache knows no lengths, so rewinding is a smaller mask.
    """

    def __init__(self, c, rows, slots, like):
        shape = (c.layers, rows, c.kv_heads, slots, c.head_dim)
        self.keys, self.values = like.new_zeros(shape), like.new_zeros(shape)

    def write(self, layer, slots, k, v):
        """Store k and v (B, K, T, d) of one layer at `slots` (B, T); return that layer's whole buffers (B, K, S, d)."""
        index = slots[:, None, :, None].expand_as(k)
        self.keys[layer].scatter_(2, index, k)
        self.values[layer].scatter_(2, index, v)
        return self.keys[layer], self.values[layer]

    def fork(self, rows, slots, room):
        """A new cache whose row b starts with `slots[b]` (B, S') of old row `rows[b]`, with `room` empty slots behind."""
        new, words = (
            object.__new__(Cache),
            self.keys.dtype if self.keys.shape[-1] % 4 else torch.int64,
        )
        # Where they fill them, copied in words of 8 bytes, for which a GPU takes no longer than for 2.
        new.keys, new.values = (
            F.pad(
                old.view(words)[:, rows[:, None], :, slots].permute(2, 0, 3, 1, 4), (0, 0, 0, room)
            ).view(old.dtype)
            for old in (self.keys, self.values)
        )
        return new

    def keep(self, rows):
        """Drop all rows but these, in place."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]


def attend(q, k, v, mask):
    """What queries (B, H, T, d) read from keys and values (B, H, S, d), in pieces (B, T', H d) that follow one another.

    mask (B, 1, T', S), added, is that of the last T' queries. Those before see all keys up to their own: said as such, the kernel
    skips the half of the square that a mask would have it compute and then hide.
    """
    n = q.shape[2] - mask.shape[2]
    pieces = []
    if n:
        (first, q), (k, early_k), (v, early_v) = (
            q.split([n, mask.shape[2]], 2),
            _Shared.apply(k, n),
            _Shared.apply(v, n),
        )
        pieces = [F.scaled_dot_product_attention(first, early_k, early_v, is_causal=True)]
    return [
        y.transpose(1, 2).flatten(2)
        for y in (*pieces, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
    ]


class _Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.d = c.heads, c.kv_heads, c.head_dim
        self.q_proj = nn.Linear(c.width, c.heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.width, bias=c.out_bias)

    def forward(self, x, norm, cos, sin, mask, store, read):
        """norm(x), x (B, T, D), to (B, T, D); `store` takes this call's k and v and gives those to look at, the cache's included.

        The norm comes along so that the backward pass can apply it again to x, which is kept anyway, instead of keeping what it gives.
        With `read` (B, R) only those positions ask, (B, R, D) comes out.
        """
        B, T, _ = x.shape
        normed, inward = norm(x), (self.q_proj, self.k_proj, self.v_proj)
        *q, k, v = project(normed, *(inward if read is None else inward[1:]), again=(norm, x))
        k = _Rotated.apply(k.view(B, T, self.kv_heads, self.d), cos, sin).transpose(
            1, 2
        )  # (B, K, T, d)
        k, v = store(
            k, v.view(B, T, self.kv_heads, self.d).transpose(1, 2)
        )  # with a cache: (B, K, S, d)
        if read is not None:
            q, cos, sin = (
                [self.q_proj(taken(normed, read))],
                *(taken(part[:, :, 0], read)[:, :, None] for part in (cos, sin)),
            )
        q = _Rotated.apply(q[0].view(B, -1, self.heads, self.d), cos, sin).transpose(
            1, 2
        )  # (B, H, T, d)
        if self.heads != self.kv_heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        pieces = attend(q, k, v, mask)
        return project(joined(*pieces), self.o_proj, again=(joined, *pieces))[0]


def joined(*pieces):
    """Pieces (B, T', D) as one, (B, T, D)."""
    return torch.cat(pieces, 1) if len(pieces) > 1 else pieces[0]


def gated(gate, up):
    """silu(gate) * up."""
    return F.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """silu(gate) * up; of the four wide tensors of an MLP the backward pass keeps three, and computes silu(gate) again."""

    @staticmethod
    def forward(ctx, gate, up):
        """The product."""
        ctx.save_for_backward(gate, up)
        return gated(gate, up)

    @staticmethod
    def backward(ctx, grad):
        """Gradients for gate and up."""
        gate, up = ctx.saved_tensors
        slope = grad * up
        return torch.ops.aten.silu_backward.grad_input(slope, gate, grad_input=slope), F.silu(
            gate
        ).mul_(grad)


class _MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(c.width, c.inner, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(c.inner, c.width, bias=False)

    def forward(self, x, norm):
        gate, up = project(norm(x), self.gate_proj, self.up_proj, again=(norm, x))
        return project(_Gated.apply(gate, up), self.down_proj, again=(gated, gate, up))[0]


class _Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.self_attn, self.mlp = _Attention(c), _MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (
            nn.RMSNorm(c.width, c.eps),
            nn.RMSNorm(c.width, c.eps),
        )

    def forward(self, x, cos, sin, mask, store, read=None):
        y = self.self_attn(x, self.input_layernorm, cos, sin, mask, store, read)
        x = y + (x if read is None else taken(x, read))
        return x + self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """Embeddings in, hidden states out; the token embedding table lives here, the vocabulary head does not.

    With `checkpointing` the backward pass computes every layer a second time instead of keeping its activations: about a third
    more time for a memory that holds one layer's activations and each layer's input.
    """

    def __init__(self, c):
        super().__init__()
        self.c, self.checkpointing, self.frequencies = c, False, None
        self.embed_tokens = nn.Embedding(c.vocab, c.width)
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.layers))
        self.norm = nn.RMSNorm(c.width, c.eps)

    def forward(self, x, positions, mask, cache=None, slots=None, read=None):
        """Hidden states (B, T, D) after the last norm, or at the positions `read` (B, R) alone, (B, R, D): the last layer is then
        computed there only, since nothing else reads it.

        x (B, T, D) embeddings; positions (B, T); mask (B, 1, T', S) bool, True where one of the last T' queries may see key s
        (S = T without a cache); earlier queries see every key up to their own, and `read` names none of them but as padding.
        With a cache the new keys go to `slots` (B, T), of which those before the mask's are 0, 1, ..., and the queries look at the whole
        buffer through the mask.
        """
        if self.frequencies is None or self.frequencies.device != x.device:
            self.frequencies = rope_frequencies(self.c).to(
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
