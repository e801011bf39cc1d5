"""LoRA adapters in PEFT's files: the same logits, the same files, and what is refused.

tests/golden/make_adapters.py made the golden files. There PEFT also reads what is saved here.
"""

import json

import numpy as np
import pytest
import torch
from golden.models import cases
from golden_cases import assert_close, assert_same_tensors, last_logits
from safetensors.torch import load_file, save_file

from minialign.models.adapters import ADAPTER_PREFIX, load_adapter, save_adapter
from minialign.models.checkpoint import LAYOUTS, load_model, save_model
from minialign.utils.files import InputError

PEFT = json.loads((cases.HERE / "adapters.json").read_text())["adapters"]
LOGITS = np.load(cases.HERE / "adapters.npz")
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def write_adapter(directory, name, config_changes=None, tensor_changes=None):
    """Write an adapter as PEFT saved it, with changes. A tensor that is None is left out."""
    directory.mkdir()
    config = PEFT[name]["theirs"] | (config_changes or {})
    (directory / CONFIG).write_text(json.dumps(config))
    tensors = {}
    for tensor_name, shape in PEFT[name]["shapes"].items():
        tensors[tensor_name] = torch.from_numpy(cases.adapter_weight(tensor_name, shape))
    tensors |= tensor_changes or {}
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / WEIGHTS)
    return directory


@pytest.mark.parametrize("name", cases.ADAPTERS)
def test_adapters_of_peft(name, tmp_path):
    """An adapter gives PEFT's logits on, off and merged, and is saved as PEFT saves it."""
    case, _ = cases.ADAPTERS[name]
    source = cases.write(tmp_path / "base", case)
    peft_adapter = write_adapter(tmp_path / "peft", name)
    model = load_model(source)
    base_logits = last_logits(model)

    # 1. On and off. Off is the base model to the bit.
    policy = load_adapter(model, peft_adapter)
    assert_close(last_logits(model), LOGITS[f"{name}: on"], 1e-5)
    with policy.reference():
        assert torch.equal(last_logits(model), base_logits)
    assert_close(base_logits, LOGITS[f"{name}: off"], 1e-5)
    assert np.abs(LOGITS[f"{name}: on"] - LOGITS[f"{name}: off"]).max() > 0.1

    # 2. Saved: the weights are those of PEFT's file, and PEFT took the config.
    save_adapter(policy, tmp_path / "saved", "the base")
    assert_same_tensors(load_file(tmp_path / "saved" / WEIGHTS), load_file(peft_adapter / WEIGHTS))
    assert json.loads((tmp_path / "saved" / CONFIG).read_text()) == PEFT[name]["ours"]

    # 3. Merged: a model without adapters, in the layout that the base had.
    policy.merge()
    assert_close(last_logits(model), LOGITS[f"{name}: on"], 1e-5)
    save_model(model, source, tmp_path / "merged")
    assert torch.equal(last_logits(load_model(tmp_path / "merged")), last_logits(model))
    merged_tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged_tensors.keys() == load_file(source / "model.safetensors").keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_may_use_the_names_of_any_layout(layout, tmp_path):
    """Older versions of transformers named the base model's modules otherwise, and PEFT follows."""
    model = load_model(cases.write(tmp_path / "base", "llava_llama"))
    directory = write_adapter(tmp_path / "adapter", "plain")
    tensors = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        module_name = name.removeprefix(ADAPTER_PREFIX)
        tensors[ADAPTER_PREFIX + cases.renamed(module_name, layout)] = tensor
    save_file(tensors, directory / WEIGHTS)

    load_adapter(model, directory)

    assert_close(last_logits(model), LOGITS["plain: on"], 1e-5)


def test_the_directory_of_an_adapter_is_no_model(tmp_path):
    """The message names the base model, and the option for the adapter."""
    adapter = write_adapter(
        tmp_path / "adapter", "plain", {"base_model_name_or_path": "models/llava"}
    )

    with pytest.raises(InputError, match=r"models/llava.*--adapter"):
        load_model(adapter)


# --- what is refused ---

LORA_A = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
VISION_LORA_A = (
    "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
)
# Changes of adapter_config.json, and words of the message.
UNSUPPORTED_CONFIGS = {
    "another method": ({"peft_type": "IA3"}, ["peft_type 'IA3'", "LORA"]),
    "DoRA": ({"use_dora": True}, ["use_dora"]),
    "biases": ({"bias": "all"}, ["bias 'all'"]),
    "ranks by module": ({"rank_pattern": {"q_proj": 8}}, ["rank_pattern"]),
    "an initialization that changes the base": (
        {"init_lora_weights": "pissa"},
        ["init_lora_weights 'pissa'"],
    ),
    "an unknown field": ({"use_novelty": {"strength": 1}}, ["use_novelty"]),
    "another saved module": ({"modules_to_save": ["lm_head"]}, ["modules_to_save", "lm_head"]),
    "no rank": ({"r": None}, ["no r"]),
    "r is text": ({"r": "x"}, ["r"]),
    "r is negative": ({"r": -1}, ["r"]),
    "r is no whole number": ({"r": 1.5}, ["r"]),
    "r is a bool": ({"r": True}, ["r"]),
    "lora_alpha is text": ({"lora_alpha": "x"}, ["lora_alpha"]),
    "lora_alpha is a list": ({"lora_alpha": []}, ["lora_alpha"]),
    "modules_to_save is a number": ({"modules_to_save": 3}, ["modules_to_save"]),
    "modules_to_save is nested": (
        {"modules_to_save": [["multi_modal_projector"]]},
        ["modules_to_save"],
    ),
}
# Changes of the tensors, and words of the message.
UNSUPPORTED_TENSORS = {
    "missing tensor": ({LORA_A: None}, [WEIGHTS, "layers.1.mlp.up_proj.lora_A"]),
    "tensor of another shape": (
        {LORA_A: torch.zeros(5, 48)},
        [WEIGHTS, LORA_A, "(5, 48)", "(4, 48)"],
    ),
    "adapter of the vision tower": (
        {VISION_LORA_A: torch.zeros(4, 32)},
        [WEIGHTS, "vision_tower.encoder.layers.0.self_attn.q_proj.lora_A", "no place"],
    ),
}


def assert_refused(adapter, tmp_path, words):
    """Fail unless an adapter is refused in one line with its directory and these words."""
    model = load_model(cases.write(tmp_path / "model", "llava_llama"))
    with pytest.raises(InputError) as error:
        load_adapter(model, adapter)
    message = str(error.value)
    assert "\n" not in message
    for word in [str(adapter), *words]:
        assert word in message


@pytest.mark.parametrize("name", UNSUPPORTED_CONFIGS)
def test_unsupported_configs_are_refused_by_name(name, tmp_path):
    changes, words = UNSUPPORTED_CONFIGS[name]
    adapter = write_adapter(tmp_path / "adapter", "plain", config_changes=changes)

    assert_refused(adapter, tmp_path, [CONFIG, *words])


@pytest.mark.parametrize("name", UNSUPPORTED_TENSORS)
def test_unsupported_tensors_are_refused_by_name(name, tmp_path):
    changes, words = UNSUPPORTED_TENSORS[name]
    adapter = write_adapter(tmp_path / "adapter", "plain", tensor_changes=changes)

    assert_refused(adapter, tmp_path, words)
