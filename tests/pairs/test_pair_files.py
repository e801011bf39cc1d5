"""Files of pairs: the same bytes whatever the group and after any restart, and readable again."""

import copy
import json
from dataclasses import replace

import pytest
from bdhs_helpers import QUICK, make_sampler, unusual_records
from conftest import TINY

from minialign.data.records import read_records
from minialign.pairs.bdhs import BdhsSampler
from minialign.pairs.pair_files import (
    pair_file_header,
    preference_pair,
    read_finished_pairs,
    sample_pair_file,
)
from minialign.pairs.similarity import ModelEmbeddings
from minialign.training.inputs import sample_or_read_pairs
from minialign.utils.files import InputError, write_jsonl


def sample_file(vlm, records, path, group_size, *, resume=False, config=QUICK, seed=0):
    """Sample a file of pairs, with the similarity that is used by default."""
    similarity = ModelEmbeddings(vlm.model, vlm.tokenizer)
    sampler = make_sampler(vlm, config, similarity, seed)
    return sample_pair_file(sampler, records, path, group_size=group_size, resume=resume)


@pytest.fixture
def interrupted_file(vlm, records, tmp_path, monkeypatch):
    """Return the path of a file of four pairs in groups of two, interrupted after one group."""
    path = tmp_path / "pairs.jsonl"
    interrupt_sampling(vlm, records[:4], path, monkeypatch, after_groups=1)
    return path


def interrupt_sampling(vlm, records, path, monkeypatch, *, after_groups):
    """Sample in groups of two, and break off as Ctrl-C does."""
    num_calls = 0
    pairs = BdhsSampler.pairs

    def breaking_pairs(self, *args):
        nonlocal num_calls
        num_calls += 1
        if num_calls > after_groups:
            raise KeyboardInterrupt
        return pairs(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(BdhsSampler, "pairs", breaking_pairs)
        with pytest.raises(KeyboardInterrupt):
            sample_file(vlm, records, path, 2)


def part_of(path):
    """Return the path of the unfinished file."""
    return path.with_name(path.name + ".part")


# --- groups and restarts


def test_pairs_do_not_depend_on_the_group(vlm, records, tmp_path):
    """Groups of 1, 4 and 32 write the same bytes, and leave nothing else.

    A random number within rounding (1e-6) of a boundary could make a difference: odds of about 1
    in 1,000 for new weights.
    """
    some_records = unusual_records(records)
    contents = []

    for group_size in (1, 4, 32):
        path = tmp_path / f"{group_size}.jsonl"
        sample_file(vlm, some_records, path, group_size)
        contents.append(path.read_bytes())

    assert contents[0] == contents[1] == contents[2]
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["1.jsonl", "32.jsonl", "4.jsonl"]


@pytest.mark.parametrize("torn", ["", '{"id": "tiny-00', None])
def test_a_restart_gives_the_same_file(vlm, records, tmp_path, monkeypatch, torn):
    """Interrupted after two groups of two. The unfinished file may end with half a line (kill -9).

    With None its last line is missing, so that the second group is not complete.
    """
    # Arrange: a whole file, and one that was interrupted.
    some_records = records[:7]
    whole_path = tmp_path / "whole.jsonl"
    sample_file(vlm, some_records, whole_path, 2)
    path = tmp_path / "pairs.jsonl"
    interrupt_sampling(vlm, some_records, path, monkeypatch, after_groups=2)
    part = part_of(path)
    text = part.read_text()
    assert not path.exists()
    assert len(text.splitlines()) == 5  # a header and four pairs
    if torn is None:
        part.write_text("".join(text.splitlines(keepends=True)[:4]))
    else:
        part.write_text(text + torn)

    # Act: resume, and note the groups that are sampled.
    groups = []
    pairs_method = BdhsSampler.pairs

    def recording_pairs(self, records, *args):
        groups.append([record.id for record in records])
        return pairs_method(self, records, *args)

    monkeypatch.setattr(BdhsSampler, "pairs", recording_pairs)
    pairs = sample_file(vlm, some_records, path, 2, resume=True)

    # Assert: only the missing groups of the full list were sampled.
    ids = [record.id for record in some_records]
    missing_groups = [ids[4:6], ids[6:]]
    if torn is None:
        missing_groups = [ids[2:4], *missing_groups]
    assert groups == missing_groups
    assert path.read_bytes() == whole_path.read_bytes()
    assert not part.exists()
    assert pairs == [json.loads(line) for line in whole_path.read_text().splitlines()]


@pytest.mark.parametrize("line", ["{", "3"])
def test_a_whole_line_that_is_no_pair_is_refused(vlm, records, interrupted_file, line):
    part = part_of(interrupted_file)
    lines = part.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:2]) + line + "\n")

    with pytest.raises(InputError, match="remove it") as error:
        sample_file(vlm, records[:4], interrupted_file, 2, resume=True)

    assert str(part) in str(error.value)
    assert not interrupted_file.exists()


def test_a_line_torn_inside_a_character_is_dropped(vlm, records, interrupted_file):
    part = part_of(interrupted_file)
    half_a_line = '{"id": "Zoë'.encode()[:-1]
    part.write_bytes(part.read_bytes() + half_a_line)

    pairs = sample_file(vlm, records[:4], interrupted_file, 2, resume=True)

    assert len(pairs) == 4


