"""Load sentence encoders from a directory, such as all-MiniLM-L6-v2 and all-mpnet-base-v2."""

import re
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from minialign.data.wordpiece import WordPiece
from minialign.models.checkpoint import fingerprint
from minialign.models.checkpoint_checks import check_model_folder, check_sizes
from minialign.models.config import ACTIVATIONS
from minialign.models.config_section import LARGEST_SIZE
from minialign.models.safetensors_files import read_headers, read_tensors, tensor_files
from minialign.pairs.encoder_network import MPNET_BUCKETS, PADDING_ID, EncoderNetwork
from minialign.utils.files import check, read_json

# Our module names, and what the checkpoints call them: those outside the layers, those that are the
# same in the layers of both families, and those of each family. The fingerprint of an encoder
# includes our names, so a changed name would make another encoder of it.
OUTER = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "types": "embeddings.token_type_embeddings",
    "norm": "embeddings.LayerNorm",
    "distances": "encoder.relative_attention_bias",
}
INNER = {
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}
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
    | {
        "q": "attention.attn.q",
        "k": "attention.attn.k",
        "v": "attention.attn.v",
        "o": "attention.attn.o",
        "attention_norm": "attention.LayerNorm",
    },
}
# Tensors that are not read: the heads of pre-training, and a buffer of old files.
UNREAD = re.compile(r"(pooler|cls|lm_head)\.|.*position_ids$")
SHAPE = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
)
MODULES = (".Transformer", ".Pooling", ".Normalize")


# --- reading the settings ---


def _check_field(is_supported, path, key, value, remedy):
    """Raise InputError about one field of a JSON file unless its value is supported."""
    check(is_supported, f"{path}: {key} {value!r:.100} is not supported; {remedy}")


def _read_optional(path, kind=dict):
    """Return the value in a JSON file, or an empty one if there is no such file."""
    if path.exists():
        return read_json(path, kind)
    return kind()


def _read_config(directory) -> dict:
    """Return the config.json of a sentence encoder. Raises InputError for what is not supported."""
    path = directory / "config.json"
    config = read_json(path, dict)

    # 1. Check the family and its sizes.
    family = config.get("model_type")
    # A list, since a value in a broken file may be something that a dict cannot look up.
    families = list(FAMILIES)
    _check_field(
        family in families, path, "model_type", family, f"supported: {', '.join(families)}"
    )
    size_keys = list(SHAPE)
    if family == "bert":
        size_keys.append("type_vocab_size")
    for key in size_keys:
        size = config.get(key)
        is_size = type(size) is int and 0 < size <= LARGEST_SIZE
        remedy = f"it must be a whole number from 1 to {LARGEST_SIZE}"
        _check_field(is_size, path, key, size, remedy)
    num_heads = config["num_attention_heads"]
    _check_field(
        config["hidden_size"] % num_heads == 0,
        path,
        "num_attention_heads",
        num_heads,
        "it must divide hidden_size",
    )

    # 2. Check what the layers compute.
    norm_eps = config.get("layer_norm_eps", 1e-12)
    is_number = type(norm_eps) in (int, float) and 0 < norm_eps <= 1
    _check_field(is_number, path, "layer_norm_eps", norm_eps, "it must be a number from 0 to 1")
    activation = config.get("hidden_act")
    activations = list(ACTIVATIONS)
    _check_field(
        activation in activations,
        path,
        "hidden_act",
        activation,
        f"supported: {', '.join(activations)}",
    )
    fixed_values = {
        "position_embedding_type": "absolute",
        "relative_attention_num_buckets": MPNET_BUCKETS,
    }
    for key, fixed_value in fixed_values.items():
        value = config.get(key, fixed_value)
        _check_field(value == fixed_value, path, key, value, f"supported: {fixed_value}")
    return config


def _check_pooling(directory):
    """Raise InputError unless the files of sentence-transformers ask for the mean over tokens.

    They may also be absent.
    """
    path = directory / "modules.json"
    for module in _read_optional(path, list):
        is_supported = isinstance(module, dict) and str(module.get("type")).endswith(MODULES)
        remedy = "supported: Transformer, Pooling, Normalize"
        _check_field(is_supported, path, "module", module, remedy)

    path = directory / "1_Pooling/config.json"
    for key, value in _read_optional(path).items():
        is_other_field = not key.startswith("pooling_mode")
        is_mean = (key, value) in (("pooling_mode_mean_tokens", True), ("pooling_mode", "mean"))
        is_supported = is_other_field or is_mean or not value
        _check_field(is_supported, path, key, value, "supported: the mean over tokens")


