"""The command `python sample.py pairs --by corrupt`."""

import contextlib
import io
import json
import shutil
import sys

import pytest
from conftest import TINY

import sample
from minialign.data.records import read_records
from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.pairs.corruption import RuleCorrupter
from minialign.utils.cli import run_script


@pytest.fixture()
def folder(tmp_path):
    """Return a folder with six captions of the training data, their images and annotations."""
    rows = json.loads((TINY / "train" / "instruct.json").read_text())[:6]
    (tmp_path / "images").mkdir()
    for row in rows:
        shutil.copy(TINY / "train" / "images" / row["image"], tmp_path / "images")
    shutil.copy(TINY / "train" / "captions.json", tmp_path)
    (tmp_path / "instruct.json").write_text(json.dumps(rows))
    return tmp_path


@pytest.fixture()
def run_command(folder, monkeypatch, capsys):
    """Return a function that corrupts the folder's records to `out`: (status, output, errors)."""

    def run(out, *arguments):
        words = ["pairs", "--by", "corrupt", "--data", folder / "instruct.json", "--out", out]
        monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, [*words, *arguments])])
        return run_script(sample.main), *capsys.readouterr()

    return run


def test_pairs_by_rule(folder, run_command):
    """Training reads a pair for each record. There is a contact sheet, and counts are printed."""
    path = folder / "pairs.jsonl"

    status, out, err = run_command(path, "--seed", "5")

    assert status == 0
    assert out == ""
    assert "6 pairs in" in err
    assert "used: 6" in err
    assert path.with_suffix(".png").exists()

    with contextlib.redirect_stderr(io.StringIO()) as printed:
        pairs = read_records([path], TINY / "train" / "images")
    assert printed.getvalue() == ""
    records = read_records([folder / "instruct.json"], None)
    corrupter = RuleCorrupter(None, GroundTruthAnnotator(folder / "captions.json"), seed=5)
    expected = corrupter.pairs(records)
    for record, pair, expected_pair in zip(records, pairs, expected, strict=True):
        assert (pair.id, pair.turns, pair.chosen) == (record.id, record.turns, record.chosen)
        assert pair.rejected == expected_pair["rejected"]


def test_the_size_of_a_group_changes_nothing(folder, run_command):
    run_command(folder / "pairs.jsonl", "--seed", "5")

    status, _, _ = run_command(folder / "one.jsonl", "--seed", "5", "--group", "1")

    assert status == 0
    assert (folder / "one.jsonl").read_bytes() == (folder / "pairs.jsonl").read_bytes()


def test_pairs_by_a_model(folder, run_command):
    """The tiny model cannot rewrite. Its answers are counted, and all pairs are ties."""
    path = folder / "pairs.jsonl"
    arguments = ["--corrupter", TINY / "model", "--limit", "2", "--max-new-tokens", "4"]

    status, _, err = run_command(path, *arguments)

    pairs = [json.loads(line) for line in path.read_text().splitlines()]
    assert status == 0
    assert "no answer: 2" in err
    assert [pair["corrupted"] for pair in pairs] == ["no answer"] * 2
    assert all(pair["rejected"] == pair["chosen"] for pair in pairs)


def test_other_annotations_are_not_resumed_with(folder, run_command, monkeypatch):
    """The pairs of one file are of one kind."""

    def interrupt(path, lines):
        raise KeyboardInterrupt

    path = folder / "pairs.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("minialign.pairs.pair_files.append_jsonl", interrupt)
        assert run_command(path)[0] == 130
    annotations = (folder / "captions.json").read_text()
    (folder / "captions.json").write_text(annotations.replace("top left", "top right"))

    status, _, err = run_command(path, "--resume")

    assert status == 2
    assert "other settings" in err
    assert not path.exists()


def test_a_missing_file_of_annotations_is_named_with_the_option(folder, run_command):
    (folder / "captions.json").unlink()

    status, _, err = run_command(folder / "pairs.jsonl")

    assert status == 2
    assert "captions.json: no such file" in err
    assert "or give --corrupter the folder of a multimodal LLM" in err
    assert "--annotator" not in err


def test_an_image_without_annotation_is_found_before_anything_is_written(folder, run_command):
    raw = json.loads((folder / "captions.json").read_text())
    raw["captions"] = raw["captions"][:3]
    (folder / "captions.json").write_text(json.dumps(raw))

    status, _, err = run_command(folder / "pairs.jsonl")

    assert status == 2
    assert err.count("\n") == 1
    assert "captions.json" in err
    assert "tiny-0004" in err
    assert err.endswith("; add them, or give another --corrupter\n")
    assert not list(folder.glob("pairs*"))
