"""Two processes do the work of one: the same log, the same pairs, the same scores, written once."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY
from processes import Outcome, run_file, run_in_two, start_process
from safetensors.torch import load_file
from torch.distributed.distributed_c10d import _set_pg_timeout

from minialign.training.run_folder import RunFolder
from minialign.utils import distributed
from minialign.utils.cli import describe_error, run_script
from minialign.utils.distributed import (
    LAUNCH_VARIABLES,
    LaunchError,
    LostProcessError,
    all_reduce_sum,
    barrier,
    broadcast_from_main,
    check_launch,
    error_store,
    gather_results,
    gather_tensors,
    group_processes,
    init_distributed,
    is_main_process,
    join_lists,
    local_share,
    lost_process_errors,
    map_across_ranks,
    part_index,
    share_of_model,
    sum_over_parts,
    value_of_first_part,
)

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# So few tokens a micro-batch that both processes have several of them in each step.
SMALL = (
    *("--limit", "12"),
    *("--batch-size", "8"),
    *("--steps", "2"),
    *("--tokens-per-microbatch", "400"),
)
# The options of the methods that sample.
SAMPLING = {"bdhs": "--group 5 --max-new-tokens 24", "online-dpo": "--max-new-tokens 24"}


def run_with_torchrun(*words) -> Outcome:
    """Run train.py in two processes that torchrun starts, with one thread each."""
    done = subprocess.run(
        [*TORCHRUN, ROOT / "train.py", *map(str, words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def run_forked(*words) -> Outcome:
    """Run train.py in two processes that are forked, which is faster."""
    first, second = run_in_two(run_file, "train.py", *map(str, words))
    status = first.status or second.status
    return Outcome(status, first.stdout + second.stdout, first.stderr + second.stderr)


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


class TensorOnGpu:
    """A tensor that says where it was copied to."""

    def cpu(self):
        """Return the copy on the CPU."""
        return "on the CPU"


def test_the_tensors_of_one_process_are_on_the_cpu_too():
    assert gather_tensors(TensorOnGpu()) == ["on the CPU"]


def test_work_is_not_called_without_items():
    assert map_across_ranks([], pytest.fail) == []


def share_work():
    """Use every helper in one of two processes."""
    init_distributed("cpu")
    rank = distributed.model_index()
    items = [10, 20, 30, 40, 50]
    assert local_share(items) == ([10, 30, 50] if rank == 0 else [20, 40])
    assert share_of_model(1, items) == [20, 40]
    doubled = map_across_ranks(items, lambda share: [[2 * item, rank] for item in share])
    assert doubled == [[20, 0], [40, 1], [60, 0], [80, 1], [100, 0]]
    assert map_across_ranks(["only"], list) == ["only"]
    assert broadcast_from_main(rank) == 0
    assert join_lists([rank]) == [0, 1]
    first, second = gather_tensors(torch.arange(3 * rank, dtype=torch.int32))
    assert first.tolist() == []
    assert second.tolist() == [0, 1, 2]
    assert second.dtype == torch.int32
    tensor = torch.tensor([1.0, 2.0]) * (rank + 1)
    all_reduce_sum([tensor])
    assert tensor.tolist() == [3.0, 6.0]
    barrier()


def test_two_processes_share_the_work():
    """Item i belongs to process i % 2. Both receive all results, in the order of the items."""
    for outcome in run_in_two(share_work):
        assert outcome.status == 0, outcome.stderr


def patience_of(group):
    """Return how long a process waits for the others of a group."""
    return group._get_backend(torch.device("cpu")).options._timeout


def hold_one_model():
    """Hold a part of one model. The second process leaves an exchange unanswered."""
    init_distributed("cpu")
    group_processes(2)
    rank = part_index()
    for group in (dist.group.WORLD, *distributed._groups.values()):
        assert patience_of(group) == timedelta(days=1)
    assert value_of_first_part([0.1, rank]) == [0.1, 0]

    if rank == 1:
        error_store().wait(["given up"])
        return
    _set_pg_timeout(timedelta(seconds=0.2), distributed._groups["parts"])
    with pytest.raises(LostProcessError, match="^another process of this run does not answer"):
        sum_over_parts(torch.zeros(1))
    error_store().set("given up", "")


def test_the_parts_of_a_model_agree_and_wait_for_each_other():
    """They wait for a day, and say of a process that is late that it does not answer."""
    for outcome in run_in_two(hold_one_model):
        assert outcome.status == 0, outcome.stderr


@pytest.mark.parametrize(
    "message, what",
    [
        ("[gloo/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:7. Was it", "has ended"),
        ("[gloo/buffer.cc:78] Timed out waiting 1800000ms for recv operation", "does not answer"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1", "does not answer"),
    ],
)
def test_a_lost_process_and_a_late_one_are_told_apart(message, what):
    with pytest.raises(LostProcessError, match=rf"^another process of this run {what} \("):
        with lost_process_errors():
            raise RuntimeError(message)


@pytest.mark.parametrize("num_gpus", [0, 1])
def test_a_process_without_a_gpu_is_told(monkeypatch, num_gpus):
    """It is the second one of its machine."""
    for name in LAUNCH_VARIABLES:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)

    check_launch("cpu")
    with pytest.raises(LaunchError) as caught:
        check_launch("cuda")

    line = describe_error(caught.value, "train.py")
    assert line.startswith(
        f"--device cuda: process 1 of this machine has no GPU (torch sees {num_gpus}); lower"
    )


@pytest.mark.parametrize("name", LAUNCH_VARIABLES)
def test_a_launch_without_torchrun_is_refused(monkeypatch, name):
    """WORLD_SIZE comes from something else."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for other_name in LAUNCH_VARIABLES:
        monkeypatch.setenv(other_name, "0")
    monkeypatch.delenv(name)

    with pytest.raises(LaunchError, match=f"WORLD_SIZE is set, but {name} is not; start"):
        init_distributed("cpu")


