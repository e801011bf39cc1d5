"""Checkpoint directories in and out: every layout of the names, every public model's list, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from golden.models import cases
from safetensors.torch import load_file, save_file
from golden_cases import PROMPTS, assert_close as close, encode_golden_images, prompt_logits

from minialign.models import checkpoint
from minialign.models.adapters import load_adapter, save_adapter
from minialign.models.checkpoint import (
    LAYOUTS,
    detect_layout,
    load_model,
    save_model,
    to_layout_name,
)
from minialign.models.config_json import parse_config
from minialign.models.llava import Llava
from minialign.utils.files import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
HEAD = "language_model.lm_head.weight"


@pytest.fixture()
def directory(tmp_path):
    """A small sound checkpoint, to be spoilt."""
    return cases.write(tmp_path / "model", "llava_llama")


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def shard(directory, weight_map=lambda names: {}):
    """Cut the weights in two shards; `weight_map` may change the index."""
    tensors, files = (
        load_file(directory / WEIGHTS),
        ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
    )
    names = {name: files[number % 2] for number, name in enumerate(sorted(tensors))}
    for file in files:
        save_file(
            {name: tensors[name] for name, where in names.items() if where == file},
            directory / file,
        )
    (directory / INDEX).write_text(
        json.dumps({"metadata": {}, "weight_map": names | weight_map(names)})
    )
    (directory / WEIGHTS).unlink()
    return names


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["llava_llama", "llava_qwen2_tied", "next_siglip_qwen2"])
def test_every_layout_is_read_and_kept(case, layout, tmp_path):
    """make_models.py holds the same of transformers, so what is saved here is what transformers reads."""
    source = cases.write(tmp_path / "source", case, layout)
    model = load_model(source)
    assert {
        to_layout_name(name, "memory"): list(p.shape) for name, p in model.named_parameters()
    } == cases.names()[case]
    save_model(model, source, tmp_path / "saved")
    same(
        load_file(tmp_path / "saved" / WEIGHTS),
        {name: torch.from_numpy(array) for name, array in cases.tensors(case, layout).items()},
    )
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == cases.CONFIGS[case]


@pytest.mark.parametrize("name", cases.PUBLIC)
def test_public_models_have_the_tensors_that_the_loader_expects(name):
    theirs = cases.names()[name]
    with torch.device("meta"):
        model = Llava(parse_config(cases.PUBLIC[name], "config.json"))
    for layout in LAYOUTS:
        assert {
            to_layout_name(ours, layout): list(p.shape) for ours, p in model.named_parameters()
        } == {cases.renamed(n, layout): s for n, s in theirs.items()}
        assert detect_layout({cases.renamed(n, layout) for n in theirs}) == layout


def test_shards_are_one_model(directory):
    whole = load_model(directory).state_dict()
    shard(directory)
    same(load_model(directory).state_dict(), whole)


def test_dtype_asked_for(directory):
    assert {p.dtype for p in load_model(directory).parameters()} == {torch.float32}
    assert {p.dtype for p in load_model(directory, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_buffers_of_old_files_are_passed_over(directory):
    """transformers 4.31 and older saved position_ids; they hold nothing that the shapes do not say."""
    save_file(
        load_file(directory / WEIGHTS)
        | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(10)[None]},
        directory / WEIGHTS,
    )
    load_model(directory)


def test_tied_head_may_be_stored_twice_but_not_differ(tmp_path):
    directory = cases.write(tmp_path / "model", "llava_qwen2_tied")
    tensors = load_file(directory / WEIGHTS)
    save_file(
        tensors | {HEAD: tensors["language_model.model.embed_tokens.weight"].clone()},
        directory / WEIGHTS,
    )
    load_model(directory)
    save_file(
        tensors | {HEAD: tensors["language_model.model.embed_tokens.weight"] + 1},
        directory / WEIGHTS,
    )
    with pytest.raises(InputError, match=f"{HEAD}.*tie_word_embeddings"):
        load_model(directory)


def without_head(directory):
    save_file(
        {name: tensor for name, tensor in load_file(directory / WEIGHTS).items() if name != HEAD},
        directory / WEIGHTS,
    )


def with_more(directory):
    save_file(
        load_file(directory / WEIGHTS) | {"language_model.model.layers.3.extra": torch.zeros(1)},
        directory / WEIGHTS,
    )


def mis_shaped(directory):
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors | {HEAD: tensors[HEAD].T.contiguous()}, directory / WEIGHTS)


def truncated(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:-5])


def truncated_header(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def not_safetensors(directory):
    (directory / WEIGHTS).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    )


def shard_gone(directory):
    (directory / shard(directory)[HEAD]).unlink()


def index_of_nothing(directory):
    shard(directory, lambda names: {"language_model.gone": names[HEAD]})


def index_of_the_wrong_shard(directory):
    shard(
        directory,
        lambda names: {HEAD: next(file for file in names.values() if file != names[HEAD])},
    )


def not_in_the_index(directory):
    file = directory / shard(directory)[HEAD]
    save_file(load_file(file) | {"language_model.unlisted": torch.zeros(1)}, file)


def pickle_only(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def no_weights(directory):
    (directory / WEIGHTS).unlink()


def no_config(directory):
    (directory / "config.json").unlink()


def changed_config(change):
    def spoil(directory):
        config = json.loads((directory / "config.json").read_text())
        change(config)
        (directory / "config.json").write_text(json.dumps(config))

    return spoil


SPOILT = {
    "missing tensor": (without_head, [HEAD, "missing"]),
    "unused tensor": (with_more, [WEIGHTS, "language_model.model.layers.3.extra"]),
    "mis-shaped tensor": (mis_shaped, [WEIGHTS, HEAD, "(48, 160)", "(160, 48)"]),
    "truncated file": (truncated, [WEIGHTS, "not a complete safetensors file"]),
    "truncated header": (truncated_header, [WEIGHTS, "not a complete safetensors file"]),
    "a pointer of git-lfs": (not_safetensors, [WEIGHTS, "not a complete safetensors file"]),
    "missing shard": (shard_gone, ["model-0000", "missing", INDEX]),
    "index naming a tensor that no shard has": (
        index_of_nothing,
        ["model-0000", INDEX, "language_model.gone"],
    ),
    "index naming the wrong shard": (index_of_the_wrong_shard, ["model-0000", INDEX, HEAD]),
    "a shard with a tensor that the index lacks": (
        not_in_the_index,
        ["model-0000", INDEX, "language_model.unlisted"],
    ),
    "pickle": (pickle_only, ["pytorch_model.bin", "safe_serialization"]),
    "no weights": (no_weights, [WEIGHTS, "no such file"]),
    "no config": (no_config, ["config.json", "no such file"]),
    "no vision_config": (
        changed_config(lambda c: c.pop("vision_config")),
        ["config.json", "vision_config"],
    ),
    "no text_config": (
        changed_config(lambda c: c.pop("text_config")),
        ["config.json", "text_config"],
    ),
    "model_type": (
        changed_config(lambda c: c.update(model_type="llava_onevision")),
        ["config.json", "llava_onevision", "supported: llava, llava_next"],
    ),
    "no model_type": (
        changed_config(lambda c: c.pop("model_type")),
        ["config.json", "model_type", "None"],
    ),
    "text model_type": (
        changed_config(lambda c: c["text_config"].update(model_type="gemma")),
        ["gemma", "llama, mistral, qwen2"],
    ),
    "vision model_type": (
        changed_config(lambda c: c["vision_config"].update(model_type="dinov2")),
        ["dinov2", "clip_vision_model, siglip_vision_model"],
    ),
    "rope of another type": (
        changed_config(
            lambda c: c["text_config"].update(rope_scaling={"type": "linear", "factor": 2})
        ),
        ["rope_scaling", "linear", "llama3"],
    ),
    "rope of another type in version 5": (
        changed_config(lambda c: c["text_config"].update(rope_parameters={"rope_type": "yarn"})),
        ["yarn", "llama3"],
    ),
    "half a rope_scaling": (
        changed_config(
            lambda c: c["text_config"].update(rope_scaling=cases.without(cases.LLAMA3, "factor"))
        ),
        ["rope_scaling", "factor"],
    ),
    "sliding window": (
        changed_config(
            lambda c: c["text_config"].update(
                model_type="mistral", num_key_value_heads=6, sliding_window=100
            )
        ),
        ["sliding_window 100", "512"],
    ),
    "several feature layers": (
        changed_config(lambda c: c.update(vision_feature_layer=[-2, -1])),
        ["vision_feature_layer", "[-2, -1]"],
    ),
    **{
        f"{part} {key} {value!r}": (
            changed_config(lambda c, part=part, key=key, value=value: c[part].update({key: value})),
            ["config.json"],
        )
        for part, key, *values in (
            ("text_config", "hidden_size", "x", -4, None),
            ("text_config", "num_attention_heads", 0, "4"),
            ("text_config", "num_hidden_layers", 1.5, 0, True),
            ("text_config", "rms_norm_eps", "x", None),
            ("text_config", "rope_theta", "x", []),
            ("text_config", "rope_parameters", 3),
            ("text_config", "rope_scaling", 3),
            ("text_config", "rope_scaling", cases.LLAMA3 | {"factor": "x"}),
            ("text_config", "max_position_embeddings", "x"),
            ("text_config", "head_dim", "x"),
            ("vision_config", "patch_size", 0, "x"),
            ("vision_config", "num_attention_heads", 5, 0),
            ("vision_config", "image_size", None),
        )
        for value in values
    },
    "grid pinpoints that are none": (
        changed_config(lambda c: c.update(model_type="llava_next", image_grid_pinpoints=[3])),
        ["config.json"],
    ),
    "an index of another shape": (
        lambda directory: (directory / INDEX).write_text('{"weight_map": ["model.safetensors"]}'),
        [INDEX, "download"],
    ),
    "an index of numbers": (
        lambda directory: (directory / INDEX).write_text('{"weight_map": {"lm_head.weight": 1}}'),
        [INDEX, "download"],
    ),
    "an index of nothing": (
        lambda directory: (directory / INDEX).write_text("{}"),
        [INDEX, "weight_map"],
    ),
    "AnyRes with CLS": (
        changed_config(
            lambda c: c.update(model_type="llava_next", vision_feature_select_strategy="full")
        ),
        ["'full'", "clip", "+1"],
    ),
    "AnyRes without a patch": (
        changed_config(lambda c: c.update(model_type="llava_next", vision_config=cases.SIGLIP)),
        ["'default'", "siglip", "-1"],
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_bad_checkpoints_are_refused_by_name(what, directory):
    spoil, words = SPOILT[what]
    spoil(directory)
    with pytest.raises(InputError) as error:
        load_model(directory)
    assert str(directory) in str(error.value) and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


# Adapters (tests/golden/make_adapters.py, where PEFT also reads what is saved here, with the same logits).
PEFT = json.loads((cases.HERE / "adapters.json").read_text())["adapters"]
LOGITS = np.load(cases.HERE / "adapters.npz")


def write_adapter(directory, name, changes=None, tensors=None):
    """The directory that PEFT saved, its weights drawn by name; `changes` and `tensors` add to config and weights."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(
        json.dumps(PEFT[name]["theirs"] | (changes or {}))
    )
    drawn = {
        where: torch.from_numpy(cases.adapter_weight(where, shape))
        for where, shape in PEFT[name]["shapes"].items()
    }
    save_file(
        {
            where: tensor
            for where, tensor in (drawn | (tensors or {})).items()
            if tensor is not None
        },
        directory / "adapter_model.safetensors",
    )
    return directory


