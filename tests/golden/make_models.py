"""Write tests/golden/models/: what transformers computes for the tiny random models of cases.py.

Run it by hand with transformers 5: `python tests/golden/make_models.py`.
"""

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
PACKAGES = ("transformers", "torch", "numpy")
FAMILIES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava_next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
}
disable_progress_bar()


def new_model(raw_config):
    """Return a model with the configuration of a config.json and random weights."""
    config_class, model_class = FAMILIES[raw_config["model_type"]]
    own_copy = json.loads(json.dumps(raw_config))  # transformers changes what it is given
    return model_class(config_class(**own_copy))


def skeleton(raw_config):
    """Return the model of a config.json without weights."""
    with torch.device("meta"):
        return new_model(raw_config)


def build(raw_config):
    """Return the model of a config.json with the weights of cases.py."""
    model = new_model(raw_config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = torch.from_numpy(cases.weight(name, tuple(parameter.shape)))
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


def tensor_shapes(model):
    """Return {tensor name: shape} of a model's checkpoint, a tied head not counted."""
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    expected_names = set(model.state_dict())
    if model.config.tie_word_embeddings:
        expected_names.remove("lm_head.weight")
    assert set(shapes) == expected_names
    return shapes


def image_inputs(config, sizes):
    """Return pixel_values (and image_sizes) of the images of one prompt."""
    tile_size = config.vision_config.image_size
    if config.model_type == "llava":
        tiles = [torch.from_numpy(cases.pixels(size, 1, tile_size)) for size in sizes]
        return {"pixel_values": torch.cat(tiles)}
    counts = []
    for size in sizes:
        counts.append(image_size_to_num_patches(size, config.image_grid_pinpoints, tile_size))
    pixel_values = torch.zeros(len(sizes), max(counts), 3, tile_size, tile_size)
    for i, size in enumerate(sizes):
        tiles = cases.pixels(size, counts[i], tile_size)
        pixel_values[i, : counts[i]] = torch.from_numpy(tiles)
    return {"pixel_values": pixel_values, "image_sizes": torch.tensor(sizes)}


def prompt_inputs(model, prompt, sizes):
    """Return what `forward` and `generate` take for one prompt with its images."""
    inputs = {}
    token_counts = []
    if sizes:
        inputs = image_inputs(model.config, sizes)
        features = model.get_image_features(**inputs, return_dict=True).pooler_output
        token_counts = [len(image_tokens) for image_tokens in features]
    remaining_counts = iter(token_counts)
    ids = []
    for token_id in prompt:
        if token_id == cases.IMAGE:
            ids += [token_id] * next(remaining_counts)
        else:
            ids.append(token_id)
    ids = torch.tensor([ids])
    return {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}


@torch.no_grad()
def golden_arrays(model):
    """Return the golden arrays of one model.

    For each image: the vision tower's features, their projection, and the tokens they become. For
    each prompt: the logits at text positions, and 64 greedy ids.
    """
    arrays = {}
    projector_call = {}

    def remember(_, inputs, output):
        projector_call["features"] = inputs[0]
        projector_call["projected"] = output

    model.model.multi_modal_projector.register_forward_hook(remember)
    for i, (prompt, sizes) in enumerate(cases.PROMPTS):
        for size in sizes:
            inputs = image_inputs(model.config, [size])
            image_tokens = model.get_image_features(**inputs, return_dict=True).pooler_output[0]
            arrays[f"features {size}"] = projector_call["features"]
            arrays[f"projected {size}"] = projector_call["projected"]
            arrays[f"vectors {size}"] = image_tokens
        inputs = prompt_inputs(model, prompt, sizes)
        ids = inputs["input_ids"][0]
        is_text = ids != cases.IMAGE
        arrays[f"logits {i}"] = model(**inputs).logits[0][is_text]
        generated = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, len(ids) :]
        arrays[f"greedy {i}"] = generated.to(torch.int16)
    return {name: array.numpy() for name, array in arrays.items()}


def check_layouts(case, model):
    """Assert that transformers itself reads every layout of cases.py, and saves it alike."""
    for layout in ("hub", "flat", "memory", "fresh"):
        with tempfile.TemporaryDirectory() as folder:
            directory = cases.write(Path(folder) / "model", case, layout)
            loaded, info = type(model).from_pretrained(directory, output_loading_info=True)
            assert not any(info.values()), (case, layout, info)
            for weight, expected in zip(loaded.parameters(), model.parameters(), strict=True):
                assert torch.equal(weight, expected), (case, layout)
            loaded.save_pretrained(Path(folder) / "saved")
            with safe_open(Path(folder) / "saved" / "model.safetensors", "pt") as saved:
                assert set(saved.keys()) == set(cases.tensors(case, layout)), (case, layout)


def main():
    # 1. Tensor names, and config.json as transformers 5 saves it. The public models are not built.
    names = {}
    configs = {}
    for case, raw_config in {**cases.CONFIGS, **cases.PUBLIC}.items():
        model = skeleton(raw_config)
        names[case] = tensor_shapes(model)
        configs[case] = json.loads(model.config.to_json_string())
    (OUT / "names.json.gz").write_bytes(gzip.compress(json.dumps(names).encode(), mtime=0))

    # 2. The arrays of the tiny models.
    arrays = {}
    for case, raw_config in cases.CONFIGS.items():
        model = build(raw_config)
        check_layouts(case, model)
        for name, array in golden_arrays(model).items():
            arrays[f"{case}: {name}"] = array
    np.savez_compressed(OUT / "golden.npz", **arrays)

    # 3. The versions that computed them.
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        versions[package] = version(package)
    about = {"versions": versions, "configs": configs}
    (OUT / "golden.json").write_text(json.dumps(about) + "\n")


if __name__ == "__main__":
    main()
