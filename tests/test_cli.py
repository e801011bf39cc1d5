"""The two scripts as a user meets them: every method's results, restarts after kill -9, and one line for every kind of bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sample
import train
from minialign.pairs.reward_model import load_reward_model
from minialign.training.loop import Schedule
from minialign.utils import cli

SMALL = ("--limit", "24", "--batch-size", "4", "--eval", "--group", "8")
BRIEF = (
    "--limit",
    "8",
    "--batch-size",
    "4",
    "--steps",
    "2",
    "--eval",
    "--max-new-tokens",
    "8",
    "--lora-rank",
    "4",
)
SCRIPTS = {"train.py": train.main, "sample.py": sample.main}


def start(script, *words, cwd=ROOT, err=subprocess.PIPE):
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, words)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=err,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def signalled(number, path, lines, script, *words):
    """(status, what stood on standard error) of a script that is sent a signal once `path` has this many lines.

    Standard error goes to a file: a pipe that nobody reads is full after some hundred steps of a progress bar, and then the script waits for ever.
    """
    with tempfile.TemporaryFile("w+") as err:
        process = start(script, *words, err=err)
        while not (path.exists() and len(path.read_text().splitlines()) >= lines):
            assert process.poll() is None, (process.communicate(), err.seek(0), err.read())
            time.sleep(0.005)
        process.send_signal(number)
        process.communicate()
        err.seek(0)
        return process.returncode, err.read()


def run(script, *words, cwd=ROOT):
    process = start(script, *words, cwd=cwd)
    out, err = process.communicate()
    return process.returncode, out, err


def here(monkeypatch, capfd, script, *words):
    """(status, standard output, lines on standard error but progress bars) of a script run inside this process, to save the start-up."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
    try:
        status = cli.run_script(SCRIPTS[script])
    except SystemExit as left:  # argparse's own way out
        status = left.code
    out, err = capfd.readouterr()
    return (
        status,
        out,
        [line for line in err.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line],
    )


def metrics(folder):
    return [
        {key: value for key, value in json.loads(line).items() if key != "seconds"}
        for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize(
    "words, weights",
    [
        (("--lora-rank", "0"), "model/model.safetensors"),
        (("--lora-rank", "4"), "adapter/adapter_model.safetensors"),
    ],
)
def test_a_killed_run_resumed_equals_an_uninterrupted_one(tmp_path, words, weights):
    """kill -9 between two checkpoints, then --resume: same weights, same log, to the bit (the log's seconds apart)."""
    options = (*SMALL, "--steps", "45", "--control", *words)
    assert run("train.py", *options, "--out", tmp_path / "whole")[0] == 0
    signalled(
        signal.SIGKILL,
        tmp_path / "cut" / "metrics.jsonl",
        25,
        "train.py",
        *options,
        "--out",
        tmp_path / "cut",
    )
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert (
        run("train.py", *options, "--out", tmp_path / "cut")[0] == 2
    )  # an existing OUT needs --resume
    status, out, err = run("train.py", *options, "--out", tmp_path / "cut", "--resume")
    assert status == 0, err
    for part in (tmp_path / "whole", tmp_path / "whole" / "control"):
        other = tmp_path / "cut" / part.relative_to(tmp_path / "whole")
        assert metrics(part) == metrics(other) and len(metrics(part)) == 45
        assert same_weights(part / weights, other / weights)
    status, _, err = run("train.py", *options, "--out", tmp_path / "cut", "--resume")
    assert status == 0 and "finished already" in err
    status, _, err = run("train.py", *options, "--seed", "9", "--out", tmp_path / "cut", "--resume")
    assert status == 2 and "--seed" in err


def test_an_interrupt_saves_and_exits_with_130(tmp_path):
    """Ctrl-C in training ends the step, saves it, and --resume goes on from there."""
    options = (*SMALL, "--method", "dpo", "--steps", "400", "--out", tmp_path / "run")
    status, err = signalled(
        signal.SIGINT, tmp_path / "run" / "metrics.jsonl", 3, "train.py", *options
    )
    assert status == 130 and "--resume" in err and "Traceback" not in err
    steps = len(metrics(tmp_path / "run"))
    assert steps < 400 and (tmp_path / "run" / "state.safetensors").exists()


def test_sampling_killed_and_resumed_equals_an_uninterrupted_one(tmp_path):
    """Groups are formed from the full list, so the pairs of a restarted run are those of one that was never stopped."""
    options = ("--limit", "48", "--group", "4", "--rho", ".97", "--max-new-tokens", "16")
    assert run("sample.py", *options, "--out", tmp_path / "whole.jsonl")[0] == 0
    part = tmp_path / "cut.jsonl.part"
    signalled(signal.SIGKILL, part, 9, "sample.py", *options, "--out", tmp_path / "cut.jsonl")
    assert not (tmp_path / "cut.jsonl").exists()
    assert run("sample.py", *options, "--out", tmp_path / "cut.jsonl")[0] == 2
    assert run("sample.py", *options, "--out", tmp_path / "cut.jsonl", "--resume")[0] == 0
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "cut.jsonl").read_bytes()
    assert (tmp_path / "cut.png").exists() and not part.exists()


