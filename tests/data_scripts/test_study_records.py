"""The records that all arms of a study share: what a sampler cannot use, no arm learns from."""

import json
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "data"))
from tiny_study import records  # noqa: E402
from tiny_study.records import share_records  # noqa: E402

IDS = ("one", "two", "three", "four", "five")
# What each sampler finds. The chosen response is "yes".
REJECTED = {
    "bdhs": ("no", "yes", "no", "no", "no"),  # the second is the chosen response
    "unguided": ("no", "no", "no", "", "no"),  # the fourth is empty
}


@pytest.fixture()
def base(tmp_path, monkeypatch):
    """Return the folder of a base with five records. Sampling is replaced, and counted."""
    folder = tmp_path / "tiny"
    (folder / "train").mkdir(parents=True)
    rows = [{"id": name, "image": f"{name}.png"} for name in IDS]
    (folder / "train" / "instruct.json").write_text(json.dumps(rows))
    sampled = []

    def load_and_validate(options):
        return "vlm", [SimpleNamespace(id=name, chosen="yes") for name in IDS], {}

    def sample_or_read_pairs(options, vlm, loaded_records, path):
        name = "unguided" if options.unguided else "bdhs"
        sampled.append((name, options.seed, options.rho, path.name))
        pairs = []
        for record, rejected in zip(loaded_records, REJECTED[name], strict=True):
            pairs.append({"id": record.id, "chosen": "yes", "rejected": rejected})
        return pairs

    monkeypatch.setattr(records, "load_and_validate", load_and_validate)
    monkeypatch.setattr(records, "sample_or_read_pairs", sample_or_read_pairs)
    return SimpleNamespace(folder=folder, sampled=sampled)


def test_shared_records_are_those_that_every_sampler_can_use(tmp_path, base):
    recipe = {"rho": 0.5, "methods": {}}

    folder = share_records(str(base.folder), 2, recipe, tmp_path / "out")

    assert folder == tmp_path / "out" / "records" / "tiny-2"
    chosen = json.loads((folder / "chosen.json").read_text())
    assert [row["id"] for row in chosen] == ["one", "three", "five"]
    assert chosen[0] == {"id": "one", "image": "one.png"}
    for name in ("bdhs", "unguided"):
        lines = (folder / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["id"] for line in lines] == ["one", "three", "five"]
    assert json.loads((folder / "counts.json").read_text()) == {
        "records": 3,
        "of": 5,
        "unusable, bdhs": 1,
        "unusable, unguided": 1,
    }
    assert base.sampled == [
        ("bdhs", 2, 0.5, "all-bdhs.jsonl"),
        ("unguided", 2, 0.5, "all-unguided.jsonl"),
    ]


def test_records_are_sampled_once_for_a_base_and_a_seed(tmp_path, base):
    for seed in (0, 1, 0):
        share_records(str(base.folder), seed, {"methods": {}}, tmp_path / "out")

    assert [(name, seed) for name, seed, _, _ in base.sampled] == [
        ("bdhs", 0),
        ("unguided", 0),
        ("bdhs", 1),
        ("unguided", 1),
    ]
