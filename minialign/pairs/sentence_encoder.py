"""Sentence encoders from a directory: BERT (all-MiniLM-L6-v2) and MPNet (all-mpnet-base-v2), mean over tokens, length 1."""

import math
import re
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from minialign.data.wordpiece import WordPiece
from minialign.models.checkpoint import fingerprint, read_tensors, tensor_files
from minialign.models.config import ACTIVATIONS
from minialign.utils.files import check, read_json

# Our module names, and what the two families call them.
OUTER = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "distances": "encoder.relative_attention_bias",
}
INNER = {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
FAMILIES = {
    "bert": INNER
    | {
        "q": "attention.self.query",
        "k": "attention.self.key",
        "v": "attention.self.value",
        "o": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
    },
    "mpnet": INNER
    | {name: f"attention.attn.{name}" for name in "qkvo"}
    | {"attention_norm": "attention.LayerNorm"},
}
UNREAD = re.compile(
    r"(pooler|cls|lm_head)\.|.*position_ids$"
)  # heads of pre-training, and buffers of old files
SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
MPNET_BUCKETS, MPNET_MAX_DISTANCE, PADDING_ID = (
    32,
    128,
    1,
)  # MPNet's constants, whatever its config.json says


def _read_settings(directory):
    """(config.json, longest text in tokens) of a sentence encoder. Raises BadInput for what is not supported."""

    def _beside(name, kind=dict):
        return (
            read_json(directory / name, kind)
            if name == "config.json" or (directory / name).exists()
            else kind()
        )

    def check_field(fits, name, key, value, remedy):
        check(fits, f"{directory / name}: {key} {value!r} is not supported; {remedy}")

    config, sentence = _beside("config.json"), _beside("sentence_bert_config.json")
    get, family = config.get, config.get("model_type")
    check_field(
        family in [*FAMILIES],
        "config.json",
        "model_type",
        family,
        f"supported: {', '.join(FAMILIES)}",
    )
    for key in SHAPE + ("type_vocab_size",) * (family == "bert"):
        check_field(
            type(get(key)) is int and get(key) > 0,
            "config.json",
            key,
            get(key),
            "it must be a positive whole number",
        )
    check_field(
        get("hidden_size") % get("num_attention_heads") == 0,
        "config.json",
        "num_attention_heads",
        get("num_attention_heads"),
        "it must divide hidden_size",
    )
    check_field(
        get("hidden_act") in [*ACTIVATIONS],
        "config.json",
        "hidden_act",
        get("hidden_act"),
        f"supported: {', '.join(ACTIVATIONS)}",
    )
    for key, only in (
        ("position_embedding_type", "absolute"),
        ("relative_attention_num_buckets", MPNET_BUCKETS),
    ):
        check_field(get(key, only) == only, "config.json", key, get(key), f"supported: {only}")
    # What sentence-transformers does with the states, where its files say so, must be to average them.
    for step in _beside("modules.json", list):
        fits = isinstance(step, dict) and str(step.get("type")).endswith(
            (".Transformer", ".Pooling", ".Normalize")
        )
        check_field(
            fits, "modules.json", "module", step, "supported: Transformer, Pooling, Normalize"
        )
    for key, value in _beside("1_Pooling/config.json").items():
        fits = (
            not key.startswith("pooling_mode")
            or not value
            or (key, value) in (("pooling_mode_mean_tokens", True), ("pooling_mode", "mean"))
        )
        check_field(fits, "1_Pooling/config.json", key, value, "supported: the mean over tokens")
    check_field(
        not sentence.get("do_lower_case"),
        "sentence_bert_config.json",
        "do_lower_case",
        True,
        "set it in tokenizer_config.json",
    )
    room = get("max_position_embeddings") - (PADDING_ID + 1) * (family == "mpnet")
    longest = (
        sentence.get("max_seq_length")
        or _beside("tokenizer_config.json").get("model_max_length")
        or room
    )
    check_field(
        isinstance(longest, (int, float)) and longest > 2,
        "sentence_bert_config.json",
        "max_seq_length",
        longest,
        "it must be a number above 2",
    )
    return config, int(min(room, longest))


class EncoderLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, eps, self.heads = (
            c["hidden_size"],
            c.get("layer_norm_eps", 1e-12),
            c["num_attention_heads"],
        )
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = (
            nn.Linear(D, c["intermediate_size"]),
            nn.Linear(c["intermediate_size"], D),
        )
        self.attention_norm, self.norm = nn.LayerNorm(D, eps), nn.LayerNorm(D, eps)
        self.activation = ACTIVATIONS[c["hidden_act"]]

    def forward(self, x, bias):
        """(B, T, D) to (B, T, D); `bias` is added to the attention's scores: padding, and MPNet's relative positions."""
        B, T, D = x.shape
        q, k, v = (
            project(x).view(B, T, self.heads, -1).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )  # (B, H, T, d)
        attended = (
            F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(B, T, D)
        )
        x = self.attention_norm(x + self.o(attended))
        return self.norm(x + self.down(self.activation(self.up(x))))


class EncoderNetwork(nn.Module):
    """BERT's encoder, or MPNet's, where `distances` biases attention by how far apart two tokens are, the same in every layer."""

    def __init__(self, c):
        super().__init__()
        D, self.mpnet = c["hidden_size"], c["model_type"] == "mpnet"
        self.words, self.positions = (
            nn.Embedding(c["vocab_size"], D),
            nn.Embedding(c["max_position_embeddings"], D),
        )
        if self.mpnet:
            self.distances = nn.Embedding(MPNET_BUCKETS, c["num_attention_heads"])
        else:
            self.types = nn.Embedding(c["type_vocab_size"], D)
        self.norm = nn.LayerNorm(D, c.get("layer_norm_eps", 1e-12))
        self.layers = nn.ModuleList(EncoderLayer(c) for _ in range(c["num_hidden_layers"]))

    def forward(self, ids, real):
        """Ids (B, T), and which of them are no padding, to states (B, T, D)."""
        bias = torch.zeros(real.shape, device=ids.device).masked_fill(~real, -math.inf)[
            :, None, None
        ]  # (B, 1, 1, T)
        if self.mpnet:
            kept = (ids != PADDING_ID).long()  # a "<pad>" in the text is counted out too
            x = self.words(ids) + self.positions(kept.cumsum(1) * kept + PADDING_ID)
            bias = bias + self.distances(
                relative_position_buckets(ids.shape[1]).to(ids.device)
            ).permute(2, 0, 1)  # (B, H, T, T)
        else:
            x = self.words(ids) + self.types.weight[0] + self.positions.weight[: ids.shape[1]]
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, bias)
        return x


