"""Everything that computes, on a GPU and, everywhere, on a pretend one: a device of torch's that refuses, as CUDA does, to mix tensors with the CPU's.

Its tensors call their device "meta", for which torch has all it needs everywhere, and keep their numbers on the CPU: what runs there
without an error runs on a GPU as far as where tensors lie is concerned, and gives the numbers of the CPU. Kernels are tested by the real one alone.
"""

import json
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, TINY
from safetensors import safe_open
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from minialign.evaluation.evaluation_sets import read_folder  # noqa: E402
from minialign.evaluation.report import evaluate_set  # noqa: E402
from minialign.methods.base import add_reference_logps, encode_example  # noqa: E402
from minialign.methods.preference import PreferenceMethod  # noqa: E402
from minialign.models import checkpoint  # noqa: E402
from minialign.models import loading as loading  # noqa: E402
from minialign.models.loading import load_vlm  # noqa: E402
from minialign.models.policy import Policy  # noqa: E402
from minialign.utils import cli  # noqa: E402

aten, make_tensor = torch.ops.aten, torch.tensor
BETWEEN = (aten._to_copy.default, aten.copy_.default)  # these move numbers
PLACES = [
    "gpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
    ),
]
INDEXING = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
)  # CUDA takes indices from the CPU


def is_there(device):
    return device is not None and torch.device(device).type in ("meta", "cuda")


def numbers(tensor):
    """A tensor of either GPU on the CPU."""
    return getattr(tensor, "own", tensor).cpu()


class There(torch.Tensor):
    """A tensor of the pretend GPU; `own` is the one on the CPU that holds its numbers."""

    @staticmethod
    def __new__(cls, own):
        made = torch.Tensor._make_wrapper_subclass(
            cls, own.shape, own.stride(), own.storage_offset(), dtype=own.dtype, device="meta"
        )
        made.own = own
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def tolist(self):
        return self.own.tolist()

    def __getitem__(self, index):
        """Lists among the indices become tensors on the CPU: torch would make them on "meta", without numbers."""
        several = index if isinstance(index, tuple) else (index,)
        return torch.Tensor.__getitem__(
            self, tuple(make_tensor(one) if isinstance(one, list) else one for one in several)
        )


def run(function, args, kwargs):
    """An operation on the numbers; its result lies where its tensors do, or where it is asked to be made."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    there, here = (
        [one for one in tensors if isinstance(one, There)],
        [one for one in tensors if not isinstance(one, There)],
    )
    assert all(one.device.type == "cpu" for one in here), f"{function}: a tensor without numbers"
    if there and any(one.ndim for one in here) and function not in BETWEEN + INDEXING:
        raise RuntimeError(f"{function}: tensors of two devices")
    device, known = kwargs.get("device"), {id(one.own): one for one in there}
    result_there = (
        isinstance(args[0], There)
        if function is aten.copy_.default
        else bool(there)
        if device is None
        else is_there(device)
    )
    kwargs = kwargs | ({"device": torch.device("cpu")} if is_there(device) else {})
    found = function(
        *tree_map(lambda one: getattr(one, "own", one), args),
        **tree_map(lambda one: getattr(one, "own", one), kwargs),
    )
    return tree_map(
        lambda one: (
            known.get(id(one), There(one))
            if isinstance(one, torch.Tensor) and result_there
            else one
        ),
        found,
    )


class Dispatch(TorchDispatchMode):
    """Within: what is asked to be made on the pretend GPU is."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class OpenedThere:
    """safe_open, which knows no pretend GPU."""

    def __init__(self, path, framework, device):
        self.file, self.device = safe_open(path, framework=framework), device

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None

    def get_tensor(self, name):
        return self.file.get_tensor(name).to(self.device)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture()
def gpu(monkeypatch):
    """All models are loaded onto the pretend GPU."""
    load = loading.load_model
    monkeypatch.setattr(
        loading,
        "load_model",
        lambda directory, dtype=None, device="cpu": load(directory, dtype, "meta"),
    )
    monkeypatch.setattr(checkpoint, "safe_open", OpenedThere)
    monkeypatch.setattr(
        torch,
        "tensor",
        lambda *args, device=None, **kwargs: make_tensor(*args, **kwargs).to(device or "cpu"),
    )
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with Dispatch():
        yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.fixture()
def cuda(monkeypatch):
    """All models are loaded onto the real GPU."""
    load = loading.load_model
    monkeypatch.setattr(
        loading,
        "load_model",
        lambda directory, dtype=None, device="cpu": load(directory, dtype, "cuda"),
    )


