"""Everything that computes gives the same on a GPU: on a pretend one, and on a real one if any.

pretend_gpu.py says what the pretend GPU can show and what it cannot.
"""

import json
import random
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY
from pretend_gpu import PretendGpu, SafeOpenOnGpu, is_gpu, make_cpu_tensor, to_cpu
from processes import run_process, start_process

sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from minialign.evaluation.evaluation_sets import read_folder  # noqa: E402
from minialign.evaluation.results import evaluate_set  # noqa: E402
from minialign.methods.base import add_reference_logps, encode_example  # noqa: E402
from minialign.methods.preference import PreferenceMethod  # noqa: E402
from minialign.methods.registry import METHODS  # noqa: E402
from minialign.models import loading, safetensors_files  # noqa: E402
from minialign.models.loading import load_vlm  # noqa: E402
from minialign.models.policy import Policy  # noqa: E402
from minialign.utils import cli  # noqa: E402

NO_GPU = not torch.cuda.is_available()
# Each is the name of a fixture. A test asks for it when it needs the CPU no more.
GPUS = ["gpu", pytest.param("cuda", marks=pytest.mark.skipif(NO_GPU, reason="no GPU here"))]


def load_models_onto(device, monkeypatch):
    """Make the package load every model onto a device, whatever the caller asks for."""
    load_model = loading.load_model

    def load_onto_device(directory, dtype=None, device_asked_for="cpu"):
        return load_model(directory, dtype, device)

    monkeypatch.setattr(loading, "load_model", load_onto_device)


def tensor_by_copy(*args, device="cpu", **kwargs):
    """Make a tensor as torch.tensor does, on the CPU first, and copy it to its device."""
    return make_cpu_tensor(*args, **kwargs).to(device or "cpu")


@pytest.fixture()
def gpu(monkeypatch):
    """Load all models onto the pretend GPU."""
    load_models_onto("meta", monkeypatch)
    monkeypatch.setattr(safetensors_files, "safe_open", SafeOpenOnGpu)
    monkeypatch.setattr(torch, "tensor", tensor_by_copy)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with PretendGpu():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.fixture()
def cuda(monkeypatch):
    """Load all models onto the real GPU."""
    load_models_onto("cuda", monkeypatch)


def test_the_pretend_gpu_behaves_like_one(gpu):
    """It holds numbers, refuses tensors of the CPU, and says where its results lie.

    Single numbers and indices may come from the CPU.
    """
    a = torch.arange(6.0, device="meta").view(2, 3)
    b = torch.ones(3, 2)

    # Tensors of two devices cannot be mixed.
    with pytest.raises(RuntimeError, match="two devices"):
        a @ b
    with pytest.raises(RuntimeError, match="two devices"):
        torch.cat([a, b.T])

    # A result lies where its tensors lie, and has numbers.
    product = a @ b.to(a)
    assert is_gpu(product.device)
    assert product.tolist() == [[3, 3], [12, 12]]

    # A single number and an index may come from the CPU.
    doubled = (a * torch.tensor(2.0))[:, [2, 0]]
    assert doubled.tolist() == [[4, 0], [10, 6]]

    # A copy to the CPU lies there.
    copied = b.copy_(a.T)
    assert copied.device.type == "cpu"
    assert copied.tolist() == [[0, 3], [1, 4], [2, 5]]

    assert torch.tensor([1, 2], device="meta").sum().item() == 3


# --- a step of DPO ---


def dpo_step(vlm, records):
    """Compute the loss of three pairs and its gradients, and return the metrics and the policy.

    The reference log-probs are shifted, so that the margins are not zero.
    """
    policy = Policy(vlm.model, 4, 8)
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:3]]
    add_reference_logps(policy, vlm, examples)
    shift = torch.tensor([1.0, 0.0])
    shifted = [replace(example, ref_logps=example.ref_logps - shift) for example in examples]
    loss, metrics = PreferenceMethod(vlm, "dpo", 0.5).loss(shifted, examples)
    loss.backward()
    return metrics | {"loss": loss.item()}, policy


@pytest.mark.parametrize("gpu_name", GPUS)
def test_a_dpo_step_gives_the_gradient_of_the_cpu(records, request, gpu_name):
    cpu_metrics, cpu_policy = dpo_step(load_vlm(TINY / "model"), records)

    request.getfixturevalue(gpu_name)
    metrics, policy = dpo_step(load_vlm(TINY / "model"), records)

    assert metrics == pytest.approx(cpu_metrics, rel=1e-5)
    parameters = policy.parameters()
    for name, cpu_parameter in cpu_policy.parameters().items():
        parameter = parameters[name]
        assert is_gpu(parameter.device)
        assert is_gpu(parameter.grad.device)
        gradient = to_cpu(parameter.grad)
        assert torch.allclose(gradient, cpu_parameter.grad, rtol=1e-4, atol=1e-6), name


# --- whole runs of train.py ---