def relative_position_buckets(T):
    """(T query, T key) MPNet's bucket of each distance: 8 exact and 8 logarithmic ones for each direction (T5, arXiv 1910.10683)."""
    distance = torch.arange(T) - torch.arange(T)[:, None]
    half, exact, far = MPNET_BUCKETS // 2, MPNET_BUCKETS // 4, distance.abs()
    rough = (
        exact
        + (
            torch.log(far.float() / exact) / math.log(MPNET_MAX_DISTANCE / exact) * (half - exact)
        ).long()
    )
    return half * (distance > 0) + torch.where(far < exact, far, rough.clamp(max=half - 1))


def _outward(name, family):
    """The checkpoint's name of our parameter."""
    *layer, module, kind = name.split(".")
    return (
        f"encoder.layer.{layer[1]}.{FAMILIES[family][module]}.{kind}"
        if layer
        else f"{OUTER[module]}.{kind}"
    )


def _load_network(directory, config, device):
    """The network with its weights in fp32. Raises BadInput naming the first missing, unused or mis-shaped tensor."""
    family = config["model_type"]
    with torch.device("meta"):
        network = EncoderNetwork(config)
    files = tensor_files(directory)
    prefix = f"{family}." if any(name.startswith(f"{family}.") for name in files) else ""
    for name in list(files):
        if UNREAD.match(name.removeprefix(prefix)):
            del files[name]
    wanted = {
        prefix + _outward(name, family): (name, parameter.shape)
        for name, parameter in network.named_parameters()
    }
    if any(name.endswith("LayerNorm.gamma") for name in files):  # as bert-base has it
        wanted = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): ours
            for name, ours in wanted.items()
        }
    state = read_tensors(
        directory,
        files,
        wanted,
        device=device,
        dtype=torch.float32,
    )
    network.load_state_dict(state, strict=True, assign=True)
    return network.requires_grad_(False).train(False)


class Similarity:
    """What every sentence encoder does with its `embed`."""

    def cosine(self, a, b):
        """Cosine of two texts, from -1 to 1."""
        a, b = self.embed([a, b])
        return float(a @ b)


class SentenceEncoder(Similarity):
    """A sentence encoder from a directory of sentence-transformers' or plain transformers' kind (config.json, model.safetensors,
    tokenizer.json), in fp32. Like sentence-transformers it reads no more of a text than max_seq_length tokens
    (sentence_bert_config.json), else model_max_length (tokenizer_config.json). Raises BadInput.
    """

    def __init__(self, directory, device="cpu"):
        directory = Path(directory)
        config, self.limit = _read_settings(directory)
        self.tokenizer = WordPiece.load(directory)
        size = config["vocab_size"]
        check(
            self.tokenizer.size <= size,
            f"{directory}: the tokenizer has ids up to {self.tokenizer.size - 1}, config.json a vocab_size of {size}",
        )
        self.network, self.device = _load_network(directory, config, device), device
        self.name = f"{directory.resolve().name} ({config['model_type']}, {self.limit} tokens, {fingerprint(self.network)})"

    @torch.no_grad()
    def embed(self, texts):
        """(B, D) fp32 unit vectors of B texts, read as one batch: the mean state over a text's tokens, special ones included."""
        rows = [torch.tensor(self.tokenizer.encode(text, self.limit)) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=PADDING_ID).to(
            self.device
        )  # BERT never looks at padding, whatever its id
        real = (
            pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
            .bool()
            .to(self.device)
        )  # (B, T)
        return F.normalize(
            (self.network(ids, real) * real[..., None]).sum(1) / real.sum(1, keepdim=True), dim=-1
        )
