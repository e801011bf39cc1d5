"""Reading the config.json of a checkpoint: defaults of each family, and what is not supported."""

from dataclasses import fields
from pathlib import Path

from minialign.models.config import ACTIVATIONS, LlavaConfig, TextConfig, VisionConfig
from minialign.utils.files import InputError, check, friendly_errors, read_json

# A text_config or vision_config may leave out what its family has by default. These are the
# defaults of transformers.
TEXT_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
}
TEXT_DEFAULTS = {
    "llama": {
        **TEXT_COMMON,
        "intermediate_size": 11008,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
        "attention_bias": False,
    },
    "mistral": {
        **TEXT_COMMON,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "sliding_window": 4096,
    },
    "qwen2": {
        **TEXT_COMMON,
        "intermediate_size": 22016,
        "num_key_value_heads": 32,
        "vocab_size": 151936,
        "max_position_embeddings": 32768,
        "attention_bias": True,
    },
}
VISION_COMMON = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
}
VISION_DEFAULTS = {
    "clip_vision_model": {
        **VISION_COMMON,
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    },
    "siglip_vision_model": {
        **VISION_COMMON,
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
    },
}

# Sizes (height, width) that LLaVA-1.6 resizes images to.
DEFAULT_GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

LLAMA3_SCALING = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


def read_config(directory: Path | str) -> tuple[LlavaConfig, dict]:
    """Read the config.json of a checkpoint directory; return it parsed, and as the raw dictionary.

    Raises InputError if the directory is missing, or holds no checkpoint that is supported.
    """
    directory = Path(directory)
    path = directory / "config.json"
    adapter_path = directory / "adapter_config.json"
    if adapter_path.exists() and not path.exists():
        base = read_json(adapter_path, dict).get("base_model_name_or_path")
        raise InputError(
            f"{directory}: an adapter, not a model: give --model its base ({base}) and "
            "--adapter this directory"
        )
    check(
        directory.is_dir(),
        f"{directory}: no such folder; give the folder of a checkpoint, nothing is downloaded",
    )
    raw = read_json(path, dict)
    with friendly_errors(path, "take the file that the checkpoint came with"):
        return parse_config(raw, path), raw


def parse_config(raw: dict, path: Path | str) -> LlavaConfig:
    """Parse the dictionary of a config.json.

    Raises InputError that names `path` and what is missing or not supported.
    """
    # 1. What kind of model it is.
    model_type = raw.get("model_type")
    _check_supported(path, "model_type", model_type, supported=["llava", "llava_next"])
    for section in ("text_config", "vision_config"):
        check(
            isinstance(raw.get(section), dict),
            f"{path}: no {section}; is this the directory of a LLaVA checkpoint?",
        )

    # 2. Its parts.
    text = _read_text_config(path, raw)
    vision = _read_vision_config(path, raw["vision_config"])
    _check_numbers(path, "text_config", text)
    _check_numbers(path, "vision_config", vision)
    check(
        vision.hidden_size % vision.num_heads == 0,
        f"{path}: the hidden_size of {vision.hidden_size} in vision_config is no multiple of "
        f"its {vision.num_heads} heads",
    )

    # 3. How images enter the text. The id of the image token has two names.
    image_token_id = raw.get("image_token_index", raw.get("image_token_id", 32000))
    feature_layer = _read_feature_layer(path, raw, vision)
    feature_strategy = raw.get("vision_feature_select_strategy", "default")
    _check_supported(
        path,
        "vision_feature_select_strategy",
        feature_strategy,
        supported=["default", "full"],
    )
    projector_activation = raw.get("projector_hidden_act", "gelu")
    _check_supported(path, "projector_hidden_act", projector_activation, supported=ACTIVATIONS)
    image_grid_pinpoints = None
    if model_type == "llava_next":
        sizes = raw.get("image_grid_pinpoints") or DEFAULT_GRID_PINPOINTS
        image_grid_pinpoints = tuple(tuple(size) for size in sizes)
    config = LlavaConfig(
        text=text,
        vision=vision,
        image_token_id=image_token_id,
        vision_feature_layer=feature_layer,
        drop_class_token=feature_strategy == "default",  # "full" keeps it
        projector_activation=projector_activation,
        projector_bias=raw.get("multimodal_projector_bias", True),
        image_grid_pinpoints=image_grid_pinpoints,
    )
    _check_anyres(path, config)
    return config


