"""Two processes do the work of one: the same log, the same pairs, the same scores, written once."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from safetensors.torch import load_file

from minialign.utils.distributed import (
    all_reduce_sum,
    broadcast_from_main,
    gather_results,
    is_main_process,
    local_share,
    map_across_ranks,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# So few tokens a micro-batch that both processes have several of them in each step.
SMALL = (
    *("--limit", "20"),
    *("--batch-size", "8"),
    *("--steps", "3"),
    *("--tokens-per-microbatch", "400"),
)
# The options of the methods that sample.
SAMPLING = {"bdhs": "--group 5 --max-new-tokens 48", "online-dpo": "--max-new-tokens 48"}


def run(*words):
    """Run a command with one thread a process, and return what it left."""
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def train_alone(folder, *words):
    """Run train.py as one process."""
    return run(sys.executable, ROOT / "train.py", *SMALL, "--out", folder, *words)


def train_in_two(folder, *words):
    """Run train.py as two processes."""
    return run(*TORCHRUN, ROOT / "train.py", *SMALL, "--out", folder, *words)


def run_code_in_two(code):
    """Run Python code in each of two processes."""
    return run(*TORCHRUN, "--no-python", sys.executable, "-c", code)


def read_log(folder):
    """Return the lines of the log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- the helpers ---


def squares(numbers):
    return [number * number for number in numbers]


def test_one_process_does_all_the_work():
    assert is_main_process()
    assert local_share([1, 2, 3]) == [1, 2, 3]
    assert gather_results([1, 4, 9], num_items=3) == [1, 4, 9]
    assert map_across_ranks([1, 2, 3], squares) == [1, 4, 9]
    assert broadcast_from_main("here") == "here"
    tensor = torch.tensor([1.0, 2.0])
    all_reduce_sum([tensor])
    assert tensor.tolist() == [1.0, 2.0]


def test_work_is_not_called_without_items():
    assert map_across_ranks([], pytest.fail) == []


HELPERS_IN_TWO = """
import torch
from minialign.utils import distributed as d

d.init_distributed("cpu")
items = [10, 20, 30, 40, 50]
share = d.local_share(items)
assert share == ([10, 30, 50] if d.rank() == 0 else [20, 40]), share
doubled = d.map_across_ranks(items, lambda own: [[2 * item, d.rank()] for item in own])
assert doubled == [[20, 0], [40, 1], [60, 0], [80, 1], [100, 0]], doubled
assert d.map_across_ranks(["only"], list) == ["only"]
assert d.broadcast_from_main(d.rank()) == 0
tensor = torch.tensor([1.0, 2.0]) * (d.rank() + 1)
d.all_reduce_sum([tensor])
assert tensor.tolist() == [3.0, 6.0], tensor
d.barrier()
"""


def test_two_processes_share_the_work():
    """Item i belongs to process i % 2. Both receive all results, in the order of the items."""
    done = run_code_in_two(HELPERS_IN_TWO)

    assert done.returncode == 0, done.stderr


def test_an_error_of_the_second_process_is_seen():
    """Its ordinary output is silenced, its uncaught exceptions are not."""
    done = run_code_in_two(
        "from minialign.utils.distributed import init_distributed, is_main_process\n"
        "init_distributed('cpu')\n"
        "assert is_main_process(), 'only here'"
    )

    assert done.returncode != 0
    assert "AssertionError: only here" in done.stderr


# --- train.py ---


@pytest.fixture
def small_set(tmp_path):
    """Return an evaluation set with nine captions."""
    source = TINY / "tune" / "typical"
    folder = tmp_path / "typical"
    folder.mkdir()
    annotations = json.loads((source / "captions.json").read_text())
    annotations["captions"] = annotations["captions"][:9]
    (folder / "captions.json").write_text(json.dumps(annotations))
    (folder / "images").symlink_to(source / "images")
    return folder


