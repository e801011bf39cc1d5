"""Averaging checkpoints and adapters: what comes out, and what has no common base."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import TINY
from golden.models import cases
from golden_cases import assert_close, assert_same_tensors
from model_helpers import move_weights
from safetensors.torch import load_file, save_file

from minialign.merge import main
from minialign.models.adapters import load_adapter, open_adapter, save_adapter
from minialign.models.checkpoint import load_model, save_model
from minialign.models.merging import average
from minialign.models.policy import Policy
from minialign.utils.cli import run_script

MODEL_FILE = "model.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
Q_PROJ = "language_model.layers.1.self_attn.q_proj.weight"


@pytest.fixture()
def base(tmp_path):
    """Write a base model with a tokenizer."""
    return write_model(tmp_path / "base")


def write_model(directory):
    """Write a small model with a tokenizer. The weights are always the same."""
    cases.write(directory, "llava_llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / name, directory)
    return directory


def write_trained(base, directory, size):
    """Write the base with all weights moved that training would move, by about `size`."""
    model = load_model(base)
    move_weights(Policy(model, rank=0, alpha=1), size)
    save_model(model, base, directory)
    return directory


def write_adapter(base, directory, *, size, seed=0, **policy_arguments):
    """Write an adapter as a run does, after training has moved its weights by about `size`."""
    arguments = {"rank": 2, "alpha": 4} | policy_arguments
    policy = Policy(load_model(base), seed=seed, **arguments)
    move_weights(policy, size)
    save_adapter(policy, directory, base)
    return directory


def merge(*models, out, options=()):
    """Run the command here, and return its exit status."""
    words = ["merge.py", "--models", *models, "--out", out, *options]
    sys.argv = [str(word) for word in words]
    try:
        return run_script(main)
    except SystemExit as error:
        return error.code


def merged_weight(base, adapter):
    """Return a weight of the decoder with an adapter folded into it."""
    policy = load_adapter(load_model(base), adapter)
    policy.merge()
    return dict(policy.model.named_parameters())[Q_PROJ].detach()


def projector(directory):
    """Return the tensors of the projector in a folder, by name."""
    file = directory / MODEL_FILE
    if not file.exists():
        file = directory / ADAPTER_FILE
    return {name: value for name, value in load_file(file).items() if "projector" in name}


@pytest.fixture(autouse=True)
def _restore_arguments(monkeypatch):
    """Put the arguments of the test command back after a test."""
    monkeypatch.setattr(sys, "argv", sys.argv)


# --- the mean ---


def test_average_by_hand():
    """.25 * [1, 4] + .75 * [5, 0] = [4, 1]."""
    mean = average([torch.tensor([1.0, 4.0]), torch.tensor([5.0, 0.0])], [0.25, 0.75])

    assert mean.tolist() == [4.0, 1.0]


def test_average_of_equal_tensors_is_exact():
    """Also with shares such as .1, .2 and .7, whose products with a number are rounded."""
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(0))

    assert torch.equal(average([tensor] * 3, [0.1, 0.2, 0.7]), tensor)


# --- checkpoints ---


def test_a_checkpoint_merged_with_itself_is_the_same_to_the_bit(base, tmp_path):
    assert merge(base, base, out=tmp_path / "merged", options=["--weights", ".3", ".7"]) == 0

    assert_same_tensors(load_file(tmp_path / "merged" / MODEL_FILE), load_file(base / MODEL_FILE))
    assert (tmp_path / "merged" / "tokenizer.json").read_bytes() == (
        base / "tokenizer.json"
    ).read_bytes()


@pytest.mark.parametrize("kept", ["base", "trained"])
def test_decoders_are_averaged_and_one_projector_is_kept(kept, base, tmp_path):
    trained = write_trained(base, tmp_path / "trained", 0.02)
    options = ["--weights", "1", "3", "--vision-of", tmp_path / kept]

    assert merge(base, trained, out=tmp_path / "merged", options=options) == 0

    before = dict(load_model(base).named_parameters())
    after = dict(load_model(trained).named_parameters())
    merged = dict(load_model(tmp_path / "merged").named_parameters())
    for name in (Q_PROJ, "lm_head.weight", "language_model.norm.weight"):
        assert_close(merged[name], (before[name] + 3 * after[name]) / 4, 1e-6)
    assert_same_tensors(projector(tmp_path / "merged"), projector(tmp_path / kept))


# --- adapters ---


def test_an_adapter_merged_with_itself_is_the_same_to_the_bit(base, tmp_path):
    adapter = write_adapter(base, tmp_path / "adapter", size=0.1)

    assert merge(adapter, adapter, out=tmp_path / "merged", options=["--weights", ".3", ".4"]) == 0

    merged = tmp_path / "merged"
    assert_same_tensors(load_file(merged / ADAPTER_FILE), load_file(adapter / ADAPTER_FILE))
    assert open_adapter(merged).base_hash == open_adapter(adapter).base_hash
    merged_config = json.loads((merged / ADAPTER_CONFIG).read_text())
    assert merged_config == json.loads((adapter / ADAPTER_CONFIG).read_text())


def test_merged_adapters_are_the_mean_of_their_deltas(base, tmp_path):
    """Ranks and scales may differ, and rsLoRA may meet LoRA. The first one is given twice."""
    first = write_adapter(base, tmp_path / "first", size=0.1)
    second = write_adapter(
        base, tmp_path / "second", size=0.2, seed=1, rank=3, alpha=5, rslora=True
    )
    options = ["--weights", "1", "2", "1", "--vision-of", second]

    assert merge(first, second, first, out=tmp_path / "merged", options=options) == 0

    expected = (merged_weight(base, first) + merged_weight(base, second)) / 2
    assert (merged_weight(base, first) - merged_weight(base, second)).abs().max() > 0.01
    assert_close(merged_weight(base, tmp_path / "merged"), expected, 1e-6)
    assert json.loads((tmp_path / "merged" / ADAPTER_CONFIG).read_text())["r"] == 5
    assert_same_tensors(projector(tmp_path / "merged"), projector(second))


def test_the_projector_of_the_base_is_kept_if_the_named_adapter_trained_none(base, tmp_path):
    first = write_adapter(base, tmp_path / "first", size=0.1, train_projector=False)
    second = write_adapter(base, tmp_path / "second", size=0.2)

    assert merge(first, second, out=tmp_path / "merged") == 0

    assert projector(tmp_path / "merged") == {}
    load_adapter(load_model(base), tmp_path / "merged", base)


# --- what is refused ---


def refusal(capsys, *models, out, options=()):
    """Return the one line with which a merge is refused. Nothing may be written."""
    assert merge(*models, out=out, options=options) == 2
    assert not Path(out).exists()
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_adapters_of_two_bases_are_refused(base, tmp_path, capsys):
    """The hash of the base decides. The folders of both have the same name."""
    other_base = write_trained(base, tmp_path / "other" / "base", 0.02)
    first = write_adapter(base, tmp_path / "first", size=0.1)
    second = write_adapter(other_base, tmp_path / "second", size=0.1)

    line = refusal(capsys, first, second, out=tmp_path / "merged")

    assert f"{second}: was trained on another base" in line


def test_adapters_without_a_hash_are_compared_by_the_names_of_their_bases(base, tmp_path, capsys):
    folders = []
    for name in ("hub/llava", "else/llava", "hub/vicuna", None):
        adapter = write_adapter(base, tmp_path / f"adapter{len(folders)}", size=0.1)
        save_file(load_file(adapter / ADAPTER_FILE), adapter / ADAPTER_FILE)
        config = json.loads((adapter / ADAPTER_CONFIG).read_text())
        config["base_model_name_or_path"] = name
        (adapter / ADAPTER_CONFIG).write_text(json.dumps(config))
        folders.append(adapter)

    assert "vicuna" in refusal(capsys, folders[0], folders[2], out=tmp_path / "merged")
    assert "base_model_name" in refusal(capsys, folders[0], folders[3], out=tmp_path / "merged")
    assert merge(folders[0], folders[1], out=tmp_path / "merged") == 0


def test_adapters_of_other_layers_are_refused(base, tmp_path, capsys):
    first = write_adapter(base, tmp_path / "first", size=0.1)
    second = write_adapter(base, tmp_path / "second", size=0.1, targets=("q_proj",))

    line = refusal(capsys, first, second, out=tmp_path / "merged")

    assert str(second) in line
    assert "not adapted" in line


def test_models_of_two_bases_are_refused(base, tmp_path, capsys):
    """A model of the same shape with weights of its own: their mean would be noise."""
    other = write_model(tmp_path / "other")
    tensors = load_file(other / MODEL_FILE)
    for tensor in tensors.values():
        tensor.copy_(tensor.flatten().flip(0).view(tensor.shape))
    save_file(tensors, other / MODEL_FILE)

    line = refusal(capsys, base, other, out=tmp_path / "merged")

    assert f"{other}: its decoder does not come from the same base" in line


def test_models_of_other_shapes_or_tokens_are_refused(base, tmp_path, capsys):
    longer = write_model(tmp_path / "longer")
    config = json.loads((longer / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 1024
    (longer / "config.json").write_text(json.dumps(config))
    line = refusal(capsys, base, longer, out=tmp_path / "merged")
    assert "max_position_embeddings of its decoder is 1024" in line

    swapped = write_model(tmp_path / "swapped")
    spec = json.loads((swapped / "tokenizer.json").read_text())
    vocab = spec["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (swapped / "tokenizer.json").write_text(json.dumps(spec))
    assert "the token 'a' has the id" in refusal(capsys, base, swapped, out=tmp_path / "merged")


def test_what_does_not_go_together_is_refused(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter", size=0.1)
    out = tmp_path / "merged"

    assert "only one is an adapter" in refusal(capsys, adapter, base, out=out)
    assert "two or more" in refusal(capsys, base, out=out)
    assert "given twice" in refusal(capsys, base, out=out, options=["--models", base])
    assert "1 weights for 2" in refusal(capsys, base, base, out=out, options=["--weights", "1"])
    assert "--vision-of" in refusal(capsys, base, base, out=out, options=["--vision-of", "else"])
    assert "above 0" in refusal(capsys, base, base, out=out, options=["--weights", "1", "0"])
    assert "gone" in refusal(capsys, base, tmp_path / "gone", out=out)
    assert merge(base, base, out=base) == 2
    assert "exists already" in capsys.readouterr().err


def test_a_damaged_adapter_is_refused_and_leaves_no_result(base, tmp_path, capsys):
    adapter = write_adapter(base, tmp_path / "adapter", size=0.1)
    damaged = write_adapter(base, tmp_path / "damaged", size=0.1)
    tensors = load_file(damaged / ADAPTER_FILE)
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    del tensors[name]
    save_file(tensors, damaged / ADAPTER_FILE, metadata={"base_weights": "0"})

    assert "missing" in refusal(capsys, damaged, adapter, out=tmp_path / "merged")
