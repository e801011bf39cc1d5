"""Checkpoint directories: every layout is read and written, damaged weights are refused."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from golden.models import cases
from golden_cases import assert_same_tensors, last_logits
from safetensors.torch import load_file, save_file

from minialign.models import safetensors_files
from minialign.models.checkpoint import (
    LAYOUTS,
    detect_layout,
    fingerprint,
    load_model,
    save_model,
    to_layout_name,
    to_our_name,
)
from minialign.models.config_json import parse_config
from minialign.models.llava import Llava
from minialign.utils.files import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
HEAD = "language_model.lm_head.weight"
PROCESS_STATUS = Path("/proc", "self", "status")
NORM = "language_model.model.norm.weight"
EMBEDDINGS = "language_model.model.embed_tokens.weight"


@pytest.fixture()
def directory(tmp_path):
    """Write a small checkpoint for a test to damage."""
    return cases.write(tmp_path / "model", "llava_llama")


def change_weights(directory, changes):
    """Add or replace tensors of a checkpoint. None removes a tensor."""
    tensors = load_file(directory / WEIGHTS) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, directory / WEIGHTS)


def write_shards(directory, index_changes=None):
    """Cut the weights in two shards with an index, and return the index: tensor name -> shard."""
    tensors = load_file(directory / WEIGHTS)
    shard_of = {}
    tensors_of = {shard: {} for shard in SHARDS}
    for i, name in enumerate(sorted(tensors)):
        shard = SHARDS[i % 2]
        shard_of[name] = shard
        tensors_of[shard][name] = tensors[name]
    for shard in SHARDS:
        save_file(tensors_of[shard], directory / shard)
    index = {"metadata": {}, "weight_map": shard_of | (index_changes or {})}
    (directory / INDEX).write_text(json.dumps(index))
    (directory / WEIGHTS).unlink()
    return shard_of


# --- what is read and written ---


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["llava_llama", "llava_qwen2_tied", "next_siglip_qwen2"])
def test_every_layout_is_read_and_written(case, layout, tmp_path):
    """make_models.py checks the same files with transformers, so it reads what is saved here."""
    source = cases.write(tmp_path / "source", case, layout)

    model = load_model(source)
    save_model(model, source, tmp_path / "saved")

    shapes = {}
    for name, parameter in model.named_parameters():
        shapes[to_layout_name(name, "memory")] = list(parameter.shape)
    assert shapes == cases.names()[case]
    expected = {}
    for name, array in cases.tensors(case, layout).items():
        expected[name] = torch.from_numpy(array)
    assert_same_tensors(load_file(tmp_path / "saved" / WEIGHTS), expected)
    saved_config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved_config == cases.CONFIGS[case]


@pytest.mark.parametrize("name", cases.PUBLIC)
def test_public_models_have_the_tensors_that_the_loader_expects(name):
    """The names and shapes are those of transformers, in every layout."""
    with torch.device("meta"):
        model = Llava(parse_config(cases.PUBLIC[name], "config.json"))

    for layout in LAYOUTS:
        shapes = {}
        for our_name, parameter in model.named_parameters():
            shapes[to_layout_name(our_name, layout)] = list(parameter.shape)
        expected = {}
        for memory_name, shape in cases.names()[name].items():
            expected[cases.renamed(memory_name, layout)] = shape
        assert shapes == expected
        assert detect_layout(expected) == layout


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_come_back_from_every_layout(layout):
    with torch.device("meta"):
        model = Llava(parse_config(cases.CONFIGS["next_vicuna"], "config.json"))
    for name, _ in model.named_parameters():
        assert to_our_name(to_layout_name(name, layout)) == name


def test_shards_are_one_model(directory):
    whole = load_model(directory).state_dict()

    write_shards(directory)

    assert_same_tensors(load_model(directory).state_dict(), whole)


def test_dtype_is_converted_on_request(directory):
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = load_model(directory, dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def write_config(directory, changes):
    """Change fields of config.json, write it as people do, and return its new content."""
    raw = cases.CONFIGS["llava_llama"] | changes
    (directory / "config.json").write_text(json.dumps(raw, indent=4))
    return raw


def test_a_saved_config_names_the_dtype_of_the_weights(directory, tmp_path):
    """transformers loads a model in the dtype that config.json names. All else stays."""
    # Arrange
    text = cases.CONFIGS["llava_llama"]["text_config"]
    vision = cases.CONFIGS["llava_llama"]["vision_config"]
    changes = {
        "torch_dtype": "float32",
        "dtype": None,
        "text_config": text | {"dtype": "float16"},
        "vision_config": vision | {"torch_dtype": "bfloat16"},
        "note": 1e-05,
    }
    raw = write_config(directory, changes)

    # Act
    save_model(load_model(directory, torch.bfloat16), directory, tmp_path / "saved")

    # Assert
    expected = raw | {
        "torch_dtype": "bfloat16",
        "text_config": text | {"dtype": "bfloat16"},
    }
    assert json.loads((tmp_path / "saved" / "config.json").read_text()) == expected


@pytest.mark.parametrize("changes", [{}, {"dtype": "float32", "torch_dtype": "float32"}])
def test_a_config_that_fits_the_weights_is_copied_to_the_byte(changes, directory, tmp_path):
    write_config(directory, changes)

    save_model(load_model(directory), directory, tmp_path / "saved")

    saved = (tmp_path / "saved" / "config.json").read_bytes()
    assert saved == (directory / "config.json").read_bytes()


def test_computed_buffers_of_old_files_are_ignored(directory):
    """transformers up to 4.31 saved position_ids, which only count the patches."""
    position_ids = torch.arange(10)[None]
    change_weights(directory, {"vision_tower.vision_model.embeddings.position_ids": position_ids})

    load_model(directory)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_pooling_head_of_siglip_is_kept_without_being_computed(layout, tmp_path):
    """transformers builds it by default and saves it, but LLaVA never computes it."""
    # Arrange
    case = "llava_siglip_default"
    without_head = last_logits(load_model(cases.write(tmp_path / "plain", case, layout)))
    source = cases.write(tmp_path / "source", case, layout)
    tower = LAYOUTS[layout]["vision_tower."]
    head = {
        f"{tower}head.probe": torch.ones(1, 1, 32),
        f"{tower}head.attention.in_proj_weight": torch.ones(96, 32),
        f"{tower}head.attention.out_proj.bias": torch.ones(32),
        f"{tower}head.layernorm.weight": torch.ones(32),
        f"{tower}head.mlp.fc1.weight": torch.ones(48, 32),
    }
    change_weights(source, head)

    # Act
    model = load_model(source)
    save_model(model, source, tmp_path / "saved")
    save_model(load_model(source, torch.bfloat16), source, tmp_path / "converted")

    # Assert
    assert torch.equal(last_logits(model), without_head)
    assert_same_tensors(load_file(tmp_path / "saved" / WEIGHTS), load_file(source / WEIGHTS))
    assert torch.equal(last_logits(load_model(tmp_path / "saved")), without_head)
    converted = load_file(tmp_path / "converted" / WEIGHTS)
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}


def test_a_pooling_head_has_no_place_in_clip(directory):
    change_weights(directory, {"vision_tower.vision_model.head.probe": torch.ones(1, 1, 32)})

    with pytest.raises(InputError, match=r"vision_model\.head\.probe has no place"):
        load_model(directory)


def test_tied_head_may_be_stored_twice_but_must_not_differ(tmp_path):
    directory = cases.write(tmp_path / "model", "llava_qwen2_tied")
    embeddings = load_file(directory / WEIGHTS)[EMBEDDINGS]

    change_weights(directory, {HEAD: embeddings.clone()})
    load_model(directory)
    change_weights(directory, {HEAD: None})
    load_model(directory)

    change_weights(directory, {HEAD: embeddings + 1})
    with pytest.raises(InputError, match=f"{HEAD}.*tie_word_embeddings"):
        load_model(directory)


# --- what is refused ---


def remove_tensor(directory):
    change_weights(directory, {HEAD: None})


def add_tensor(directory):
    change_weights(directory, {"language_model.model.layers.3.extra": torch.zeros(1)})


def transpose_tensor(directory):
    head = load_file(directory / WEIGHTS)[HEAD]
    change_weights(directory, {HEAD: head.T.contiguous()})


def truncate_file(directory):
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:-5])


def truncate_header(directory):
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[:100])


def write_git_lfs_pointer(directory):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4\n"
    (directory / WEIGHTS).write_bytes(pointer)


def remove_shard(directory):
    shard_of = write_shards(directory)
    (directory / shard_of[HEAD]).unlink()


def index_unknown_tensor(directory):
    write_shards(directory, {"language_model.gone": SHARDS[0]})


def index_wrong_shard(directory):
    shard_of = write_shards(directory)
    other_shard = SHARDS[1] if shard_of[HEAD] == SHARDS[0] else SHARDS[0]
    index = {"weight_map": shard_of | {HEAD: other_shard}}
    (directory / INDEX).write_text(json.dumps(index))


def add_tensor_to_shard_only(directory):
    shard = directory / write_shards(directory)[HEAD]
    save_file(load_file(shard) | {"language_model.unlisted": torch.zeros(1)}, shard)


def rename_to_pickle(directory):
    (directory / WEIGHTS).rename(directory / "pytorch_model.bin")


def remove_weights(directory):
    (directory / WEIGHTS).unlink()


def write_index_with_list(directory):
    (directory / INDEX).write_text('{"weight_map": ["model.safetensors"]}')


def write_index_with_number(directory):
    (directory / INDEX).write_text('{"weight_map": {"lm_head.weight": 1}}')


def write_empty_index(directory):
    (directory / INDEX).write_text("{}")


def index_tensor_twice(directory):
    write_shards(directory)
    text = (directory / INDEX).read_text()
    text = text.replace(f'"{HEAD}":', f'"{HEAD}": "{SHARDS[0]}", "{HEAD}":')
    (directory / INDEX).write_text(text)


def store_tensor_in_two_shards(directory):
    shard_of = write_shards(directory)
    other_shard = SHARDS[1] if shard_of[HEAD] == SHARDS[0] else SHARDS[0]
    head = load_file(directory / shard_of[HEAD])[HEAD]
    save_file(load_file(directory / other_shard) | {HEAD: head}, directory / other_shard)


def index_file_elsewhere(directory):
    write_shards(directory, {HEAD: "../model.safetensors"})


def index_no_tensor(directory):
    (directory / INDEX).write_text('{"weight_map": {}}')


def keep_whole_file_beside_shards(directory):
    content = (directory / WEIGHTS).read_bytes()
    write_shards(directory)
    (directory / WEIGHTS).write_bytes(content)


def remove_index(directory):
    write_shards(directory)
    (directory / INDEX).unlink()


def rename_to_gguf(directory):
    (directory / WEIGHTS).rename(directory / "model.Q4_K_M.gguf")


def rename_weights(directory):
    (directory / WEIGHTS).rename(directory / "weights.safetensors")


def append_byte(directory):
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes() + b"x")


def claim_another_shape(directory):
    content = (directory / WEIGHTS).read_bytes()
    changed = content.replace(b"[160,48]", b"[160,99]", 1)
    assert changed != content
    (directory / WEIGHTS).write_bytes(changed)


def remove_all_tensors(directory):
    save_file({}, directory / WEIGHTS)


NOT_COMPLETE = "not a complete safetensors file"
# How the weights are damaged, and words of the message.
DAMAGES = {
    remove_tensor: [HEAD, "missing"],
    add_tensor: [WEIGHTS, "language_model.model.layers.3.extra"],
    transpose_tensor: [WEIGHTS, HEAD, "(48, 160)", "(160, 48)"],
    truncate_file: [WEIGHTS, NOT_COMPLETE],
    truncate_header: [WEIGHTS, NOT_COMPLETE],
    write_git_lfs_pointer: [WEIGHTS, NOT_COMPLETE],
    remove_shard: ["model-0000", "missing", INDEX],
    index_unknown_tensor: ["model-0000", INDEX, "language_model.gone"],
    index_wrong_shard: ["model-0000", INDEX, HEAD],
    add_tensor_to_shard_only: ["model-0000", INDEX, "language_model.unlisted"],
    index_tensor_twice: [INDEX, HEAD, "twice"],
    store_tensor_in_two_shards: ["model-0000", INDEX, HEAD],
    index_file_elsewhere: [INDEX, "../model.safetensors"],
    index_no_tensor: [INDEX, "no tensor"],
    keep_whole_file_beside_shards: [WEIGHTS, INDEX, "remove"],
    remove_index: [SHARDS[0], INDEX],
    rename_to_gguf: ["model.Q4_K_M.gguf", "quantized"],
    rename_weights: ["weights.safetensors", WEIGHTS],
    append_byte: [WEIGHTS, NOT_COMPLETE],
    claim_another_shape: [WEIGHTS, NOT_COMPLETE],
    remove_all_tensors: ["config.json", "vocab_size"],
    rename_to_pickle: ["pytorch_model.bin", "safe_serialization"],
    remove_weights: [WEIGHTS, "no such file"],
    write_index_with_list: [INDEX, "download"],
    write_index_with_number: [INDEX, "download"],
    write_empty_index: [INDEX, "weight_map"],
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_weights_are_refused_by_name(damage, directory):
    """The message is one line that names the directory and what is wrong in it."""
    damage(directory)

    with pytest.raises(InputError) as error:
        load_model(directory)

    message = str(error.value)
    assert "\n" not in message
    assert str(directory) in message
    for word in DAMAGES[damage]:
        assert word in message


def test_weights_without_permission_are_not_called_missing(directory, monkeypatch):
    """The superuser may read every file, so the refusal of the system is made up."""

    def refuse(path, mode):
        """Fail as a file does that belongs to somebody else."""
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(InputError, match=f"{WEIGHTS}: cannot be read .*change its permissions"):
        safetensors_files.open_tensors(directory / WEIGHTS)


# --- dtypes and values ---


def in_bfloat16(directory):
    """Return the weights of a checkpoint in bfloat16."""
    return {name: tensor.bfloat16() for name, tensor in load_file(directory / WEIGHTS).items()}


@pytest.mark.parametrize("name", [NORM, HEAD, EMBEDDINGS])
def test_a_model_has_one_dtype(name, directory, capsys):
    """A few tensors in float32 beside bfloat16 once ended in a RuntimeError of the first answer."""
    in_float32 = load_file(directory / WEIGHTS)[name]
    save_file(in_bfloat16(directory) | {name: in_float32}, directory / WEIGHTS)

    model = load_model(directory)

    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert "F32 and are converted to torch.bfloat16" in capsys.readouterr().err
    assert torch.isfinite(last_logits(model)).all()
    in_full = load_model(directory, torch.float32)
    assert {parameter.dtype for parameter in in_full.parameters()} == {torch.float32}


def test_one_dtype_needs_no_line(directory, capsys):
    load_model(directory)

    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("names", [[NORM], None], ids=["one tensor", "all tensors"])
def test_float64_becomes_float32(names, directory):
    expected = load_model(directory).state_dict()
    tensors = load_file(directory / WEIGHTS)
    for name in names or list(tensors):
        tensors[name] = tensors[name].double()
    save_file(tensors, directory / WEIGHTS)

    assert_same_tensors(load_model(directory).state_dict(), expected)


@pytest.mark.parametrize("asked_dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(
    "dtype, stored_name",
    [
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.int32, "I32"),
        (torch.bool, "BOOL"),
    ],
)
def test_quantized_tensors_are_refused_by_name(dtype, stored_name, asked_dtype, directory):
    """Converting them would give other weights, since their scales are stored elsewhere."""
    change_weights(directory, {NORM: load_file(directory / WEIGHTS)[NORM].to(dtype)})

    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor {NORM} has the dtype {stored_name}"):
        load_model(directory, asked_dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [HEAD, "vision_tower.vision_model.post_layernorm.weight"])
def test_weights_that_are_not_finite_are_refused(name, value, dtype, directory):
    """Wherever they are: also in the last value, and in a layer that is never computed."""
    tensors = {key: tensor.to(dtype) for key, tensor in load_file(directory / WEIGHTS).items()}
    tensors[name].view(-1)[-1] = value
    save_file(tensors, directory / WEIGHTS)

    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor {name} has 1 of .* infinite"):
        load_model(directory)


def test_values_that_a_dtype_cannot_hold_are_refused(directory):
    norm = load_file(directory / WEIGHTS)[NORM].double()
    norm[0] = 1e60
    change_weights(directory, {NORM: norm})

    with pytest.raises(InputError, match=rf"{NORM} .*infinite in float32"):
        load_model(directory)


# --- memory and devices ---


def anonymous_memory():
    """Return how many bytes of this process are backed by no file."""
    for line in PROCESS_STATUS.read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"{PROCESS_STATUS} has no RssAnon")


@pytest.mark.skipif(not PROCESS_STATUS.exists(), reason="the figure comes from Linux")
def test_mapped_weights_take_no_memory_of_their_own(tmp_path):
    """The weights of a model in the dtype of the file are the file, mapped into memory."""
    # 1. Two tables of 500,000 x 48 in bfloat16 make the file 96 MB large.
    vocab_size = 500_000
    directory = cases.write(tmp_path / "model", "llava_llama")
    config = json.loads((directory / "config.json").read_text())
    config["text_config"]["vocab_size"] = vocab_size
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {}
    for name, tensor in load_file(directory / WEIGHTS).items():
        tensors[name] = tensor.bfloat16()
    for name in (HEAD, EMBEDDINGS):
        tensors[name] = torch.zeros(vocab_size, 48, dtype=torch.bfloat16)
    save_file(tensors, directory / WEIGHTS)

    # 2. Loading takes a small part of that.
    before = anonymous_memory()
    model = load_model(directory)
    assert anonymous_memory() - before < 0.2 * (directory / WEIGHTS).stat().st_size
    assert model.vocab_head.shape == (vocab_size, 48)
    assert model.vocab_head.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "device, expected", [("cpu", "cpu"), ("cuda", "cuda:3"), (torch.device("cuda", 1), "cuda:1")]
)
def test_weights_go_to_the_gpu_of_the_process(directory, monkeypatch, device, expected):
    """safetensors takes "cuda" for the first GPU, whichever one torchrun gave to the process."""
    devices = []

    def record_device(path, framework, device):
        devices.append(device)

    monkeypatch.setattr(safetensors_files, "safe_open", record_device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)

    safetensors_files.open_tensors(directory / WEIGHTS, device)

    assert devices == [expected]


def fingerprint_of(**tensors):
    """Return the fingerprint of a model with these weights."""
    module = torch.nn.Module()
    for name, tensor in tensors.items():
        module.register_parameter(name, torch.nn.Parameter(tensor))
    return fingerprint(module)


def test_every_value_of_a_small_tensor_changes_the_fingerprint():
    """The last tensor counts as the first does."""
    weights = {"first": torch.arange(12.0), "second": torch.arange(12.0)}
    fingerprints = {fingerprint_of(**weights)}

    for name in weights:
        for i in range(12):
            changed = {key: tensor.clone() for key, tensor in weights.items()}
            changed[name][i] += 1
            fingerprints.add(fingerprint_of(**changed))

    assert len(fingerprints) == 1 + 2 * 12


def test_every_thousandth_of_a_large_tensor_changes_the_fingerprint():
    """Of a million values about 4,000 are looked at, so each thousandth holds some of them."""
    weight = torch.zeros(1_000_000)
    fingerprints = {fingerprint_of(weight=weight)}

    for start in range(0, 1_000_000, 100_000):
        changed = weight.clone()
        changed[start : start + 1000] = 1
        fingerprints.add(fingerprint_of(weight=changed))
    changed = weight.clone()
    changed[-1000:] = 1
    fingerprints.add(fingerprint_of(weight=changed))

    assert len(fingerprints) == 12


def test_name_shape_and_dtype_are_part_of_the_fingerprint():
    """Zeros have the same bytes whatever their shape, and two of 16 bits as one of 32."""
    fingerprints = {
        fingerprint_of(weight=torch.zeros(2, 3)),
        fingerprint_of(weight=torch.zeros(3, 2)),
        fingerprint_of(other=torch.zeros(2, 3)),
        fingerprint_of(weight=torch.zeros(2, 3, dtype=torch.float16)),
        fingerprint_of(weight=torch.zeros(2, 3, dtype=torch.bfloat16)),
    }

    assert len(fingerprints) == 5
