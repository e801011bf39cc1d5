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

# Values that are no whole number above 0, or whatever else the field has to be.
MALFORMED = {
    ("text_config", "hidden_size"): ["x", -4, None],
    ("text_config", "num_attention_heads"): [0, "4"],
    ("text_config", "num_hidden_layers"): [1.5, 0, True],
    ("text_config", "rms_norm_eps"): ["x", None],
    ("text_config", "rope_theta"): ["x", []],
    ("text_config", "rope_parameters"): [3],
    ("text_config", "rope_scaling"): [3, cases.LLAMA3 | {"factor": "x"}],
    ("text_config", "max_position_embeddings"): ["x"],
    ("text_config", "head_dim"): ["x"],
    ("vision_config", "patch_size"): [0, "x"],
    ("vision_config", "num_attention_heads"): [5, 0],
    ("vision_config", "image_size"): [None],
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
    change_config(directory, section, {key: value})

    assert "config.json" in error_of(directory)


def test_missing_config_is_refused(directory):
    (directory / "config.json").unlink()

    message = error_of(directory)

    assert "config.json" in message
    assert "no such file" in message
