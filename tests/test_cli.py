"""The two scripts as a user meets them: results, restarts after kill -9, and one line for every kind of bad input."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import sample
import train
from conftest import ROOT, TINY
from PIL import Image
from safetensors.torch import load_file

from minialign import cli

SMALL = ("--limit", "24", "--batch-size", "4", "--eval", "--group", "8")


def start(script, *words, cwd=ROOT):
    return subprocess.Popen([sys.executable, ROOT / script, *map(str, words)], cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=os.environ | {"PYTHONPATH": str(ROOT)})


def run(script, *words, cwd=ROOT):
    process = start(script, *words, cwd=cwd)
    out, err = process.communicate()
    return process.returncode, out, err


def metrics(folder):
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(a, b):
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


@pytest.mark.parametrize("words, weights", [(("--lora-rank", "0"), "model/model.safetensors"), (("--lora-rank", "4"), "adapter/adapter_model.safetensors")])
def test_a_killed_run_resumed_equals_an_uninterrupted_one(tmp_path, words, weights):
    """kill -9 between two checkpoints, then --resume: same weights, same log, to the bit (the log's seconds apart)."""
    options = (*SMALL, "--steps", "45", "--control", *words)
    assert run("train.py", *options, "--out", tmp_path / "whole")[0] == 0
    process = start("train.py", *options, "--out", tmp_path / "cut")
    log = tmp_path / "cut" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 25):
        assert process.poll() is None, process.communicate()
        time.sleep(.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    assert run("train.py", *options, "--out", tmp_path / "cut")[0] == 2  # an existing OUT needs --resume
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
    options = (*SMALL, "--steps", "400", "--out", tmp_path / "run")
    process = start("train.py", *options)
    log = tmp_path / "run" / "metrics.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 3):
        assert process.poll() is None, process.communicate()
        time.sleep(.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130 and "--resume" in err and "Traceback" not in err
    steps = len(metrics(tmp_path / "run"))
    assert steps < 400 and (tmp_path / "run" / "state.safetensors").exists()


def test_sampling_killed_and_resumed_equals_an_uninterrupted_one(tmp_path):
    """Groups are formed from the full list, so the pairs of a restarted run are those of one that was never stopped."""
    options = ("--limit", "48", "--group", "4", "--rho", ".97", "--max-new-tokens", "16")
    assert run("sample.py", *options, "--out", tmp_path / "whole.jsonl")[0] == 0
    process = start("sample.py", *options, "--out", tmp_path / "cut.jsonl")
    part = tmp_path / "cut.jsonl.part"
    while not (part.exists() and len(part.read_text().splitlines()) >= 9):
        assert process.poll() is None, process.communicate()
        time.sleep(.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut.jsonl").exists()
    assert run("sample.py", *options, "--out", tmp_path / "cut.jsonl")[0] == 2
    assert run("sample.py", *options, "--out", tmp_path / "cut.jsonl", "--resume")[0] == 0
    assert (tmp_path / "whole.jsonl").read_bytes() == (tmp_path / "cut.jsonl").read_bytes()
    assert (tmp_path / "cut.png").exists() and not part.exists()


def test_the_result_folder_holds_what_is_promised(tmp_path):
    """Every file and field of the contract, on a run of three steps with one evaluation set."""
    status, out, err = run("train.py", "--limit", "8", "--steps", "3", "--batch-size", "4", "--control", "--eval", TINY / "tune" / "typical", "--out", tmp_path / "run")
    assert status == 0, err
    folder = tmp_path / "run"
    first = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    assert list(first) == ["step", "loss", "logp_chosen", "logp_rejected", "ref_logp_chosen", "ref_logp_rejected", "margin", "accuracy", "lr", "grad_norm", "seconds"]
    assert abs(first["loss"] - .693147) < 1e-4 and abs(first["margin"]) < 1e-3
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "control", "aligned"] and list(evaluation["base"]) == ["typical"]
    scores = evaluation["aligned"]["typical"]
    assert set(scores) == {"chair_i", "chair_s", "recall", "colour", "pope", "words", "repeats"}
    assert set(scores["pope"]) == {"random", "popular", "adversarial"} and scores["pope"]["random"]["n"] == 800
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["seconds"]) == {"load", "sample", "reference", "train", "evaluate"} and summary["steps"] == 3
    config = json.loads((folder / "config.json").read_text())
    assert config["checkpoint"] and config["versions"]["torch"] and config["settings"]["beta"] and config["template"] == "vicuna"
    pair = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    assert set(pair) == {"id", "image", "prompt", "chosen", "rejected", "rounds", "similarity", "visible", "cuts", "seed"}
    assert "| typical | aligned |" in out and str(folder) in out.splitlines()[-1]


def test_pairs_of_other_records_are_refused_and_sampled_work_is_kept(tmp_path):
    """A data file changed between a run and its --resume; a picture that turns out damaged after pairs were sampled."""
    records = json.loads((TINY / "train" / "instruct.json").read_text())[:12]
    shutil.copytree(TINY / "train" / "images", tmp_path / "images", ignore=lambda _, names: [n for n in names if n not in {r["image"] for r in records}])
    data, out = tmp_path / "data.json", tmp_path / "out"
    data.write_text(json.dumps(records))
    words = ("--data", data, "--eval", "--steps", "2", "--batch-size", "2", "--group", "4", "--out", out)
    late = tmp_path / "images" / "late.jpg"  # a JPEG's header tells nothing of its end
    Image.open(tmp_path / "images" / records[10]["image"]).convert("RGB").save(late)
    whole = late.read_bytes()
    late.write_bytes(whole[:len(whole) // 2])
    records[10]["image"] = late.name
    data.write_text(json.dumps(records))
    status, _, err = run("train.py", *words)
    assert status == 2 and "late.jpg" in err and len((out / "pairs.jsonl.part").read_text().splitlines()) == 1 + 8
    late.write_bytes(whole)
    assert run("train.py", *words, "--resume")[0] == 0
    (out / "summary.json").unlink()
    data.write_text(json.dumps(records[1:]))
    status, _, err = run("train.py", *words, "--resume")
    assert status == 2 and "other records" in err and (out / "pairs.jsonl").exists()


def test_answer_streams_the_same_text_that_score_reads(tmp_path):
    """`answer` prints the answer alone; `score` gives a line a record with the end token counted."""
    picture = TINY / "tune" / "typical" / "images" / "0001.png"
    status, out, err = run("sample.py", "answer", "--image", picture, "--prompt", "Where is the cup?", "--max-new-tokens", "12")
    assert status == 0 and out.endswith("\n") and "<" not in out
    record = {"id": "a", "image": picture.name, "conversations": [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "Yes."}],
              "rejected_conversations": [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "No."}]}
    (tmp_path / "one.json").write_text(json.dumps([record]))
    status, out, err = run("sample.py", "score", "--data", tmp_path / "one.json", "--images", picture.parent)
    assert status == 0, err
    line = json.loads(out)
    assert list(line) == ["id", "logp_chosen", "logp_rejected", "tokens_chosen", "tokens_rejected"] and line["tokens_chosen"] == 3 and line["logp_chosen"] < 0


def broken_inputs(folder):
    """(what is wrong, script, words, what the one line must name)."""
    good = json.loads((TINY / "train" / "instruct.json").read_text())[:3]
    shutil.copytree(TINY / "train" / "images", folder / "images", ignore=lambda _, names: [n for n in names if n not in {r["image"] for r in good}])
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
    (folder / "images" / "cut.png").write_bytes(whole[:len(whole) // 2])
    yield "missing picture", "train.py", data("a.json", [good[0], good[1] | {"image": "gone.png"}]), ("a.json", "record 2", "gone.png", "--images")
    yield "no picture", "train.py", data("b.json", [good[0] | {"image": "text.png"}]), ("text.png", "convert")
    yield "truncated picture", "train.py", data("c.json", [good[0] | {"image": "cut.png"}]), ("cut.png", "complete")
    yield "cut JSON", "train.py", data("d.json", json.dumps(good)[:300]), ("d.json", "line 1", "complete")
    yield "no conversations", "train.py", data("e.json", [good[0], {"id": "x", "image": good[1]["image"]}]), ("e.json", "record 2", "conversations")
    yield "empty answer", "train.py", data("f.json", turned(1, "  ")), ("f.json", "record 2", "empty", "remove")
    yield "too long", "train.py", data("g.json", turned(0, "<image>\n" + "cup " * 600)), (good[1]["id"], "512", "shorten")
    yield "rho", "train.py", ("--rho", "1.5"), ("--rho", "1.5", "from 0 to 1")
    yield "unknown option", "train.py", ("--colour", "red"), ("--colour", "--help")
    yield "unknown method", "train.py", ("--method", "magic"), ("magic", "bdhs")
    yield "no model", "train.py", ("--model", folder / "nowhere", *data("h.json", good)), ("nowhere", "config.json")
    yield "rejected missing", "train.py", ("--method", "dpo", *data("i.json", good)), (good[0]["id"], "rejected")
    yield "rho, sample", "sample.py", ("--rho", "-1"), ("--rho", "-1")
    yield "sub-command's option", "sample.py", ("score", "--rho", "1"), ("--rho",)
    yield "missing picture, sample", "sample.py", data("j.json", [good[0] | {"image": "gone.png"}]), ("j.json", "record 1", "gone.png")
    yield "no place to write", "sample.py", ("--limit", "2", "--out", "/dev/null/pairs.jsonl"), ("/dev/null", "--out")
    yield "a file for a folder", "train.py", ("--data", folder), (folder, "directory")
    yield "no such encoder", "train.py", ("--similarity", folder / "none", *data("m.json", good)), ("none", "config.json")
    yield "another template", "train.py", ("--template", "chatml", *data("n.json", good)), ("chatml", "--template")
    yield "resume what?", "train.py", ("--resume",), ("--resume", "--out")
    yield "resume what, sample", "sample.py", ("--resume",), ("--resume", "--out")
    yield "an endless rate", "train.py", ("--lr", "inf"), ("--lr", "inf")
    yield "an input as output", "sample.py", ("score", *data("o.json", good), "--out", folder / "o.json"), ("o.json", "exists already")
    yield "score without pairs", "sample.py", ("score", *data("k.json", good)), (good[0]["id"], "rejected")
    (model / "model.safetensors").unlink()
    yield "missing weights", "train.py", ("--model", model, *data("l.json", good)), ("model.safetensors",)
    (model / "tokenizer.json").unlink()
    yield "missing tokenizer", "sample.py", ("--model", model), ("tokenizer.json",)


def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capfd):
    """Each names file, record and remedy; no traceback, no OUT left behind. Run inside this process, to save the start-up."""
    monkeypatch.chdir(tmp_path)
    room = tmp_path / "room"
    room.mkdir()
    scripts = {"train.py": train.main, "sample.py": sample.main}
    for what, script, words, names in broken_inputs(room):
        out = ("--out", tmp_path / "out") if "score" not in words and "--out" not in words and "--resume" not in words else ()
        monkeypatch.setattr(sys, "argv", [script, *map(str, (*words, *out))])
        try:
            status = cli.run(scripts[script])
        except SystemExit as left:  # argparse's own way out
            status = left.code
        printed, err = capfd.readouterr()
        last = [line for line in err.replace("\r", "\n").split("\n") if line.strip() and "%|" not in line and not line.startswith("model ")]
        assert status == 2 and printed == "", (what, err)
        assert len(last) == 1 and "Traceback" not in err, (what, err)
        assert all(str(name) in last[0] for name in names), (what, last)
        assert not (tmp_path / "out").exists() and not list(tmp_path.glob("runs")), what
