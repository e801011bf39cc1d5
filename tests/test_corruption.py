"""Chosen responses rewritten with hallucinations: by rule, every change held against the picture's annotation; by a model, its answers put in its mouth."""

import contextlib
import io
import json
import re
import shutil
import sys
from collections import Counter
from dataclasses import replace

import pytest
from conftest import TINY

import sample
from minialign.data.records import Record, read_records
from minialign.pairs import corruption
from minialign.pairs.annotators import GroundTruthAnnotator
from minialign.pairs.corruption import MLLMCorrupter, RuleCorrupter, rejection_reason
from minialign.pairs.pair_files import sample_pair_file
from minialign.utils import cli

CHOSEN = "There is a red cup on a table."  # 8 words


@pytest.mark.parametrize(
    "text, why",
    [
        ("There is a blue cup on a table.", None),
        (
            "There is a red cup and there is a dog on a table, as it seems.",
            None,
        ),  # 15 words; 16 are twice as many
        ("A blue cup lies.", None),  # 4 words are half
        ("I'm sorry, but I can't help with that request.", "refusal"),
        ("As an AI, I will not invent false things here.", "refusal"),
        ("I cannot see the picture, so there it stays.", "refusal"),
        ("i can not see the picture, so there it stays.", "refusal"),
        (CHOSEN, "copy"),
        ("there is a RED  cup on\na table. ", "copy"),
        ("", "no answer"),
        (" \n", "no answer"),
        ("A blue cup.", "no answer"),
        ("There is a blue cup on a table. " * 2 + "Yes.", "no answer"),  # 17 words
        ("Here is the changed answer:\n\nThere is a blue cup on a table.", "no answer"),
    ],
)
def test_what_is_wrong_with_a_rewritten_answer(text, why):
    assert rejection_reason(CHOSEN, text) == why


def test_an_answer_that_itself_says_cannot_is_no_refusal():
    assert (
        rejection_reason("I cannot tell what the man holds.", "I cannot tell what the woman holds.")
        is None
    )


# --- by rule ---


@pytest.fixture(scope="module")
def truth():
    return GroundTruthAnnotator(TINY / "train" / "captions.json")


def changed(truth, record, seed=0):
    (pair,) = RuleCorrupter(None, truth, seed).pairs([record])
    return pair["rejected"]


def dissected(truth, text):
    """(facts, the rest) of a text of the tiny world: its objects, colours and places in order, and it without them or its articles."""
    facts = "|".join(
        [
            *truth.places,
            *truth.vocabulary.colors,
            *(" ".join(words) for words in truth.vocabulary.names),
        ]
    )
    return re.findall(rf"\b(?:{facts})\b", text), re.sub(rf"\b(?:{facts}|a|an|A|An)\b", "_", text)


def test_one_or_two_facts_change_to_others_of_their_kind_and_nothing_else(truth, records):
    """400 shipped records: both numbers occur; an object becomes one that is not in the picture, a colour or a place another."""
    captions, numbers, kinds = (
        [record for record in records if not re.match("Yes|No", record.chosen)][:400],
        set(),
        set(),
    )
    for record in captions:
        (old, frame), (new, after) = (
            dissected(truth, record.chosen),
            dissected(truth, changed(truth, record)),
        )
        changes = [(a, b) for a, b in zip(old, new, strict=True) if a != b]
        numbers.add(len(changes))
        assert frame == after
        for before, fact in changes:
            (kind,) = [
                number
                for number, known in enumerate(
                    (truth.vocabulary.colors, truth.places, truth.vocabulary.names.values())
                )
                if before in known
            ]
            kinds.add(kind)
            others = (
                truth.vocabulary.colors,
                truth.places,
                set(truth.vocabulary.names.values())
                - {one["name"] for one in truth.objects[record.image]},
            )
            assert fact in others[kind]
    assert numbers == {1, 2} and kinds == {0, 1, 2}


def test_articles_follow_the_new_words(truth):
    """The tiny world has no word that wants an "an": these do."""
    record = Record(
        "r", "0001.png", (), ("<image>\nWhat?",), "An orange is here. A lamp is there, and a pear."
    )
    own = GroundTruthAnnotator(truth.path)
    own.vocabulary.names = {
        (name,): name for name in ("orange", "apple", "lamp", "umbrella", "pear")
    }
    texts = {changed(own, record, seed) for seed in range(60)}
    assert len(texts) > 10 and {"An", "A"} == {text.split()[0] for text in texts}
    assert not any(re.search(r"\b[Aa] [aou]|\b[Aa]n [^aou]", text) for text in texts)


