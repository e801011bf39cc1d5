"""Who ranks two responses: the ground truth's verdicts worked by hand, a judge with answers put in its mouth, and how well any of them ranks."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

from minialign.annotators import main
from minialign.data.records import Record
from minialign.pairs import annotators
from minialign.pairs.annotators import (
    GroundTruthAnnotator,
    MLLMAnnotator,
    RewardAnnotator,
    captions_file_of,
    pair_accuracy,
    parse_verdict,
)
from minialign.utils import cli
from minialign.utils.files import InputError

VOCABULARY = {
    "objects": {
        "cup": ["cup", "cups"],
        "dog": ["dog", "puppy"],
        "lamp": ["lamp"],
        "ball": ["ball"],
    },
    "colours": ["red", "blue", "green"],
}
CUP, DOG = (
    {"name": "cup", "colour": "red", "place": "top left"},
    {"name": "dog", "colour": "blue", "place": "bottom right"},
)
ANNOTATED = {
    "a.png": [CUP, DOG],
    "two.png": [CUP, CUP | {"colour": "blue", "place": "bottom right"}],
}


def annotate(folder, annotated):
    """Write a captions.json; its path."""
    rows = [
        {"image": image, "prompt": "What is there?", "objects": objects}
        for image, objects in annotated.items()
    ]
    (folder / "captions.json").write_text(json.dumps({"vocabulary": VOCABULARY, "captions": rows}))
    return folder / "captions.json"


@pytest.fixture()
def truth(tmp_path):
    return GroundTruthAnnotator(annotate(tmp_path, ANNOTATED))


def record(chosen="good", rejected="bad", image="a.png", question="What is there?"):
    return Record(
        "r-7", image, (f"/pictures/{image}",), (f"<image>\n{question}",), chosen, rejected
    )


def both_ways(annotator, asked, first, second):
    """The verdict on (first, second), which must turn round with them."""
    (there,) = annotator.compare([asked], [first], [second])
    (back,) = annotator.compare([asked], [second], [first])
    assert back == (None if there is None else 1 - there)
    return there


# --- the ground truth ---


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        ("There is a cup.", "There is a lamp.", 0),  # an object that is not there
        ("A red cup.", "A blue cup.", 0),
        (
            "The cup is red.",
            "The cup is blue.",
            0,
        ),  # the colour of the one thing spoken of may stand anywhere
        ("A cup is at the top left.", "A cup is at the bottom right.", 0),
        (
            "A red cup and a blue dog.",
            "A blue cup and a red dog.",
            0,
        ),  # of two things, each its own
        (
            "A cup and a dog at the bottom right.",
            "A cup and a dog.",
            None,
        ),  # whose place is not told
        (
            "A cup.",
            "A red cup at the top left. A blue dog at the bottom right. A lamp.",
            0,
        ),  # 0 wrong, 1 right; 1 wrong, 6 right
        ("A lamp.", "A blue cup at the bottom right.", 0),  # 1 wrong; colour and place, 2 wrong
        (
            "A lamp. A ball.",
            "A blue cup at the bottom right. A dog.",
            1,
        ),  # 2 wrong each; 0 right, 2 right
        ("A lamp.", "A blue cup.", 1),  # 1 wrong each; nothing right, the cup is
        ("A cup.", "A cup. A dog.", 1),
        ("A red cup.", "A cup.", 0),
        ("A cup at the top left.", "A cup.", 0),
        ("A cup and a puppy.", "A cup.", 0),
        (
            "A cup. A cup. One more cup, and cups.",
            "A cup.",
            None,
        ),  # saying it again makes it no truer
        ("A red cup. The cup is red.", "A cup. It is a red cup.", None),
        ("A lamp. A lamp.", "A lamp.", 1),  # but each false statement is one
        ("There is a cup.", "One sees the cup!", None),
        ("A blue cup.", "A red dog.", None),  # 1 wrong and 1 right each
        ("Nothing.", "A lovely day.", None),
        ("No, there is no lamp.", "There is a lamp.", 0),
        (
            "There is no lamp, nor anything else.",
            "Nothing.",
            None,
        ),  # what is not there is not said to be there
        ("A cup without a ball.", "A cup.", None),
        ("A cup, not a lamp.", "A cup.", None),
        ("There isn't a red\nlamp.", "Nothing.", None),
        ("There is no dog and a cup is here.", "A cup.", None),
        ("- no dog\n- a cup", "A cup.", None),
        ("Without a doubt a cup.", "A cup.", None),
        ("No dog (a cup is there).", "A cup.", None),
        ("I cannot see a dog.", "Nothing.", None),
        ("Neither a dog nor a lamp.", "Nothing.", None),
        ("None of it is a dog.", "Nothing.", None),
        ("There is no dog.", "A dog.", 1),
        ("The cup is not blue.", "The cup is blue.", 0),
        ("Not only a cup.", "A cup.", None),
        ("No lamp but a cup.", "A cup.", None),
        ("No, a lamp.", "No, a cup.", 1),
        ("There is no lamp: a ball.", "A ball.", None),  # up to the end of its clause
    ],
)
def test_fewer_wrong_statements_first_then_more_right_ones(truth, first, second, verdict):
    """The picture: a red cup at the top left, a blue dog at the bottom right; no lamp, no ball."""
    assert both_ways(truth, record(), first, second) == verdict


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        ("A red cup. A blue cup.", "A red cup. A green cup.", 0),
        (
            "A red cup. A blue cup.",
            "A red cup.",
            0,
        ),  # the second one's colour is a statement of its own
        ("A cup at the bottom right.", "A cup.", 0),
    ],
)
def test_what_is_true_of_one_of_two_alike_is_true(truth, first, second, verdict):
    assert both_ways(truth, record(image="two.png"), first, second) == verdict


def test_what_is_annotated_as_null_is_not_known(tmp_path):
    """Whatever is said of it is no mistake, and null is no place to look for."""
    truth = GroundTruthAnnotator(
        annotate(tmp_path, {"a.png": [DOG, {"name": "cup", "colour": None, "place": None}]})
    )
    assert (
        both_ways(truth, record(), "A red cup at the bottom right.", "A lamp.") == 0
        and both_ways(truth, record(), "A red cup.", "A blue cup.") is None
    )


@pytest.mark.parametrize(
    "question, first, second, verdict",
    [
        ("Is there a dog in the picture?", "Yes.", "No.", 0),
        ("Is there a lamp in the picture?", "Yes.", "No.", 1),
        ("Is there a lamp in the picture?", "yes, I think so", "no", 1),
        ("Is there a lamp in the picture?", "No.", "There is.", 0),  # a right answer against none
        (
            "Is there a lamp in the picture?",
            "Nothing of that kind.",
            "No.",
            1,
        ),  # begins like an answer and is none
        ("Is there a lamp in the picture?", "Yes, a lamp.", "Yes.", 1),  # 2 wrong, 1 wrong
        ("Is it raining?", "Yes.", "No.", None),  # about nothing that is annotated
        ("Is there a cup or a lamp?", "Yes.", "No.", None),  # about two things: not told
    ],
)
def test_a_yes_or_no_is_held_against_what_the_question_names(
    truth, question, first, second, verdict
):
    assert both_ways(truth, record(question=question), first, second) == verdict


def test_the_last_question_of_a_conversation_is_the_one_answered(truth):
    turns = ("<image>\nIs there a lamp?", "No.", "Is there a cup?")
    assert both_ways(truth, replace(record(), turns=turns), "Yes.", "No.") == 0


def test_many_records_are_judged_each_by_its_own_picture(truth):
    asked = [record(), record(image="two.png"), record()]
    assert truth.compare(
        asked, ["A dog.", "A dog.", "A lamp."], ["A lamp.", "A lamp. A red cup.", "A dog."]
    ) == [0, 1, 1]


def test_a_picture_without_annotation_is_named(truth):
    with pytest.raises(InputError, match=r"captions\.json.*r-7.*gone\.png") as error:
        truth.compare([record(), record(image="gone.png")], ["A cup."] * 2, ["A dog."] * 2)
    assert str(truth.path) in str(error.value) and "\n" not in str(error.value)


def test_a_picture_named_in_a_list_of_one_is_that_picture(truth):
    """Formats such as TRL's name pictures in lists."""
    assert both_ways(truth, replace(record(), image=["a.png"]), "A cup.", "A lamp.") == 0


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        json.dumps({"vocabulary": VOCABULARY}),
        json.dumps({"vocabulary": VOCABULARY, "captions": [3]}),
        '{"vocab',
        *(
            json.dumps(
                {
                    "vocabulary": VOCABULARY,
                    "captions": [
                        {"image": "a.png", "objects": [CUP]},
                        {"image": "b.png"} | objects,
                    ],
                }
            )
            for objects in (
                {},
                {"objects": ["cup"]},
                {"objects": ["its name"]},
                {"objects": [3]},
                {"objects": [CUP, {"colour": "red"}]},
                {"objects": CUP},
                {"objects": None},
                {"objects": [CUP | {"place": []}]},
                {"objects": [CUP | {"place": 3}]},
                {"objects": [CUP | {"colour": {}}]},
            )
        ),
    ],
)
def test_annotations_that_are_none_are_refused_by_name(tmp_path, text):
    (tmp_path / "captions.json").write_text(text)
    with pytest.raises(InputError) as error:
        GroundTruthAnnotator(tmp_path / "captions.json")
    assert str(tmp_path / "captions.json") in str(error.value) and "\n" not in str(error.value)
    assert "b.png" not in text or "record 2" in str(error.value)


