"""Read the config.json of a checkpoint: add defaults, and refuse what is not supported."""

from pathlib import Path

from minialign.models.checkpoint_checks import check_model_folder
from minialign.models.config import ACTIVATIONS, LlavaConfig, TextConfig, VisionConfig
from minialign.models.config_rope import read_rope
from minialign.models.config_section import LARGEST_SIZE, ConfigSection
from minialign.models.model_families import check_model_type
from minialign.utils.files import InputError, check, friendly_errors, read_json

# config.json, its text_config and its vision_config may leave out what their family has by default.
# These are the defaults of transformers.
LLAVA_DEFAULTS = {
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
}
TEXT_COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
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
        "use_sliding_window": True,  # no field of Mistral, which uses its window if it has one
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
    "num_channels": 3,
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

# The sizes (height, width) that LLaVA-1.6 resizes images to.
DEFAULT_GRID_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

MAX_TILES_PER_SIDE = 100  # LLaVA-OneVision's grids, the largest known, have 6
IMAGE_TOKEN_FIELDS = ("image_token_index", "image_token_id")
DEFAULT_IMAGE_TOKEN_ID = 32000
LAYER_TYPES = {"full_attention", "sliding_attention"}


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
    check_model_folder(directory, "a checkpoint")
    raw = read_json(path, dict)
    with friendly_errors(path, "take the file that the checkpoint came with"):
        return parse_config(raw, path), raw


def parse_config(raw: dict, path: Path | str) -> LlavaConfig:
    """Parse the dictionary of a config.json.

    Raises InputError that names `path` and what is missing or not supported.
    """
    # 1. Check what kind of model it is.
    model_type = check_model_type(path, raw)
    for name in ("text_config", "vision_config"):
        check(
            isinstance(raw.get(name), dict),
            f"{path}: no {name}; is this the directory of a LLaVA checkpoint?",
        )
    root = ConfigSection(path, "", {**LLAVA_DEFAULTS, **raw})

    # 2. Read the shapes of its decoder and of its vision tower.
    text = _read_text_config(root)
    vision = _read_vision_config(root)

    # 3. Read how images enter the text.
    strategy = root.choice("vision_feature_select_strategy", ["default", "full"])
    image_grid_pinpoints = None
    if model_type == "llava_next":
        image_grid_pinpoints = _read_grid_pinpoints(root, vision)
    config = LlavaConfig(
        text=text,
        vision=vision,
        image_token_id=_read_image_token_id(root),
        vision_feature_layer=_read_feature_layer(root, vision),
        drop_class_token=strategy == "default",  # "full" keeps it
        projector_activation=root.choice("projector_hidden_act", ACTIVATIONS),
        projector_bias=root.flag("multimodal_projector_bias"),
        image_grid_pinpoints=image_grid_pinpoints,
    )
    _check_anyres(path, config)
    return config


def _read_section(root, name, defaults_of_families, *, default_family):
    """Return the family of a section, and the section with the defaults of this family."""
    values = {"model_type": default_family, **root.section(name)}
    section = ConfigSection(root.path, name, values)
    family = section.choice("model_type", defaults_of_families)
    return family, ConfigSection(root.path, name, {**defaults_of_families[family], **values})


