"""The whole model: vision tower, projector, decoder and vocabulary head; pictures become vectors among token embeddings."""

import torch
from torch import nn
from torch.nn import functional as F

from minialign.data.anyres import grid_shape, unpadded_region
from minialign.data.packing import PackedBatch, attention_mask_from_segments
from minialign.models.config import ACTIVATIONS
from minialign.models.decoder import Decoder
from minialign.models.kv_cache import KVCache
from minialign.models.vision import VisionTower


class Projector(nn.Module):
    """Two linear layers from the tower's width to the decoder's."""

    def __init__(self, config):
        super().__init__()
        self.linear_1 = nn.Linear(
            config.vision.hidden_size, config.text.hidden_size, bias=config.projector_bias
        )
        self.linear_2 = nn.Linear(
            config.text.hidden_size, config.text.hidden_size, bias=config.projector_bias
        )
        self.activation = ACTIVATIONS[config.projector_activation]

    def forward(self, features):
        """(..., Dv) to (..., D), computed in the features' dtype: where the weights are trained they are fp32 masters."""
        first, second = (
            (
                layer.weight.to(features.dtype),
                None if layer.bias is None else layer.bias.to(features.dtype),
            )
            for layer in (self.linear_1, self.linear_2)
        )
        return F.linear(self.activation(F.linear(features, *first)), *second)


class ImageFeatures:
    """What the frozen tower says of one picture: `tiles` (n, I, Dv), tile 0 the whole picture, and the picture's size (height, width)."""

    def __init__(self, tiles, size):
        self.tiles, self.size = tiles, size


class Llava(nn.Module):
    """A LLaVA-type model. Parameter names are transformers' own, so that a checkpoint is a renaming of prefixes."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.vision_tower, self.multi_modal_projector = VisionTower(config), Projector(config)
        self.language_model = Decoder(config.text)
        if config.image_grid_pinpoints:
            self.image_newline = nn.Parameter(torch.zeros(config.text.hidden_size))
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    @property
    def vocab_head(self):
        """The vocabulary head's weight (V, D): the embedding table itself where the two are tied."""
        return (
            self.language_model.embed_tokens.weight
            if self.config.text.tie_word_embeddings
            else self.lm_head.weight
        )

    @property
    def device(self):
        return self.vocab_head.device

    @torch.no_grad()
    def encode_images(self, prepared):
        """Tower features of several pictures, given as (tiles (n, 3, S, S), size); the tower is frozen, so no gradient.

        A few tiles at a time: on a CPU as many as its caches hold, on a GPU as many as fill it.
        """
        tiles = torch.cat([tiles for tiles, _ in prepared]).to(
            self.device, self.vision_tower.post_layernorm.weight.dtype
        )
        features = torch.cat(
            [
                self.vision_tower(part)
                for part in tiles.split(4 if tiles.device.type == "cpu" else 64)
            ]
        )
        counts = [len(tiles) for tiles, _ in prepared]
        return [
            ImageFeatures(part, size) for part, (_, size) in zip(features.split(counts), prepared)
        ]

    def project_image_features(self, pictures):
        """Picture vectors that enter the text: a list of (I, D), one for each Features. AnyRes maps are laid out here."""
        if not pictures:
            return []
        tiles = torch.cat([picture.tiles for picture in pictures])
        projected = self.multi_modal_projector(tiles.to(self.vocab_head.dtype))
        parts = projected.split([len(picture.tiles) for picture in pictures])
        if not self.config.image_grid_pinpoints:
            return [part.flatten(0, 1) for part in parts]
        return [self._anyres(part, picture.size) for part, picture in zip(parts, pictures)]

    def _anyres(self, tiles, size):
        """(n, I, D) to base vectors, then the un-padded map of the other tiles with a newline vector ending each row."""
        side, D = self.config.vision.patches_per_side, tiles.shape[-1]
        rows, columns = grid_shape(
            size, self.config.image_grid_pinpoints, self.config.vision.image_size
        )
        laid = (
            tiles[1:]
            .view(rows, columns, side, side, D)
            .transpose(1, 2)
            .reshape(rows * side, columns * side, D)
        )
        top, bottom, left, right = unpadded_region(size, rows * side, columns * side)
        laid = laid[top:bottom, left:right]
        newline = self.image_newline.to(laid.dtype).expand(len(laid), 1, D)
        return torch.cat([tiles[0], torch.cat([laid, newline], 1).flatten(0, 1)])


def embed_batch(model: Llava, batch: PackedBatch) -> torch.Tensor:
    """Return the embeddings (B, T, D) of a batch: token embeddings, with image tokens in their places."""
    embeddings = model.language_model.embed_tokens(batch.ids)  # (B, T, D)
    is_image = batch.is_image[..., None]  # (B, T, 1)
    return embeddings.masked_scatter(is_image, batch.image_tokens.to(embeddings.dtype))


def hidden_states(
    model: Llava,
    batch: PackedBatch,
    kv_cache: KVCache | None = None,
    query_positions: torch.Tensor | None = None,
    num_cached: int = 0,
) -> torch.Tensor:
    """Return the hidden states (B, T, D) of a packed batch.

    Args:
        kv_cache: if given, keys and values are stored in it, position t of a row at cache position t.
        query_positions: if given, (B, R), only the states at these positions are returned, (B, R, D).
        num_cached: how many positions of every row the cache holds already. Only the positions behind them are
            computed, and `query_positions` counts from there. Zero, or the length of the shortest prefix.
    """
    # 1. Where the keys and values go.
    cache_positions = None
    if kv_cache is not None:
        num_rows, num_positions = batch.ids.shape
        cache_positions = torch.arange(num_cached, num_positions, device=batch.ids.device)
        cache_positions = cache_positions.expand(num_rows, -1)  # (B, T - num_cached)

    # 2. Positions that are prefix in every row need no mask: each sees all that come before it.
    mask = attention_mask_from_segments(batch.segments, min(batch.prefix_lengths))

    # 3. Run the decoder on what is not cached.
    return model.language_model(
        embed_batch(model, batch)[:, num_cached:],
        batch.positions[:, num_cached:],
        mask,
        kv_cache=kv_cache,
        cache_positions=cache_positions,
        query_positions=query_positions,
    )