def last_logits(model):
    """Logits (prompts, V) behind every prompt of cases.py."""
    return torch.stack(
        [out[-1] for out in prompt_logits(model, PROMPTS, encode_golden_images(model))]
    )


@pytest.mark.parametrize("name", cases.ADAPTERS)
def test_adapters_of_peft(name, tmp_path):
    """On, off, and merged; off is the base to the bit. What is saved again is PEFT's file to the bit, and a config that PEFT took."""
    source = cases.write(tmp_path / "base", cases.ADAPTERS[name][0])
    model = load_model(source)
    base = last_logits(model)
    policy = load_adapter(model, write_adapter(tmp_path / "theirs", name))
    close(last_logits(model), LOGITS[f"{name}: on"], 1e-5)
    with policy.reference():
        assert torch.equal(last_logits(model), base)
    close(base, LOGITS[f"{name}: off"], 1e-5)
    assert np.abs(LOGITS[f"{name}: on"] - LOGITS[f"{name}: off"]).max() > 0.1

    save_adapter(policy, tmp_path / "ours", "the base")
    same(
        load_file(tmp_path / "ours" / "adapter_model.safetensors"),
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"),
    )
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text()) == PEFT[name]["ours"]

    policy.merge()
    close(last_logits(model), LOGITS[f"{name}: on"], 1e-5)
    save_model(model, source, tmp_path / "merged")
    assert torch.equal(last_logits(load_model(tmp_path / "merged")), last_logits(model))
    assert load_file(tmp_path / "merged" / WEIGHTS).keys() == load_file(source / WEIGHTS).keys()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapters_made_under_any_layout(layout, tmp_path):
    """Adapters of older transformers name the base's modules as it did."""
    model = load_model(cases.write(tmp_path / "base", "llava_llama"))
    directory = write_adapter(tmp_path / "adapter", "plain")
    tensors, prefix = load_file(directory / "adapter_model.safetensors"), "base_model.model."
    save_file(
        {
            prefix + cases.renamed(name.removeprefix(prefix), layout): tensor
            for name, tensor in tensors.items()
        },
        directory / "adapter_model.safetensors",
    )
    load_adapter(model, directory)
    close(last_logits(model), LOGITS["plain: on"], 1e-5)