def test_the_result_folder_holds_what_is_promised(tmp_path):
    """Every file and field of the contract, on a run of three steps with one evaluation set."""
    status, out, err = run(
        "train.py",
        "--limit",
        "8",
        "--steps",
        "3",
        "--batch-size",
        "4",
        "--control",
        "--eval",
        TINY / "tune" / "typical",
        "--out",
        tmp_path / "run",
    )
    assert status == 0, err
    folder = tmp_path / "run"
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert list(first) == [
        "step",
        "loss",
        "logp_chosen",
        "logp_rejected",
        "ref_logp_chosen",
        "ref_logp_rejected",
        "margin",
        "accuracy",
        "lr",
        "grad_norm",
        "seconds",
    ]
    assert abs(first["loss"] - 0.693147) < 1e-4 and abs(first["margin"]) < 1e-3
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "control", "aligned"] and list(evaluation["base"]) == [
        "typical"
    ]
    scores = evaluation["aligned"]["typical"]
    assert set(scores) == {"chair_i", "chair_s", "recall", "colour", "pope", "words", "repeats"}
    assert (
        set(scores["pope"]) == {"random", "popular", "adversarial"}
        and scores["pope"]["random"]["n"] == 800
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        set(summary["seconds"]) == {"load", "sample", "reference", "train", "evaluate"}
        and summary["steps"] == 3
    )
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["checkpoint"]
        and config["versions"]["torch"]
        and config["settings"]["beta"]
        and config["template"] == "vicuna"
    )
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    assert set(pair) == {
        "id",
        "image",
        "prompt",
        "chosen",
        "rejected",
        "rounds",
        "similarity",
        "visible",
        "cuts",
        "completed",
        "seed",
    }
    assert "| typical | aligned |" in out and str(folder) in out.splitlines()[-1]


def test_reference_log_probs_are_read_back_and_stale_ones_computed_again(
    tmp_path, monkeypatch, capfd
):
    """Of the same data they come from OUT and are not computed; where a rejected answer changed meanwhile one line says so, and its number alone is another."""
    records = json.loads((TINY / "train" / "povid.json").read_text())[:3]
    data, out = tmp_path / "povid.json", tmp_path / "out"
    data.write_text(json.dumps(records))
    words = (
        "--method",
        "dpo",
        "--data",
        data,
        "--images",
        TINY / "train" / "images",
        "--eval",
        "--steps",
        "1",
        "--batch-size",
        "3",
        "--lora-rank",
        "4",
        "--out",
        out,
    )

    def resumed():
        """(standard error, reference log-probs, metadata's key) of the run gone on with, or begun."""
        (out / "summary.json").unlink(missing_ok=True)
        status, _, said = here(monkeypatch, capfd, "train.py", *words, "--resume")
        assert status == 0, said
        with safe_open(out / "reference.safetensors", "pt") as file:
            return "\n".join(said), file.get_tensor("logps"), file.metadata()["key"]

    said, logps, key = resumed()
    assert "computing it again" not in said and logps.shape == (3, 2)
    with monkeypatch.context() as patch:
        patch.setattr(
            train.methods,
            "add_reference_logps",
            lambda *_: pytest.fail("what is there was computed again"),
        )
        said, same, still = resumed()
    assert "computing it again" not in said and torch.equal(same, logps) and still == key
    records[1]["rejected_conversations"][1]["value"] = "Nothing."
    data.write_text(json.dumps(records))
    said, other, new = resumed()
    assert (
        f"{out / 'reference.safetensors'} belongs to other weights, data or template; computing it again"
        in said
        and new != key
    )
    assert abs(other[1, 1] - logps[1, 1]) > 1
    other[1, 1] = logps[1, 1]
    torch.testing.assert_close(other, logps, rtol=1e-6, atol=1e-4)
    for state, metadata in (
        ({"logps": logps}, None),
        ({"logps": logps[:2]}, {"key": new}),
        ({"x": logps}, {"key": new}),
    ):  # its key alone is not enough
        save_file(state, out / "reference.safetensors", metadata)
        said, again, key = resumed()
        assert "computing it again" in said and again.shape == (3, 2) and key == new
    (out / "summary.json").unlink()
    (out / ".evaluation.json").write_text('{"base": 3}')
    status, _, said = here(monkeypatch, capfd, "train.py", *words, "--resume")
    assert (
        status == 2
        and said[-1]
        == f"train.py: {out / '.evaluation.json'}: not this run's scores; remove it, and they are measured again"
    )