@pytest.mark.parametrize("method", ["bdhs", "online-dpo", "distill", "dpo --loss mpo"])
def test_two_processes_give_the_results_of_one(tmp_path, small_set, method):
    """Losses, margins and log-probs to 1e-6; pairs, targets and the base's scores exactly.

    The shift of MPO is the mean over the pairs of both. The norm of the gradient is summed in
    another order, so it has 1e-5.
    """
    alone = tmp_path / "alone"
    in_two = tmp_path / "in_two"
    words = ["--method", *method.split(), *SAMPLING.get(method, "").split(), "--eval", small_set]
    done_alone = train_alone(alone, *words)
    done_in_two = train_in_two(in_two, *words)
    assert done_alone.returncode == 0, done_alone.stderr
    assert done_in_two.returncode == 0, done_in_two.stderr

    # 1. The log.
    for line, expected in zip(read_log(in_two), read_log(alone), strict=True):
        for name in line.keys() & {"loss", "margin", "logp_chosen", "logp_rejected", "shift"}:
            assert line[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-5), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5, abs=1e-5)

    # 2. Pairs and scores.
    if method == "bdhs":
        assert (in_two / "pairs.jsonl").read_bytes() == (alone / "pairs.jsonl").read_bytes()
    if method == "distill":
        targets = load_file(in_two / "targets.safetensors")
        for name, tensor in load_file(alone / "targets.safetensors").items():
            assert torch.equal(targets[name], tensor), name
    scores = json.loads((in_two / "evaluation.json").read_text())
    expected_scores = json.loads((alone / "evaluation.json").read_text())
    assert scores["base"] == expected_scores["base"]

    # 3. No file of the second process is left, and everything is printed once.
    names = sorted(path.name for path in in_two.iterdir())
    assert names == sorted(path.name for path in alone.iterdir())
    assert "typical  base" in done_in_two.stdout
    assert done_in_two.stdout.replace(str(in_two), str(alone)) == done_alone.stdout


def test_two_processes_share_rollouts_that_serve_two_passes(tmp_path):
    """GRPO with a reward model that is trained first, by two processes or by one.

    Sums are made in another order, and the first step of Adam takes the sign of a gradient however
    small it is. So numbers have 1e-4. In the loss, terms of about 1 with both signs cancel.
    """
    few = "--limit 6 --batch-size 6 --steps 2 --lora-rank 2 --max-new-tokens 8 --eval"
    words = ["--method", "grpo", "--passes", "2", "--reward-steps", "1", *few.split()]
    done_alone = train_alone(tmp_path / "alone", *words)
    done_in_two = train_in_two(tmp_path / "in_two", *words)
    assert done_alone.returncode == 0, done_alone.stderr
    assert done_in_two.returncode == 0, done_in_two.stderr

    lines = read_log(tmp_path / "in_two")
    assert len(lines) == 2
    for line, expected in zip(lines, read_log(tmp_path / "alone"), strict=True):
        for name in ("reward", "kl", "entropy", "length", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
        assert line["loss"] == pytest.approx(expected["loss"], abs=5e-4)


def test_bad_input_is_reported_once(tmp_path):
    """Both processes stop. torchrun adds a report of its own, our line is printed once."""
    instruct = TINY / "train" / "instruct.json"

    done = train_in_two(
        tmp_path / "out", "--method", "dpo", "--data", instruct, "--limit", "4", "--eval"
    )

    assert done.returncode != 0
    assert done.stderr.count("has no rejected response") == 1
    assert not (tmp_path / "out").exists()


LATE_SECOND_PROCESS = """
import os, sys, time
import train
from minialign.training.run_folder import RunFolder

evaluate = RunFolder.evaluate

def evaluate_late(run, variant, *args):
    if variant == "aligned" and os.environ["RANK"] == "1":
        time.sleep(1)
    return evaluate(run, variant, *args)

RunFolder.evaluate = evaluate_late
sys.argv = {words}
sys.exit(train.run_script(train.main))
"""


def test_a_late_second_process_finds_what_it_reads(tmp_path):
    """Without evaluation nothing is exchanged between the last step and the end.

    The main process must not remove a file that the other one still reads.
    """
    out = tmp_path / "out"
    words = [
        "train.py",
        *SMALL,
        *("--out", str(out)),
        *("--method", "sft"),
        *("--steps", "1"),
        "--eval",
    ]

    done = run_code_in_two(LATE_SECOND_PROCESS.format(words=words))

    assert done.returncode == 0, done.stderr
    assert (out / "summary.json").exists()
