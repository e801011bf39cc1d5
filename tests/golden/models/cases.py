"""Tiny random models of every supported family, which transformers and minialign both load.

Weights and pixels are drawn from a hash of their names, so that both get the same ones and none is
stored.
"""

import functools
import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

HERE = Path(__file__).parent

CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 8,
    "projection_dim": 32,
}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "vision_use_head": False,
}
TEXT = {
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA = {"model_type": "llama", **TEXT}
MISTRAL = {"model_type": "mistral", **TEXT}
QWEN2 = {"model_type": "qwen2", **TEXT}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PINPOINTS = [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
IMAGE = 155


def llava(text, vision, **more):
    """Return config.json of a LLaVA."""
    return {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "text_config": text,
        "vision_config": vision,
        **more,
    }


def llava_next(text, vision, **more):
    """Return config.json of a LLaVA-NeXT."""
    config = llava(text, vision, image_grid_pinpoints=PINPOINTS)
    return {**config, "model_type": "llava_next", **more}


def without(config, *names):
    """Return a configuration without some of its fields."""
    return {name: value for name, value in config.items() if name not in names}


# config.json as transformers 4 and the hub have it: sparse, with theta and rope_scaling on top.
CONFIGS = {
    # A small LLaVA-1.5, as sparse as the hub's.
    "llava_llama": llava(
        without(LLAMA, "num_key_value_heads", "rms_norm_eps", "model_type"),
        without(CLIP, "model_type"),
    ),
    "llava_llama_grouped": llava(LLAMA | {"num_key_value_heads": 2, "rope_theta": 5e6}, CLIP),
    "llava_mistral_wide_heads": llava(
        MISTRAL
        | {"num_key_value_heads": 3, "head_dim": 12, "sliding_window": None, "rope_theta": 1e6},
        CLIP,
    ),
    # A small llava-interleave-qwen-0.5b.
    "llava_qwen2_tied": llava(
        QWEN2
        | {
            "tie_word_embeddings": True,
            "rope_theta": 1e6,
            "num_key_value_heads": 2,
            "sliding_window": 128,
            "use_sliding_window": False,
        },
        SIGLIP,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
    # SigLIP has no CLS token, so "default" drops its first patch.
    "llava_siglip_default": llava(
        LLAMA | {"attention_bias": True},
        SIGLIP | {"hidden_act": "gelu_pytorch_tanh"},
        multimodal_projector_bias=False,
    ),
    "llava_clip_full_last": llava(
        QWEN2,
        CLIP | {"hidden_act": "gelu"},
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        projector_hidden_act="gelu_pytorch_tanh",
    ),
    "next_vicuna": llava_next(
        LLAMA | {"rope_scaling": None}, CLIP, use_image_newline_parameter=True
    ),
    "next_llama3": llava_next(
        LLAMA
        | {
            "hidden_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rope_theta": 5e5,
            "rope_scaling": LLAMA3,
        },
        CLIP | {"image_size": 28, "patch_size": 7},
        image_grid_pinpoints=[[h * 28 // 24, w * 28 // 24] for h, w in PINPOINTS],
    ),
    "next_mistral": llava_next(
        MISTRAL | {"num_key_value_heads": 2, "sliding_window": 512, "rope_theta": 1e6}, CLIP
    ),
    "next_siglip_qwen2": llava_next(
        QWEN2 | {"num_key_value_heads": 2},
        SIGLIP,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    ),
}
# The hub's own config.json of public models, as far as shapes go.
CLIP_L = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "image_size": 336,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "patch_size": 14,
    "projection_dim": 768,
    "vocab_size": 32000,
}
SIGLIP_SO = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 26,
    "patch_size": 14,
    "vision_use_head": False,
}
VICUNA_7B = {
    "model_type": "llama",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "vocab_size": 32064,
}
VICUNA_13B = VICUNA_7B | {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 40,
}
NEXT = {
    "model_type": "llava_next",
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "use_image_newline_parameter": True,
}
PUBLIC = {
    "llava-1.5-7b": llava(VICUNA_7B, CLIP_L) | {"image_token_index": 32000},
    "llava-1.5-13b": llava(VICUNA_13B, CLIP_L) | {"image_token_index": 32000},
    "tiny-llava-v1": llava(
        VICUNA_7B
        | {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 22,
            "num_key_value_heads": 4,
        },
        CLIP_L,
    ),
    "llava-interleave-qwen-0.5b": llava(
        {
            "model_type": "qwen2",
            "hidden_size": 1024,
            "intermediate_size": 2816,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "vocab_size": 152000,
            "sliding_window": 32768,
            "max_window_layers": 21,
            "use_sliding_window": False,
        },
        SIGLIP_SO,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    | {"image_token_index": 151646},
    "llava-v1.6-vicuna-7b": llava(VICUNA_7B, CLIP_L) | NEXT,
    "llava-v1.6-vicuna-13b": llava(VICUNA_13B, CLIP_L) | NEXT,
    "llava-v1.6-mistral-7b": llava(
        {
            "model_type": "mistral",
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "sliding_window": None,
            "vocab_size": 32064,
        },
        CLIP_L,
    )
    | NEXT,
    "llava-v1.6-34b": llava(
        {
            "model_type": "llama",
            "hidden_size": 7168,
            "intermediate_size": 20480,
            "max_position_embeddings": 4096,
            "num_attention_heads": 56,
            "num_hidden_layers": 60,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e6,
            "vocab_size": 64064,
        },
        CLIP_L,
    )
    | NEXT,
    "llama3-llava-next-8b": llava(
        {
            "model_type": "llama",
            "intermediate_size": 14336,
            "max_position_embeddings": 8192,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "vocab_size": 128320,
        },
        CLIP_L,
    )
    | NEXT,
}
# LoRA adapters as PEFT makes them: the model, and the arguments of LoraConfig.
ALL_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
ADAPTERS = {
    "plain": (
        "llava_llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ALL_LINEARS,
            "modules_to_save": ["multi_modal_projector"],
        },
    ),
    "rslora_of_two": (
        "next_mistral",
        {
            "r": 3,
            "lora_alpha": 5,
            "target_modules": r".*language_model.*\.(q_proj|v_proj)",
            "use_rslora": True,
        },
    ),
    "tied": (
        "llava_qwen2_tied",
        {
            "r": 2,
            "lora_alpha": 3,
            "target_modules": ALL_LINEARS,
            "modules_to_save": ["multi_modal_projector"],
            "init_lora_weights": "gaussian",
        },
    ),
}
# Prompts with the sizes (height, width) of their images: of any length, with two images or none.
PROMPTS = [
    ([1, 20, 21, IMAGE, 13, 40, 41, 42], [(30, 40)]),
    ([1, 22, IMAGE, 13, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52], [(211, 60)]),
    ([1, IMAGE, 13, 60, 61, IMAGE, 62, 63, 64], [(50, 211), (37, 37)]),
    ([1, 70, 71, 72, 73, 74], []),
]


def draw(name, shape):
    """Return uniform numbers of mean 0 and variance 1 that depend on name and shape alone.

    The doubles of NumPy's PCG64 are the same on every machine.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    numbers = np.random.Generator(np.random.PCG64(seed)).random(shape)
    return (numbers - 0.5) * 12**0.5


def weight(name, shape):
    """Return the weight that transformers calls `name` in memory.

    It is scaled so that every part of the model has an effect on its output.
    """
    values = draw(name, shape)
    if len(shape) == 1:
        values = 0.3 * values
        if "norm" in name and name.endswith(".weight"):
            values = values + 1
    elif "embed" in name and "patch" not in name:
        # Small, because a tied head would only ever repeat the last token otherwise.
        values = 0.3 * values
    else:
        # Queries, keys and the head are larger, so that attention and logits are not flat.
        scale = 1.0
        if "q_proj" in name or "k_proj" in name or "lm_head" in name:
            scale = 1.5
        values = values * scale / np.prod(shape[1:]) ** 0.5
    return values.astype(np.float32)


def adapter_weight(name, shape):
    """Return the weight that PEFT's file calls `name`."""
    scale = np.float32(1)
    if "lora" in name:
        scale = np.float32(0.3)
    return weight(name, shape) * scale


def pixels(size, num_tiles, tile_size):
    """Return normalized tiles (n, 3, S, S) of an image of (height, width).

    They are noise. What processors do to images is tested elsewhere.
    """
    shape = (num_tiles, 3, tile_size, tile_size)
    return draw(f"picture of {size}", shape).astype(np.float32)


def names():
    """Return {tensor name in memory: shape} by transformers for every model."""
    compressed = (HERE / "names.json.gz").read_bytes()
    return json.loads(gzip.decompress(compressed))


def renamed(name, layout):
    """Return a tensor's name in a layout of files. `name` is its name in memory.

    "memory": as it is. "hub": as public checkpoints have it. "fresh": as transformers 5 saves it.
    "flat": a form between them.
    """
    if layout in ("hub", "fresh"):
        name = name.removeprefix("model.")
        name = name.replace("language_model.", "language_model.model.")
        name = name.replace("lm_head.", "language_model.lm_head.")
    if layout in ("hub", "flat"):
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
    return name


@functools.cache  # hundreds of tests write the same models
def tensors(case, layout="hub"):
    """Return the weights of a model of CONFIGS as its file would hold them."""
    shapes = names()[case]
    return {renamed(name, layout): weight(name, shape) for name, shape in shapes.items()}


def write(directory, case, layout="hub"):
    """Write a checkpoint folder of config and weights, and return it."""
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[case]))
    save_file(tensors(case, layout), directory / "model.safetensors", metadata={"format": "pt"})
    return directory