# --- a multimodal LLM ---


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("Response 1", 0),
        ("Response 2", 1),
        ("response 1 is better.", 0),
        ("RESPONSE 2!", 1),
        ("  Response 2: fewer mistakes.", 1),
        ("**Response 1**", 0),
        ("Response2", 1),
        ("Response 2 is better than Response 1.", 1),  # the one that is named first
        ("Response 1 is better than Response 2, which names a dog.", 0),
        (
            "Let me look at the picture. There is no dog. So Response 2 is better. Response 1 is not.",
            1,
        ),  # the first sentence that names one
        ("Response 2 is better. Both are equally long.", 1),
        ("I looked.\nresponse 1", 0),
        ("Neither Response 1 nor Response 2.", None),
        ("Response 1 and Response 2 are equal.", None),
        ("Response 1 and Response 2 are equally good", None),
        ("It is a tie between Response 1 and Response 2.", None),
        ("Response 1 or Response 2", None),  # the instruction, said back
        ("Response 1 is worse than Response 2.", 1),
        ("Response 2 is worse than Response 1.", 0),
        ("Response 2 is worse.", 0),
        ("The worse one is Response 1", 1),
        ("Response 1: the worst.", 1),
        ("Response 1 is better, Response 2 is worse.", 0),
        ("Response 2, since Response 1 is worse.", 1),  # of each what is said of it
        ("Response 2 is not as good as Response 1.", 0),
        ("Response 1 is less accurate than Response 2.", 1),
        ("Response 1 has more errors than Response 2.", 1),
        ("Response 1 is inferior to Response 2.", 1),
        ("Response 1 is wrong. Response 2 is better.", 1),
        ("Compared to Response 1, Response 2 is better.", 1),
        ("Between Response 1 and Response 2, Response 2 is clearly the better one.", 1),
        ("Response 1 avoids the worst mistakes.", 0),
        ("Response 2 is better, because neither of its claims is wrong.", 1),
        ("Response 1 is better than the worse one.", 0),
        ("Response 1 is worse. Response 2 is better.", 1),
        ("Response 1 is no worse than Response 2.", None),
        ("Response 1 is not better than Response 2.", None),
        ("Response 2 isn't any worse than Response 1.", None),
        ("", None),
        ("   ", None),
        ("The picture shows a cup.", None),
        ("1", None),
        ("Response 3", None),
        ("Response 12", None),
        ("Responses 1", None),
        ("§$%&/()=?", None),
    ],
)
def test_a_verdict_is_read_off_the_answer(answer, verdict):
    assert parse_verdict(answer) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "Neither response is better. Response 1 is longer.",
        "Both responses are equally good. Response 1 and Response 2 name the cup.",
    ],
)
def test_who_prefers_neither_prefers_none_that_is_named_later(answer):
    assert parse_verdict(answer) is None


