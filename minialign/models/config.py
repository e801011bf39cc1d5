"""What a checkpoint's config.json says about its shape: LLaVA-type models, their decoder and their vision tower."""

from dataclasses import dataclass, fields
from pathlib import Path

from torch.nn import functional as F

from minialign.utils.files import InputError, check, friendly_errors, read_json

# What a sparse text_config or vision_config leaves out takes its family's defaults, as in transformers.
TEXT_COMMON = dict(
    hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, rms_norm_eps=1e-6
)
TEXT_DEFAULTS = {
    "llama": TEXT_COMMON
    | dict(
        intermediate_size=11008,
        vocab_size=32000,
        max_position_embeddings=2048,
        attention_bias=False,
    ),
    "mistral": TEXT_COMMON
    | dict(
        intermediate_size=14336,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=131072,
        attention_bias=False,
        sliding_window=4096,
    ),
    "qwen2": TEXT_COMMON
    | dict(
        intermediate_size=22016,
        num_key_value_heads=32,
        vocab_size=151936,
        max_position_embeddings=32768,
        attention_bias=True,
    ),
}
VISION_COMMON = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    image_size=224,
)
VISION_DEFAULTS = {
    "clip_vision_model": VISION_COMMON
    | dict(patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu"),
    "siglip_vision_model": VISION_COMMON
    | dict(patch_size=16, layer_norm_eps=1e-6, hidden_act="gelu_pytorch_tanh"),
}
DEFAULT_GRID_PINPOINTS = [
    [336, 672],
    [672, 336],
    [672, 672],
    [1008, 336],
    [336, 1008],
]  # LLaVA-1.6, (height, width)
LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
# The pointwise functions by the names that checkpoints call them.
ACTIVATIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    **dict.fromkeys(("gelu_new", "gelu_pytorch_tanh"), lambda x: F.gelu(x, approximate="tanh")),
    "quick_gelu": lambda x: (1.702 * x).sigmoid_() * x,
}


@dataclass(frozen=True)
class VisionConfig:
    """Shape of a CLIP or SigLIP vision tower; `layers` counts all of the checkpoint's, used or not."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    norm_eps: float
    activation: str

    @property
    def patches_per_side(self):
        """Patches along one edge of a tile."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class TextConfig:
    """Shape of a Llama-style decoder. `positions` is the longest context in tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict | None
    qkv_bias: bool
    out_bias: bool
    tie_word_embeddings: bool


@dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-type checkpoint: its two towers and how pictures enter the text."""

    text: TextConfig
    vision: VisionConfig
    image_token_id: int
    vision_feature_layer: int
    drop_class_token: bool
    projector_activation: str
    projector_bias: bool
    image_grid_pinpoints: tuple | None

    @property
    def extra_image_tokens(self):
        """Vectors of a tile beyond its patches: 1 where CLIP's CLS is kept, -1 where SigLIP, which has none, loses its first patch."""
        return (self.vision.family == "clip") - self.drop_class_token

    @property
    def vision_layers_used(self):
        """Layers of the tower whose output reaches the projector: 23 of 24 at feature layer -2."""
        return (
            self.vision_feature_layer
            if self.vision_feature_layer >= 0
            else self.vision.num_layers + 1 + self.vision_feature_layer
        )


def _check_supported(path, what, value, supported):
    check(
        value in supported,
        f"{path}: {what} {value!r} is not supported; supported: {', '.join(supported)}",
    )
    return value


def _read_rope(path, raw):
    """RoPE's theta and scaling, from the top level (transformers v4) or from rope_parameters (v5)."""
    parameters = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or (
        parameters if parameters.get("rope_type", "default") != "default" else None
    )
    kind = scaling and _check_supported(
        path,
        "rope_scaling type",
        scaling.get("rope_type", scaling.get("type", "default")),
        ["default", "llama3"],
    )
    for key in LLAMA3_SCALING:
        whole = kind != "llama3" or isinstance(scaling.get(key), (int, float))
        check(
            whole,
            f"{path}: rope_scaling of type llama3 has no number {key}; it needs {', '.join(LLAMA3_SCALING)}",
        )
    scaling = {key: scaling[key] for key in LLAMA3_SCALING} if kind == "llama3" else None
    return float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0))), scaling