def test_what_the_options_say_reaches_the_methods(monkeypatch):
    """Each part of a method says what it was given; the data's own rejected response comes first and has the weight gamma (Eq. 5)."""
    for name in (
        "preference",
        "supervised",
        "online",
        "online_bdhs",
        "distortion",
        "reward_model",
        "rloo",
        "ppo",
        "normaliser",
    ):
        monkeypatch.setattr(train.methods, name, lambda *given, name=name: (name, *given))
    monkeypatch.setattr(train, "annotator_of", lambda options: "annotator")
    monkeypatch.setattr(train, "reward_of", lambda options, folder: f"reward of {folder}")
    monkeypatch.setattr(train.bdhs, "bdhs_sampler", lambda options, vlm: "sampler")
    policy, heads = SimpleNamespace(add_scalar_head=lambda: heads.append("value")), []
    options = SimpleNamespace(
        loss="ipo",
        beta=0.3,
        smoothing=0.1,
        gamma=None,
        max_new_tokens=7,
        temperature=0.8,
        top_p=0.9,
        seed=3,
        mix=0.4,
        noise_steps=11,
        reward=None,
    )

    def asked(name, gamma=None):
        """What the method of that name is made of."""
        return train.method_of(
            SimpleNamespace(**vars(options) | {"gamma": gamma}),
            name,
            policy,
            "subject",
            [SimpleNamespace(record=1)],
            Path("out"),
        )

    sampling, common = (7, 0.8, 0.9, 3), ("preference", "subject", "ipo", 0.3, 0.1)
    assert asked("dpo") == asked("bdhs") == (*common, (1.0,), train.methods.given)
    assert asked("online-dpo") == (
        *common,
        (1.0,),
        ("online", policy, "subject", "annotator", sampling),
    )
    assert asked("mixed-dpo") == (
        *common,
        (1.0,),
        ("online", policy, "subject", "annotator", sampling, 0.4),
    )
    assert asked("online-bdhs", 0.25) == (
        *common,
        (0.25, 0.75),
        ("online_bdhs", policy, "subject", "sampler"),
    )
    assert asked("distortion", 0.25) == (
        *common,
        (0.25, 0.75),
        ("distortion", policy, "subject", 11, 3),
    )
    assert (
        asked("sft") == ("supervised", "subject")
        and asked("reward") == ("reward_model", policy, "subject")
        and heads == []
    )
    reinforced = (
        policy,
        "subject",
        "reward of out/reward",
        ("normaliser", "reward of out/reward", [1]),
        sampling,
        0.3,
    )
    assert asked("rloo") == ("rloo", *reinforced) and heads == []
    assert asked("ppo") == ("ppo", *reinforced) and heads == ["value"]


def test_what_the_options_say_reaches_the_training(monkeypatch, tmp_path):
    """Rank, alpha, seed, rates, schedule, budget and checkpointing: 5 examples, 3 epochs, 2 a step make 8 steps."""
    seen = {}
    monkeypatch.setattr(train, "Policy", lambda *given: seen.setdefault("policy", given))
    monkeypatch.setattr(
        train,
        "train",
        lambda policy, method, examples, schedule, folder, title: seen.update(
            schedule=schedule, title=title
        ),
    )
    monkeypatch.setattr(train, "save_adapter", lambda policy, folder, model: None)
    monkeypatch.setattr(train, "left_out", lambda folder: None)
    monkeypatch.setattr(train.methods, "encode_example", lambda vlm, record, texts: None)
    model = SimpleNamespace(language_model=SimpleNamespace(checkpointing=False))
    options = SimpleNamespace(
        lora_rank=4,
        lora_alpha=9,
        seed=3,
        checkpoint_layers=True,
        steps=None,
        epochs=3,
        batch_size=2,
        lr=0.1,
        projector_lr=0.2,
        tokens_per_microbatch=77,
        schedule="constant",
        max_new_tokens=1,
        temperature=1,
        top_p=1,
        model="m",
    )
    steps, _ = train.train_arm(
        options,
        SimpleNamespace(model=model, template="vicuna"),
        [(None, None)] * 5,
        tmp_path,
        "sft",
        Counter(),
        "key",
    )
    assert (
        steps == 8
        and seen["policy"] == (model, 4, 9, 3)
        and model.language_model.checkpointing
        and seen["title"] == "supervised"
    )
    assert seen["schedule"] == Schedule(
        steps=8,
        batch_size=2,
        lr=0.1,
        projector_lr=0.2,
        seed=3,
        max_tokens_per_microbatch=77,
        constant=True,
    )


