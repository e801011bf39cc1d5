"""Writes tests/golden/models/adapters.{npz,json}: logits that PEFT gives with the adapters of cases.py on and off. Needs transformers 5 and peft.

On the way, minialign reads what PEFT saved and PEFT reads what minialign saved; run it with PYTHONPATH at the project's root.
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


@torch.no_grad()
def last_logits(model):
    """Logits (prompts, V) behind every prompt of cases.py."""
    base = model.get_base_model()
    return torch.stack(
        [model(**prompt_inputs(base, *prompt)).logits[0, -1] for prompt in cases.PROMPTS]
    ).numpy()


def saved_name(name):
    """The name in PEFT's file of a parameter in memory."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def main():
    arrays, about = {}, {}
    for name, (case, arguments) in cases.ADAPTERS.items():
        model = get_peft_model(
            build(cases.CONFIGS[case]), LoraConfig(task_type="CAUSAL_LM", **arguments)
        ).eval()
        shapes = {
            saved_name(where): tuple(p.shape)
            for where, p in model.named_parameters()
            if p.requires_grad
        }
        for where, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.from_numpy(
                    cases.adapter_weight(saved_name(where), tuple(parameter.shape))
                )
        arrays[f"{name}: on"] = last_logits(model)
        with model.disable_adapter():
            arrays[f"{name}: off"] = last_logits(model)
        with tempfile.TemporaryDirectory() as room:
            theirs, ours = Path(room) / "theirs", Path(room) / "ours"
            model.save_pretrained(theirs)
            with safe_open(theirs / "adapter_model.safetensors", "pt") as file:
                assert {
                    where: tuple(file.get_slice(where).get_shape()) for where in file.keys()
                } == shapes
            save_adapter(
                load_adapter(load_model(cases.write(Path(room) / "base", case)), theirs),
                ours,
                "the base",
            )
            again = PeftModel.from_pretrained(build(cases.CONFIGS[case]), ours)
            assert np.array_equal(last_logits(again), arrays[f"{name}: on"])
            about[name] = {
                "shapes": shapes,
                "theirs": json.loads((theirs / "adapter_config.json").read_text()),
                "ours": json.loads((ours / "adapter_config.json").read_text()),
            }
    np.savez_compressed(OUT / "adapters.npz", **arrays)
    versions = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("transformers", "peft", "torch", "numpy")},
    }
    (OUT / "adapters.json").write_text(json.dumps({"versions": versions, "adapters": about}) + "\n")


if __name__ == "__main__":
    main()