def test_articles_elsewhere_stay_as_they_were(truth):
    """Only what is false may tell a rejected response from the chosen one: no spelling of "hour" or "uniform"."""
    record = Record(
        "r", "0001.png", (), ("<image>\nWhat?",), "It takes an hour to clean a lamp and a uniform."
    )
    for seed in range(10):
        assert re.fullmatch(
            r"It takes an hour to clean a \w+ and a uniform\.", changed(truth, record, seed)
        )


def test_a_word_that_is_an_object_and_a_colour_is_exchanged_once(truth):
    """COCO's orange."""
    own = GroundTruthAnnotator(truth.path)
    own.vocabulary.names, own.vocabulary.colors = (
        {(name,): name for name in ("orange", "umbrella")},
        {"orange", "red"},
    )
    record = Record("r", "0001.png", (), ("<image>\nWhat?",), "There is an orange here.")
    assert {changed(own, record, seed) for seed in range(20)} <= {
        "There is an umbrella here.",
        "There is a red here.",
    }


def test_a_name_of_several_words_is_exchanged_whole(truth):
    own = GroundTruthAnnotator(truth.path)
    own.vocabulary.names = {
        ("toilet",): "toilet",
        ("toilet", "seat"): "toilet",
        ("cup",): "cup",
        ("dog",): "dog",
    }
    own.objects = {"0001.png": [{"name": "toilet"}]}
    record = Record("r", "0001.png", (), ("<image>\nWhat?",), "There is a toilet seat.")
    assert {changed(own, record, seed) for seed in range(10)} == {
        "There is a cup.",
        "There is a dog.",
    }


@pytest.mark.parametrize(
    "chosen, turned", [("Yes.", "No."), ("No.", "Yes."), ("no", "Yes."), ("YES!", "No.")]
)
def test_a_bare_yes_or_no_is_turned_round(truth, records, chosen, turned):
    assert changed(truth, replace(records[0], chosen=chosen)) == turned


def test_changes_depend_on_the_seed_and_the_record_alone(truth, records):
    some = [record for record in records if len(record.chosen) > 60][:12]
    texts = [pair["rejected"] for pair in RuleCorrupter(None, truth, 3).pairs(some)]
    assert texts == [changed(truth, record, 3) for record in reversed(some)][::-1]
    assert texts != [changed(truth, record, 4) for record in some] and texts != [
        changed(truth, replace(record, id="other"), 3) for record in some
    ]


# --- what is not used is left out, and counted ---


def test_where_nothing_can_be_changed_the_pair_is_left_out(truth, records):
    maker = RuleCorrupter(None, truth, 0)
    (pair,) = maker.pairs([replace(records[0], chosen="It is a lovely day.")])
    assert (pair["rejected"], pair["corrupted"]) == (pair["chosen"], "copy")


def answered(monkeypatch, answer):
    """Let every writer answer `answer(the text it is to change)` instead of asking its model; returns (model, paths, question) of what was asked."""
    asked = []

    def ask(writer, keys, title, max_new_tokens):
        asked.extend((writer, *key, max_new_tokens) for key in keys)
        return {key: answer(re.search(r"^Answer: (.*)$", key[1], re.M)[1]) for key in keys}

    monkeypatch.setattr(corruption, "answer_questions", ask)
    return asked


def told(path, **options):
    """(records of a file of pairs, what reading it said)."""
    with contextlib.redirect_stderr(io.StringIO()) as notes:
        records = read_records([path], TINY / "train" / "images", **options)
    return records, notes.getvalue()


def test_a_models_answers_are_used_or_counted_and_left_out(vlm, records, tmp_path, monkeypatch):
    """Of five answers two are of use; the file that is written holds a line for each record, its reader leaves the others out as ties."""
    own = [
        replace(record, chosen=f"There is a cup on table number {n}.")
        for n, record in enumerate(records[:5])
    ]
    said = {
        own[0].chosen: " There is a dog on table number 0.\n",
        own[1].chosen: "Sorry, I would rather not invent any.",
        own[2].chosen: own[2].chosen,
        own[3].chosen: "",
        own[4].chosen: "There is a cup under table number 4.",
    }
    answered(monkeypatch, said.get)
    maker = MLLMCorrupter(vlm, None, "somebody")
    pairs = sample_pair_file(maker, own, tmp_path / "pairs.jsonl", group_size=2)
    assert [pair["corrupted"] for pair in pairs] == ["used", "refusal", "copy", "no answer", "used"]
    assert pairs[0]["rejected"] == "There is a dog on table number 0." and Counter(
        pair["corrupted"] for pair in pairs
    ) == {"used": 2, "refusal": 1, "copy": 1, "no answer": 1}
    read, notes = told(tmp_path / "pairs.jsonl")
    assert "3 of 5" in notes and [record.id for record in read] == [own[0].id, own[4].id]
    assert [record.rejected for record in read] == [
        "There is a dog on table number 0.",
        "There is a cup under table number 4.",
    ]
    assert [(record.image, record.paths, record.turns, record.chosen) for record in read] == [
        (one.image, one.paths, one.turns, one.chosen) for one in (own[0], own[4])
    ]