def test_pairs_of_other_records_are_refused_and_sampled_work_is_kept(tmp_path, monkeypatch, capfd):
    """A data file changed between a run and its --resume; a picture that turns out damaged after pairs were sampled."""
    records = json.loads((TINY / "train" / "instruct.json").read_text())[:12]
    shutil.copytree(
        TINY / "train" / "images",
        tmp_path / "images",
        ignore=lambda _, names: [n for n in names if n not in {r["image"] for r in records}],
    )
    data, out = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps(records))
    words = (
        "--data",
        data,
        "--eval",
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--group",
        "4",
        "--out",
        out,
    )
    late = tmp_path / "images" / "late.jpg"  # a JPEG's header tells nothing of its end
    Image.open(tmp_path / "images" / records[10]["image"]).convert("RGB").save(late)
    whole = late.read_bytes()
    late.write_bytes(whole[: len(whole) // 2])
    records[10]["image"] = late.name
    data.write_text(json.dumps(records))
    with monkeypatch.context() as patch:
        patch.setattr(
            train, "check_images", lambda paths: None
        )  # as if the file had been cut since
        status, _, said = here(patch, capfd, "train.py", *words)
    assert (
        status == 2
        and "late.jpg" in said[-1]
        and len((out / "pairs.jsonl.part").read_text().splitlines()) == 1 + 8
    )
    late.write_bytes(whole)
    assert run("train.py", *words, "--resume")[0] == 0
    (out / "summary.json").unlink()
    data.write_text(json.dumps(records[1:]))
    status, _, err = run("train.py", *words, "--resume")
    assert status == 2 and "other records" in err and (out / "pairs.jsonl").exists()


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
def test_work_of_another_shape_is_not_gone_on_with(tmp_path, monkeypatch, capfd, name, text):
    """A file of OUT that holds other JSON than was written there: one line that names it, and the file stays."""
    (tmp_path / name).write_text(text)
    status, printed, said = here(
        monkeypatch, capfd, "train.py", *BRIEF, "--limit", "2", "--out", tmp_path, "--resume"
    )
    said = [line for line in said if not line.startswith("model ")]
    assert status == 2 and printed == "" and len(said) == 1 and str(tmp_path / name) in said[0], (
        said
    )
    assert (tmp_path / name).read_text() == text


def test_answer_streams_the_same_text_that_score_reads(tmp_path):
    """`answer` prints the answer alone; `score` gives a line a record with the end token counted."""
    picture = TINY / "tune" / "typical" / "images" / "0001.png"
    status, out, err = run(
        "sample.py",
        "answer",
        "--image",
        picture,
        "--prompt",
        "Where is the cup?",
        "--max-new-tokens",
        "12",
    )
    assert status == 0 and out.endswith("\n") and "<" not in out
    record = {
        "id": "a",
        "image": picture.name,
        "conversations": [
            {"from": "human", "value": "<image>\nIs it?"},
            {"from": "gpt", "value": "Yes."},
        ],
        "rejected_conversations": [
            {"from": "human", "value": "<image>\nIs it?"},
            {"from": "gpt", "value": "No."},
        ],
    }
    (tmp_path / "one.json").write_text(json.dumps([record]))
    status, out, err = run(
        "sample.py", "score", "--data", tmp_path / "one.json", "--images", picture.parent
    )
    assert status == 0, err
    line = json.loads(out)
    assert (
        list(line) == ["id", "logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"]
        and line["tokens_chosen"] == 3
        and line["logp_chosen"] < 0
    )


def broken_inputs(folder):
    """(what is wrong, script, words, what the one line must name)."""
    good = json.loads((TINY / "train" / "instruct.json").read_text())[:3]
    shutil.copytree(
        TINY / "train" / "images",
        folder / "images",
        ignore=lambda _, names: [n for n in names if n not in {r["image"] for r in good}],
    )
    model = folder / "model"
    shutil.copytree(TINY / "model", model)

    def data(name, records):
        (folder / name).write_text(records if isinstance(records, str) else json.dumps(records))
        return ("--data", folder / name)

    def turned(index, value):
        record = json.loads(json.dumps(good[1]))
        record["conversations"][index]["value"] = value
        return [good[0], record]

    (folder / "images" / "text.png").write_text("not a picture")
    whole = (folder / "images" / good[0]["image"]).read_bytes()
    (folder / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    yield (
        "missing picture",
        "train.py",
        data("a.json", [good[0], good[1] | {"image": "gone.png"}]),
        ("a.json", "record 2", "gone.png", "--images"),
    )
    yield (
        "no picture",
        "train.py",
        data("b.json", [good[0] | {"image": "text.png"}]),
        ("text.png", "convert"),
    )
    yield (
        "truncated picture",
        "train.py",
        data("c.json", [good[0] | {"image": "cut.png"}]),
        ("cut.png", "complete"),
    )
    Image.open(folder / "images" / good[0]["image"]).convert("RGB").save(
        folder / "images" / "late.jpg"
    )  # a JPEG's header tells nothing of its end
    (folder / "images" / "late.jpg").write_bytes(
        (folder / "images" / "late.jpg").read_bytes()[:-500]
    )
    yield (
        "truncated picture that begins well",
        "train.py",
        ("--eval", *data("p.json", [good[0] | {"image": "late.jpg"}])),
        ("late.jpg", "complete"),
    )
    yield (
        "cut JSON",
        "train.py",
        data("d.json", json.dumps(good)[:300]),
        ("d.json", "line 1", "complete"),
    )
    yield (
        "no conversations",
        "train.py",
        data("e.json", [good[0], {"id": "x", "image": good[1]["image"]}]),
        ("e.json", "record 2", "conversations"),
    )
    yield (
        "empty answer",
        "train.py",
        data("f.json", turned(1, "  ")),
        ("f.json", "record 2", "empty", "remove"),
    )
    yield (
        "too long",
        "train.py",
        data("g.json", turned(0, "<image>\n" + "cup " * 600)),
        (good[1]["id"], "512", "shorten"),
    )
    yield "rho", "train.py", ("--rho", "1.5"), ("--rho", "1.5", "from 0 to 1")
    yield "unknown option", "train.py", ("--colour", "red"), ("--colour", "--help")
    yield "unknown method", "train.py", ("--method", "magic"), ("magic", "bdhs")
    yield (
        "no model",
        "train.py",
        ("--model", folder / "nowhere", *data("h.json", good)),
        ("nowhere", "no such folder"),
    )
    yield (
        "rejected missing",
        "train.py",
        ("--method", "dpo", *data("i.json", good)),
        (good[0]["id"], "rejected"),
    )
    yield "rho, sample", "sample.py", ("--rho", "-1"), ("--rho", "-1")
    yield "sub-command's option", "sample.py", ("score", "--rho", "1"), ("--rho",)
    yield (
        "missing picture, sample",
        "sample.py",
        data("j.json", [good[0] | {"image": "gone.png"}]),
        ("j.json", "record 1", "gone.png"),
    )
    yield (
        "no place to write",
        "sample.py",
        ("--limit", "2", "--out", "/dev/null/pairs.jsonl"),
        ("/dev/null", "--out"),
    )
    yield "a file for a folder", "train.py", ("--data", folder), (folder, "directory")
    yield (
        "no such encoder",
        "train.py",
        ("--similarity", folder / "none", *data("m.json", good)),
        ("none", "config.json"),
    )
    yield (
        "another template",
        "train.py",
        ("--template", "chatml", *data("n.json", good)),
        ("chatml", "--template"),
    )
    yield "resume what?", "train.py", ("--resume",), ("--resume", "--out")
    yield "resume what, sample", "sample.py", ("--resume",), ("--resume", "--out")
    yield "an endless rate", "train.py", ("--lr", "inf"), ("--lr", "inf")
    yield (
        "an input as output",
        "sample.py",
        ("score", *data("o.json", good), "--out", folder / "o.json"),
        ("o.json", "exists already"),
    )
    yield (
        "score without pairs",
        "sample.py",
        ("score", *data("k.json", good)),
        (good[0]["id"], "rejected"),
    )
    (model / "model.safetensors").unlink()
    yield (
        "missing weights",
        "train.py",
        ("--model", model, *data("l.json", good)),
        ("model.safetensors",),
    )
    (model / "tokenizer.json").unlink()
    yield "missing tokenizer", "sample.py", ("--model", model), ("tokenizer.json",)


@pytest.mark.parametrize(
    "script, words",
    [
        ("train.py", ("--limit", "2", "--eval", "{room}")),
        ("train.py", ("--data", "{room}/data.json", "--eval")),
        ("sample.py", ("--data", "{room}/data.json")),
        ("sample.py", ("score", "--data", "{room}/data.json")),
    ],
    ids=["evaluation", "data", "pairs", "score"],
)
def test_a_picture_that_is_cut_short_is_found_before_any_work(
    tmp_path, monkeypatch, capfd, script, words
):
    """A JPEG whose header is whole: nothing is evaluated, sampled or scored before the last picture has been decoded."""
    monkeypatch.chdir(tmp_path)
    record = json.loads((TINY / "train" / "povid.json").read_text())[0]
    (tmp_path / "images").mkdir()
    Image.open(TINY / "train" / "images" / record["image"]).convert("RGB").save(
        tmp_path / "images" / "late.jpg"
    )
    (tmp_path / "images" / "late.jpg").write_bytes(
        (tmp_path / "images" / "late.jpg").read_bytes()[:-500]
    )
    (tmp_path / "data.json").write_text(json.dumps([record | {"image": "late.jpg"}]))
    (tmp_path / "pope_random.jsonl").write_text(
        json.dumps({"image": "late.jpg", "text": "Is there a cup?", "label": "yes"})
    )
    monkeypatch.setattr(train, "job", lambda *_: pytest.fail("the work began"))
    monkeypatch.setattr(sample, "sample_pair_file", lambda *_, **__: pytest.fail("sampling began"))
    monkeypatch.setattr(sample, "response_logps", lambda *_: pytest.fail("scoring began"))
    status, printed, said = here(
        monkeypatch, capfd, script, *(word.format(room=tmp_path) for word in words)
    )
    assert (
        status == 2
        and printed == ""
        and len(said) == 1
        and "late.jpg" in said[0]
        and "complete" in said[0]
    ), said
    assert not list(tmp_path.glob("runs"))


def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capfd):
    """Each names file, record and remedy; no traceback, no OUT left behind."""
    monkeypatch.chdir(tmp_path)
    room = tmp_path / "room"
    room.mkdir()
    for what, script, words, names in broken_inputs(room):
        out = (
            ("--out", tmp_path / "out")
            if "score" not in words and "--out" not in words and "--resume" not in words
            else ()
        )
        status, printed, said = here(monkeypatch, capfd, script, *words, *out)
        said = [line for line in said if not line.startswith("model ")]  # what is found late
        assert status == 2 and printed == "" and len(said) == 1, (what, said)
        assert all(str(name) in said[0] for name in names), (what, said)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("runs")), what


# --- every method of the study ---

CONTRACT = {
    "step",
    "loss",
    "logp_chosen",
    "logp_rejected",
    "ref_logp_chosen",
    "ref_logp_rejected",
    "margin",
    "accuracy",
    "lr",
    "grad_norm",
    "seconds",
}
REINFORCED = {"step", "loss", "reward", "kl", "entropy", "length", "lr", "grad_norm", "seconds"}


@pytest.fixture(scope="module")
def reward(tmp_path_factory):
    """The folder of a reward model that was trained for two steps."""
    folder = tmp_path_factory.mktemp("reward") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", "--method", "reward", *BRIEF, "--out", str(folder)])
        assert cli.run_script(train.main) == 0
    return folder


def learnt(adapter):
    """Whether a written adapter is more than its start, where every lora_B is zero."""
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    return any(
        tensor.any()
        for name, tensor in load_file(adapter / "adapter_model.safetensors").items()
        if "lora_B" in name
    )


@pytest.mark.parametrize(
    "words, fields",
    [
        (("sft",), {"step", "loss", "logp_chosen", "lr", "grad_norm", "seconds"}),
        (("dpo", "--loss", "ipo"), CONTRACT),
        (("online-dpo",), CONTRACT | {"same", "tied", "offline"}),
        (("mixed-dpo", "--loss", "slic"), CONTRACT | {"same", "tied", "offline"}),
        (("bdhs", "--by", "noise", "--unguided"), CONTRACT),
        (("online-bdhs", "--gamma", ".3"), CONTRACT | {"rounds", "same"}),
        (("distortion",), CONTRACT | {"changed"}),
        (("rloo",), REINFORCED),
        (("ppo",), REINFORCED | {"value_loss"}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_every_method_leaves_the_documented_files(
    tmp_path, monkeypatch, capfd, reward, words, fields
):
    """Two steps on eight records: settings, a line a step, timings, scores and an adapter that has learnt; nothing half-written."""
    folder, first = tmp_path / "run", ("--reward", reward) if words[0] in ("rloo", "ppo") else ()
    status, out, said = here(
        monkeypatch, capfd, "train.py", "--method", *words, *BRIEF, *first, "--out", folder
    )
    assert status == 0 and f"{words[0]} is done; model and logs are in {folder}" in out, said
    assert json.loads((folder / "config.json").read_text())["settings"]["method"] == words[0]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1] and all(fields <= set(line) for line in lines)
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        set(summary["seconds"]) == {"load", "sample", "reference", "train", "evaluate"}
        and summary["steps"] == 2
        and 1 <= summary["pairs"] <= 8
    )
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["base"] == evaluation["aligned"] == {} and set(evaluation) - {"control"} == {
        "base",
        "aligned",
    }
    assert learnt(folder / "adapter")
    left = {path.name for path in folder.rglob("*") if path.is_file()} - {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "evaluation.json",
        "adapter_config.json",
        "adapter_model.safetensors",
        "pairs.jsonl",
        "reference.safetensors",
    }
    assert not left


def test_a_reward_run_leaves_a_head_and_its_accuracies(reward):
    """Of eight pairs one is held out; before training all scores are 0, so all are ties."""
    names = {path.relative_to(reward).as_posix() for path in reward.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "evaluation.json",
        "score.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert {
        "step",
        "loss",
        "score_chosen",
        "score_rejected",
        "margin",
        "accuracy",
        "lr",
        "grad_norm",
    } <= set(metrics(reward)[0]) and len(metrics(reward)) == 2
    evaluation = json.loads((reward / "evaluation.json").read_text())
    assert {
        arm: {name: scores["n"] for name, scores in parts.items()}
        for arm, parts in evaluation.items()
    } == dict.fromkeys(("base", "aligned"), {"train": 7, "held-out": 1})
    assert (
        evaluation["base"]["train"]["ties"] == 1.0
        and evaluation["base"]["train"]["first"] is None
        and evaluation["aligned"]["train"]["ties"] < 1
    )
    assert learnt(reward / "adapter") and load_file(reward / "score.safetensors")["weight"].any()


@pytest.mark.parametrize("method", ["online-dpo", "rloo"])
def test_a_killed_run_that_writes_its_own_responses_resumes_to_the_bit(
    tmp_path, monkeypatch, capfd, reward, method
):
    """kill -9 after the checkpoint of step 20, then --resume: what was written in every step, and all weights, as in one go."""
    words = ("--method", method, *BRIEF, "--batch-size", "1", "--steps", "26", "--reward", reward)
    assert here(monkeypatch, capfd, "train.py", *words, "--out", tmp_path / "whole")[0] == 0
    signalled(
        signal.SIGKILL,
        tmp_path / "cut" / "metrics.jsonl",
        21,
        "train.py",
        *words,
        "--out",
        tmp_path / "cut",
    )
    assert (
        not (tmp_path / "cut" / "summary.json").exists()
        and (tmp_path / "cut" / "state.safetensors").exists()
    )
    status, _, said = here(
        monkeypatch, capfd, "train.py", *words, "--out", tmp_path / "cut", "--resume"
    )
    assert status == 0, said
    assert (
        metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
        and len(metrics(tmp_path / "cut")) == 26
    )
    assert same_weights(
        *(tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("cut", "whole"))
    )


@pytest.mark.parametrize("method", ["rloo", "online-bdhs"])
def test_a_response_written_to_the_end_of_the_context_does_not_end_the_run(
    tmp_path, monkeypatch, capfd, reward, method
):
    """Records that fit, their prompts so long that three tokens are left: what the policy writes there cannot end, and is no fault of theirs."""
    rows = json.loads((TINY / "train" / "povid.json").read_text())[:4]
    for row in rows:
        for name, answer in (("conversations", "Yes."), ("rejected_conversations", "No.")):
            row[name] = [
                {"from": "human", "value": "<image>\n" + "Describe the picture. " * 109},
                {"from": "gpt", "value": answer},
            ]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    status, _, said = here(
        monkeypatch,
        capfd,
        "train.py",
        "--method",
        method,
        "--data",
        tmp_path / "long.json",
        "--images",
        TINY / "train" / "images",
        *BRIEF,
        "--reward",
        reward,
        "--out",
        tmp_path / "out",
    )
    assert status == 0, said


def test_an_interrupt_between_the_files_of_a_first_reward_can_be_resumed(
    tmp_path, monkeypatch, capfd
):
    """rloo without --reward trains one in OUT/reward: broken off when its head is written and its adapter is not."""
    monkeypatch.setitem(train.PAPER, "reward", {"steps": 1})
    words = (
        "--method",
        "rloo",
        "--model",
        TINY / "model",
        "--data",
        TINY / "train" / "povid.json",
        *BRIEF,
        "--steps",
        "1",
        "--out",
        tmp_path / "run",
    )

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "save_adapter", interrupted)
        assert here(patch, capfd, "train.py", *words)[0] == 130
    status, _, said = here(monkeypatch, capfd, "train.py", *words, "--resume")
    assert status == 0, said
    assert {path.name for path in (tmp_path / "run" / "reward").iterdir()} == {
        "adapter",
        "score.safetensors",
        "metrics.jsonl",
        "evaluation.json",
    }


def test_a_reward_is_read_with_the_template_it_was_trained_with(tmp_path, monkeypatch, capfd):
    status, _, said = here(
        monkeypatch,
        capfd,
        "train.py",
        "--method",
        "reward",
        "--template",
        "vicuna_v1",
        *BRIEF,
        "--out",
        tmp_path / "run",
    )
    assert status == 0, said
    assert load_reward_model(tmp_path / "run", TINY / "model").vlm.template == "vicuna_v1"


@pytest.mark.parametrize(
    "words",
    [(), ("--method", "reward"), ("--method", "reward", "--model", "elsewhere", "--data", "file")],
)
def test_who_asks_for_epochs_gets_epochs(words):
    """Neither the recipe's steps nor the paper's stand in the way of what was asked for."""
    assert train.parse([*words, "--epochs", "2"]).steps is None


def broken_methods(folder, reward):
    """(what is wrong, words of train.py, what the one line must name)."""
    good = json.loads((TINY / "train" / "povid.json").read_text())[:3]
    shutil.copytree(
        TINY / "train" / "images",
        folder / "images",
        ignore=lambda _, names: [n for n in names if n not in {r["image"] for r in good}],
    )
    (folder / "pairs.json").write_text(json.dumps(good))
    (folder / "supervised.json").write_text(
        json.dumps(
            [
                {key: value for key, value in row.items() if key != "rejected_conversations"}
                for row in good
            ]
        )
    )
    (folder / "same.json").write_text(
        json.dumps([good[0], good[1] | {"rejected_conversations": good[1]["conversations"]}])
    )
    pairs = "--data", folder / "pairs.json"
    for method in ("dpo", "mixed-dpo", "distortion", "reward", "rloo", "ppo"):
        yield (
            f"{method} without rejected",
            ("--method", method, "--data", folder / "supervised.json"),
            (good[0]["id"], "rejected", method),
        )
    yield (
        "Eq. 5 without rejected",
        ("--method", "online-bdhs", "--gamma", ".5", "--data", folder / "supervised.json"),
        (good[0]["id"], "rejected"),
    )
    yield (
        "no preference",
        ("--method", "dpo", "--data", folder / "same.json"),
        ("same.json", "record 2", good[1]["id"], "same"),
    )
    yield (
        "no preference, reward",
        ("--method", "reward", "--data", folder / "same.json"),
        ("same.json", "record 2", good[1]["id"], "same"),
    )
    for option, values, bounds in (
        ("--beta", ("0", "-.1"), "above 0"),
        ("--rho", ("1.01", "-.1"), "from 0 to 1"),
        ("--rounds", ("0",), "from 1 up"),
        ("--mix", ("1.5", "-1"), "from 0 to 1"),
        ("--gamma", ("1.5", "-1"), "from 0 to 1"),
        ("--noise-steps", ("0", "1000"), "from 1 to 999"),
    ):
        for value in values:
            yield f"{option} {value}", (option, value, *pairs), (option, value, bounds)
    yield "unknown format", ("--format", "xml", *pairs), ("--format", "xml", "povid")
    yield (
        "another format",
        ("--format", "rlhf-v", *pairs),
        ("pairs.json", "record 1", "rlhf-v", "'text'"),
    )
    yield "unknown method", ("--method", "grpo", *pairs), ("grpo", "rloo")
    for method in ("rloo", "ppo"):
        yield (
            f"{method}, no reward",
            ("--method", method, "--reward", folder, *pairs),
            (folder / "score.safetensors",),
        )
    wide = folder / "wide"
    shutil.copytree(reward, wide)
    save_file(
        {
            "weight": load_file(wide / "score.safetensors")["weight"].repeat(1, 2),
            "bias": load_file(wide / "score.safetensors")["bias"],
        },
        wide / "score.safetensors",
    )
    yield (
        "a reward of another width",
        ("--method", "rloo", "--reward", wide, *pairs),
        (wide / "score.safetensors", "256", "128"),
    )
    for method in ("online-dpo", "mixed-dpo"):
        yield (
            f"{method}, no annotator",
            ("--method", method, "--annotator", folder / "none", *pairs),
            (folder / "none",),
        )
    yield (
        "a folder that is no annotator",
        ("--method", "online-dpo", "--annotator", folder, *pairs),
        (folder, "config.json"),
    )
    yield (
        "an annotator that is no reward",
        ("--method", "online-dpo", "--annotator", f"reward:{folder}", *pairs),
        (folder / "score.safetensors",),
    )
    yield (
        "an annotator of another width",
        ("--method", "online-dpo", "--annotator", f"reward:{wide}", *pairs),
        (wide / "score.safetensors", "256", "128"),
    )
    yield "no annotations", ("--method", "online-dpo", *pairs), (folder / "captions.json",)


def test_what_a_method_cannot_work_with_is_one_line_and_status_2(
    tmp_path, monkeypatch, capfd, reward
):
    """Said before any work: not even the line that tells what is going to be done stands before it."""
    monkeypatch.chdir(tmp_path)
    room = tmp_path / "room"
    room.mkdir()
    for what, words, names in broken_methods(room, reward):
        status, printed, said = here(
            monkeypatch,
            capfd,
            "train.py",
            *words,
            "--eval",
            "--steps",
            "2",
            "--batch-size",
            "2",
            "--out",
            tmp_path / "out",
        )
        assert status == 2 and printed == "" and len(said) == 1, (what, said)
        assert all(str(name) in said[0] for name in names), (what, said)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("runs")), what