LORA_A = "base_model.model.model.language_model.layers.1.mlp.up_proj.lora_A.weight"
STRANGE_ADAPTERS = {
    "another method": ({"peft_type": "IA3"}, {}, ["peft_type 'IA3'", "LORA"]),
    "DoRA": ({"use_dora": True}, {}, ["use_dora"]),
    "biases": ({"bias": "all"}, {}, ["bias 'all'"]),
    "ranks by module": ({"rank_pattern": {"q_proj": 8}}, {}, ["rank_pattern"]),
    "a start that changes the base": (
        {"init_lora_weights": "pissa"},
        {},
        ["init_lora_weights 'pissa'"],
    ),
    "what is yet to be invented": ({"use_novelty": {"strength": 1}}, {}, ["use_novelty"]),
    "another module saved": ({"modules_to_save": ["lm_head"]}, {}, ["modules_to_save", "lm_head"]),
    "no rank": ({"r": None}, {}, ["no r"]),
    **{
        f"{key} {value!r}": ({key: value}, {}, ["adapter_config.json", key])
        for key, *values in (
            ("r", "x", -1, 1.5, True),
            ("lora_alpha", "x", []),
            ("modules_to_save", 3, [["multi_modal_projector"]]),
        )
        for value in values
    },
    "missing tensor": (
        {},
        {LORA_A: None},
        ["adapter_model.safetensors", "layers.1.mlp.up_proj.lora_A"],
    ),
    "mis-shaped tensor": ({}, {LORA_A: torch.zeros(5, 48)}, [LORA_A, "(5, 48)", "(4, 48)"]),
    "the vision tower, hit by a suffix": (
        {},
        {
            "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(
                4, 32
            )
        },
        ["vision_tower.encoder.layers.0.self_attn.q_proj.lora_A", "no place"],
    ),
}


