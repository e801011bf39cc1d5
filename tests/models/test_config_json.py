"""config.json of a checkpoint: what is not supported is refused, and the message names it."""

import json

import pytest
from golden.models import cases

from minialign.models.checkpoint import load_model
from minialign.utils.files import InputError

REMOVED = object()


@pytest.fixture()
def directory(tmp_path):
    """Write a small checkpoint for a test to change."""
    return cases.write(tmp_path / "model", "llava_llama")


def change_config(directory, section, changes):
    """Change fields of config.json, or of its `section`. REMOVED removes a field."""
    config = json.loads((directory / "config.json").read_text())
    settings = config if section is None else config[section]
    for key, value in changes.items():
        if value is REMOVED:
            del settings[key]
        else:
            settings[key] = value
    (directory / "config.json").write_text(json.dumps(config))


def error_of(directory):
    """Return the message with which a checkpoint is refused."""
    with pytest.raises(InputError) as error:
        load_model(directory)
    message = str(error.value)
    assert str(directory) in message
    assert "\n" not in message
    return message


# What is changed in which section of config.json, and words of the message.
UNSUPPORTED = {
    "no vision_config": (None, {"vision_config": REMOVED}, ["vision_config"]),
    "no text_config": (None, {"text_config": REMOVED}, ["text_config"]),
    "model_type": (
        None,
        {"model_type": "llava_onevision"},
        ["llava_onevision", "supported: llava, llava_next"],
    ),
    "the original layout": (
        None,
        {"mm_vision_tower": "openai/clip", "text_config": REMOVED},
        ["original LLaVA layout", "openai/clip", "-hf"],
    ),
    "the original class": (
        None,
        {"architectures": ["LlavaLlamaForCausalLM"]},
        ["original LLaVA layout", "convert_llava_weights_to_hf.py"],
    ),
    "Qwen2-VL": (None, {"model_type": "qwen2_vl"}, ["qwen2_vl", "Qwen2-VL"]),
    "InternVL": (None, {"model_type": "internvl_chat"}, ["internvl_chat", "InternVL"]),
    "PaliGemma": (None, {"model_type": "paligemma"}, ["PaliGemma"]),
    "mllama": (None, {"model_type": "mllama"}, ["Llama 3.2 Vision"]),
    "a language model": (None, {"model_type": "llama"}, ["without a vision tower"]),
    "a run": (None, {"model_type": REMOVED, "settings": {}}, ["--adapter", "run"]),
    "quantized": (None, {"quantization_config": {"quant_method": "awq"}}, ["'awq'", "quantized"]),
    "two image tokens": (None, {"image_token_id": 5}, ["155", "5", "differ"]),
    "two places for RoPE that differ": (
        "text_config",
        {"rope_scaling": cases.LLAMA3, "rope_parameters": {"rope_theta": 5e5}},
        ["rope_scaling", "rope_parameters", "differ"],
    ),
    "RoPE of three axes": (
        "text_config",
        {"rope_scaling": {"type": "default", "mrope_section": [16, 24, 24]}},
        ["mrope_section"],
    ),
    "RoPE of a part of the channels": (
        "text_config",
        {"partial_rotary_factor": 0.5},
        ["partial_rotary_factor", "0.5"],
    ),
    "Llama 3's factors out of order": (
        "text_config",
        {"rope_scaling": cases.LLAMA3 | {"low_freq_factor": 4.0}},
        ["low_freq_factor", "high_freq_factor"],
    ),
    "biases in the MLPs": ("text_config", {"mlp_bias": True}, ["mlp_bias"]),
    "layers with a window": (
        "text_config",
        {"layer_types": ["sliding_attention"] * 3, "sliding_window": 100},
        ["sliding_window 100", "512"],
    ),
    "layers of another type": (
        "text_config",
        {"layer_types": ["linear_attention"]},
        ["layer_types", "linear_attention"],
    ),
    "heads that do not divide": (
        "text_config",
        {"num_attention_heads": 5, "num_key_value_heads": 5},
        ["48", "5 heads"],
    ),
    "key-value heads that do not divide": (
        "text_config",
        {"num_key_value_heads": 4},
        ["num_attention_heads", "6", "4"],
    ),
    "heads of odd width": ("text_config", {"head_dim": 7}, ["head_dim", "7"]),
    "a patch larger than the image": ("vision_config", {"patch_size": 25}, ["patch_size", "24"]),
    "gray images": ("vision_config", {"num_channels": 1}, ["num_channels"]),
    "grid pinpoints without end": (
        None,
        {"model_type": "llava_next", "image_grid_pinpoints": [[24 * 10**9, 24]]},
        ["image_grid_pinpoints", "tiles"],
    ),
    "no model_type": (None, {"model_type": REMOVED}, ["model_type", "None"]),
    "text model_type": ("text_config", {"model_type": "gemma"}, ["gemma", "llama, mistral, qwen2"]),
    "vision model_type": (
        "vision_config",
        {"model_type": "dinov2"},
        ["dinov2", "clip_vision_model, siglip_vision_model"],
    ),
    "rope of another type": (
        "text_config",
        {"rope_scaling": {"type": "linear", "factor": 2}},
        ["rope_scaling", "linear", "llama3"],
    ),
    "rope of another type, as transformers 5 writes it": (
        "text_config",
        {"rope_parameters": {"rope_type": "yarn"}},
        ["yarn", "llama3"],
    ),
    "rope_scaling without its factor": (
        "text_config",
        {"rope_scaling": cases.without(cases.LLAMA3, "factor")},
        ["rope_scaling", "factor"],
    ),
    "sliding window": (
        "text_config",
        {"model_type": "mistral", "num_key_value_heads": 6, "sliding_window": 100},
        ["sliding_window 100", "512"],
    ),
    "several feature layers": (
        None,
        {"vision_feature_layer": [-2, -1]},
        ["vision_feature_layer", "[-2, -1]"],
    ),
    "grid pinpoints of another shape": (
        None,
        {"model_type": "llava_next", "image_grid_pinpoints": [3]},
        ["config.json"],
    ),
    "AnyRes with the class token": (
        None,
        {"model_type": "llava_next", "vision_feature_select_strategy": "full"},
        ["'full'", "clip", "+1"],
    ),
    "AnyRes without a patch": (
        None,
        {"model_type": "llava_next", "vision_config": cases.SIGLIP},
        ["'default'", "siglip", "-1"],
    ),
}