@pytest.mark.parametrize("change", ["rho", "seed", "group", "records", "similarity"])
def test_a_restart_with_other_settings_is_refused(
    vlm, records, interrupted_file, monkeypatch, change
):
    """The unfinished file stays as it was."""
    # Arrange
    part = part_of(interrupted_file)
    before = part.read_bytes()
    arguments = {"records": records[:4], "group_size": 2, "config": QUICK, "seed": 0}
    if change == "rho":
        arguments["config"] = replace(QUICK, rho=0.5)
    elif change == "seed":
        arguments["seed"] = 1
    elif change == "group":
        arguments["group_size"] = 4
    elif change == "records":
        arguments["records"] = records[:5]
    else:
        monkeypatch.setattr(ModelEmbeddings, "name", "another")

    # Act
    with pytest.raises(InputError, match="other settings") as error:
        sample_file(vlm, path=interrupted_file, resume=True, **arguments)

    # Assert
    assert "\n" not in str(error.value)
    assert part.read_bytes() == before
    assert not interrupted_file.exists()


@pytest.mark.parametrize("change", ["model", "files", "template"])
def test_a_restart_with_another_model_or_template_is_refused(
    vlm, records, interrupted_file, change
):
    other = copy.copy(vlm)
    if change == "model":
        other.model = copy.deepcopy(vlm.model)
        other.model.lm_head.weight.data.neg_()
    elif change == "files":
        file = next(iter(vlm.file_digests))
        other.file_digests = vlm.file_digests | {file: "another"}
    else:
        other.template = "vicuna_v1"

    with pytest.raises(InputError):
        sample_file(other, records[:4], interrupted_file, 2, resume=True)


# --- reading a file again


def test_a_pair_can_be_read_back(vlm, records, tmp_path):
    """Training reads what sampling writes: prompt, chosen and rejected response."""
    path = tmp_path / "pairs.jsonl"
    pairs = sample_file(vlm, records[:3], path, 2)

    read = read_records([path], TINY / "train" / "images")

    for record, pair, read_record in zip(records[:3], pairs, read, strict=True):
        assert read_record.id == record.id
        assert read_record.paths == record.paths
        assert read_record.turns == record.turns
        assert read_record.chosen == record.chosen
        assert read_record.rejected == pair["rejected"]


def test_a_pair_of_a_longer_conversation_can_be_read_back(vlm, records, tmp_path):
    """The prompt of a pair is the whole conversation that its responses were written for."""
    turns = (records[1].turns[0], records[1].chosen, "And what else?")
    record = replace(records[1], turns=turns)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / record.image).write_bytes(b"")
    sample_file(vlm, [record], tmp_path / "pairs.jsonl", 1)

    (read_record,) = read_records([tmp_path / "pairs.jsonl"], None)

    assert read_record.turns == record.turns


def test_a_pair_keeps_the_system_text_of_its_record(vlm, records, tmp_path):
    """It is read back. Unfinished pairs of another system text are not resumed."""
    sampler = make_sampler(vlm)
    brief = replace(records[0], system="Answer briefly.")
    path = tmp_path / "pairs.jsonl"

    (pair,) = sample_file(vlm, [brief], path, group_size=1)
    (record,) = read_records([path], TINY / "train" / "images")

    assert record == replace(brief, rejected=pair["rejected"])
    header = pair_file_header(sampler, [brief], 1)
    assert header != pair_file_header(sampler, [replace(brief, system="Name positions.")], 1)
    assert "system" not in preference_pair(records[0], "A cup.")


# --- finished files


def test_the_records_of_kept_pairs_are_found(records, tmp_path):
    """Two records have the same id, as two questions about one image may."""
    same_id = replace(records[1], id=records[0].id)
    some_records = [records[0], same_id, *records[2:5]]
    kept_records = [same_id, some_records[3]]
    pairs = [preference_pair(record, "A cup.") for record in kept_records]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)

    assert read_finished_pairs(tmp_path / "pairs.jsonl", some_records, "") == (kept_records, pairs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chosen": "other"}, "was sampled for other records than those of --data; try again"),
        ({"system": "Be brief."}, "was sampled for other records than those of --data; try again"),
        ({"rejected": None}, "pairs.jsonl: pair 1 has no rejected response; try again"),
    ],
)
def test_finished_pairs_of_other_data_are_refused(records, tmp_path, change, message):
    write_jsonl(tmp_path / "pairs.jsonl", [preference_pair(records[0], "A cup.") | change])

    with pytest.raises(InputError, match=message):
        read_finished_pairs(tmp_path / "pairs.jsonl", records[:2], "try again")


def test_a_run_removes_the_unfinished_file_beside_finished_pairs(records, tmp_path):
    """An earlier process wrote all pairs, and was stopped before it removed it."""
    path = tmp_path / "pairs.jsonl"
    pairs = [preference_pair(record, "A cup.") for record in records[:2]]
    write_jsonl(path, pairs)
    part_of(path).touch()

    assert sample_or_read_pairs(None, None, records[:2], path) == pairs

    assert not part_of(path).exists()