def test_a_picture_without_annotation_is_found_before_any_step(tmp_path, monkeypatch, capfd):
    """By whoever ranks by them, however late its record would come."""
    good = json.loads((TINY / "train" / "povid.json").read_text())[:3]
    (tmp_path / "pairs.json").write_text(json.dumps(good))
    raw = json.loads((TINY / "train" / "captions.json").read_text())
    (tmp_path / "captions.json").write_text(
        json.dumps(
            raw | {"captions": [row for row in raw["captions"] if row["image"] != good[1]["image"]]}
        )
    )
    (tmp_path / "images").symlink_to(TINY / "train" / "images")
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("the first step was taken"))
    status, printed, said = here(
        monkeypatch,
        capfd,
        "train.py",
        "--method",
        "online-dpo",
        "--data",
        tmp_path / "pairs.json",
        *BRIEF,
        "--out",
        tmp_path / "out",
    )
    assert (status, printed, len(said)) == (2, "", 1) and all(
        name in said[0] for name in ("captions.json", good[1]["id"], good[1]["image"])
    )
    assert not (tmp_path / "out").exists()


def test_what_lies_where_a_result_goes_is_kept(tmp_path, monkeypatch, capfd):
    """A picture where the sheet would go; a run's own folder as the place of the merged model."""
    photo = tmp_path / "photo.png"
    photo.write_text("precious")
    status, _, said = here(
        monkeypatch, capfd, "sample.py", "pairs", "--limit", "1", "--out", tmp_path / "photo.jsonl"
    )
    assert (
        status == 2
        and said[-1] == f"sample.py: {photo}: exists already; give another --out"
        and photo.read_text() == "precious"
    )
    for place in ("run", "run/adapter"):
        status, _, said = here(
            monkeypatch,
            capfd,
            "train.py",
            *BRIEF,
            "--out",
            tmp_path / "run",
            "--export",
            tmp_path / place,
        )
        assert (
            status == 2
            and said[-1]
            == f"train.py: {tmp_path / place}: lies in the run's own folder {tmp_path / 'run'}; give another --export"
            and not (tmp_path / "run").exists()
        )