def test_the_writer_gets_question_and_answer_and_no_picture(vlm, records, monkeypatch):
    """It is another model than the one that is aligned."""
    asked = answered(monkeypatch, str)
    MLLMCorrupter(vlm, "writer", "somebody", max_new_tokens=7).pairs(records[:1])
    ((writer, paths, text, most),) = asked
    question = records[0].turns[0].replace("<image>", "").strip()
    assert (
        (writer, paths, most) == ("writer", (), 7)
        and f"\nQuestion: {question}\nAnswer: {records[0].chosen}\n" in text
        and "<image>" not in text
    )


# --- the script ---


def run(monkeypatch, capsys, *words):
    """(status, standard output, standard error) of sample.py, in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, words)])
    return cli.run_script(sample.main), *capsys.readouterr()


@pytest.fixture()
def room(tmp_path, records):
    """Six captions of the training data as a user would have them, their pictures and the annotations beside."""
    some = json.loads((TINY / "train" / "instruct.json").read_text())[:6]
    (tmp_path / "images").mkdir()
    for raw in some:
        shutil.copy(TINY / "train" / "images" / raw["image"], tmp_path / "images")
    shutil.copy(TINY / "train" / "captions.json", tmp_path)
    (tmp_path / "instruct.json").write_text(json.dumps(some))
    return tmp_path


def test_pairs_by_rule_from_the_command_line(room, truth, monkeypatch, capsys):
    """A pair a record that training reads, a sheet to look at, counts on standard error; the group changes nothing."""
    words = "pairs", "--by", "corrupt", "--data", room / "instruct.json", "--seed", "5"
    status, out, err = run(monkeypatch, capsys, *words, "--out", room / "pairs.jsonl")
    assert (
        (status, out) == (0, "")
        and "6 pairs in" in err
        and "used: 6" in err
        and (room / "pairs.png").exists()
    )
    read, notes = told(room / "pairs.jsonl")
    own = read_records([room / "instruct.json"], None)
    assert notes == "" and [(r.id, r.turns, r.chosen, r.rejected) for r in read] == [
        (r.id, r.turns, r.chosen, changed(truth, r, 5)) for r in own
    ]
    assert run(monkeypatch, capsys, *words, "--group", "1", "--out", room / "one.jsonl")[0] == 0
    assert (room / "one.jsonl").read_bytes() == (room / "pairs.jsonl").read_bytes()


def test_pairs_by_a_model_from_the_command_line(room, monkeypatch, capsys):
    """The tiny model cannot rewrite: what it said is counted, and a file whose pairs are all ties says so to its reader."""
    status, _, err = run(
        monkeypatch,
        capsys,
        "pairs",
        "--by",
        "corrupt",
        "--corrupter",
        TINY / "model",
        "--data",
        room / "instruct.json",
        "--limit",
        "2",
        "--max-new-tokens",
        "4",
        "--out",
        room / "pairs.jsonl",
    )
    lines = [json.loads(line) for line in (room / "pairs.jsonl").read_text().splitlines()]
    assert (
        status == 0
        and [line["corrupted"] for line in lines] == ["no answer"] * 2
        and "no answer: 2" in err
    )
    assert all(line["rejected"] == line["chosen"] for line in lines)


def test_a_picture_without_annotation_is_found_before_anything_is_written(
    room, monkeypatch, capsys
):
    raw = json.loads((room / "captions.json").read_text())
    (room / "captions.json").write_text(json.dumps(raw | {"captions": raw["captions"][:3]}))
    status, _, err = run(
        monkeypatch,
        capsys,
        "pairs",
        "--by",
        "corrupt",
        "--data",
        room / "instruct.json",
        "--out",
        room / "pairs.jsonl",
    )
    assert (
        status == 2
        and err.count("\n") == 1
        and "captions.json" in err
        and "tiny-0004" in err
        and not list(room.glob("pairs*"))
    )
