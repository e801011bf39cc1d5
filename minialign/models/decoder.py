"""The Llama-style decoder (Llama, Mistral, Qwen2): embeddings in, hidden states out.

Each fast form that it calls (`lora_linears`, `apply_rope`, `SwiGLU`, `attention`) has a plain form
that computes the same, here or in fused_ops.py. The vocabulary head is not here. It is applied only
where logits are needed.

Shapes: B rows, T positions, S keys (T without a cache), R queries (T unless `query_positions` says
otherwise), D the width, H heads, K key-value heads, d the width of a head.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minialign.models.config import TextConfig
from minialign.models.fused_ops import SharedPrefix, SwiGLU, apply_rope, concat_pieces, swiglu
from minialign.models.kv_cache import KVCache
from minialign.models.lora import lora_linears
from minialign.models.split import enter_cut, leave_cut


def rope_frequencies(config: TextConfig) -> Tensor:
    """Return the angle per position of each pair of channels, (d/2,) in fp32.

    Llama 3 stretches the slow rotations by `factor`, so that a longer context fits into one turn.
    """
    # 1. Plain RoPE: frequencies fall from 1 to almost 1 / theta.
    channels = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    frequencies = 1.0 / config.rope_theta ** (channels / config.head_dim)
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies

    # 2. How many turns each pair makes over the context that the model was first trained on.
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)

    # 3. Fast pairs (blend 1) stay as they are, slow ones (blend 0) are divided by the factor.
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (blend + (1 - blend) / scaling["factor"])


def gather_positions(x: Tensor, positions: Tensor) -> Tensor:
    """Pick positions (B, R) out of x (B, T, D), which gives (B, R, D)."""
    index = positions[..., None].expand(-1, -1, x.shape[-1])  # (B, R, D)
    return x.gather(1, index)


def repeat_kv(x: Tensor, num_repeats: int) -> Tensor:
    """Repeat each key-value head for its query heads: (B, K, S, d) to (B, H, S, d)."""
    if num_repeats == 1:
        return x
    return x.repeat_interleave(num_repeats, dim=1)


def attention_plain(q, k, v, mask):
    """Attend in the textbook's way: softmax(q k^T / sqrt(d) + mask) v, heads side by side.

    q (B, H, T, d), k and v (B, H, S, d), mask (B, 1, T, S) of 0 and -inf. Returns (B, T, H d).
    """
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (B, H, T, S)
    weights = torch.softmax(scores + mask, dim=-1)  # (B, H, T, S)
    return merge_heads(weights @ v)


def merge_heads(y):
    """Put the heads of y (B, H, T, d) side by side: (B, T, H d)."""
    return y.transpose(1, 2).flatten(2)


def attention(q, k, v, mask):
    """Attend from queries (B, H, R, d) to keys and values (B, H, S, d), with a fused kernel.

    Same result as `attention_plain` with the mask of all queries, as a list of one or two pieces
    (B, _, H d) that follow one another. The mask (B, 1, R', S) is that of the last R' queries. Each
    earlier query sees the keys up to its own, as `is_causal` says, and the kernel skips the others.
    With a mask it would compute all scores and then hide half of them.
    """
    # 1. One piece, if the mask covers all queries.
    num_mask_rows = mask.shape[2]
    num_causal = q.shape[2] - num_mask_rows
    if num_causal == 0:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, d)
        return [merge_heads(y)]

    # 2. Else two pieces: causal attention inside the prefix, then the queries with a mask.
    causal_q, masked_q = q.split([num_causal, num_mask_rows], dim=2)
    k, prefix_k = SharedPrefix.apply(k, num_causal)
    v, prefix_v = SharedPrefix.apply(v, num_causal)
    causal_y = F.scaled_dot_product_attention(causal_q, prefix_k, prefix_v, is_causal=True)
    masked_y = F.scaled_dot_product_attention(masked_q, k, v, attn_mask=mask)
    return [merge_heads(causal_y), merge_heads(masked_y)]


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions; query heads may share key-value heads."""

    def __init__(self, config: TextConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim

        q_width = config.num_heads * config.head_dim
        kv_width = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.out_bias)

    def forward(
        self,
        x,
        norm,
        rope,
        mask,
        *,
        kv_cache=None,
        cache_positions=None,
        query_positions=None,
    ):
        """Apply self-attention to norm(x), x (B, T, D).

        `norm` is the layer's norm, a module. It is applied in here, so that the backward pass can
        compute norm(x) from x again instead of storing it. `rope` is (cos, sin), each (B, T, d/2).
        The other arguments are those of `Decoder.forward`. With `query_positions` (B, R) only those
        positions are queries, and (B, R, D) comes out.
        """
        B, T, _ = x.shape

        # 1. Project to queries (B, R, H d), keys and values (B, T, K d), and split into heads.
        q, k, v = self.project_qkv(x, norm, query_positions)
        q = q.view(B, -1, self.num_heads, self.head_dim)  # (B, R, H, d)
        k = k.view(B, T, self.num_kv_heads, self.head_dim)  # (B, T, K, d)
        v = v.view(B, T, self.num_kv_heads, self.head_dim)  # (B, T, K, d)

        # 2. Rotate keys and queries by their positions.
        cos, sin = rope  # each (B, T, d/2)
        k = apply_rope(k, cos, sin)
        if query_positions is not None:
            cos = gather_positions(cos, query_positions)  # (B, R, d/2)
            sin = gather_positions(sin, query_positions)  # (B, R, d/2)
        q = apply_rope(q, cos, sin)

        # 3. Heads to the front.
        q = q.transpose(1, 2)  # (B, H, R, d)
        k = k.transpose(1, 2)  # (B, K, T, d)
        v = v.transpose(1, 2)  # (B, K, T, d)

        # 4. Store the new keys and values in the cache, and go on with all that it holds.
        if kv_cache is not None:
            k, v = kv_cache.update(self.layer_idx, cache_positions, k, v)  # (B, K, S, d)
        k = repeat_kv(k, self.num_heads // self.num_kv_heads)  # (B, H, S, d)
        v = repeat_kv(v, self.num_heads // self.num_kv_heads)  # (B, H, S, d)

        # 5. Attend.
        pieces = attention(q, k, v, mask)
        y = concat_pieces(*pieces)  # (B, R, H d)

        # 6. Project back to the width of the model. The attention kernel stores its pieces anyway,
        # so that the backward pass can concatenate them again instead of storing y.
        (out,) = lora_linears(y, [self.o_proj], recompute_from=(concat_pieces, *pieces))
        return leave_cut(out)  # (B, R, D)

    def project_qkv(self, x, norm, query_positions):
        """Project norm(x) to queries, keys and values."""
        # If several processes hold the model, each has some of the heads, and some of the channels
        # of the MLP (split.py). `enter_cut` and `leave_cut` mark where its share of a block begins
        # and ends. In one process they return what they are given.
        normed = enter_cut(norm(x))  # (B, T, D)
        if query_positions is None:
            layers = [self.q_proj, self.k_proj, self.v_proj]
            return lora_linears(normed, layers, recompute_from=(norm, x))

        # Every position has a key and a value, but only some are queries.
        k, v = lora_linears(normed, [self.k_proj, self.v_proj], recompute_from=(norm, x))
        (q,) = lora_linears(gather_positions(normed, query_positions), [self.q_proj])
        return q, k, v


class MLP(nn.Module):
    """The gated feed-forward block of Llama: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, norm):
        """Apply the block to norm(x), x (B, T, D). `norm` is a module, as in `Attention`.

        F is the inner width of the block.
        """
        normed = enter_cut(norm(x))
        gate, up = lora_linears(normed, [self.gate_proj, self.up_proj], recompute_from=(norm, x))
        hidden = SwiGLU.apply(gate, up)  # silu(gate) * up, (B, T, F)
        (out,) = lora_linears(hidden, [self.down_proj], recompute_from=(swiglu, gate, up))
        return leave_cut(out)  # (B, T, D)


class DecoderLayer(nn.Module):
    """One pre-norm transformer layer: attention, then the MLP, each added to its input."""

    def __init__(self, config: TextConfig, layer_idx: int):
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x,
        rope,
        mask,
        *,
        kv_cache=None,
        cache_positions=None,
        query_positions=None,
    ):
        """Apply the layer to x (B, T, D), at all positions or at `query_positions` (B, R) only."""
        attended = self.self_attn(
            x,
            self.input_layernorm,
            rope,
            mask,
            kv_cache=kv_cache,
            cache_positions=cache_positions,
            query_positions=query_positions,
        )
        if query_positions is not None:
            x = gather_positions(x, query_positions)  # (B, R, D)
        x = attended + x
        return x + self.mlp(x, self.post_attention_layernorm)


class Decoder(nn.Module):
    """A stack of decoder layers with the token embeddings below and a norm on top.

    With `checkpointing` the backward pass computes every layer a second time instead of storing its
    activations. That costs about a third more time. Memory then holds the activations of one layer
    and the input of each.
    """

    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.frequencies = None
        # Zeros in the place of random numbers. On the "meta" device, where checkpoints are loaded,
        # torch would import its compiler to draw them, which takes seconds.
        embeddings = torch.zeros(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embeddings, freeze=False)
        self.layers = nn.ModuleList()
        for layer_idx in range(config.num_layers):
            self.layers.append(DecoderLayer(config, layer_idx))
        self.norm = nn.RMSNorm(config.hidden_size, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        mask: Tensor,
        kv_cache: KVCache | None = None,
        cache_positions: Tensor | None = None,
        query_positions: Tensor | None = None,
    ) -> Tensor:
        """Return hidden states (B, T, D) after the last norm.

        Args:
            x: (B, T, D), embeddings.
            positions: (B, T), the position of each embedding, for RoPE.
            mask: (B, 1, T', S) bool, True where one of the last T' queries may see key s. Earlier
                queries see every key up to their own. Without a cache S is T.
            kv_cache: where to store the keys and values. The queries then see all of its positions
                that the mask allows.
            cache_positions: (B, T), where in the cache each key goes. Those before the last T' go
                to 0, 1, 2, and so on, where the causal queries look for them.
            query_positions: (B, R), the positions among T whose hidden states are needed. Only
                these are returned, (B, R, D). All that are read lie among the last T'. An earlier
                one is a filler of `left_align`: its state is wrong, and it is dropped.
        """
        # 1. Cosines and sines for RoPE.
        rope = self.rope_at(positions, x.dtype)

        # 2. The mask as numbers to add to the scores, made once for all layers.
        additive_mask = torch.zeros(mask.shape, dtype=x.dtype, device=x.device)
        additive_mask = additive_mask.masked_fill(~mask, -math.inf)  # (B, 1, T', S)

        # 3. All layers but the last, at all positions, since the next layer attends to all of them.
        num_causal = x.shape[1] - mask.shape[2]  # earlier queries, which need no mask
        cache_arguments = dict(kv_cache=kv_cache, cache_positions=cache_positions)
        for layer in self.layers[:-1]:
            x = self.run_layer(layer, x, rope, additive_mask, **cache_arguments)

        # 4. The last layer, at the query positions only, since no layer attends to its output.
        if query_positions is not None:
            rows_of_mask = (query_positions - num_causal).clamp(min=0)  # (B, R)
            additive_mask = gather_positions(additive_mask[:, 0], rows_of_mask)[:, None]
        x = self.run_layer(
            self.layers[-1],
            x,
            rope,
            additive_mask,
            **cache_arguments,
            query_positions=query_positions,
        )

        # 5. The last norm.
        return self.norm(x)

    def run_layer(self, layer, *inputs, **options):
        """Run one layer. With `checkpointing`, let the backward pass run it a second time."""
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, **options, use_reentrant=False)
        return layer(*inputs, **options)

    def rope_at(self, positions, dtype):
        """Return cosines and sines of the RoPE angles at positions (B, T), each (B, T, d/2)."""
        # The frequencies are computed once per device: a CUDA graph must not copy from the CPU.
        if self.frequencies is None or self.frequencies.device != positions.device:
            self.frequencies = rope_frequencies(self.config).to(positions.device)
        angles = positions[..., None].float() * self.frequencies  # (B, T, d/2), fp32
        return angles.cos().to(dtype), angles.sin().to(dtype)