@pytest.fixture(scope="module")
def data_files(tmp_path_factory):
    """Return the folder of files with four records each: instructions, and pairs."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("instruct.json", "povid.json"):
        rows = json.loads((TINY / "train" / name).read_text())
        indices = random.Random(0).sample(range(len(rows)), 4)
        few_rows = [rows[i] for i in sorted(indices)]
        (folder / name).write_text(json.dumps(few_rows))
    return folder


def training_words(folder, data_files, method, *more_options):
    """Return the command line of a run of two steps.

    All records are one batch, in the layout of the reference log-probs. So the first margin is 0,
    not a rounding error.
    """
    options = {
        "--model": TINY / "model",
        "--method": method,
        "--data": data_files / ("instruct.json" if method == "bdhs" else "povid.json"),
        "--images": TINY / "train" / "images",
        "--steps": 2,
        "--batch-size": 4,
        "--lora-rank": 4,
        "--lr": 1e-3,
        "--out": folder,
    }
    # Distillation samples only with --on.
    if "max_new_tokens" in METHODS[method].options and method != "distill":
        options["--max-new-tokens"] = 8
    if "temperature" in METHODS[method].options and method != "distill":
        options["--temperature"] = 2
    words = ["train.py"]
    for name, value in options.items():
        words += [name, value]
    return [*words, *more_options]


def read_log(folder):
    """Return the lines of the log of a run without the times."""
    lines = []
    for text in (folder / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        del line["seconds"]
        lines.append(line)
    return lines


@pytest.fixture(scope="module")
def trained_reward_folder(tmp_path_factory, data_files):
    """Return the folder of a reward model."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    assert run_process(*training_words(folder, data_files, "reward")).status == 0
    return folder


RUNS = {
    "bdhs": ("bdhs", []),
    "bdhs by noise": ("bdhs", ["--by", "noise", "--checkpoint-layers"]),
    "distortion": ("distortion", ["--noise-steps", 900]),
    "online-dpo": ("online-dpo", []),
    "sft of all weights": ("sft", ["--lora-rank", 0]),
    "rloo": ("rloo", []),
    "ppo": ("ppo", []),
    "grpo": ("grpo", []),
    "distill": ("distill", []),
    "distill on policy": ("distill", ["--on", "policy", "--max-new-tokens", 8]),
}


@pytest.mark.parametrize("gpu_name", GPUS)
# The warning is about the head of the reward model. On the pretend GPU load_state_dict does copy.
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta")
@pytest.mark.parametrize("run_name", RUNS)
def test_training_gives_the_log_of_the_cpu(
    tmp_path, monkeypatch, request, data_files, trained_reward_folder, run_name, gpu_name
):
    """The same random draws, and metrics within rounding, in two steps of every kind of run.

    The noise changes each response. If a rejected one were equal to the chosen one, rounding alone
    would give the sign of its margin, which the accuracy counts.
    """
    # Arrange
    method, more_options = RUNS[run_name]
    if method in ("rloo", "ppo", "grpo"):
        more_options = ["--reward", trained_reward_folder]
    words = training_words(tmp_path / "gpu", data_files, method, *more_options)
    cpu_words = training_words(tmp_path / "cpu", data_files, method, *more_options)
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    monkeypatch.setenv("TQDM_DISABLE", "1")

    # Act: another process computes on the CPU.
    cpu_run = start_process(*cpu_words)
    request.getfixturevalue(gpu_name)
    assert cli.run_script(train.main) == 0
    assert cpu_run.wait().status == 0

    # GRPO divides the rounding errors of nearly equal rewards by a deviation of 1e-4 and more.
    tolerance = 1e-4 if method == "grpo" else 1e-5

    # Assert. Adam's first step only uses the sign of each gradient, so that a rounding error may
    # change the second norm by more than it changes anything else on a real GPU.
    norm_tolerance = 1e-3 if gpu_name == "gpu" else 1e-2
    lines = read_log(tmp_path / "gpu")
    for line, cpu_line in zip(lines, read_log(tmp_path / "cpu"), strict=True):
        norm = line.pop("grad_norm")
        cpu_norm = cpu_line.pop("grad_norm")
        assert norm == pytest.approx(cpu_norm, rel=norm_tolerance)
        assert line == pytest.approx(cpu_line, rel=1e-3, abs=tolerance)


# --- evaluation ---


@pytest.mark.parametrize("gpu_name", GPUS)
def test_evaluation_gives_the_scores_of_the_cpu(request, gpu_name):
    """Captions and POPE, without and with contrast, which decode from forked caches."""
    whole_set = read_folder(TINY / "tune" / "balanced")
    few_questions = {}
    for split, questions in whole_set.pope.items():
        few_questions[split] = questions[:4]
    small_set = replace(whole_set, captions=whole_set.captions[:3], pope=few_questions)
    cpu_scores = []
    for contrast in (0.0, 1.0):
        cpu_scores.append(evaluate_set(load_vlm(TINY / "model"), small_set, contrast=contrast))

    request.getfixturevalue(gpu_name)
    scores = []
    for contrast in (0.0, 1.0):
        scores.append(evaluate_set(load_vlm(TINY / "model"), small_set, contrast=contrast))

    assert scores == cpu_scores