def defaults(monkeypatch, capfd, *words):
    """{option: default} as train.py --help tells them."""
    monkeypatch.setenv("COLUMNS", "300")
    status, told, _ = here(monkeypatch, capfd, "train.py", *words, "--help")
    assert status == 0
    return {
        line.split()[0]: line.rpartition("(default: ")[2].rstrip(")")
        for line in told.splitlines()
        if line.startswith("  --") and "(default: " in line
    }


def test_help_tells_the_methods_own_defaults(monkeypatch, capfd):
    """The tiny recipe's, the recipe's for RLOO, and the paper's for a reward model (App. A)."""
    recipe = json.loads((TINY / "recipe.json").read_text())
    told = [
        defaults(monkeypatch, capfd, *words)
        for words in ((), ("--method", "rloo"), ("--model", "some", "--method", "reward"))
    ]
    assert (told[0]["--steps"], told[0]["--beta"]) == (str(recipe["steps"]), str(recipe["beta"]))
    assert told[1]["--steps"] == str(recipe["methods"]["rloo"]["steps"]) != told[0]["--steps"]
    assert (told[2]["--lr"], told[2]["--steps"]) == ("2e-05", "4000")


def test_the_control_can_be_left_out_and_a_run_that_is_none_is_said_to_be_new(
    tmp_path, monkeypatch, capfd
):
    words = (
        "--limit",
        "4",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--max-new-tokens",
        "4",
        "--rounds",
        "1",
    )
    for name, more in (("with", ()), ("without", ("--no-control", "--resume"))):
        status, _, said = here(
            monkeypatch, capfd, "train.py", *words, "--eval", *more, "--out", tmp_path / name
        )
        assert status == 0 and (tmp_path / name / "control").exists() == (name == "with")
        assert (f"{tmp_path / name}: nothing to go on with; this is a new run" in said) == (
            name == "without"
        )


