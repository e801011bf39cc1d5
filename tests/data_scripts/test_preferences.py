"""Stated preferences: the pairs for two system texts, and what was measured of models on them."""

import sys

import pytest
from conftest import ROOT, TINY

from minialign.data.records import read_records
from minialign.evaluation.evaluation_sets import read_folder
from minialign.models.adapters import save_adapter
from minialign.models.policy import Policy
from minialign.utils.files import InputError, read_json, write_json

sys.path.insert(0, str(ROOT / "data"))
from preferences import measure_captions, name_adapters, table_lines  # noqa: E402
from tiny_world.preferences import (  # noqa: E402
    brief_caption,
    names_position,
    preference_pairs,
)


def instruct_records():
    """Return the first records of the tiny training data."""
    return read_json(TINY / "train" / "instruct.json")[:5]


def test_each_caption_becomes_two_pairs_that_only_the_system_text_tells_apart():
    """The first three records ask for captions, the next two where something is."""
    pairs = preference_pairs(instruct_records())

    assert [pair["id"] for pair in pairs[:2]] == ["tiny-0001-brief", "tiny-0001-positions"]
    assert len(pairs) == 6
    brief, positions = pairs[:2]
    assert brief["system"] == "Answer briefly."
    assert brief["chosen"] == (
        "There is a yellow lamp. There is a blue pen. There is a purple book."
    )
    assert brief["rejected"] == instruct_records()[0]["conversations"][1]["value"]
    assert positions["system"] == "Name positions."
    assert (positions["chosen"], positions["rejected"]) == (brief["rejected"], brief["chosen"])
    assert (positions["prompt"], positions["image"]) == (brief["prompt"], brief["image"])


def test_the_pairs_are_records_that_train_reads(tmp_path):
    path = tmp_path / "pairs.json"
    write_json(path, preference_pairs(instruct_records()))

    records = read_records([path], TINY / "train" / "images")

    assert {record.system for record in records} == {"Answer briefly.", "Name positions."}
    assert len({record.prompt for record in records}) == 6


def test_a_brief_caption_names_no_position():
    caption = brief_caption([("orange", "cup", 0), ("blue", "bus", 5)])

    assert caption == "There is an orange cup. There is a blue bus."
    assert not names_position(caption)
    assert names_position("A blue bus is at the bottom right.")


def test_the_shipped_tokenizer_spells_both_system_texts(vlm):
    """The model was never trained with a system text, but each letter has a token."""
    for system in ("Answer briefly.", "Name positions."):
        tokens = [vlm.tokenizer.tokens[token_id] for token_id in vlm.tokenizer.encode(system)]
        text = "".join(tokens).replace("▁", " ").strip()
        assert text == system  # no <unk>, and no byte such as <0x41>


def test_captions_are_counted_under_the_system_text(vlm):
    """The base names positions in every caption, whatever the system text says."""
    evaluation_set = read_folder(TINY / "tune" / "typical")
    evaluation_set.captions = evaluation_set.captions[:2]
    vlm.system = "Answer briefly."

    scores = measure_captions(vlm, [evaluation_set])

    assert scores["images"] == 2
    assert scores["names_positions"] == 1.0


def test_the_page_shows_the_stored_scores():
    page = (TINY / "methods.md").read_text(encoding="utf-8")
    stored = read_json(TINY / "preferences.json")

    assert "\n".join(table_lines(stored)) in page


def test_a_score_that_is_a_share_of_nothing_is_a_dash():
    """A model that mentions no object has no CHAIR_i, and repeats none."""
    scores = {"names_positions": 0.0, "words": 2.0, "recall": 0.0, "chair_i": None, "repeats": None}

    lines = table_lines({"silent": {"brief": scores}})

    assert lines[-1] == "| silent | Answer briefly. | 0.0 | 2.0 | - | 0.0 | - |"


def test_runs_are_measured_under_the_names_of_their_folders(vlm, tmp_path):
    """Two runs of one name would write over each other's scores."""
    policy = Policy(vlm.model, rank=2, alpha=4)
    for name in ("a/mpo", "b/mpo", "base"):
        save_adapter(policy, tmp_path / name / "adapter", TINY / "model")
    first, second, base = (tmp_path / name for name in ("a/mpo", "b/mpo", "base"))

    assert name_adapters([first]) == {"mpo": first / "adapter"}
    with pytest.raises(InputError, match="the scores of another model have the name 'mpo'"):
        name_adapters([first, second])
    with pytest.raises(InputError, match="the scores of another model have the name 'base'"):
        name_adapters([base])
    with pytest.raises(InputError, match="missing"):
        name_adapters([first, tmp_path / "missing"])