def _read_text_config(path, raw, tied):
    family = _check_supported(
        path, "text model_type", raw.get("model_type", "llama"), list(TEXT_DEFAULTS)
    )
    raw = TEXT_DEFAULTS[family] | raw
    _check_supported(path, "text hidden_act", raw.get("hidden_act", "silu"), ["silu"])
    window = (
        raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None
    )  # Qwen2 names a window that it leaves switched off
    check(
        window is None or window >= raw["max_position_embeddings"],
        f"{path}: sliding_window {window} is shorter than the context of {raw['max_position_embeddings']}; only full attention is supported (null, or a window as long as that)",
    )
    (theta, scaling), heads = _read_rope(path, raw), raw["num_attention_heads"]
    return TextConfig(
        vocab_size=raw["vocab_size"],
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        norm_eps=raw["rms_norm_eps"],
        max_position_embeddings=raw["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bool(raw["attention_bias"]),
        out_bias=bool(raw["attention_bias"]) and family == "llama",
        tie_word_embeddings=tied,
    )


def _read_vision_config(path, raw):
    family = _check_supported(
        path, "vision model_type", raw.get("model_type", "clip_vision_model"), list(VISION_DEFAULTS)
    )
    raw = VISION_DEFAULTS[family] | raw
    return VisionConfig(
        family=family.removesuffix("_vision_model"),
        hidden_size=raw["hidden_size"],
        intermediate_size=raw["intermediate_size"],
        num_layers=raw["num_hidden_layers"],
        num_heads=raw["num_attention_heads"],
        image_size=raw["image_size"],
        patch_size=raw["patch_size"],
        norm_eps=raw["layer_norm_eps"],
        activation=_check_supported(path, "vision hidden_act", raw["hidden_act"], [*ACTIVATIONS]),
    )


def parse_config(raw, path):
    """Config from the dictionary of a config.json. Raises BadInput naming what is missing or not supported."""
    model_type = _check_supported(
        path, "model_type", raw.get("model_type"), ["llava", "llava_next"]
    )
    for part in ("text_config", "vision_config"):
        check(
            isinstance(raw.get(part), dict),
            f"{path}: no {part}; is this the directory of a LLaVA checkpoint?",
        )
    tied = any(part.get("tie_word_embeddings", False) for part in (raw, raw["text_config"]))
    layer, vision = (
        raw.get("vision_feature_layer", -2),
        _read_vision_config(path, raw["vision_config"]),
    )
    if not isinstance(layer, int) or not -vision.num_layers - 1 <= layer <= vision.num_layers:
        raise InputError(
            f"{path}: vision_feature_layer {layer!r} is not one layer of a tower of {vision.num_layers}"
        )
    strategy = _check_supported(
        path,
        "vision_feature_select_strategy",
        raw.get("vision_feature_select_strategy", "default"),
        ["default", "full"],
    )
    pinpoints = (
        tuple(map(tuple, raw.get("image_grid_pinpoints") or DEFAULT_GRID_PINPOINTS))
        if model_type == "llava_next"
        else None
    )
    config = LlavaConfig(
        text=_read_text_config(path, raw["text_config"], tied),
        vision=vision,
        image_token_id=raw.get("image_token_index", raw.get("image_token_id", 32000)),
        vision_feature_layer=layer,
        drop_class_token=strategy == "default",
        projector_activation=_check_supported(
            path, "projector_hidden_act", raw.get("projector_hidden_act", "gelu"), [*ACTIVATIONS]
        ),
        projector_bias=raw.get("multimodal_projector_bias", True),
        image_grid_pinpoints=pinpoints,
    )
    for part in (config.text, config.vision):
        for field in fields(part):
            value = getattr(part, field.name)
            fits = (
                field.type not in (int, float)
                or isinstance(value, (int, field.type))
                and not isinstance(value, bool)
                and value > 0
            )
            check(
                fits,
                f"{path}: the {field.name} in {'text' if part is config.text else 'vision'}_config is {value!r}, not a{' whole' * (field.type is int)} number above 0",
            )
    check(
        vision.hidden_size % vision.num_heads == 0,
        f"{path}: {vision.num_heads} heads do not divide the vision tower's width of {vision.hidden_size}",
    )
    check(
        not (pinpoints and config.extra_image_tokens),
        f"{path}: vision_feature_select_strategy {strategy!r} leaves a {vision.family} tile with {config.extra_image_tokens:+d} vector "
        f"beside its patches, which AnyRes cannot lay out; {'full' if strategy == 'default' else 'default'!r} fits this tower",
    )
    return config


def read_config(directory):
    """(Config, raw dictionary) of a checkpoint directory."""
    path, adapter = Path(directory) / "config.json", Path(directory) / "adapter_config.json"
    if adapter.exists() and not path.exists():
        base = read_json(adapter, dict).get("base_model_name_or_path")
        raise InputError(
            f"{directory}: an adapter, not a model: give --model its base ({base}) and --adapter this directory"
        )
    check(
        Path(directory).is_dir(),
        f"{directory}: no such folder; a checkpoint's own is needed, nothing is downloaded",
    )
    raw = read_json(path, dict)
    with friendly_errors(path, "take the file that the checkpoint came with"):
        return parse_config(raw, path), raw