def _read_text_config(path, raw):
    """Read the shape of the decoder from the text_config of `raw`."""
    # 1. Fill in the defaults of the family.
    section = raw["text_config"]
    family = section.get("model_type", "llama")
    _check_supported(path, "text model_type", family, supported=TEXT_DEFAULTS)
    section = {**TEXT_DEFAULTS[family], **section}

    # 2. Refuse what is not supported.
    activation = section.get("hidden_act", "silu")
    _check_supported(path, "text hidden_act", activation, supported=["silu"])
    _check_full_attention(path, family, section)

    # 3. Work out what follows from other fields.
    rope_theta, rope_scaling = _read_rope(path, section)
    num_heads = section["num_attention_heads"]
    num_kv_heads = section.get("num_key_value_heads") or num_heads
    head_dim = section.get("head_dim") or section["hidden_size"] // num_heads
    has_bias = bool(section["attention_bias"])
    is_tied = section.get("tie_word_embeddings") or raw.get("tie_word_embeddings")
    return TextConfig(
        vocab_size=section["vocab_size"],
        hidden_size=section["hidden_size"],
        intermediate_size=section["intermediate_size"],
        num_layers=section["num_hidden_layers"],
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=section["rms_norm_eps"],
        max_position_embeddings=section["max_position_embeddings"],
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=has_bias,
        out_bias=has_bias and family == "llama",  # Qwen2 has none on the output
        tie_word_embeddings=bool(is_tied),
    )


def _check_full_attention(path, family, section):
    """Raise InputError if the decoder looks back less far than its context."""
    # Qwen2 names a sliding window even where it does not use one.
    uses_window = section.get("use_sliding_window", family == "mistral")
    if not uses_window:
        return
    window = section.get("sliding_window")
    context_length = section["max_position_embeddings"]
    check(
        window is None or window >= context_length,
        f"{path}: sliding_window {window} is shorter than the context of {context_length}; only "
        "full attention is supported (null, or a window as long as that)",
    )


def _read_rope(path, section):
    """Return theta and the scaling (or None) of RoPE.

    They stand at the top level of the section (transformers 4) or in its rope_parameters (5).
    """
    # 1. Find both.
    parameters = section.get("rope_parameters") or {}
    theta = float(parameters.get("rope_theta", section.get("rope_theta", 10000.0)))
    scaling = section.get("rope_scaling")
    if not scaling and parameters.get("rope_type", "default") != "default":
        scaling = parameters
    if not scaling:
        return theta, None

    # 2. Only the scaling of Llama 3 is supported.
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    _check_supported(path, "rope_scaling type", rope_type, supported=["default", "llama3"])
    if rope_type == "default":
        return theta, None
    for key in LLAMA3_SCALING:
        check(
            isinstance(scaling.get(key), (int, float)),
            f"{path}: rope_scaling of type llama3 has no number {key}; it needs "
            f"{', '.join(LLAMA3_SCALING)}",
        )
    return theta, {key: scaling[key] for key in LLAMA3_SCALING}


def _read_vision_config(path, section):
    """Read the shape of the vision tower from a vision_config."""
    family = section.get("model_type", "clip_vision_model")
    _check_supported(path, "vision model_type", family, supported=VISION_DEFAULTS)
    section = {**VISION_DEFAULTS[family], **section}
    activation = section["hidden_act"]
    _check_supported(path, "vision hidden_act", activation, supported=ACTIVATIONS)
    return VisionConfig(
        family=family.removesuffix("_vision_model"),
        hidden_size=section["hidden_size"],
        intermediate_size=section["intermediate_size"],
        num_layers=section["num_hidden_layers"],
        num_heads=section["num_attention_heads"],
        image_size=section["image_size"],
        patch_size=section["patch_size"],
        norm_eps=section["layer_norm_eps"],
        activation=activation,
    )


def _read_feature_layer(path, raw, vision):
    """Return the hidden state of the vision tower that is read, checked to exist."""
    layer = raw.get("vision_feature_layer", -2)
    lowest = -vision.num_layers - 1
    check(
        isinstance(layer, int) and lowest <= layer <= vision.num_layers,
        f"{path}: vision_feature_layer {layer!r} must be one number from {lowest} to "
        f"{vision.num_layers}, since the vision tower has {vision.num_layers} layers",
    )
    return layer


def _check_supported(path, name, value, *, supported):
    """Raise InputError unless `value` is among the supported ones."""
    check(
        value in supported,
        f"{path}: {name} {value!r} is not supported; supported: {', '.join(supported)}",
    )


def _check_numbers(path, section_name, section):
    """Raise InputError unless all sizes and other numbers of a config are above 0."""
    for field in fields(section):
        if field.type not in (int, float):
            continue
        value = getattr(section, field.name)
        expected = "whole number" if field.type is int else "number"
        # An int will do for a float. In Python a bool is an int, but not here.
        is_number = isinstance(value, (int, field.type)) and not isinstance(value, bool)
        check(
            is_number and value > 0,
            f"{path}: the {field.name} in {section_name} is {value!r}, not a {expected} above 0",
        )


def _check_anyres(path, config):
    """Raise InputError if an AnyRes tile has other features than one for each patch."""
    extra = config.extra_image_tokens
    if not config.image_grid_pinpoints or extra == 0:
        return
    strategy = "default" if config.drop_class_token else "full"
    remedy = "full" if config.drop_class_token else "default"
    raise InputError(
        f"{path}: vision_feature_select_strategy {strategy!r} gives a {config.vision.family} tile "
        f"{extra:+d} feature beside its patches, which AnyRes cannot lay out; use {remedy!r}"
    )
