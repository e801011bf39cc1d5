"""LoRA adapters in PEFT's files: the same logits, the same files, and what is refused.

tests/golden/make_adapters.py made the golden files. There PEFT also reads what is saved here.
"""

import json

import numpy as np
import pytest
import torch
from golden.models import cases
from golden_cases import assert_close, assert_same_tensors, last_logits
from model_helpers import move_weights
from safetensors.torch import load_file, save_file

from minialign.models.adapters import ADAPTER_PREFIX, load_adapter, save_adapter
from minialign.models.checkpoint import LAYOUTS, load_model, save_model
from minialign.models.policy import Policy
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
    "biases of LoRA": ({"lora_bias": True}, ["lora_bias", "bias"]),
    "single tokens": ({"trainable_token_indices": [3]}, ["trainable_token_indices", "tokens"]),
    "parameters": ({"target_parameters": ["x"]}, ["target_parameters"]),
    "scales by module": ({"alpha_pattern": {"q_proj": 8}}, ["alpha_pattern", "scales"]),
    "transposed weights": ({"fan_in_fan_out": True}, ["fan_in_fan_out"]),
    "repeated layers": ({"layer_replication": [[0, 2], [1, 3]]}, ["layer_replication"]),
    "what to do": ({"use_dora": True}, ["DoRA also scales", "merge_and_unload"]),
    "rsLoRA is text": ({"use_rslora": "false"}, ["use_rslora"]),
    "lora_alpha is NaN": ({"lora_alpha": float("nan")}, ["lora_alpha"]),
    "lora_alpha is infinite": ({"lora_alpha": float("inf")}, ["lora_alpha"]),
    "lora_alpha is 0": ({"lora_alpha": 0}, ["lora_alpha"]),
    "lora_alpha is a bool": ({"lora_alpha": True}, ["lora_alpha"]),
    "r is beyond the weights": ({"r": 10**9}, ["adapter_model", "1000000000", "lora_A"]),
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
# Tensors of a modified model's other parts.
HEAD = "base_model.model.lm_head.weight"
PROJECTOR_LORA_A = "base_model.model.model.multi_modal_projector.linear_1.lora_A.weight"
EMBEDDINGS = "base_model.model.model.language_model.embed_tokens.weight"
# Changes of the tensors, and words of the message.
UNSUPPORTED_TENSORS = {
    "missing tensor": ({LORA_A: None}, [WEIGHTS, "layers.1.mlp.up_proj.lora_A"]),
    "tensor of another shape": (
        {LORA_A: torch.zeros(5, 48)},
        [WEIGHTS, LORA_A, "(5, 48)", "(4, 48)"],
    ),
    "adapter of the vision tower": (
        {VISION_LORA_A: torch.zeros(4, 32)},
        [
            WEIGHTS,
            "vision_tower.encoder.layers.0.self_attn.q_proj.lora_A",
            "no place",
            "by suffix",
            "merge_and_unload",
        ],
    ),
    "vocabulary head": ({HEAD: torch.zeros(160, 48)}, [HEAD, "vocabulary head"]),
    "embedding table": ({EMBEDDINGS: torch.zeros(160, 48)}, [EMBEDDINGS, "embedding table"]),
    "adapter of the projector": (
        {PROJECTOR_LORA_A: torch.zeros(4, 32)},
        [PROJECTOR_LORA_A, "by LoRA"],
    ),
    "NaN": ({LORA_A: torch.full((4, 48), float("nan"))}, [WEIGHTS, LORA_A, "NaN"]),
    "integers": ({LORA_A: torch.zeros(4, 48, dtype=torch.int8)}, [WEIGHTS, LORA_A, "I8"]),
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

    assert_refused(adapter, tmp_path, ["adapter_", *words])


@pytest.mark.parametrize("name", UNSUPPORTED_TENSORS)
def test_unsupported_tensors_are_refused_by_name(name, tmp_path):
    changes, words = UNSUPPORTED_TENSORS[name]
    adapter = write_adapter(tmp_path / "adapter", "plain", tensor_changes=changes)

    assert_refused(adapter, tmp_path, words)


@pytest.mark.parametrize("kept_layers", [[0], [0, 2], [1, 2]])
def test_adapters_of_some_layers_are_refused_with_the_reason(kept_layers, tmp_path):
    """PEFT makes them by layers_to_transform, or by a pattern of target modules."""
    adapter = write_adapter(
        tmp_path / "adapter", "plain", {"layers_to_transform": kept_layers, "layers_pattern": None}
    )
    tensors = {}
    for name, tensor in load_file(adapter / WEIGHTS).items():
        layer = name.partition(".layers.")[2].partition(".")[0]
        if not layer or int(layer) in kept_layers:
            tensors[name] = tensor
    save_file(tensors, adapter / WEIGHTS)

    words = [WEIGHTS, "q_proj", f"{len(kept_layers)} of 3 layers", "layers_to_transform"]
    assert_refused(adapter, tmp_path, words)


def test_all_layers_may_be_named(tmp_path):
    model = load_model(cases.write(tmp_path / "base", "llava_llama"))

    load_adapter(
        model, write_adapter(tmp_path / "adapter", "plain", {"layers_to_transform": [0, 1, 2]})
    )

    assert_close(last_logits(model), LOGITS["plain: on"], 1e-5)


# What PEFT 0.21 writes as eva_config if the ranks stay equal.
EVA = {
    "rho": 1.0,
    "tau": 0.99,
    "use_label_mask": True,
    "label_mask_value": -100,
    "whiten": False,
    "adjust_scaling_factors": True,
}


@pytest.mark.parametrize(
    "changes",
    [{"init_lora_weights": "eva", "eva_config": EVA}, {"init_lora_weights": "mica"}],
    ids=["eva", "mica"],
)
def test_an_initialization_that_leaves_the_base_alone_is_accepted(changes, tmp_path):
    """EVA sets lora_A and MiCA lora_B. The other matrix is zero at first."""
    model = load_model(cases.write(tmp_path / "base", "llava_llama"))

    load_adapter(model, write_adapter(tmp_path / "adapter", "plain", changes))

    assert_close(last_logits(model), LOGITS["plain: on"], 1e-5)


def test_eva_with_different_ranks_is_refused_for_these(tmp_path):
    """A rho above 1 gives some modules a higher rank and others a lower one."""
    changes = {
        "init_lora_weights": "eva",
        "eva_config": EVA | {"rho": 2.0},
        "rank_pattern": {"q_proj": 5, "up_proj": 3},
    }
    adapter = write_adapter(tmp_path / "adapter", "plain", changes)

    assert_refused(adapter, tmp_path, ["rank_pattern", "modules have different ranks"])


def test_an_adapter_without_lora_is_refused(tmp_path):
    adapter = write_adapter(tmp_path / "adapter", "plain")
    save_file({}, adapter / WEIGHTS)

    assert_refused(adapter, tmp_path, [WEIGHTS, "no LoRA"])


@pytest.mark.parametrize(
    "name, words", [("adapter", ["--adapter", "run/adapter"]), ("model", ["--model", "run/model"])]
)
def test_the_folder_of_a_run_is_no_adapter(name, words, tmp_path):
    (tmp_path / "run" / name).mkdir(parents=True)

    assert_refused(tmp_path / "run", tmp_path, words)


def test_other_directories_are_no_adapters(tmp_path):
    assert_refused(tmp_path / "gone", tmp_path, ["no such folder"])
    (tmp_path / "adapter_model.safetensors").touch()
    file = tmp_path / "adapter_model.safetensors"
    assert_refused(file, tmp_path, ["is a file", f"give its folder, {tmp_path}"])
    assert_refused(cases.write(tmp_path / "other", "llava_llama"), tmp_path, ["a model", "--model"])
    pickled = write_adapter(tmp_path / "pickled", "plain")
    (pickled / WEIGHTS).rename(pickled / "adapter_model.bin")
    assert_refused(pickled, tmp_path, ["adapter_model.bin", "safe_serialization"])


# --- the base of an adapter ---


@pytest.fixture()
def base(tmp_path):
    """Write a base model."""
    return cases.write(tmp_path / "base", "llava_llama")


@pytest.fixture()
def our_adapter(base, tmp_path):
    """Write an adapter as a run does, after training has moved all of its weights."""
    policy = Policy(load_model(base), rank=2, alpha=4)
    move_weights(policy)
    save_adapter(policy, tmp_path / "adapter", base)
    return tmp_path / "adapter"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_adapter_knows_its_base(dtype, base, our_adapter, tmp_path, capsys):
    """The dtype of the model, the layout and the name of its folder do not matter."""
    save_model(load_model(base), base, tmp_path / "copy")

    load_adapter(load_model(tmp_path / "copy", dtype), our_adapter, tmp_path / "copy")

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.2.mlp.down_proj.weight",
        "multi_modal_projector.linear_2.bias",
        "vision_tower.vision_model.embeddings.class_embedding",
    ],
)
def test_an_adapter_on_other_weights_is_put_on_with_a_warning(
    name, base, our_adapter, tmp_path, capsys
):
    tensors = load_file(base / "model.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, base / "model.safetensors")

    load_adapter(load_model(base), our_adapter, base)

    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert str(our_adapter) in warning
    assert f"trained on other weights than those of {base}" in warning


def test_an_adapter_of_peft_is_compared_by_the_name_of_its_base(base, tmp_path, capsys):
    same = write_adapter(tmp_path / "same", "plain", {"base_model_name_or_path": "hub/base"})
    load_adapter(load_model(base), same, base)
    assert capsys.readouterr().err == ""

    other = write_adapter(tmp_path / "other", "plain", {"base_model_name_or_path": "hub/llava"})
    load_adapter(load_model(base), other, base)
    warning = capsys.readouterr().err
    assert "hub/llava" in warning
    assert str(base) in warning
