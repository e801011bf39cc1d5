"""Test that a killed and resumed run on sampled responses ends with the same bits."""

import copy
import json

import pytest
import torch
from conftest import TINY
from method_runs import FixedAnnotator, make_collector, make_run
from processes import RunningProcess
from safetensors.torch import load_file

from minialign.methods.base import Method
from minialign.methods.registry import METHODS
from minialign.models.loading import load_vlm
from minialign.neighbor_losses import NEIGHBOR_LOSSES
from minialign.training.loop import Schedule, train


class DyingMethod(Method):
    """A method whose process is killed at a call of its loss."""

    def __init__(self, method, num_calls):
        self.method = method
        self.passes = method.passes
        self.calls_left = num_calls

    def collect(self, batch, step):
        """Collect as the method does."""
        return self.method.collect(batch, step)

    def state_tensors(self):
        """Keep what the method keeps."""
        return self.method.state_tensors()

    def loss(self, examples, batch):
        """Return the method's loss so many times, then die."""
        if self.calls_left == 0:
            raise MemoryError("killed")
        self.calls_left -= 1
        return self.method.loss(examples, batch)


class TiesFirst:
    """A collector that finds only ties in the first two steps."""

    def __init__(self, tied, online):
        self.tied = tied
        self.online = online

    def collect(self, batch, step):
        """Return nothing but ties in steps 0 and 1, then pairs."""
        if step < 2:
            return self.tied.collect(batch, step)
        return self.online.collect(batch, step)


def train_in(folder, run, schedule, method=None):
    """Train a run in a folder, perhaps by another method."""
    train(run.policy, method or run.method, run.examples, schedule, folder)


def read_log(folder):
    """Return the lines of a log without the seconds, which differ between two runs."""
    lines = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        del metrics["seconds"]
        lines.append(metrics)
    return lines


def assert_same_runs(folder, other_folder):
    """Assert that two runs left the same log and the same bits of weights and Adam's moments."""
    assert read_log(folder) == read_log(other_folder)
    state = load_file(folder / "state.safetensors")
    other_state = load_file(other_folder / "state.safetensors")
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other_state[name]), name


# After how many calls of its loss a run is killed, for every method that samples in each step, and
# for the losses that compute more in each step or are a sum of two methods.
KILLED_AFTER = {
    "mpo": 3,
    "mdpo": 3,
    "online-dpo": 3,
    "mixed-dpo": 3,
    "online-bdhs": 3,
    "distortion": 1,
    "rloo": 3,
    "ppo": 5,
    "grpo": 3,
    "distill-policy": 3,
    "dpo-distill": 3,
}


def test_every_method_that_samples_in_each_step_is_killed():
    """The others learn from fixed responses, and so does distill unless it samples.

    dpo-distill is a sum of two such methods, killed here because its loss has two parts.
    tests/training/test_resume.py kills a run with fixed responses.
    """
    methods = {name.removesuffix("-policy") for name in KILLED_AFTER}
    assert methods - {*NEIGHBOR_LOSSES, "dpo-distill"} == METHODS.keys() - {
        "sft",
        "dpo",
        "bdhs",
        "reward",
    }


def train_whole(folder, name, records, schedule):
    """Train a run in one go."""
    train_in(folder, make_run(name, load_vlm(TINY / "model"), records), schedule)


@pytest.mark.parametrize("name, num_calls", KILLED_AFTER.items())
def test_a_killed_run_resumes_to_the_bit(vlm, records, tmp_path, name, num_calls):
    """A run is killed after its last checkpoint or before its first, and another one resumes it.

    PPO is killed between the two passes of a step. Another process trains the run in one go.
    """
    schedule = Schedule(4, 3, 1e-3, 1e-3, 0, save_every=2)
    few_records = records[:4]
    whole = RunningProcess(train_whole, tmp_path / "whole", name, few_records, schedule)
    killed_run = make_run(name, copy.deepcopy(vlm), few_records)
    resumed_run = make_run(name, vlm, few_records)

    with pytest.raises(MemoryError):
        dying_method = DyingMethod(killed_run.method, num_calls)
        train_in(tmp_path / "killed", killed_run, schedule, dying_method)
    train_in(tmp_path / "killed", resumed_run, schedule)
    outcome = whole.wait()
    assert outcome.status == 0, outcome.stderr

    assert len(read_log(tmp_path / "whole")) == 4
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def make_run_with_ties_first(vlm, records):
    """Return an Online-DPO run whose first two steps give nothing to learn from."""
    run = make_run("online-dpo", vlm, records)
    ties = FixedAnnotator({example.record.id: None for example in run.examples})
    tied = make_collector("online-dpo", run.policy, vlm, annotator=ties)
    run.method.collector = TiesFirst(tied, run.method.collector)
    return run


def test_a_run_that_has_not_learned_yet_can_be_resumed(vlm, records, tmp_path):
    """Steps 0 and 1 are ties, and the run is killed in step 2: there are no moments to restore.

    At the end Adam has counted the two steps that it took.
    """
    schedule = Schedule(4, 4, 1e-3, 1e-3, 0, save_every=1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_in(whole, make_run_with_ties_first(copy.deepcopy(vlm), records), schedule)

    killed_run = make_run_with_ties_first(copy.deepcopy(vlm), records)
    with pytest.raises(MemoryError):
        train_in(killed, killed_run, schedule, DyingMethod(killed_run.method, 0))
    stored_names = load_file(killed / "state.safetensors").keys()
    assert not any(name.startswith("step.") for name in stored_names)
    train_in(killed, make_run_with_ties_first(vlm, records), schedule)

    assert_same_runs(whole, killed)
    step_counts = []
    for name, tensor in load_file(whole / "state.safetensors").items():
        if name.startswith("step."):
            step_counts.append(float(tensor))
    assert set(step_counts) == {2.0}
