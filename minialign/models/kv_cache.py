"""A key-value cache that can be forked, so that one prefill serves any number of continuations."""

import torch
from torch import Tensor
from torch.nn import functional as F

from minialign.models.config import TextConfig


class KVCache:
    """The keys and values of every layer, each in one buffer (L, B, K, S, d).

    L counts layers, B rows, K key-value heads, S cache positions, d the width of a head.

    The cache keeps no lengths. The attention mask of the caller says which positions a query may
    see. To rewind to an earlier point is to fork fewer positions, or to pass a smaller mask.
    """

    def __init__(self, keys: Tensor, values: Tensor):
        self.keys = keys
        self.values = values

    @classmethod
    def empty(
        cls, config: TextConfig, num_rows: int, *, num_positions: int, like: Tensor
    ) -> "KVCache":
        """Make a cache of zeros, with the dtype and the device of the tensor `like`."""
        shape = (
            config.num_layers,
            num_rows,
            config.num_kv_heads,
            num_positions,
            config.head_dim,
        )
        return cls(keys=like.new_zeros(shape), values=like.new_zeros(shape))

    @property
    def num_positions(self) -> int:
        """Return S, the number of cache positions of each row."""
        return self.keys.shape[3]

    def update(
        self,
        layer_idx: int,
        cache_positions: Tensor,
        k: Tensor,
        v: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Store new keys and values of one layer, and return all that the layer has.

        k and v (B, K, T, d) go to `cache_positions` (B, T). The result is two buffers (B, K, S, d).
        """
        index = cache_positions[:, None, :, None].expand_as(k)  # (B, K, T, d)
        self.keys[layer_idx].scatter_(2, index, k)
        self.values[layer_idx].scatter_(2, index, v)
        return self.keys[layer_idx], self.values[layer_idx]

    def fork(self, rows: Tensor, cache_positions: Tensor, num_empty: int) -> "KVCache":
        """Return a new cache that begins with chosen rows and positions of this one.

        Row b of the new cache holds `cache_positions[b]` (B, S') of the old row `rows[b]`.
        Behind them come `num_empty` positions of zeros. The old cache stays as it is, so that
        several continuations can fork the same row.
        """
        keys = _fork_buffer(self.keys, rows, cache_positions, num_empty)
        values = _fork_buffer(self.values, rows, cache_positions, num_empty)
        return KVCache(keys, values)

    def add_empty_positions(self, num_empty: int) -> None:
        """Put `num_empty` positions of zeros behind those of every row."""
        self.keys = F.pad(self.keys, (0, 0, 0, num_empty))
        self.values = F.pad(self.values, (0, 0, 0, num_empty))

    def keep_rows(self, rows: Tensor) -> None:
        """Drop all rows but these, given by index, in the order given."""
        self.keys = self.keys[:, rows]
        self.values = self.values[:, rows]


def gather_cache_positions(buffer: Tensor, rows: Tensor, cache_positions: Tensor) -> Tensor:
    """Copy positions (B, S') of rows (B,) of a buffer (L, rows, K, S, d): (L, B, K, S', d)."""
    # The two index tensors broadcast to (B, S'). Because a slice stands between them, indexing
    # puts these two dimensions first.
    row_index = rows[:, None]  # (B, 1)
    gathered = buffer[:, row_index, :, cache_positions]  # (B, S', L, K, d)
    return gathered.permute(2, 0, 3, 1, 4)  # (L, B, K, S', d)


def view_as_words(buffer: Tensor) -> Tensor:
    """View a buffer in words of 8 bytes if they fill its last dimension, else return it as it is.

    Same result as the buffer itself for whoever only copies elements. It saves time on a GPU, which
    takes as long to copy an element of 2 bytes as one of 8.
    """
    if (
        buffer.shape[-1] % 4 == 0
    ):  # four elements fill whole words in every dtype of 2 bytes or more
        return buffer.view(torch.int64)
    return buffer


def _fork_buffer(buffer, rows, cache_positions, num_empty):
    """Copy the chosen positions of one buffer and append empty ones."""
    words = view_as_words(buffer)  # (L, rows, K, S, w)
    copied = gather_cache_positions(words, rows, cache_positions)  # (L, B, K, S', w)
    # The integer zero has the same bits as 0.0.
    padded = F.pad(copied, (0, 0, 0, num_empty))  # (L, B, K, S' + num_empty, w)
    return padded.view(buffer.dtype)  # (L, B, K, S' + num_empty, d)