def test_a_tie_that_somebody_wears_is_none():
    assert parse_verdict("Response 1 is better because it mentions the man's tie.") == 0


def spoken(monkeypatch, answer):
    """Let every judge answer `answer(response 1, response 2)` instead of asking its model; returns the questions it was asked."""
    asked = []

    def ask(vlm, keys, title, max_new_tokens):
        asked.extend(keys)
        return {
            key: answer(*re.search(r"^Response 1: (.*)\nResponse 2: (.*)$", key[1], re.M).groups())
            for key in keys
        }

    monkeypatch.setattr(annotators, "answer_questions", ask)
    return asked


def honest(first, second):
    return "Response 1, it is good." if first == "good" else "Response 2, it is good."


def test_verdicts_that_agree_in_both_orders_stand(monkeypatch):
    asked, judge = spoken(monkeypatch, honest), MLLMAnnotator(None)
    assert judge.compare([record(), record()], ["good", "bad"], ["bad", "good"]) == [0, 1]
    assert len(asked) == 4 and judge.counters == {
        "asked": 4,
        "not understood": 0,
        "first is better": 2,
        "changed with the order": 0,
    }


def test_a_verdict_that_changes_with_the_order_is_a_tie_and_counted(monkeypatch):
    spoken(
        monkeypatch,
        lambda first, second: (
            "Response 1" if "stubborn" in first + second else honest(first, second)
        ),
    )
    judge = MLLMAnnotator(None)
    assert judge.compare([record()] * 3, ["good", "stubborn", "stubborn 2"], ["bad"] * 3) == [
        0,
        None,
        None,
    ]
    assert judge.counters["changed with the order"] == 2 and judge.counters["not understood"] == 0


