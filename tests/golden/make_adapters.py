"""Write tests/golden/models/adapters.{npz,json}: logits by PEFT with adapters on and off.

Run it by hand with transformers 5 and peft, with PYTHONPATH at the project's root. On the way,
minialign reads what PEFT saved, and PEFT reads what minialign saved.
"""

import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from make_models import OUT, build, prompt_inputs
from models import cases
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open

from minialign.models.adapters import load_adapter, save_adapter
from minialign.models.checkpoint import load_model

PACKAGES = ("transformers", "peft", "torch", "numpy")


@torch.no_grad()
def last_logits(model):
    """Return the logits (prompts, V) of the token after every prompt of cases.py."""
    base_model = model.get_base_model()
    logits = []
    for prompt, sizes in cases.PROMPTS:
        inputs = prompt_inputs(base_model, prompt, sizes)
        logits.append(model(**inputs).logits[0, -1])
    return torch.stack(logits).numpy()


def name_in_file(name):
    """Return the name that a parameter in memory has in PEFT's file."""
    name = name.replace(".modules_to_save.default.", ".")
    return name.replace(".default.", ".")


def draw_weights(model):
    """Give the trainable parameters of a PEFT model their weights, and return their shapes."""
    shapes = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            saved_name = name_in_file(name)
            shapes[saved_name] = tuple(parameter.shape)
            weight = cases.adapter_weight(saved_name, shapes[saved_name])
            parameter.data = torch.from_numpy(weight)
    return shapes


def shapes_in_file(path):
    """Return {name: shape} of a safetensors file."""
    shapes = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():
            shapes[name] = tuple(file.get_slice(name).get_shape())
    return shapes


def golden_of(case, arguments, folder):
    """Return the arrays and the JSON of one adapter, which is saved by PEFT and by minialign."""
    # 1. Logits with the adapter on and off.
    model = build(cases.CONFIGS[case])
    peft_model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **arguments)).eval()
    shapes = draw_weights(peft_model)
    logits_on = last_logits(peft_model)
    with peft_model.disable_adapter():
        logits_off = last_logits(peft_model)

    # 2. The adapter by way of PEFT's file, minialign and minialign's file, unchanged.
    peft_folder = folder / "theirs"
    our_folder = folder / "ours"
    peft_model.save_pretrained(peft_folder)
    assert shapes_in_file(peft_folder / "adapter_model.safetensors") == shapes
    base = load_model(cases.write(folder / "base", case))
    save_adapter(load_adapter(base, peft_folder), our_folder, "the base")
    reloaded = PeftModel.from_pretrained(build(cases.CONFIGS[case]), our_folder)
    assert np.array_equal(last_logits(reloaded), logits_on)

    arrays = {"on": logits_on, "off": logits_off}
    about = {
        "shapes": shapes,
        "theirs": json.loads((peft_folder / "adapter_config.json").read_text()),
        "ours": json.loads((our_folder / "adapter_config.json").read_text()),
    }
    return arrays, about


def main():
    all_arrays = {}
    adapters = {}
    for name, (case, arguments) in cases.ADAPTERS.items():
        with tempfile.TemporaryDirectory() as folder:
            arrays, adapters[name] = golden_of(case, arguments, Path(folder))
        for state, array in arrays.items():
            all_arrays[f"{name}: {state}"] = array
    np.savez_compressed(OUT / "adapters.npz", **all_arrays)
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = version(package)
    about = {"versions": versions, "adapters": adapters}
    (OUT / "adapters.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