def test_the_sentence_names_the_control():
    """By hand: shares of 1/2, 1/4 and 1/3; a set without captions is passed over."""
    results = {
        arm: {"typical": {"chair_i": share}, "asked": {}}
        for arm, share in (("base", 0.5), ("control", 1 / 3), ("aligned", 0.25))
    }
    assert train.sentence(results, "bdhs", "runs/1").startswith(
        "bdhs took the share of mentioned objects that are not there from 50.0 to 25.0 % (control 33.3) on typical; "
    )
    del results["control"]
    assert "50.0 to 25.0 % on typical; " in train.sentence(
        results, "bdhs", "runs/1"
    ) and "is done" in train.sentence({"base": {}, "aligned": {}}, "sft", "x")


@pytest.mark.parametrize(
    "script, words, told",
    [
        ("train.py", ("--data", "d\udcff/povid.json"), "not UTF-8"),
        ("sample.py", ("answer", "--image", "\udcff.png", "--prompt", "?"), "not UTF-8"),
        (
            "sample.py",
            ("answer", "--image", "a.png", "--prompt", "?", "--max-new-tokens", "1000000000000"),
            "from 1 to 65536",
        ),
        ("train.py", ("--lora-rank", "100000000"), "from 0 to 65536"),
        (
            "train.py",
            ("--model", "liuhaotian/llava-v1.5-7b", "--data", TINY / "train" / "povid.json"),
            "liuhaotian/llava-v1.5-7b: no such folder",
        ),
    ],
)
def test_what_no_run_can_use_is_one_line(tmp_path, monkeypatch, capfd, script, words, told):
    monkeypatch.chdir(tmp_path)
    status, out, said = here(monkeypatch, capfd, script, *words)
    assert (
        (status, out, len(said)) == (2, "", 1) and told in said[0] and not list(tmp_path.iterdir())
    )