def test_an_answer_that_is_not_understood_is_a_tie_and_counted(monkeypatch):
    """In both orders, or in one alone: then it is no change of mind either."""
    spoken(
        monkeypatch,
        lambda first, second: (
            "I like both."
            if "odd" in (first, second)
            else "No idea"
            if (first, second) == ("good", "half")
            else "Response 2"
        ),
    )
    judge = MLLMAnnotator(None)
    assert judge.compare([record()] * 2, ["odd", "good"], ["bad", "half"]) == [None, None]
    assert judge.counters == {
        "asked": 4,
        "not understood": 3,
        "first is better": 0,
        "changed with the order": 0,
    }


def test_a_judge_sees_the_picture_the_last_question_and_both_responses_in_order(monkeypatch):
    asked = spoken(monkeypatch, honest)
    talk = replace(record(), turns=("Is it day?", "Yes.", "<image>\nWhat {is} there?"))
    MLLMAnnotator(None, both_orders=False).compare([talk], ["good"], ["bad"])
    ((paths, text),) = asked
    assert (
        paths == talk.paths
        and "<image>" not in text
        and "Question: What {is} there?\nResponse 1: good\nResponse 2: bad\n" in text
        and "Is it day" not in text
    )
    asked.clear()
    MLLMAnnotator(None).compare([talk], ["good"], ["bad"])
    assert [re.findall(r"^Response \d: (.*)", text, re.M) for _, text in asked] == [
        ["good", "bad"],
        ["bad", "good"],
    ]


def test_a_judge_that_always_says_the_first_is_found_out(monkeypatch):
    """Asked once its bias shows in `first`; asked in both orders it has no opinion left."""
    spoken(monkeypatch, lambda first, second: "Response 1")
    assert pair_accuracy(MLLMAnnotator(None, both_orders=False), [record()] * 3) == {
        "accuracy": 0.5,
        "ties": 0.0,
        "first": 1.0,
        "consistency": 0.0,
        "n": 3,
    }
    found = pair_accuracy(MLLMAnnotator(None), [record()] * 3)
    assert (found["accuracy"], found["ties"], found["consistency"]) == (0.5, 1.0, 1.0)


# --- a reward model ---