def _read_text_config(root):
    """Read the shape of the decoder from the text_config of a config.json."""
    # 1. Fill in the defaults of the family.
    family, section = _read_section(root, "text_config", TEXT_DEFAULTS, default_family="llama")

    # 2. Refuse what is not supported.
    section.choice("hidden_act", ["silu"])
    check(
        not section.flag("mlp_bias"),
        f"{section.label('mlp_bias')} true is not supported: the MLPs of LLaVA have no biases",
    )
    _check_full_attention(section)

    # 3. Work out what follows from other fields.
    num_heads, num_kv_heads, head_dim = _read_heads(section)
    rope_theta, rope_scaling = read_rope(section)
    has_bias = section.flag("attention_bias")
    is_tied = section.flag("tie_word_embeddings") or root.flag("tie_word_embeddings")
    return TextConfig(
        vocab_size=section.size("vocab_size"),
        hidden_size=section.size("hidden_size"),
        intermediate_size=section.size("intermediate_size"),
        num_layers=section.size("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        norm_eps=section.number("rms_norm_eps", 1e-15, 1),
        max_position_embeddings=section.size("max_position_embeddings"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        qkv_bias=has_bias,
        out_bias=has_bias and family == "llama",  # Qwen2 has biases on q, k and v alone
        tie_word_embeddings=is_tied,
    )


def _read_heads(section):
    """Return how many heads a decoder has, how many key-value heads, and their width."""
    # 1. The heads.
    num_heads = section.size("num_attention_heads")
    num_kv_heads = num_heads
    if section.get("num_key_value_heads") is not None:
        num_kv_heads = section.size("num_key_value_heads")
    check(
        num_heads % num_kv_heads == 0,
        f"{section.label('num_attention_heads')} is {num_heads}, no multiple of the "
        f"num_key_value_heads of {num_kv_heads}",
    )

    # 2. Their width.
    if section.get("head_dim") is not None:
        head_dim = section.size("head_dim")
    else:
        _check_heads_divide(section)
        head_dim = section.size("hidden_size") // num_heads
    check(
        head_dim % 2 == 0,
        f"{section.label('head_dim')} is {head_dim}, which RoPE cannot rotate in pairs",
    )
    return num_heads, num_kv_heads, head_dim


def _check_heads_divide(section):
    """Raise InputError unless the heads of a section share its width evenly."""
    hidden_size = section.size("hidden_size")
    num_heads = section.size("num_attention_heads")
    check(
        hidden_size % num_heads == 0,
        f"{section.label('hidden_size')} is {hidden_size}, no multiple of its {num_heads} heads "
        "(num_attention_heads)",
    )


def _check_full_attention(section):
    """Raise InputError if a layer of the decoder attends to less than the whole context."""
    # 1. See whether a layer uses a window. Qwen2 states its size even where no layer does.
    layer_types = section.get("layer_types") or []
    check(
        isinstance(layer_types, list) and set(layer_types) <= LAYER_TYPES,
        f"{section.label('layer_types')} {layer_types!r:.60} is not supported; "
        f"supported: {', '.join(sorted(LAYER_TYPES))}",
    )
    uses_window = section.flag("use_sliding_window") or "sliding_attention" in layer_types
    if not uses_window or section.get("sliding_window") is None:
        return

    # 2. Compare it with the context. A window of that length hides nothing.
    window = section.size("sliding_window")
    context_length = section.size("max_position_embeddings")
    check(
        window >= context_length,
        f"{section.label('sliding_window')}: sliding_window {window} is shorter than the context "
        f"of {context_length}; only full attention is supported (null, or a window as long as "
        "that)",
    )


def _read_vision_config(root):
    """Read the shape of the vision tower from the vision_config of a config.json."""
    # 1. Fill in the defaults of the family.
    family, section = _read_section(
        root, "vision_config", VISION_DEFAULTS, default_family="clip_vision_model"
    )

    # 2. Refuse what does not fit together.
    num_channels = section.size("num_channels")
    check(
        num_channels == 3,
        f"{section.label('num_channels')} is {num_channels}; images have 3 channels here",
    )
    _check_heads_divide(section)
    image_size = section.size("image_size")
    patch_size = section.size("patch_size")
    check(
        patch_size <= image_size,
        f"{section.label('patch_size')} is {patch_size}, more than the image_size of {image_size}",
    )
    return VisionConfig(
        family=family.removesuffix("_vision_model"),
        hidden_size=section.size("hidden_size"),
        intermediate_size=section.size("intermediate_size"),
        num_layers=section.size("num_hidden_layers"),
        num_heads=section.size("num_attention_heads"),
        image_size=image_size,
        patch_size=patch_size,
        norm_eps=section.number("layer_norm_eps", 1e-15, 1),
        activation=section.choice("hidden_act", ACTIVATIONS),
    )


def _read_image_token_id(root):
    """Return the id of the image token, whose field has two names."""
    ids = []
    for key in IMAGE_TOKEN_FIELDS:
        token_id = root.get(key)
        if token_id is None:
            continue
        check(
            type(token_id) is int and 0 <= token_id <= LARGEST_SIZE,
            f"{root.label(key)} is {token_id!r:.40}, not a token id",
        )
        ids.append(token_id)
    if not ids:
        return DEFAULT_IMAGE_TOKEN_ID
    check(
        len(set(ids)) == 1,
        f"{root.path}: {' and '.join(IMAGE_TOKEN_FIELDS)} differ ({ids[0]} and {ids[-1]}); "
        "remove the wrong one",
    )
    return ids[0]


def _read_feature_layer(root, vision):
    """Return the index of the hidden state that the vision tower hands to the projector."""
    layer = root.get("vision_feature_layer")
    lowest = -vision.num_layers - 1
    check(
        type(layer) is int and lowest <= layer <= vision.num_layers,
        f"{root.label('vision_feature_layer')} {layer!r:.40} must be one number from {lowest} to "
        f"{vision.num_layers}, since the vision tower has {vision.num_layers} layers",
    )
    return layer


def _read_grid_pinpoints(root, vision):
    """Return the sizes (height, width) of AnyRes, which the image processor compares with its own.

    They are bounded, since an image is resized to such a size before any later check.
    """
    sizes = root.get("image_grid_pinpoints")
    if sizes is None:
        sizes = DEFAULT_GRID_PINPOINTS
    label = root.label("image_grid_pinpoints")
    check(isinstance(sizes, list) and sizes, f"{label} {sizes!r:.60} is no list of sizes")
    longest = vision.image_size * MAX_TILES_PER_SIDE
    for size in sizes:
        is_pair = isinstance(size, list) and len(size) == 2
        check(is_pair, f"{label} has {size!r:.40}, not a pair [height, width]")
        for length in size:
            check(
                type(length) is int and 0 < length <= longest,
                f"{label} has {size!r:.40}; lengths are whole numbers from 1 to {longest}, which "
                f"is {MAX_TILES_PER_SIDE} tiles",
            )
    return tuple(tuple(size) for size in sizes)


def _check_anyres(path, config):
    """Raise InputError if an AnyRes tile has other features than one for each patch."""
    extra = config.extra_image_tokens
    if not config.image_grid_pinpoints or extra == 0:
        return
    strategy = "default" if config.drop_class_token else "full"
    other_strategy = "full" if config.drop_class_token else "default"
    raise InputError(
        f"{path}: vision_feature_select_strategy {strategy!r} gives a {config.vision.family} tile "
        f"{extra:+d} feature beside its patches, which AnyRes cannot lay out; "
        f"use {other_strategy!r}"
    )
