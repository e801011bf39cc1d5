"""The line that shows how training goes: its text, its width, and what its numbers are made of."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from short_runs import make_run

from minialign.methods.preference import SupervisedMethod
from minialign.models.arithmetic import learn_flops, read_flops, tower_flops
from minialign.training import progress
from minialign.training.progress import (
    Speedometer,
    describe_step,
    make_progress_bar,
    row_lengths,
    short_number,
)


@pytest.fixture()
def run(vlm, records, monkeypatch):
    """Return a DPO run of five pairs in a process that has used 3 GB."""
    monkeypatch.setattr(progress, "peak_memory_mb", lambda device: round(3e9 / 2**20))
    return make_run(vlm, records)


def test_the_line_of_a_preference_run(run):
    """Two steps of five and four pairs in 0.25 and 0.2 s are 20 pairs a second."""
    speedometer = Speedometer(run.policy, run.method)
    line = {"step": 1, "loss": 0.64449, "margin": -0.1, "accuracy": 1.0}

    speedometer.add_step(run.examples, run.examples, seconds=0.25)
    speedometer.add_step(run.examples, run.examples[:4], seconds=0.2)

    text = describe_step(line, speedometer)
    assert text == "loss 0.644 margin -0.100, 20 pairs/s, 3.0 GB"


def test_the_line_of_a_supervised_run(run, vlm):
    """An example of a control has two responses, and only the chosen one is learned from."""
    speedometer = Speedometer(run.policy, SupervisedMethod(vlm))

    speedometer.add_step(run.examples, run.examples, seconds=2.0)

    assert describe_step({"loss": 1.5}, speedometer) == "loss 1.500, 2.5 resp/s, 3.0 GB"


def test_the_speed_is_that_of_the_last_ten_steps(run):
    """The first step is slow, because it warms up. It counts no longer after ten others."""
    speedometer = Speedometer(run.policy, run.method)

    speedometer.add_step(run.examples, run.examples, seconds=100.0)
    for _ in range(10):
        speedometer.add_step(run.examples, run.examples, seconds=0.5)

    assert speedometer.describe() == "10 pairs/s, 3.0 GB"


def test_a_step_that_found_nothing_has_a_line(run):
    """An online method may find no pair, and the clock may not see the step."""
    speedometer = Speedometer(run.policy, run.method)

    speedometer.add_step(run.examples, [], seconds=0.0)

    assert speedometer.describe() == "0.00 pairs/s, 3.0 GB"


# --- the share of the peak ---


def test_fixed_pairs_are_learned_from_and_nothing_else(run):
    """Their reference log-probs and image features are stored before training."""
    speedometer = Speedometer(run.policy, run.method)
    rows = [row_lengths(example) for example in run.examples]
    flops = learn_flops(run.policy.model.config, rows, rank=4)
    speedometer.peak = 4 * flops  # operations a second: the step could have taken 0.25 s

    speedometer.add_step(run.examples, run.examples, seconds=0.5)

    assert speedometer.describe() == "10 pairs/s, 3.0 GB, 50% peak"


def test_new_pairs_are_read_by_the_reference_too(run):
    """Three of five pairs are new, as in Mixed-DPO. The method passes over all of them twice."""
    run.method.passes = 2
    speedometer = Speedometer(run.policy, run.method)
    new_pairs = [replace(example) for example in run.examples[:3]]
    learned = new_pairs + run.examples[3:]
    config = run.policy.model.config
    rows = [row_lengths(example) for example in run.examples]

    counted = speedometer.count_flops(run.examples, learned)

    assert counted == 2 * learn_flops(config, rows, rank=4) + read_flops(config, rows[:3])


def test_tiles_count_in_the_step_that_encodes_them(run, vlm, records):
    """Two images of a tile each are new in the first step, and stored in the second."""
    speedometer = Speedometer(run.policy, run.method)
    for record in records[5:7]:
        vlm.encode_images(record.paths)

    first = speedometer.count_flops(run.examples, run.examples)
    second = speedometer.count_flops(run.examples, run.examples)

    assert first - second == tower_flops(vlm.model.config, num_tiles=2)


def test_two_processes_share_the_work(run, monkeypatch):
    """Whether they hold two models, or two parts of one. The reference's work is shared as well."""
    speedometer = Speedometer(run.policy, run.method)
    new_pairs = [replace(example) for example in run.examples]
    alone = speedometer.count_flops(run.examples, new_pairs)
    monkeypatch.setattr(progress, "num_processes", lambda: 2)

    assert speedometer.count_flops(run.examples, new_pairs) == alone // 2


def policy_on(device):
    """Return something that a Speedometer takes for a policy on a device."""
    model = SimpleNamespace(
        device=torch.device(device),
        num_encoded_tiles=0,
        vocab_head=torch.zeros(1, dtype=torch.bfloat16),
    )
    return SimpleNamespace(model=model)


def test_the_peak_is_measured_on_a_gpu_in_the_dtype_of_the_run(monkeypatch):
    calls = []

    def measure(device, dtype):
        calls.append((device.type, dtype))
        return 1e12

    monkeypatch.setattr(progress, "measure_peak", measure)

    on_cpu = Speedometer(policy_on("cpu"), method=None)
    on_gpu = Speedometer(policy_on("cuda"), method=None)

    assert on_cpu.peak is None
    assert on_gpu.peak == 1e12
    assert calls == [("cuda", torch.bfloat16)]


def test_a_gpu_without_room_for_the_matrices_shows_no_share(monkeypatch):
    def measure(device, dtype):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(progress, "measure_peak", measure)

    assert Speedometer(policy_on("cuda"), method=None).peak is None


# --- the width ---


@pytest.mark.parametrize(
    "title, text",
    [
        ("ppo", "loss 0.644 reward -0.10 kl 12.35, 25 resp/s, 71 GB, 41% peak"),
        ("online-bdhs", "loss 0.644 margin 12.345, 3.5 pairs/s, 141 GB, 41% peak"),
    ],
)
def test_the_longest_lines_fit_a_hundred_columns(title, text, monkeypatch, capsys):
    """On a terminal as wide as a desk. A line that does not fit would lose its end."""
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)

    with make_progress_bar(title, 1233, 5000) as bar:
        bar.start_t -= 30  # a step takes half a minute, so 3,766 more take 31 hours
        bar.set_postfix_str(text, refresh=False)
        bar.update()

    last_line = capsys.readouterr().err.strip().split("\r")[-1]
    assert len(last_line) <= 100
    assert last_line.startswith(f"{title}: 25%|")
    assert last_line.endswith(f"left, {text}")


@pytest.mark.parametrize(
    "value, expected",
    [(0.0, "0.00"), (0.042, "0.04"), (1.26, "1.3"), (9.94, "9.9"), (25.3, "25"), (1234.5, "1234")],
)
def test_short_numbers(value, expected):
    assert short_number(value) == expected