def test_the_higher_score_is_better_and_equal_ones_tie():
    class Lengths:
        def score(self, records, texts):
            return torch.tensor([[float(len(text)) for text in own] for own in texts])

    assert RewardAnnotator(Lengths()).compare(
        [record()] * 3, ["long", "a", "tie"], ["a", "long", "tie"]
    ) == [0, 1, None]


# --- how well an annotator ranks ---


class Says:
    """An annotator whose verdict is a function of the two texts."""

    def __init__(self, verdict):
        self.verdict = verdict

    def compare(self, records, firsts, seconds):
        return list(map(self.verdict, firsts, seconds))


@pytest.mark.parametrize(
    "verdict, accuracy, ties, consistency, first",
    [
        (lambda a, b: int(b == "good"), 1.0, 0.0, 1.0, 0.5),
        (lambda a, b: int(b == "bad"), 0.0, 0.0, 1.0, 0.5),  # the wrong way round
        (lambda a, b: 0, 0.5, 0.0, 0.0, 1.0),
        (lambda a, b: 1, 0.5, 0.0, 0.0, 0.0),
        (
            lambda a, b: None if a == "good" else 1,
            0.75,
            0.5,
            0.0,
            0.0,
        ),  # silent where the good one is shown first
    ],
)
def test_pair_accuracy_of_known_annotators(verdict, accuracy, ties, consistency, first):
    found = pair_accuracy(Says(verdict), [record()] * 5, batch_size=2)
    assert found == pytest.approx(
        {"accuracy": accuracy, "ties": ties, "consistency": consistency, "first": first, "n": 5}
    )


def test_who_never_says_anything_is_right_half_of_the_time():
    """Of its verdicts none is for the first: there are none, which is neither a share of 0 nor one of a half."""
    found = pair_accuracy(Says(lambda a, b: None), [record()] * 3)
    assert found == {"accuracy": 0.5, "ties": 1.0, "consistency": 1.0, "first": None, "n": 3}


def test_pair_accuracy_by_hand():
    """Verdicts of three records in both orders: (first, second), (first, first), (tie, second). Right: 2 + 1 + 1.5 of 6."""
    verdicts = {
        ("a", "x"): 0,
        ("x", "a"): 1,
        ("b", "x"): 0,
        ("x", "b"): 0,
        ("c", "x"): None,
        ("x", "c"): 1,
    }
    found = pair_accuracy(Says(lambda a, b: verdicts[a, b]), [record(name, "x") for name in "abc"])
    assert found == pytest.approx(
        {"accuracy": 0.75, "ties": 1 / 6, "first": 3 / 5, "consistency": 1 / 3, "n": 3}
    )


# --- the command line ---

PAIRS = [
    ("A red cup.", "A blue cup."),
    ("A lamp.", "A dog."),
    ("A dog.", "There is the dog."),
    ("A cup.", "A lamp."),
]  # right, wrong, tie, right


def pairs_file(folder, pairs=PAIRS, annotated=ANNOTATED):
    """Pairs about a.png with their annotations and an empty picture; the file's path."""
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "a.png").write_bytes(b"")
    annotate(folder, annotated)
    rows = [
        {
            "id": n,
            "image": "a.png",
            "prompt": f"<image>\nWhat is there, {n}?",
            "chosen": chosen,
            "rejected": rejected,
        }
        for n, (chosen, rejected) in enumerate(pairs)
    ]
    (folder / "pairs.json").write_text(json.dumps(rows))
    return folder / "pairs.json"


def run(monkeypatch, capsys, *words):
    """(status, standard output, standard error) of the command, in this process."""
    monkeypatch.setattr(sys, "argv", ["annotators", *map(str, words)])
    try:
        status = cli.run_script(main)
    except SystemExit as left:
        status = left.code
    return status, *capsys.readouterr()


def test_the_command_prints_the_table(tmp_path):
    """Four pairs: two told right, one wrong, one tie: (2 + 2 + 1 + 0) / 8, a quarter ties."""
    path = pairs_file(tmp_path / "one")
    words = [
        "-m",
        "minialign.annotators",
        "--annotator",
        "truth",
        "--data",
        path,
        "--model",
        TINY / "model",
    ]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "| annotator | data | accuracy | ties | consistency | first | n |",
        "|---|---|---|---|---|---|---|",
        f"| truth | {path} | 62.5 | 25.0 | 100.0 | 50.0 | 4 |",
    ]


