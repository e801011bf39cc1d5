"""Writes tests/golden/models/{golden.npz,golden.json,names.json.gz}: what transformers computes for the tiny random models of cases.py. Needs transformers 5."""

import gzip
import json
import platform
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from models import cases
from safetensors import safe_open
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.utils.logging import disable_progress_bar

OUT = Path(__file__).parent / "models"
disable_progress_bar()
KINDS = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}


def skeleton(raw):
    """The model of a config.json, without weights."""
    config_class, model_class = KINDS[raw["model_type"]]
    with torch.device("meta"):
        return model_class(config_class(**json.loads(json.dumps(raw))))


def shapes(model):
    """{tensor name: shape} of what a checkpoint of the model holds: parameters, a tied head once, and no buffers."""
    found = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    assert found.keys() == model.state_dict().keys() - (
        {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    )
    return found


def build(raw):
    """The model of a config.json, its weights drawn by name."""
    config_class, model_class = KINDS[raw["model_type"]]
    model = model_class(config_class(**json.loads(json.dumps(raw)))).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(cases.weight(name, tuple(parameter.shape)))
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


def picture_inputs(config, sizes):
    """pixel_values (and image_sizes) of one prompt's pictures."""
    side = config.vision_config.image_size
    if config.model_type == "llava":
        return {
            "pixel_values": torch.cat(
                [torch.from_numpy(cases.pixels(size, 1, side)) for size in sizes]
            )
        }
    counts = [image_size_to_num_patches(size, config.image_grid_pinpoints, side) for size in sizes]
    padded = torch.zeros(len(sizes), max(counts), 3, side, side)
    for row, size, count in zip(padded, sizes, counts, strict=True):
        row[:count] = torch.from_numpy(cases.pixels(size, count, side))
    return {"pixel_values": padded, "image_sizes": torch.tensor(sizes)}


def prompt_inputs(model, prompt, sizes):
    """What forward and generate take for one prompt with its pictures."""
    inputs = picture_inputs(model.config, sizes) if sizes else {}
    counts = iter(
        [
            len(vectors)
            for vectors in model.get_image_features(**inputs, return_dict=True).pooler_output
        ]
        if sizes
        else []
    )
    ids = torch.tensor(
        [[copy for id in prompt for copy in [id] * (next(counts) if id == cases.IMAGE else 1)]]
    )
    return inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def golden(model):
    """Arrays of one model: by picture what tower, projector and packing give, by prompt the logits at text positions and 64 greedy ids."""
    arrays, seen = {}, {}
    model.model.multi_modal_projector.register_forward_hook(
        lambda _, inputs, output: seen.update(features=inputs[0], projected=output)
    )
    for number, (prompt, sizes) in enumerate(cases.PROMPTS):
        for size in sizes:
            vectors = model.get_image_features(
                **picture_inputs(model.config, [size]), return_dict=True
            ).pooler_output[0]
            arrays |= {
                f"features {size}": seen["features"],
                f"projected {size}": seen["projected"],
                f"vectors {size}": vectors,
            }
        inputs = prompt_inputs(model, prompt, sizes)
        ids = inputs["input_ids"][0]
        arrays[f"logits {number}"] = model(**inputs).logits[0][ids != cases.IMAGE]
        arrays[f"greedy {number}"] = model.generate(**inputs, max_new_tokens=64, do_sample=False)[
            0, len(ids) :
        ].to(torch.int16)
    return {name: array.numpy() for name, array in arrays.items()}


def check_layouts(case, model):
    """transformers itself reads every layout of cases.py and keeps it."""
    for layout in ("hub", "flat", "memory", "fresh"):
        with tempfile.TemporaryDirectory() as room:
            loaded, info = type(model).from_pretrained(
                cases.write(Path(room) / "model", case, layout), output_loading_info=True
            )
            assert not any(info.values()), (case, layout, info)
            assert all(
                torch.equal(a, b)
                for a, b in zip(loaded.parameters(), model.parameters(), strict=True)
            ), (case, layout)
            loaded.save_pretrained(Path(room) / "saved")
            with safe_open(Path(room) / "saved" / "model.safetensors", "pt") as saved:
                assert set(saved.keys()) == set(cases.tensors(case, layout)), (case, layout)


def main():
    arrays, names, configs = {}, {}, {}
    for name, raw in (cases.CONFIGS | cases.PUBLIC).items():
        model = skeleton(raw)
        names[name], configs[name] = (
            shapes(model),
            json.loads(model.config.to_json_string()),
        )  # as transformers 5 would save it
    (OUT / "names.json.gz").write_bytes(gzip.compress(json.dumps(names).encode(), mtime=0))
    for name, raw in cases.CONFIGS.items():
        model = build(raw)
        check_layouts(name, model)
        arrays |= {f"{name}: {what}": array for what, array in golden(model).items()}
    np.savez_compressed(OUT / "golden.npz", **arrays)
    about = {
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("transformers", "torch", "numpy")},
        },
        "configs": configs,
    }
    (OUT / "golden.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
