"""Two processes do the work of one: the same log, the same pairs, the same scores, written once."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from minialign.utils.distributed import map_across_ranks

# So few slots a micro-batch that both processes have several of them in each step.
SMALL = (
    "--limit",
    "20",
    "--batch-size",
    "8",
    "--steps",
    "3",
    "--group",
    "5",
    "--tokens-per-microbatch",
    "400",
    "--max-new-tokens",
    "48",
)


def train(folder, processes, *words):
    """train.py on one process or, under torchrun, on several."""
    start = (
        [sys.executable]
        if processes == 1
        else [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
        ]
    )
    return subprocess.run(
        [*start, ROOT / "train.py", *SMALL, "--out", folder, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


def log_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_one_process_shares_with_nobody():
    assert (
        map_across_ranks([1, 2, 3], lambda own: [n * n for n in own]) == [1, 4, 9]
        and map_across_ranks([], list) == []
    )


@pytest.mark.parametrize("method", ["bdhs", "online-dpo"])
def test_two_processes_give_the_losses_and_the_pairs_of_one(tmp_path, method):
    """Losses, margins and log-probs to 1e-6; BDHS pairs and the base's scores to the letter."""
    folder = TINY / "tune" / "typical"
    small = tmp_path / "typical"
    small.mkdir()
    held = json.loads((folder / "captions.json").read_text())
    (small / "captions.json").write_text(json.dumps(held | {"captions": held["captions"][:9]}))
    (small / "images").symlink_to(folder / "images")
    outs = [tmp_path / "one", tmp_path / "two"]
    runs = [
        train(out, processes, "--method", method, "--eval", small)
        for processes, out in enumerate(outs, 1)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[1].stderr
    for one, two in zip(*map(log_of, outs), strict=True):
        for key in ("loss", "margin", "logp_chosen", "logp_rejected", "grad_norm"):
            assert two[key] == pytest.approx(
                one[key], rel=1e-5 if key == "grad_norm" else 1e-6, abs=1e-5
            ), key
    if method == "bdhs":
        assert (outs[0] / "pairs.jsonl").read_bytes() == (outs[1] / "pairs.jsonl").read_bytes()
    assert (
        json.loads((outs[0] / "evaluation.json").read_text())["base"]
        == json.loads((outs[1] / "evaluation.json").read_text())["base"]
    )
    assert sorted(path.name for path in outs[0].iterdir()) == sorted(
        path.name for path in outs[1].iterdir()
    )  # nothing left of the second process
    assert (
        runs[1].stdout.replace(str(outs[1]), str(outs[0])) == runs[0].stdout
        and "| typical | base |" in runs[1].stdout
    )  # said once


def test_bad_input_is_one_line_of_one_process(tmp_path):
    """Both stop with status 2; torchrun adds its own report, ours says it once."""
    run = train(
        tmp_path / "out",
        2,
        "--method",
        "dpo",
        "--data",
        TINY / "train" / "instruct.json",
        "--limit",
        "4",
        "--eval",
    )
    assert (
        run.returncode != 0
        and run.stderr.count("has no rejected response") == 1
        and not (tmp_path / "out").exists()
    )


def test_two_processes_end_together_without_evaluation(tmp_path):
    """Nothing is gathered between the last step and the end: neither may take away what the other still reads. What breaks one process alone is said."""

    def both(code):
        """A line of Python in each of two processes."""
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            "--no-python",
            sys.executable,
            "-c",
            code,
        ]
        return subprocess.run(
            start,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    words = [
        "train.py",
        *SMALL,
        "--out",
        str(tmp_path / "out"),
        "--method",
        "sft",
        "--steps",
        "1",
        "--eval",
    ]
    late = "train.measure = lambda *args: (args[2] == 'aligned' and os.environ['RANK'] == '1' and time.sleep(1) or False) or measure(*args)"
    run = both(
        f"import os, sys, time, train; sys.argv = {words}; measure = train.measure; {late}; sys.exit(train.run_script(train.main))"
    )
    assert run.returncode == 0 and (tmp_path / "out" / "summary.json").exists(), run.stderr
    broken = both(
        "from minialign import parallel; parallel.join('cpu'); assert parallel.leads(), 'only here'"
    )
    assert broken.returncode and "AssertionError: only here" in broken.stderr
