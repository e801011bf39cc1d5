"""A model that several processes hold together does what it does in one process.

Sums over parts are added in another order than in one process, so numbers agree up to rounding.
One process with micro-batches of another size is as far from itself. Adam's first steps take an
entry whose gradient is only rounding for a full step, so adapters are compared by their mean
difference. What involves no arithmetic is compared to the bit.
"""

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import TINY
from golden.models import cases
from golden_cases import assert_same_tensors
from model_helpers import flatten, relative_distance
from processes import run_file, run_together
from safetensors.torch import load_file, save_file
from split_commands import run_all, run_split_in_two

from minialign.models import split
from minialign.models.checkpoint import load_model
from minialign.models.config_json import read_config
from minialign.models.safetensors_files import open_tensors, read_tensors
from minialign.models.split import cut_dimension, local_config, split_models
from minialign.utils.files import InputError, read_jsonl

MODEL = TINY / "model"

# One step on four records. Where it is followed by TWO_STEPS, two.
BRIEF = "--limit 4 --batch-size 4 --steps 1 --tokens-per-microbatch 400 --no-control".split()
TWO_STEPS = ["--steps", "2"]
SHORT = "--max-new-tokens 8".split()
LORA = "--lora-rank 4 --lora-alpha 8".split()
RANK_0 = ["--lora-rank", "0"]


def run_split(num_processes, commands):
    """Run commands in several processes, of which every two hold one model."""
    for outcome in run_together(num_processes, run_split_in_two, commands):
        assert outcome.status == 0, outcome.stderr


def train_words(inputs, folder, method, *words):
    """Return the command that trains by a method. The folder's last part tells runs apart."""
    data = ["--data", inputs / "povid.json", "--images", TINY / "train" / "images"]
    words = [*BRIEF, "--method", method, *data, "--out", folder, *words]
    return ["train", *map(str, words)]


def bdhs_words(inputs, folder):
    """Return the command that samples pairs, trains on them, and evaluates before and after."""
    words = [*LORA, "--max-new-tokens", 24, "--group", 4, "--eval", inputs / "set"]
    return train_words(inputs, folder, "bdhs", *words)


def all_commands(folder, inputs):
    """Return commands that write to `folder`, and do the same in one process and in two."""
    online = [*SHORT, "--annotator", MODEL, "--one-order"]
    images = str(TINY / "train" / "images")
    pairs = ["--data", f"{inputs}/povid.json", "--images", images]
    pairs += ["--limit", "2", "--group", "2", "--max-new-tokens", "8"]
    evaluation_set = inputs / "set"
    measured = ["--captions", str(evaluation_set / "captions.json")]
    measured += ["--images", str(evaluation_set / "images")]

    def words_of(name, method, *words):
        """Return the command of the run `name`."""
        return train_words(inputs, folder / name, method, *words)

    return [
        ["gradients", str(inputs / "qwen2"), 4, f"{folder}/gradients.safetensors"],
        ["gradients", str(inputs / "qwen2"), 0, f"{folder}/gradients-0.safetensors"],
        bdhs_words(inputs, folder / "bdhs"),
        words_of("dpo", "dpo", *LORA, *TWO_STEPS, "--eval", "--export", folder / "merged"),
        words_of("rank-0", "dpo", *RANK_0, *TWO_STEPS, "--eval"),
        words_of("online-dpo", "online-dpo", *LORA, *online, "--eval"),
        words_of("reward", "reward", *LORA, "--eval"),
        words_of("ppo", "ppo", *LORA, *SHORT, "--eval", "--reward", inputs / "alone" / "reward"),
        ["sample", "pairs", *pairs, "--out", f"{folder}/pairs.jsonl"],
        ["sample", "score", "--data", f"{inputs}/povid.json", "--images", images]
        + ["--out", f"{folder}/scores.jsonl"],
        ["evaluate", "--model", str(MODEL), "--adapter", str(folder / "dpo" / "adapter"), *measured]
        + ["--out", f"{folder}/measured.json"],
    ]


