"""The Llama-style decoder (Llama, Mistral, Qwen2) and its key-value cache. It returns hidden states; heads live elsewhere."""

import torch
from torch.nn import functional as F


class KVCache:
    """Keys and values of every layer in static buffers: `keys` and `values` (L, B, K, S, d).

    Who may look at which of the S slots is the caller's mask; the cache knows no lengths, so rewinding is a smaller mask.
    """

    def __init__(self, config, rows, slots, like):
        shape = (config.num_layers, rows, config.num_kv_heads, slots, config.head_dim)
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
            object.__new__(KVCache),
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