def test_the_pretend_gpu_is_one(gpu):
    """It holds numbers, refuses the CPU's but for single ones and indices, and knows where results lie."""
    a, b = torch.arange(6.0, device="meta").view(2, 3), torch.ones(3, 2)
    with pytest.raises(RuntimeError, match="two devices"):
        a @ b
    with pytest.raises(RuntimeError, match="two devices"):
        torch.cat([a, b.T])
    assert is_there((a @ b.to(a)).device) and (a @ b.to(a)).tolist() == [[3, 3], [12, 12]]
    assert (a * torch.tensor(2.0))[:, [2, 0]].tolist() == [[4, 0], [10, 6]] and (
        b.copy_(a.T).device.type,
        b.tolist(),
    ) == ("cpu", [[0, 3], [1, 4], [2, 5]])
    assert torch.tensor([1, 2], device="meta").sum().item() == 3


def step(vlm, records):
    """The loss, the policy and where everything lies after a DPO step's backward pass."""
    policy = Policy(vlm.model, 4, 8)
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:3]]
    add_reference_logps(policy, vlm, examples)
    loss, means = PreferenceMethod(vlm, "dpo", 0.5).loss(
        [
            replace(example, ref_logps=example.ref_logps - torch.tensor([1.0, 0.0]))
            for example in examples
        ],
        examples,
    )
    loss.backward()
    return means | {"loss": loss.item()}, policy


@pytest.mark.parametrize("place", PLACES)
def test_a_dpo_step_gives_the_cpus_gradient(records, request, place):
    wanted, policy = step(load_vlm(TINY / "model"), records)
    request.getfixturevalue(place)
    found, there = step(load_vlm(TINY / "model"), records)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert all(is_there(p.device) and is_there(p.grad.device) for p in there.parameters().values())
    for name, p in policy.parameters().items():
        assert torch.allclose(
            numbers(there.parameters()[name].grad), p.grad, rtol=1e-4, atol=1e-6
        ), name


def trained(folder, monkeypatch, method, *more):
    """What two steps of train.py log, but for the time they took. All records are one batch, laid out as for the reference, so that the first margin is 0, not a rounding."""
    data = TINY / "train" / ("povid.json" if method != "bdhs" else "instruct.json")
    monkeypatch.setattr(
        sys,
        "argv",
        list(
            map(
                str,
                [
                    "train.py",
                    "--model",
                    TINY / "model",
                    "--method",
                    method,
                    "--data",
                    data,
                    "--limit",
                    4,
                    "--steps",
                    2,
                    "--batch-size",
                    4,
                    "--lora-rank",
                    4,
                    "--lr",
                    1e-3,
                    "--temperature",
                    2,
                    "--max-new-tokens",
                    8,
                    "--out",
                    folder,
                    *more,
                ],
            )
        ),
    )
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert cli.run_script(train.main) == 0
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.filterwarnings(
    "ignore:for .*copying from a non-meta"
)  # the reward head, into which load_state_dict copies all the same
@pytest.mark.parametrize(
    "method, more",
    [
        ("bdhs", ()),
        ("bdhs", ("--by", "noise", "--checkpoint-layers")),
        ("distortion", ("--noise-steps", 900)),
        ("online-dpo", ()),
        ("sft", ("--lora-rank", 0)),
        ("rloo", ("--reward",)),
        ("ppo", ("--reward",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(map(str, value[:2])),
)
def test_every_way_of_training_gives_the_cpus_log(
    tmp_path, monkeypatch, request, method, more, place
):
    """Sampling, scoring, the reward model, the optimiser and what is written: the same draws, losses within rounding.

    The noise leaves no response as it was: where one is the chosen one, rounding gives the sign of its margin, which accuracy counts.
    """
    if "--reward" in more:
        trained(tmp_path / "reward", monkeypatch, "reward")
        more = ("--reward", tmp_path / "reward")
    wanted = trained(tmp_path / "here", monkeypatch, method, *more)
    request.getfixturevalue(place)
    found = trained(tmp_path / "there", monkeypatch, method, *more)
    for one, other in zip(found, wanted, strict=True):
        lengths = [line.pop("grad_norm") for line in (one, other)]
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
        assert lengths[0] == pytest.approx(
            lengths[1], rel=1e-3 if place == "gpu" else 1e-2
        )  # Adam's first step takes but the sign of each slope


@pytest.mark.parametrize("place", PLACES)
def test_evaluation_gives_the_cpus_scores(request, place):
    """Captions and POPE, with contrast: decoding from forked caches."""
    held = read_folder(TINY / "tune" / "balanced")
    few = replace(
        held,
        captions=held.captions[:3],
        pope={name: lines[:4] for name, lines in held.pope.items()},
    )
    wanted = [evaluate_set(load_vlm(TINY / "model"), few, contrast=a) for a in (0.0, 1.0)]
    request.getfixturevalue(place)
    assert [evaluate_set(load_vlm(TINY / "model"), few, contrast=a) for a in (0.0, 1.0)] == wanted