def run_without_gpus():
    """Run a script on two processes and no GPU."""
    torch.cuda.device_count = lambda: 0
    sys.exit(run_script(lambda: init_distributed("cuda")))


def test_processes_that_cannot_start_print_one_line():
    first, second = run_in_two(run_without_gpus)

    assert (first.status, second.status) == (2, 2)
    assert len(first.messages + second.messages) == 1, first.stderr + second.stderr


def fail_in_the_second_process():
    init_distributed("cpu")
    assert is_main_process(), "only here"


def test_an_error_of_the_second_process_is_seen():
    """Its ordinary output is silenced, its uncaught exceptions are not."""
    first, second = run_in_two(fail_in_the_second_process)

    assert first.status == 0, first.stderr
    assert second.status != 0
    assert "AssertionError: only here" in second.stderr


# --- train.py ---


@pytest.fixture
def small_set(tmp_path):
    """Return an evaluation set with three captions."""
    source = TINY / "tune" / "typical"
    folder = tmp_path / "typical"
    folder.mkdir()
    annotations = json.loads((source / "captions.json").read_text())
    annotations["captions"] = annotations["captions"][:3]
    (folder / "captions.json").write_text(json.dumps(annotations))
    (folder / "images").symlink_to(source / "images")
    return folder


LOGGED = {"loss", "margin", "logp_chosen", "logp_rejected", "shift", "divergence"}


@pytest.mark.parametrize(
    "method, train_in_two",
    [
        ("bdhs", run_forked),
        ("online-dpo", run_forked),
        ("distill --no-control", run_with_torchrun),
        ("dpo --loss mpo --distill-weight 2", run_forked),
    ],
)
def test_two_processes_give_the_results_of_one(tmp_path, small_set, method, train_in_two):
    """Losses, margins and log-probs to 1e-6; pairs, targets and the base's scores exactly.

    The shift of MPO is the mean over the pairs of both. The norm of the gradient is summed in
    another order, so it has 1e-5.
    """
    alone = tmp_path / "alone"
    in_two = tmp_path / "in_two"
    words = [*SMALL, "--method", *method.split(), *SAMPLING.get(method, "").split()]
    words += ["--eval", small_set]
    run_alone = start_process("train.py", *words, "--out", alone)
    done_in_two = train_in_two(*words, "--out", in_two)
    done_alone = run_alone.wait()
    assert done_alone.status == 0, done_alone.stderr
    assert done_in_two.status == 0, done_in_two.stderr

    # 1. The log.
    for line, expected in zip(read_log(in_two), read_log(alone), strict=True):
        for name in line.keys() & LOGGED:
            assert line[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-5), name
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-5, abs=1e-5)

    # 2. Pairs and scores.
    if method == "bdhs":
        assert (in_two / "pairs.jsonl").read_bytes() == (alone / "pairs.jsonl").read_bytes()
    if "distill" in method:
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
    words = [*SMALL, "--method", "grpo", "--passes", "2", "--reward-steps", "1", *few.split()]
    run_alone = start_process("train.py", *words, "--out", tmp_path / "alone")
    done_in_two = run_forked(*words, "--out", tmp_path / "in_two")
    done_alone = run_alone.wait()
    assert done_alone.status == 0, done_alone.stderr
    assert done_in_two.status == 0, done_in_two.stderr

    lines = read_log(tmp_path / "in_two")
    assert len(lines) == 2
    for line, expected in zip(lines, read_log(tmp_path / "alone"), strict=True):
        for name in ("reward", "kl", "entropy", "length", "grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
        assert line["loss"] == pytest.approx(expected["loss"], abs=5e-4)


def test_bad_input_is_reported_once(tmp_path):
    """Both processes stop, and the line is printed once."""
    instruct = TINY / "train" / "instruct.json"

    words = ["--method", "dpo", "--data", instruct, "--limit", "4", "--eval"]
    done = run_forked(*words, "--out", tmp_path / "out")

    assert done.status == 2
    assert done.stderr.count("has no rejected response") == 1
    assert not (tmp_path / "out").exists()


def train_with_late_second_process(words):
    """Run train.py. The second process evaluates the aligned model a second later."""
    evaluate = RunFolder.evaluate

    def evaluate_late(run, variant, *arguments):
        if variant == "aligned" and distributed.model_index() == 1:
            time.sleep(1)
        return evaluate(run, variant, *arguments)

    RunFolder.evaluate = evaluate_late
    run_file("train.py", *words)


def test_a_late_second_process_finds_what_it_reads(tmp_path):
    """Without evaluation nothing is exchanged between the last step and the end.

    The main process must not remove a file that the other one still reads.
    """
    out = tmp_path / "out"
    words = [*SMALL, "--method", "sft", "--steps", "1", "--eval", "--out", str(out)]

    outcomes = run_in_two(train_with_late_second_process, words)

    for outcome in outcomes:
        assert outcome.status == 0, outcome.stderr
    assert (out / "summary.json").exists()