# Sizes that no weights have. Nothing of these sizes may be built.
ABSURD = [10**9, 10**12, 10**30]
# Values that are no whole number above 0, or whatever else the field has to be.
MALFORMED = {
    ("text_config", "vocab_size"): ABSURD,
    ("text_config", "intermediate_size"): ABSURD,
    ("text_config", "num_key_value_heads"): [0, False, -2, 10**9],
    ("vision_config", "hidden_size"): ABSURD,
    ("vision_config", "num_hidden_layers"): ABSURD,
    ("text_config", "attention_bias"): ["false", 1],
    ("text_config", "tie_word_embeddings"): ["no"],
    (None, "multimodal_projector_bias"): ["false", 0],
    (None, "image_token_index"): ["155", -1, True, 10**30, 1.0],
    (None, "vision_feature_layer"): [True, "-2", 10**30],
    (None, "projector_hidden_act"): ["tanh", ["gelu"], None],
    (None, "image_grid_pinpoints"): [[], {}, [[24]], [[24, -24]], [[24, "24"]]],
    ("text_config", "hidden_size"): ["x", -4, None, *ABSURD],
    ("text_config", "num_attention_heads"): [0, "4", *ABSURD],
    ("text_config", "num_hidden_layers"): [1.5, 0, True, *ABSURD],
    ("text_config", "rms_norm_eps"): ["x", None, True, float("nan"), 10**400],
    ("text_config", "rope_theta"): ["x", [], 10**400, 0, True, float("nan"), float("inf")],
    ("text_config", "rope_parameters"): [3, {"rope_theta": 10**400}, {"rope_theta": "x"}],
    ("text_config", "rope_scaling"): [3, cases.LLAMA3 | {"factor": "x"}],
    ("text_config", "max_position_embeddings"): ["x", 10**30],
    ("text_config", "head_dim"): ["x", 0, 10**9],
    ("vision_config", "patch_size"): [0, "x", 10**30],
    ("vision_config", "num_attention_heads"): [5, 0],
    ("vision_config", "image_size"): [None, *ABSURD],
}
MALFORMED_CASES = []
for (section, key), values in MALFORMED.items():
    for value in values:
        MALFORMED_CASES.append((section, key, value))


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_configs_are_refused(name, directory):
    section, changes, words = UNSUPPORTED[name]
    change_config(directory, section, changes)

    message = error_of(directory)

    assert "config.json" in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("section, key, value", MALFORMED_CASES)
def test_malformed_fields_are_refused(section, key, value, directory):
    if key == "image_grid_pinpoints":
        change_config(directory, None, {"model_type": "llava_next"})
    change_config(directory, section, {key: value})

    assert "config.json" in error_of(directory)


def test_missing_config_is_refused(directory):
    (directory / "config.json").unlink()

    message = error_of(directory)

    assert "config.json: no such file; give the folder of a checkpoint" in message


# Where theta stands, and what it is.
THETAS = {
    "nowhere": ({}, 1e4),
    "on top": ({"rope_theta": 5e5}, 5e5),
    "in rope_scaling": ({"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    "in rope_scaling of Llama 3": ({"rope_scaling": cases.LLAMA3 | {"rope_theta": 5e5}}, 5e5),
    "in rope_parameters": ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
    "on top and in rope_scaling": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "default", "rope_theta": 5e5}},
        5e5,
    ),
    "in both objects, which agree": (
        {"rope_scaling": {"rope_theta": 5e5}, "rope_parameters": {"rope_theta": 5e5}},
        5e5,
    ),
    "beside a scaling without it": ({"rope_theta": 5e5, "rope_scaling": cases.LLAMA3}, 5e5),
}


@pytest.mark.parametrize("place", THETAS)
def test_theta_is_found_wherever_it_stands(place, directory):
    """A theta within the objects counts more, as in transformers 5.23."""
    changes, theta = THETAS[place]
    change_config(directory, "text_config", changes)

    config = load_model(directory).config.text

    assert config.rope_theta == theta
    assert (config.rope_scaling is not None) == ("factor" in changes.get("rope_scaling", {}))


def test_long_values_are_shortened_in_messages(directory):
    change_config(directory, "text_config", {"hidden_size": "x" * 100_000})

    assert len(error_of(directory)) < 400