@pytest.mark.parametrize("what", STRANGE_ADAPTERS)
def test_other_adapters_are_refused_by_name(what, directory, tmp_path):
    changes, tensors, words = STRANGE_ADAPTERS[what]
    adapter = write_adapter(tmp_path / "adapter", "plain", changes, tensors)
    with pytest.raises(InputError) as error:
        load_adapter(load_model(directory), adapter)
    assert str(adapter) in str(error.value) and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_directory_that_holds_an_adapter_names_its_base(tmp_path):
    adapter = write_adapter(
        tmp_path / "adapter", "plain", {"base_model_name_or_path": "models/llava"}
    )
    with pytest.raises(InputError, match=r"models/llava.*--adapter"):
        load_model(adapter)


def own_memory():
    """Bytes of the process that no file backs."""
    lines = Path("/proc", "self", "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@pytest.mark.skipif(
    not Path("/proc", "self", "status").exists(), reason="the figure comes from Linux"
)
def test_mapped_weights_take_no_memory_of_their_own(tmp_path):
    """A model in the file's dtype is the file, mapped: what loading adds to the process's own memory is a small part of its size."""
    directory = cases.write(tmp_path / "model", "llava_llama")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["vocab_size"] = 500_000  # two tables of 500,000 x 48 in bfloat16: 96 MB
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(directory / WEIGHTS).items()}
    tables = dict.fromkeys((HEAD, "language_model.model.embed_tokens.weight"))
    save_file(
        tensors | {name: torch.zeros(500_000, 48, dtype=torch.bfloat16) for name in tables},
        directory / WEIGHTS,
    )
    before = own_memory()
    model = load_model(directory)
    assert own_memory() - before < 0.2 * (directory / WEIGHTS).stat().st_size
    assert model.vocab_head.shape == (500_000, 48) and model.vocab_head.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device, named", [("cpu", "cpu"), ("cuda", "cuda:3"), (torch.device("cuda", 1), "cuda:1")]
)
def test_weights_go_to_the_process_s_own_gpu(monkeypatch, device, named):
    """ "cuda" alone is the first GPU to safetensors, whatever torchrun made this process's."""
    opened = []
    monkeypatch.setattr(
        checkpoint, "safe_open", lambda path, framework, device: opened.append(device)
    )
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    checkpoint.open_tensors("model.safetensors", device)
    assert opened == [named]
