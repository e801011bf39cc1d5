"""Runs of train.py that are killed, interrupted or changed: resumed to the bit, or refused."""

import errno
import json
import os
import platform
import shutil
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import TINY
from PIL import Image
from processes import run_process, run_until, start_process
from running import (
    BRIEF,
    assert_refused,
    assert_same_tensors,
    brief,
    files_in,
    read_log,
    run_inside,
    write_json,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minialign.models import safetensors_files
from minialign.pairs.bdhs import BdhsSampler
from minialign.training import loop, options, run
from minialign.training.run_folder import RunFolder
from minialign.utils import files
from minialign.utils.locks import file_lock

SMALL = "--limit 12 --batch-size 2 --eval --group 4 --rounds 2 --max-new-tokens 16".split()


@pytest.fixture
def train(monkeypatch, capfd):
    """Return a function that runs train.py inside this process."""
    return partial(run_inside, monkeypatch, capfd, "train.py")


# --- kill -9 and Ctrl-C ---


@pytest.fixture(scope="module", params=["lora", "all-weights"])
def killed_run(request, tmp_path_factory):
    """Run 26 steps with a control twice: in one go, and killed between two saved states.

    Returns the options, the folder of the whole run, the folder of the killed one, and the name of
    the file with the trained weights.
    """
    folder = tmp_path_factory.mktemp("killed")
    if request.param == "lora":
        rank = "4"
        weights = "adapter/adapter_model.safetensors"
    else:
        rank = "0"
        weights = "model/model.safetensors"
    words = [*SMALL, "--steps", "26", "--control", "--lora-rank", rank]
    whole = folder / "whole"
    killed = folder / "killed"
    log = killed / "metrics.jsonl"
    whole_run = start_process("train.py", *words, "--out", whole)
    run_until(log, 22, signal.SIGKILL, "train.py", *words, "--out", killed)
    assert whole_run.wait().status == 0
    assert not (killed / "summary.json").exists()
    return words, whole, killed, weights


def test_a_killed_run_resumes_to_the_bit(killed_run, train):
    """Same weights and same log as the run in one go, the seconds of the log excepted."""
    words, whole, killed, weights = killed_run

    # 1. A folder that exists needs --resume.
    assert train(*words, "--out", killed).status == 2

    # 2. Resumed, it gives the same bits.
    outcome = train(*words, "--out", killed, "--resume")
    assert outcome.status == 0, outcome.stderr
    for variant in (".", "control"):
        assert len(read_log(killed / variant)) == 26
        assert read_log(killed / variant) == read_log(whole / variant)
        assert_same_tensors(killed / variant / weights, whole / variant / weights)

    # 3. A finished run is left alone, but for its page if that is missing.
    (killed / "report.html").unlink()
    outcome = train(*words, "--out", killed, "--resume")
    assert outcome.status == 0
    assert "finished already" in outcome.stderr
    assert (killed / "report.html").exists()

    # 4. Other options are refused.
    outcome = train(*words, "--seed", "9", "--out", killed, "--resume")
    assert outcome.status == 2
    assert "--seed" in outcome.stderr


@pytest.mark.parametrize(
    "method, steps", [("online-dpo", 26), ("rloo", 26), ("distill --on policy --no-control", 32)]
)
def test_a_killed_run_that_samples_in_every_step_resumes_to_the_bit(
    tmp_path, train, reward_folder, method, steps
):
    """Killed after the saved state of step 20. All later responses are those of the whole run.

    A step of distillation is short. With more steps the signal comes before the last one.
    """
    name, *options = method.split()
    words = [*brief(name), *options, "--max-new-tokens", "8"]
    words += ["--batch-size", "1", "--steps", str(steps)]
    if method == "rloo":
        words += ["--reward", reward_folder]
    whole = tmp_path / "whole"
    killed = tmp_path / "killed"
    log = killed / "metrics.jsonl"
    whole_run = start_process("train.py", *words, "--out", whole)
    run_until(log, 21, signal.SIGKILL, "train.py", *words, "--out", killed)
    assert whole_run.wait().status == 0
    assert not (killed / "summary.json").exists()
    assert (killed / "state.safetensors").exists()

    outcome = train(*words, "--out", killed, "--resume")

    assert outcome.status == 0, outcome.stderr
    assert len(read_log(killed)) == steps
    assert read_log(killed) == read_log(whole)
    adapter = "adapter/adapter_model.safetensors"
    assert_same_tensors(killed / adapter, whole / adapter)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_exits_with_128_plus_its_number(tmp_path, signal_number):
    folder = tmp_path / "run"
    words = [*BRIEF, "--method", "dpo", "--steps", "400", "--out", folder]

    outcome = run_until(folder / "metrics.jsonl", 3, signal_number, "train.py", *words)

    assert outcome.status == 128 + signal_number
    name = signal.Signals(signal_number).name
    assert outcome.messages[-1] == (
        f"train.py: interrupted by {name}; to resume, give the same options, "
        f"--out {folder} and --resume"
    )
    assert "Traceback" not in outcome.stderr
    assert len(read_log(folder)) < 400
    assert (folder / "state.safetensors").exists()
    assert not (folder / ".lock").exists()


def test_an_interrupt_between_the_files_of_a_reward_model_can_be_resumed(
    tmp_path, train, monkeypatch
):
    """rloo without --reward trains one in OUT/reward. Here it is interrupted before it is saved."""
    monkeypatch.setitem(options.METHOD_DEFAULTS, "reward", {"steps": 1})
    words = [*brief("rloo"), "--steps", "1"]
    words += ["--model", TINY / "model", "--data", TINY / "train" / "povid.json"]
    words += ["--out", tmp_path / "run"]

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_adapter", interrupt)
        assert train(*words).status == 130

    outcome = train(*words, "--resume")

    assert outcome.status == 0, outcome.stderr
    assert files_in(tmp_path / "run" / "reward") == {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "score.safetensors",
        "metrics.jsonl",
        "evaluation.json",
    }


def test_resuming_a_run_that_does_not_exist_starts_it(tmp_path, train):
    folder = tmp_path / "run"

    outcome = train("--method", "sft", *BRIEF, "--out", folder, "--resume")

    assert outcome.status == 0
    assert f"{folder}: nothing to resume; this is a new run" in outcome.messages
    assert (folder / "summary.json").exists()


# --- stored reference log-probs ---


class DpoRun:
    """A DPO run of one step on three records, which is resumed again and again."""

    def __init__(self, folder, train):
        self.train = train
        self.out = folder / "out"
        self.path = self.out / "reference.safetensors"
        self.data = folder / "povid.json"
        self.records = json.loads((TINY / "train" / "povid.json").read_text())[:3]

    def resume(self):
        """Resume, or start. Return the outcome."""
        (self.out / "summary.json").unlink(missing_ok=True)
        write_json(self.data, self.records)
        return self.train(
            *"--method dpo --eval --steps 1 --batch-size 3 --lora-rank 4".split(),
            *("--data", self.data),
            *("--images", TINY / "train" / "images"),
            *("--out", self.out, "--resume"),
        )

    def stored(self):
        """Return the stored log-probs and their key."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor("logps"), file.metadata()["key"]


@pytest.fixture
def dpo_run(tmp_path, train):
    """Return a finished DpoRun."""
    dpo_run = DpoRun(tmp_path, train)
    outcome = dpo_run.resume()
    assert outcome.status == 0, outcome.stderr
    assert "computing it again" not in outcome.stderr
    return dpo_run


def test_reference_logps_are_stored_and_not_computed_again(dpo_run, monkeypatch):
    logps, key = dpo_run.stored()
    assert logps.shape == (3, 2)

    def fail(*_):
        pytest.fail("stored log-probs were computed again")

    monkeypatch.setattr(run, "add_reference_logps", fail)
    outcome = dpo_run.resume()

    assert outcome.status == 0, outcome.stderr
    assert "computing it again" not in outcome.stderr
    same_logps, same_key = dpo_run.stored()
    assert torch.equal(same_logps, logps)
    assert same_key == key


def test_reference_logps_of_changed_data_are_computed_again(dpo_run):
    """One rejected response changes. Its log-prob is the only one that changes with it.

    The others are computed in a batch of another shape, so they may differ by rounding.
    """
    logps, key = dpo_run.stored()
    dpo_run.records[1]["rejected_conversations"][1]["value"] = "Nothing."

    outcome = dpo_run.resume()

    assert outcome.status == 0, outcome.stderr
    warning = (
        f"{dpo_run.path} was computed from other weights, data or settings, or is damaged; "
        "computing it again"
    )
    assert warning in outcome.stderr
    new_logps, new_key = dpo_run.stored()
    assert new_key != key
    assert abs(new_logps[1, 1] - logps[1, 1]) > 1
    new_logps[1, 1] = logps[1, 1]
    torch.testing.assert_close(new_logps, logps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("damage", ["no key", "another shape", "another tensor"])
def test_damaged_reference_logps_are_computed_again(dpo_run, damage):
    """The right key alone is not enough."""
    logps, key = dpo_run.stored()
    if damage == "no key":
        save_file({"logps": logps}, dpo_run.path)
    elif damage == "another shape":
        save_file({"logps": logps[:2]}, dpo_run.path, {"key": key})
    else:
        save_file({"x": logps}, dpo_run.path, {"key": key})

    outcome = dpo_run.resume()

    assert outcome.status == 0, outcome.stderr
    assert "computing it again" in outcome.stderr
    new_logps, new_key = dpo_run.stored()
    assert new_logps.shape == (3, 2)
    assert new_key == key


def test_scores_that_are_not_those_of_the_run_are_refused(dpo_run):
    path = dpo_run.out / ".evaluation.json"
    path.write_text('{"base": 3}')

    outcome = dpo_run.resume()

    line = f"train.py: {path}: not the scores of this run; remove it to measure again"
    assert_refused(outcome, line, started=True)


# --- sampled pairs ---


@pytest.fixture
def bdhs_words(tmp_path):
    """Return options for a BDHS run on twelve records, which are in tmp_path/data.json."""
    records = json.loads((TINY / "train" / "instruct.json").read_text())[:12]
    (tmp_path / "images").mkdir()
    for record in records:
        shutil.copy(TINY / "train" / "images" / record["image"], tmp_path / "images")
    write_json(tmp_path / "data.json", records)
    return [
        *("--data", tmp_path / "data.json"),
        *"--eval --steps 2 --batch-size 2 --group 4".split(),
        *("--out", tmp_path / "out"),
    ]


def test_pairs_that_were_sampled_before_an_error_are_kept(tmp_path, train, bdhs_words, monkeypatch):
    """An image is cut short after the start. The pairs of the groups before it are used again."""
    # 1. Make the eleventh image a file of its own.
    records = json.loads((tmp_path / "data.json").read_text())
    late = tmp_path / "images" / "late.jpg"
    Image.open(tmp_path / "images" / records[10]["image"]).convert("RGB").save(late)
    whole_image = late.read_bytes()
    records[10]["image"] = late.name
    write_json(tmp_path / "data.json", records)

    # 2. The run ends at that image. A header line and two groups of four pairs are left.
    sample_pairs = BdhsSampler.pairs

    def sample_with_damage(self, records, step=None):
        """Cut the image short when its group is sampled."""
        if late.name in [record.image for record in records]:
            late.write_bytes(whole_image[: len(whole_image) // 2])
        return sample_pairs(self, records, step)

    with monkeypatch.context() as patch:
        patch.setattr(BdhsSampler, "pairs", sample_with_damage)
        outcome = train(*bdhs_words)
    assert outcome.status == 2
    assert "late.jpg" in outcome.messages[-1]
    unfinished = tmp_path / "out" / "pairs.jsonl.part"
    assert len(unfinished.read_text().splitlines()) == 1 + 8

    # 3. With the whole image the run can be resumed.
    late.write_bytes(whole_image)
    assert train(*bdhs_words, "--resume").status == 0
    assert len((tmp_path / "out" / "pairs.jsonl").read_text().splitlines()) == 12


def test_pairs_of_other_records_are_refused(tmp_path, train, bdhs_words):
    """The data file changes between a run and its --resume."""
    assert train(*bdhs_words).status == 0
    (tmp_path / "out" / "summary.json").unlink()
    records = json.loads((tmp_path / "data.json").read_text())
    write_json(tmp_path / "data.json", records[1:])

    outcome = train(*bdhs_words, "--resume")

    assert_refused(outcome, "other records", started=True)
    assert (tmp_path / "out" / "pairs.jsonl").exists()


# --- files of another form ---


@pytest.mark.parametrize(
    "name, text",
    [
        ("config.json", "[]"),
        ("config.json", "3"),
        ("config.json", '{"settings": 3}'),
        ("config.json", "{}"),
        (".evaluation.json", "[]"),
        (".evaluation.json", "3"),
        ("metrics.jsonl", "x\n"),
        ("pairs.jsonl", "3\n"),
        ("pairs.jsonl", "{}\n"),
        ("pairs.jsonl", '{"id": "tiny-0001", "chosen"'),
        ("pairs.jsonl.part", "x\n"),
        ("pairs.jsonl.part", "3\n"),
    ],
)
def test_a_file_of_another_form_is_refused_and_kept(tmp_path, train, name, text):
    """A file of OUT holds other JSON than the run wrote there. One line names it."""
    (tmp_path / name).write_text(text)

    outcome = train(*BRIEF, "--limit", "2", "--out", tmp_path, "--resume")

    assert_refused(outcome, tmp_path / name, started=name != "config.json")
    assert (tmp_path / name).read_text() == text


# --- a full disk, and too little memory ---


class FullDisk:
    """Lets the n-th write of a run fail, as on a full disk."""

    def __init__(self, monkeypatch, n):
        self.writes_left = n
        monkeypatch.setattr(os, "replace", self.failing(os.replace))
        monkeypatch.setattr(Path, "write_text", self.failing(Path.write_text))
        monkeypatch.setattr(files, "append_text", self.failing(files.append_text))
        save_file = safetensors_files.save_file
        monkeypatch.setattr(safetensors_files, "save_file", self.failing(save_file, rust=True))

    def failing(self, write, rust=False):
        """Return a function that writes, unless this is the write that fails."""

        def count_and_write(*args, **kwargs):
            self.writes_left -= 1
            if self.writes_left == 0:
                if rust:
                    raise SafetensorError("I/O error: No space left on device (os error 28)")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(*args, **kwargs)

        return count_and_write


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory):
    """Return the folder of a DPO run of two steps that nothing has stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run_process("train.py", *brief("dpo"), "--out", folder).status == 0
    return folder


# A run of two steps makes 24 writes. These are its first, its last, and some between.
@pytest.mark.parametrize("n", [1, 3, 6, 10, 14, 17, 20, 24])
def test_a_full_disk_ends_in_one_line_and_resumes_to_the_bit(
    tmp_path, train, whole_folder, monkeypatch, n
):
    words = brief("dpo")
    folder = tmp_path / "full"

    with monkeypatch.context() as patch:
        FullDisk(patch, n)
        outcome = train(*words, "--out", folder)

    assert outcome.status == 2, outcome.stderr
    assert "No space left on device" in outcome.messages[-1]
    assert outcome.messages[-1].startswith(f"train.py: {folder}/")
    assert list(tmp_path.rglob("*.tmp")) == []
    outcome = train(*words, "--out", folder, "--resume")
    assert outcome.status == 0, outcome.stderr
    assert read_log(folder) == read_log(whole_folder)
    adapter = "adapter/adapter_model.safetensors"
    assert_same_tensors(folder / adapter, whole_folder / adapter)


@pytest.mark.parametrize("ends", ["within the export", "after the export"])
def test_a_run_that_ended_at_its_export_is_resumed(tmp_path, train, monkeypatch, ends):
    """It writes over what it has exported. Another folder of that name is refused."""
    words = ["--method", "dpo", *BRIEF, "--out", tmp_path / "run", "--export", tmp_path / "export"]
    patched = (run, "save_model") if ends == "within the export" else (RunFolder, "finish")
    with monkeypatch.context() as patch:
        patch.setattr(*patched, disk_is_full)
        assert train(*words).status == 2
    weights = tmp_path / "export" / "model.safetensors"
    assert weights.exists() == (ends == "after the export")

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    outcome = train(*words[:-1], elsewhere, "--resume")
    assert outcome.status == 2
    assert f"{elsewhere}: exists already; give another --export" in outcome.messages[-1]

    for _ in ("unfinished", "finished"):
        assert train(*words, "--resume").status == 0
        assert weights.exists()


def disk_is_full(*_, **__):
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has"),
    ],
)
def test_too_little_memory_ends_in_one_line(tmp_path, train, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(run, "train", fail)
    outcome = train("--method", "dpo", *BRIEF, "--out", tmp_path / "run")

    assert outcome.status == 2
    assert outcome.messages[-1].startswith("train.py: out of memory")
    assert "--tokens-per-microbatch" in outcome.messages[-1]
    assert "--resume" in outcome.messages[-1]


# --- the folder of a run ---


def test_a_run_is_named_after_its_method_and_numbers_are_not_used_twice(
    tmp_path, train, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "0006-bdhs").mkdir(parents=True)

    assert train("--method", "dpo", *BRIEF).status == 0

    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["0006-bdhs", "0007-dpo"]


def test_two_runs_cannot_use_one_folder(tmp_path, train):
    folder = tmp_path / "run"
    folder.mkdir()
    with file_lock(folder / ".lock", folder):
        for words in ([], ["--resume"]):
            outcome = train("--method", "dpo", *BRIEF, "--out", folder, *words)
            assert_refused(outcome, f"{folder}: process {os.getpid()} on ")


def test_temporary_files_of_dead_processes_are_removed(tmp_path, train):
    """No process has the number 2**22 + 1, the largest that Linux gives is 2**22."""
    folder = tmp_path / "run"
    folder.mkdir()
    dead = folder / f".state.safetensors.4194305@{platform.node()}.tmp"
    living = folder / f".state.safetensors.{os.getppid()}@{platform.node()}.tmp"
    (folder / ".lock").touch()
    dead.touch()
    living.touch()

    outcome = train("--method", "dpo", *BRIEF, "--out", folder, "--resume")

    assert outcome.status == 0, outcome.stderr
    assert not dead.exists()
    assert living.exists()


@pytest.mark.parametrize("place", ["file", "file/run", "x" * 300, "."])
def test_a_place_that_can_be_no_new_folder(tmp_path, train, place):
    (tmp_path / "file").touch()

    outcome = train("--method", "dpo", *BRIEF, "--out", tmp_path / place)

    assert_refused(outcome, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_removed_during_the_run(tmp_path, train, monkeypatch):
    folder = tmp_path / "run"
    train_step = loop.train_step

    def remove_folder(*args, **kwargs):
        shutil.rmtree(folder)
        return train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", remove_folder)
    outcome = train("--method", "dpo", *BRIEF, "--out", folder)

    assert outcome.status == 2
    assert "metrics.jsonl: was removed" in outcome.messages[-1]
    assert not folder.exists()