def write_inputs(folder):
    """Write a random Qwen2 with biases and grouped heads, a small evaluation set, and pairs."""
    cases.write(folder / "qwen2", "next_siglip_qwen2")
    records = json.loads((TINY / "train" / "povid.json").read_text())
    few = random.Random(0).sample(records, 4)  # the model gives two different answers to these
    (folder / "povid.json").write_text(json.dumps(few))
    source = TINY / "tune" / "typical"
    annotations = json.loads((source / "captions.json").read_text())
    annotations["captions"] = annotations["captions"][:2]
    (folder / "set").mkdir()
    (folder / "set" / "captions.json").write_text(json.dumps(annotations))
    (folder / "set" / "images").symlink_to(source / "images")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with all runs: alone/NAME in one process, split/NAME in two."""
    folder = tmp_path_factory.mktemp("split")
    alone = folder / "alone"
    in_two = folder / "split"
    write_inputs(folder)
    stopped_alone = train_words(
        folder, folder / "stopped-alone", "dpo", *LORA, *TWO_STEPS, "--eval"
    )
    stopped_split = train_words(
        folder, folder / "stopped-split", "dpo", *RANK_0, *TWO_STEPS, "--eval"
    )

    run_all([*all_commands(alone, folder), ["train", "stop", *stopped_alone[1:]]])
    run_split(
        2,
        [
            *all_commands(in_two, folder),
            [*stopped_alone, "--resume"],
            ["train", "stop", *stopped_split[1:]],
            ["copy", str(MODEL), str(alone / "dpo" / "adapter"), str(folder / "copy")],
        ],
    )
    assert (folder / "stopped-split" / "state.safetensors").exists()
    run_all([[*stopped_split, "--resume"]])
    return folder


def read_log(folder):
    """Return the lines of the log."""
    return read_jsonl(folder / "metrics.jsonl")


def assert_same_log(folder, expected_folder):
    """Assert that two runs have the same losses, rewards and gradient norms up to rounding."""
    for line, expected in zip(read_log(folder), read_log(expected_folder), strict=True):
        for name in line.keys() & {"loss", "grad_norm", "reward", "logp_chosen", "kl"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name


def assert_close_files(path, expected_path):
    """Assert that two safetensors files hold the same tensors, on the average to 1e-8."""
    tensors = load_file(path)
    expected = load_file(expected_path)
    assert tensors.keys() == expected.keys()
    difference = flatten(tensors) - flatten(expected)
    assert difference.abs().mean() < 1e-8


@pytest.mark.parametrize("file", ["gradients", "gradients-0"])
def test_hidden_states_log_probs_and_gradients_are_those_of_one_process(runs, file):
    """With adapters and with all weights trained."""
    tensors = load_file(runs / "split" / f"{file}.safetensors")
    expected = load_file(runs / "alone" / f"{file}.safetensors")

    assert tensors.keys() == expected.keys()
    for name in ("hidden", "logps"):
        torch.testing.assert_close(tensors.pop(name), expected.pop(name), rtol=0, atol=1e-5)
    assert relative_distance(flatten(tensors), flatten(expected)) < 1e-5
    for name in tensors:  # a sum that is left out would show in one tensor only
        assert relative_distance(tensors[name], expected[name]) < 1e-4, name


@pytest.mark.parametrize("run", ["bdhs", "dpo", "rank-0", "online-dpo", "reward", "ppo"])
def test_a_run_gives_the_result_of_one_process(runs, run):
    folder = runs / "split" / run
    expected_folder = runs / "alone" / run

    assert_same_log(folder, expected_folder)
    names = {path.relative_to(folder) for path in folder.rglob("*")}
    assert names == {path.relative_to(expected_folder) for path in expected_folder.rglob("*")}
    for path in folder.rglob("*.safetensors"):
        if path.name != "reference.safetensors":  # log-probs, of which the log shows more
            assert_close_files(path, expected_folder / path.relative_to(folder))


def test_pairs_scores_and_answers_are_the_same(runs):
    same_files = ["bdhs/pairs.jsonl", "bdhs/evaluation.json", "pairs.jsonl", "measured.json"]
    for file in same_files:
        assert (runs / "split" / file).read_text() == (runs / "alone" / file).read_text(), file
    for name in ("split", "alone"):
        assert (runs / name / "pairs.png").exists()

    all_scores = read_jsonl(runs / "split" / "scores.jsonl")
    all_expected_scores = read_jsonl(runs / "alone" / "scores.jsonl")
    for scores, expected_scores in zip(all_scores, all_expected_scores, strict=True):
        assert scores.pop("id") == expected_scores.pop("id")
        assert scores == pytest.approx(expected_scores, rel=1e-5)


def test_a_merged_model_is_that_of_one_process(runs):
    assert_close_files(
        runs / "split" / "merged" / "model.safetensors",
        runs / "alone" / "merged" / "model.safetensors",
    )


@pytest.mark.parametrize("resumed, whole", [("stopped-alone", "dpo"), ("stopped-split", "rank-0")])
def test_a_run_is_resumed_with_another_split(runs, resumed, whole):
    """Begun by one process and ended by two, and the other way round."""
    assert_same_log(runs / resumed, runs / "alone" / whole)


def test_files_are_copied_to_the_bit(runs):
    """The metadata of the adapter are a hash of the weights, which is the same as well."""
    copied = load_file(runs / "copy" / "model" / "model.safetensors")
    assert_same_tensors(copied, load_file(MODEL / "model.safetensors"))
    file = "adapter/adapter_model.safetensors"
    copied_file = runs / "copy" / file
    expected_file = runs / "alone" / "dpo" / file
    assert_same_tensors(load_file(copied_file), load_file(expected_file))
    with open_tensors(copied_file) as copied, open_tensors(expected_file) as expected:
        assert copied.metadata() == expected.metadata()


def test_a_process_holds_half_of_the_layers(runs):
    """At most 0.56: the norms, and one matrix of each adapter, are whole in both processes."""
    num_bytes = json.loads((runs / "copy" / "bytes.json").read_text())
    layers = load_model(MODEL).language_model.layers
    whole = sum(parameter.nbytes for parameter in layers.parameters())
    adapters = 0
    for name, tensor in load_file(runs / "alone/dpo/adapter/adapter_model.safetensors").items():
        if "lora_" in name:
            adapters += tensor.nbytes

    assert num_bytes < 0.56 * (whole + adapters)


def test_two_models_in_four_processes(runs, tmp_path):
    """Each of them does half of the work. The first process removes no file that others need."""
    script, *words = bdhs_words(runs, tmp_path / "bdhs")
    for outcome in run_together(4, run_file, f"{script}.py", *words, "--split", "2"):
        assert outcome.status == 0, outcome.stderr

    expected = runs / "alone" / "bdhs"
    assert_same_log(tmp_path / "bdhs", expected)
    for file in ("pairs.jsonl", "evaluation.json"):
        assert (tmp_path / "bdhs" / file).read_text() == (expected / file).read_text()


# --- the parts, without other processes ---


@pytest.fixture()
def as_part(monkeypatch):
    """Return a function that makes this process one of several that hold a model."""

    def be_part(index, num_parts=2):
        monkeypatch.setattr(split, "part_index", lambda: index)
        monkeypatch.setattr(split, "num_parts", lambda: num_parts)

    return be_part


@pytest.mark.parametrize("layout", ["hub", "flat", "memory", "fresh"])
def test_the_parts_of_a_file_are_the_whole(tmp_path, as_part, layout):
    """In every layout of names, and none of the vision tower, whose projections have such names."""
    folder = cases.write(tmp_path, "llava_clip_full_last", layout)
    file = folder / "model.safetensors"
    whole = load_file(file)
    wanted = {}
    for name, tensor in whole.items():
        wanted[name] = (name, tensor.shape)
    parts = []
    for index in range(2):
        as_part(index)
        for name, tensor in whole.items():
            shape = list(tensor.shape)
            dimension = cut_dimension(name, shape)
            if dimension is not None:
                shape[dimension] //= 2
            wanted[name] = (name, tuple(shape))
        parts.append(read_tensors(folder, dict.fromkeys(whole, file), wanted))

    num_cut = 0
    for name, tensor in whole.items():
        dimension = cut_dimension(name, tensor.shape)
        if dimension is None:
            assert parts[0][name].equal(tensor), name
        else:
            num_cut += 1
            assert torch.cat([part[name] for part in parts], dimension).equal(tensor), name
    num_layers = 3
    assert num_cut == num_layers * (7 + 3)  # weights, and the biases of q, k and v


def test_what_does_not_divide_is_refused_with_the_numbers(as_part):
    config, _ = read_config(MODEL)  # 4 heads, 352 channels

    as_part(0, 3)
    with pytest.raises(InputError, match="--split 3: MODEL has 4 attention heads, .* 2 or 4$"):
        local_config(config, "MODEL")
    as_part(0, 2)
    grouped = replace(config, text=replace(config.text, num_kv_heads=1))
    with pytest.raises(InputError, match="MODEL has 1 key-value heads, .* leave --split out$"):
        local_config(grouped, "MODEL")
    biased = replace(config, text=replace(config.text, out_bias=True))
    with pytest.raises(InputError, match="bias on o_proj"):
        local_config(biased, "MODEL")


def test_split_needs_as_many_processes():
    split_models(1)
    with pytest.raises(InputError, match="--split 2: .* --nproc-per-node 2"):
        split_models(2)


def test_a_shape_that_is_wrong_is_named_whole(tmp_path, as_part):
    """The error names the shapes of the file and of the model, not those of the parts."""
    as_part(0)
    shape = (10, 4)
    file = tmp_path / "x.safetensors"
    name = "language_model.layers.0.self_attn.q_proj.weight"
    save_file({name: torch.zeros(shape)}, file)
    with pytest.raises(InputError, match=r"shape \(10, 4\), this model needs \(12, 4\)"):
        read_tensors(tmp_path, {name: file}, {name: (name, (6, 4))})
