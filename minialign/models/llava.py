"""LLaVA: a vision tower, a projector that makes image tokens of its features, and a decoder.

Image tokens stand among the embeddings of text tokens. Shapes: n tiles an image, I features a tile,
Dv the width of the vision tower, D the width of the decoder.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minialign.data.anyres import grid_shape, unpadded_region
from minialign.data.packing import PackedBatch, attention_mask_from_segments
from minialign.models.config import ACTIVATIONS, LlavaConfig
from minialign.models.decoder import Decoder
from minialign.models.kv_cache import KVCache
from minialign.models.vision import VisionTower

# How many tiles the vision tower encodes at a time: on a CPU as many as its caches hold, on a GPU
# as many as keep it busy.
TILES_PER_CALL_CPU = 4
TILES_PER_CALL_GPU = 64


class Projector(nn.Module):
    """Two linear layers from the width of the vision tower to that of the decoder."""

    def __init__(self, config: LlavaConfig):
        super().__init__()
        in_features = config.vision.hidden_size
        out_features = config.text.hidden_size
        self.linear_1 = nn.Linear(in_features, out_features, bias=config.projector_bias)
        self.linear_2 = nn.Linear(out_features, out_features, bias=config.projector_bias)
        self.activation = ACTIVATIONS[config.projector_activation]

    def forward(self, features: Tensor) -> Tensor:
        """Project features (..., Dv) to image tokens (..., D), in the dtype of the features."""
        x = _linear_in_dtype_of(features, self.linear_1)  # (..., D)
        x = self.activation(x)
        return _linear_in_dtype_of(x, self.linear_2)  # (..., D)


def _linear_in_dtype_of(x, layer):
    """Apply a linear layer in the dtype of x. A layer that is trained has weights in fp32."""
    weight = layer.weight.to(x.dtype)
    bias = layer.bias
    if bias is not None:
        bias = bias.to(x.dtype)
    return F.linear(x, weight, bias)


@dataclass(eq=False)
class ImageFeatures:
    """What the vision tower returns for one image. The tower is frozen, so it can be kept."""

    tiles: Tensor  # (n, I, Dv); tile 0 shows the whole image, the others its parts (AnyRes)
    size: tuple[int, int]  # (height, width) of the image in pixels


class Llava(nn.Module):
    """A LLaVA-type model.

    Its parameters have the names that transformers gives them, so that loading a checkpoint only
    renames prefixes.
    """

    def __init__(self, config: LlavaConfig):
        super().__init__()
        self.config = config
        self.num_encoded_tiles = 0  # what the vision tower has done so far
        self.vision_tower = VisionTower(config)
        self.multi_modal_projector = Projector(config)
        self.language_model = Decoder(config.text)
        hidden_size = config.text.hidden_size
        if config.image_grid_pinpoints:
            self.image_newline = nn.Parameter(torch.zeros(hidden_size))
        if not config.text.tie_word_embeddings:
            self.lm_head = nn.Linear(hidden_size, config.text.vocab_size, bias=False)

    @property
    def vocab_head(self) -> Tensor:
        """Return the weight (V, D) of the vocabulary head. It may be the embedding table itself."""
        if self.config.text.tie_word_embeddings:
            return self.language_model.embed_tokens.weight
        return self.lm_head.weight

    @property
    def device(self) -> torch.device:
        """Return the device that the model is on."""
        return self.vocab_head.device

    @torch.no_grad()
    def encode_images(self, images: list[tuple]) -> list[ImageFeatures]:
        """Run the vision tower on images, each given as (tiles (n, 3, S, S), size).

        No gradient is recorded, since the vision tower is frozen.
        """
        # 1. The tiles of all images, N together, on the device and in the dtype of the tower.
        tiles = torch.cat([image_tiles for image_tiles, _ in images])  # (N, 3, S, S)
        tiles = tiles.to(self.device, self.vision_tower.post_layernorm.weight.dtype)

        # 2. A few tiles at a time.
        tiles_per_call = TILES_PER_CALL_GPU
        if tiles.device.type == "cpu":
            tiles_per_call = TILES_PER_CALL_CPU
        features = [self.vision_tower(some_tiles) for some_tiles in tiles.split(tiles_per_call)]
        features = torch.cat(features)  # (N, I, Dv)
        self.num_encoded_tiles += len(tiles)

        # 3. The features of each image.
        tiles_per_image = [len(image_tiles) for image_tiles, _ in images]
        features_of_images = features.split(tiles_per_image)  # each (n, I, Dv)
        encoded = []
        for image_features, (_, size) in zip(features_of_images, images, strict=True):
            encoded.append(ImageFeatures(tiles=image_features, size=size))
        return encoded

    def project_image_features(self, image_features: list[ImageFeatures]) -> list[Tensor]:
        """Return the image tokens (I, D) of each image, as they enter the text."""
        if not image_features:
            return []
        # 1. Project the tiles of all images at once.
        features = torch.cat([image.tiles for image in image_features])  # (N, I, Dv)
        projected = self.multi_modal_projector(features.to(self.vocab_head.dtype))  # (N, I, D)
        tiles_per_image = [len(image.tiles) for image in image_features]
        tiles_of_images = projected.split(tiles_per_image)  # each (n, I, D)

        # 2. Put the tiles of each image one behind the other, or lay them out as AnyRes does.
        image_tokens = []
        for image, tiles in zip(image_features, tiles_of_images, strict=True):
            if self.config.image_grid_pinpoints:
                image_tokens.append(self._lay_out_anyres(tiles, image.size))
            else:
                image_tokens.append(tiles.flatten(0, 1))
        return image_tokens

    def _lay_out_anyres(self, tiles, size):
        """Order the projected tiles (n, I, D) of an AnyRes image as its image tokens (I', D).

        First come the tokens of tile 0, which shows the whole image. The other tiles form one large
        map of features. What only shows the padding of the image is cut off, and a newline token
        ends each row.
        """
        tile_size = self.config.vision.image_size
        rows, columns = grid_shape(size, self.config.image_grid_pinpoints, tile_size)
        side = self.config.vision.patches_per_side
        hidden_size = tiles.shape[-1]  # D

        # 1. Make one map of the grid of tiles. Each tile has side x side features.
        grid = tiles[1:].view(rows, columns, side, side, hidden_size)
        grid = grid.transpose(1, 2)  # (rows, side, columns, side, D)
        feature_map = grid.reshape(rows * side, columns * side, hidden_size)

        # 2. Cut off the padding.
        top, bottom, left, right = unpadded_region(size, rows * side, columns * side)
        feature_map = feature_map[top:bottom, left:right]  # (h, w, D)

        # 3. End each row with a newline token.
        newline = self.image_newline.to(feature_map.dtype)  # (D,)
        newlines = newline.expand(len(feature_map), 1, hidden_size)  # (h, 1, D)
        feature_map = torch.cat([feature_map, newlines], dim=1)  # (h, w + 1, D)
        return torch.cat([tiles[0], feature_map.flatten(0, 1)])


def embed_batch(model: Llava, batch: PackedBatch) -> Tensor:
    """Return the embeddings (B, T, D) of a batch, with the image tokens in their places."""
    embeddings = model.language_model.embed_tokens(batch.ids)  # (B, T, D)
    is_image = batch.is_image[..., None]  # (B, T, 1)
    return embeddings.masked_scatter(is_image, batch.image_tokens.to(embeddings.dtype))


def hidden_states(
    model: Llava,
    batch: PackedBatch,
    kv_cache: KVCache | None = None,
    query_positions: Tensor | None = None,
    num_cached: int = 0,
) -> Tensor:
    """Return the hidden states (B, T, D) of a packed batch.

    Args:
        kv_cache: if given, keys and values are stored in it, position t of a row at cache position
            t.
        query_positions: if given, (B, R), only the states at these positions are returned, (B, R,
            D).
        num_cached: how many positions of every row the cache holds already. Only the positions
            behind them are computed, and `query_positions` counts from there. Zero, or the length
            of the shortest prefix.
    """
    # 1. Where the keys and values go.
    cache_positions = None
    if kv_cache is not None:
        num_rows, num_positions = batch.ids.shape
        cache_positions = torch.arange(num_cached, num_positions, device=batch.ids.device)
        cache_positions = cache_positions.expand(num_rows, -1)  # (B, T - num_cached)

    # 2. The mask begins behind the shortest prefix. Earlier queries are in segment 0 in every row,
    #    and so are all keys up to them. For them the predicate is just k <= q, which attention
    #    computes with is_causal instead of a mask.
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