def _read_max_length(directory, config) -> int:
    """Return how many tokens of a text the encoder reads, special tokens included.

    As in sentence-transformers this is max_seq_length of sentence_bert_config.json, or else
    model_max_length of tokenizer_config.json, as far as there are position embeddings.
    """
    path = directory / "sentence_bert_config.json"
    settings = _read_optional(path)
    _check_field(
        not settings.get("do_lower_case"),
        path,
        "do_lower_case",
        True,
        "set it in tokenizer_config.json",
    )
    num_positions = config["max_position_embeddings"]
    if config["model_type"] == "mpnet":
        num_positions -= PADDING_ID + 1  # its positions begin after the one of padding
    tokenizer_config = _read_optional(directory / "tokenizer_config.json")
    max_length = (
        settings.get("max_seq_length") or tokenizer_config.get("model_max_length") or num_positions
    )
    _check_field(
        isinstance(max_length, (int, float)) and max_length > 2,
        path,
        "max_seq_length",
        max_length,
        "it must be a number above 2",
    )
    return int(min(num_positions, max_length))


# --- reading the weights ---


def _to_checkpoint_name(name, family):
    """Return what a checkpoint of the family calls one of our parameters."""
    *layer_path, module, weight_or_bias = name.split(".")
    if not layer_path:
        return f"{OUTER[module]}.{weight_or_bias}"
    _, layer_idx = layer_path
    return f"encoder.layer.{layer_idx}.{FAMILIES[family][module]}.{weight_or_bias}"


def _load_network(directory, config, device):
    """Load the network with its weights in fp32.

    Raises InputError that names the first tensor that is missing, unused or of another shape.
    """
    # 1. Compare the sizes of config.json with the weights, before a network of these sizes is made.
    files = tensor_files(directory)
    layers = {"num_hidden_layers": config["num_hidden_layers"]}
    sizes = {}
    for key in SHAPE:
        if key not in layers:
            sizes[key] = config[key]
    config_file = directory / "config.json"
    check_sizes(config_file, read_headers(files), sizes=sizes, layers=layers)
    with torch.device("meta"):
        network = EncoderNetwork(config)

    # 2. Files with the heads of pre-training have the family's name before each name.
    family = config["model_type"]
    has_prefix = any(name.startswith(f"{family}.") for name in files)
    prefix = f"{family}." if has_prefix else ""
    for name in list(files):
        if UNREAD.match(name.removeprefix(prefix)):
            del files[name]

    # 3. Pair each parameter with its tensor. Old files call the weights of a norm gamma and beta.
    has_old_norms = any(name.endswith("LayerNorm.gamma") for name in files)
    wanted = {}
    for our_name, parameter in network.named_parameters():
        name = prefix + _to_checkpoint_name(our_name, family)
        if has_old_norms:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
            name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        wanted[name] = (our_name, parameter.shape)

    # 4. Read the tensors.
    state_dict = read_tensors(directory, files, wanted, device=device, dtype=torch.float32)
    network.load_state_dict(state_dict, strict=True, assign=True)
    network.requires_grad_(False)
    return network.train(False)


# --- sentence encoders ---


class Similarity:
    """The base class of sentence encoders. `embed` returns unit vectors (B, D) of B texts."""

    def cosine(self, first, second) -> float:
        """Return the cosine of the embeddings of two texts, from -1 to 1."""
        first_embedding, second_embedding = self.embed([first, second])
        return float(first_embedding @ second_embedding)


class SentenceEncoder(Similarity):
    """A sentence encoder from a directory as sentence-transformers or transformers writes it.

    It needs config.json, model.safetensors and tokenizer.json, and computes in fp32.

    name: what pair files record about the encoder.
    max_length: the number of tokens that it reads of a text.
    """

    def __init__(self, directory, device="cpu"):
        """Load the encoder. Raises InputError for what is missing, broken or not supported."""
        directory = Path(directory)
        check_model_folder(directory, "a sentence encoder")
        config = _read_config(directory)
        _check_pooling(directory)
        self.max_length = _read_max_length(directory, config)
        self.tokenizer = WordPiece.load(directory)
        vocab_size = config["vocab_size"]
        check(
            self.tokenizer.size <= vocab_size,
            f"{directory}: the tokenizer has ids up to {self.tokenizer.size - 1}, "
            f"config.json a vocab_size of {vocab_size}",
        )
        self.network = _load_network(directory, config, device)
        self.device = device
        weights = fingerprint(self.network)
        details = f"{config['model_type']}, {self.max_length} tokens, {weights}"
        self.name = f"{directory.resolve().name} ({details})"

    @torch.no_grad()
    def embed(self, texts):
        """Return unit vectors (B, D) of B texts: the mean state over all tokens of each text."""
        # 1. Make one batch of the texts. The network never attends to padding.
        rows = [torch.tensor(self.tokenizer.encode(text, self.max_length)) for text in texts]
        ids = pad_sequence(rows, batch_first=True, padding_value=PADDING_ID)  # (B, T)
        lengths = torch.tensor([len(row) for row in rows])
        is_token = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, T)
        ids = ids.to(self.device)
        is_token = is_token.to(self.device)

        # 2. Average the states of the tokens, without those of padding.
        states = self.network(ids, is_token) * is_token[..., None]  # (B, T, D)
        means = states.sum(1) / is_token.sum(1, keepdim=True)
        return F.normalize(means, dim=-1)