def test_annotations_lie_beside_the_folder_of_pictures(tmp_path, monkeypatch, capsys):
    path = pairs_file(tmp_path / "one")
    (tmp_path / "alone.json").write_bytes(path.read_bytes())
    status, out, _ = run(
        monkeypatch,
        capsys,
        "--annotator",
        "truth",
        "--data",
        tmp_path / "alone.json",
        "--images",
        tmp_path / "one" / "images",
    )
    assert status == 0 and "| 62.5 |" in out


def test_each_file_of_pairs_is_judged_by_its_own_annotations(tmp_path, monkeypatch, capsys):
    """The same names of pictures in two folders, which show different things."""
    here, there = (
        pairs_file(tmp_path / "one"),
        pairs_file(tmp_path / "two", annotated={"a.png": [{"name": "lamp"}]}),
    )
    status, out, _ = run(monkeypatch, capsys, "--annotator", "truth", "--data", here, there)
    assert status == 0 and [row.split("|")[3].strip() for row in out.splitlines()[2:]] == [
        "62.5",
        "50.0",
    ]  # there: tie, right, tie, wrong


def test_a_model_is_asked_and_what_it_said_is_counted(tmp_path, monkeypatch, capsys):
    """The tiny model has never seen the question: no verdict, eight questions for four pairs in both orders."""
    path = pairs_file(tmp_path / "one")
    (tmp_path / "one" / "images" / "a.png").write_bytes(
        (TINY / "train" / "images" / "0001.png").read_bytes()
    )
    status, out, err = run(monkeypatch, capsys, "--annotator", TINY / "model", "--data", path)
    assert (
        status == 0
        and "| 50.0 | 100.0 | 100.0 | - | 4 |" in out
        and "asked: 8, not understood: 8, first is better: 0" in err
    )


@pytest.mark.parametrize(
    "annotator, named",
    [
        ("truht", "truht"),
        ("{room}", "config.json"),
        ("{room}/none", "none"),
        ("reward:{room}", "score.safetensors"),
        ("reward:", "score.safetensors"),
        ("truth", "captions.json"),
    ],
)
def test_an_annotator_that_is_none_is_one_line_and_status_2(
    tmp_path, monkeypatch, capsys, annotator, named
):
    path = pairs_file(tmp_path / "one")
    (tmp_path / "one" / "captions.json").unlink()
    status, out, err = run(
        monkeypatch,
        capsys,
        "--annotator",
        annotator.format(room=tmp_path),
        "--data",
        path,
        "--model",
        TINY / "model",
    )
    assert status == 2 and err.count("\n") == 1 and named in err and "Traceback" not in err


def test_bad_input_leaves_standard_output_empty(tmp_path, monkeypatch, capsys):
    """No table is begun: neither for a bad annotator, nor for records that are no pairs."""
    path = pairs_file(tmp_path / "one")
    assert run(monkeypatch, capsys, "--annotator", "truht", "--data", path)[:2] == (2, "")
    status, out, err = run(
        monkeypatch, capsys, "--annotator", "truth", "--data", TINY / "train" / "instruct.json"
    )
    assert (
        (status, out) == (2, "")
        and "tiny-0001" in err
        and "rejected" in err
        and err.count("\n") == 1
    )


def test_the_truth_is_that_of_one_folder():
    """Names of pictures may coincide between folders, so that one's annotations would judge the other's."""
    assert captions_file_of(SimpleNamespace(images=None, data=["a/x.json", "a/y.json"])) == Path(
        "a/captions.json"
    )
    assert captions_file_of(
        SimpleNamespace(images="c/images", data=["a/x.json", "b/y.json"])
    ) == Path("c/captions.json")
    with pytest.raises(InputError, match="several folders"):
        captions_file_of(SimpleNamespace(images=None, data=["a/x.json", "b/y.json"]))
