"""Hallucination measured: POPE's and CHAIR's figures worked by hand, and greedy answers that sharing a picture does not change."""

import json
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, TINY

from minialign import evaluate, reference
from minialign.data.chat_templates import encode_prompt
from minialign.evaluation import report
from minialign.evaluation.answers import answer_questions
from minialign.evaluation.chair import Vocabulary, caption_counts, chair_scores
from minialign.evaluation.evaluation_sets import read_folder, read_set
from minialign.evaluation.pope import pope_scores, says_yes
from minialign.evaluation.report import evaluate_set, results_table
from minialign.utils import cli
from minialign.utils.files import InputError

RAW = {
    "objects": {
        "cup": ["cup", "cups"],
        "bear": ["bear", "bears"],
        "teddy": ["teddy bear", "teddy bears", "soft toy"],
        "dog": ["dog", "puppy"],
    },
    "colours": ["red", "blue"],
}
WORDS = Vocabulary(RAW, "here")


def caption_scores(captions, annotations, vocabulary):
    """The rates of whole captions."""
    return chair_scores(
        [
            caption_counts(caption, objects, vocabulary)
            for caption, objects in zip(captions, annotations)
        ]
    )


@pytest.mark.parametrize(
    "answer, yes",
    [
        ("Yes.", True),
        ("No.", False),
        ("no", False),
        ("There is not a dog.", False),
        ("No, there is none.", False),
        ("Yes. But no cat.", True),  # only what stands before the first full stop counts
        ("NO.", True),
        ("Nothing.", True),
        ("None", True),
        ("", True),  # exactly "No", "not", "no": the published rule, also where it is odd
        ("There isn't.", True),
        ("Oh,no dog", True),
        ("I say,no, to it", True),
        ("There is no, really", False),  # commas go, words are split at spaces
    ],
)
def test_popes_reading_of_an_answer(answer, yes):
    assert says_yes(answer) is yes


def test_pope_scores_by_hand():
    """Said yes to 3 of 5, 2 of them rightly, of 4 that are: precision 2/3, recall 1/2, F1 4/7, accuracy 2/5."""
    scores = pope_scores([True, True, True, False, False], [True, True, False, True, True])
    assert scores == pytest.approx(
        {"accuracy": 0.4, "precision": 2 / 3, "recall": 0.5, "f1": 4 / 7, "yes": 0.6, "n": 5}
    )


def test_pope_scores_where_nobody_said_yes_or_nothing_is_there():
    assert pope_scores([False, False], [True, False]) == {
        "accuracy": 0.5,
        "precision": 0.0,
        "recall": 0.0,
        "f1": 0.0,
        "yes": 0.0,
        "n": 2,
    }
    assert pope_scores([True], [False])["f1"] == 0.0


@pytest.mark.parametrize(
    "caption, mentions",
    [
        ("A red cup and a Puppy.", [("cup", "red"), ("dog", None)]),
        (
            "A blue teddy bear, two bears.",
            [("teddy", "blue"), ("bear", None)],
        ),  # the longest name counts, its words are not counted again
        ("A soft toy beside a bear-dog.", [("teddy", None)]),  # a hyphen makes another word
        ("red and blue cups; dog", [("cup", "blue"), ("dog", None)]),
        ("Teddy. Bear.", [("teddy", None)]),  # known weakness: punctuation does not part a name
        (
            "a red shiny cup, a red teddy bear",
            [("cup", None), ("teddy", "red")],
        ),  # a colour stands just before the name
        (
            "No dog, and not a cup.",
            [("dog", None), ("cup", None)],
        ),  # CHAIR counts what is mentioned, as published, whatever is said of it
        ("A hotdog, a cupboard.", []),
        ("", []),
    ],
)
def test_mentions(caption, mentions):
    assert WORDS.mentions(caption) == mentions


def test_caption_scores_by_hand():
    """Three captions. Mentions: cup, dog, cup | bear, teddy | none. Absent: dog (1) | bear (2). Annotated: cup, teddy | teddy, dog | cup."""
    captions = [
        "A red cup, a dog and a blue cup.",
        "A bear. A blue teddy bear.",
        "Nothing at all here.",
    ]
    annotations = [
        [{"name": "cup", "colour": "red"}, {"name": "teddy"}],
        [
            {"name": "teddy", "colour": "red"},
            {"name": "teddy", "colour": "blue"},
            {"name": "dog", "colour": "red"},
        ],
        [{"name": "cup", "colour": "blue"}],
    ]
    scores = caption_scores(captions, annotations, WORDS)
    assert scores == pytest.approx(
        {
            "chair_i": 2 / 5,
            "chair_s": 2 / 3,
            "recall": 2 / 5,  # cup; teddy; of cup + teddy, teddy + dog, cup
            "colour": 2 / 3,  # red cup right, blue cup wrong, blue teddy right (one of the two is)
            "words": (9 + 6 + 4) / 3,
            "repeats": 1 / 5,
        }
    )  # the second cup


def test_colours_of_absent_or_uncoloured_objects_do_not_count():
    scores = caption_scores(["A red dog and a blue cup."], [[{"name": "cup"}]], WORDS)
    assert scores["colour"] == 0.0 and scores["chair_i"] == 0.5


def test_a_silent_model_scores_zero_everywhere():
    """CHAIR is 0 for who says nothing: never to be read without recall, which is 0 too."""
    assert caption_scores([""], [[{"name": "cup"}]], WORDS) == {
        "chair_i": 0.0,
        "chair_s": 0.0,
        "recall": 0.0,
        "colour": 0.0,
        "words": 0.0,
        "repeats": 0.0,
    }


def test_the_table():
    """Shares in per cent, words as they are, POPE as accuracy (yes-ratio); what was not measured stays empty; arms side by side."""
    pope = {"random": {"accuracy": 0.875, "yes": 0.5}}
    full = {
        "chair_i": 0.1234,
        "chair_s": 0.5,
        "recall": 1.0,
        "colour": 0.0,
        "words": 12.34,
        "repeats": 0.005,
        "pope": pope,
    }
    lines = results_table(
        {
            "base": {"typical": full, "other": {"pope": {}}},
            "aligned": {"typical": {**full, "chair_i": 0.1}},
        }
    ).split("\n")
    assert (
        lines[0]
        == "| set | model | CHAIR_i | CHAIR_s | recall | colour | words | repeats | POPE random (yes) | popular (yes) | adversarial (yes) |"
    )
    assert lines[2:] == [
        "| typical | base | 12.3 | 50.0 | 100.0 | 0.0 | 12.3 | 0.5 | 87.5 (50) |  |  |",
        "| typical | aligned | 10.0 | 50.0 | 100.0 | 0.0 | 12.3 | 0.5 | 87.5 (50) |  |  |",
        "| other | base |  |  |  |  |  |  |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {12}


@pytest.fixture()
def folder(tmp_path, records):
    """A small evaluation set in the shipped layout: two pictures, two captions, three POPE questions in one split."""
    (tmp_path / "images").mkdir()
    for record in records[:2]:
        shutil.copy(record.paths[0], tmp_path / "images" / record.image)
    here, there = (record.image for record in records[:2])
    rows = [
        {
            "image": image,
            "prompt": "What can be seen?",
            "objects": [{"name": "cup", "colour": "red"}],
        }
        for image in (here, there)
    ]
    (tmp_path / "captions.json").write_text(json.dumps({"vocabulary": RAW, "captions": rows}))
    pope = [
        {"question_id": n, "image": image, "text": text, "label": label}
        for n, (image, text, label) in enumerate(
            [
                (here, "Is there a cup?", "yes"),
                (here, "Is there a dog in the picture?", "no"),
                (there, "Is there a cup?", "no"),
            ]
        )
    ]
    (tmp_path / "pope_random.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pope))
    return tmp_path


def test_answers_are_those_of_each_question_asked_alone(vlm, folder):
    """Questions about one picture share its row, and repeat within a set: every answer equals plain's, greedy, whole sequence anew."""
    held = read_folder(folder)
    questions = [
        ((str(folder / "images" / row["image"]),), row[key])
        for key, rows in (("prompt", held.captions), ("text", held.pope["random"]))
        for row in rows
    ]
    found = answer_questions(
        vlm, [*questions, questions[0]], "test", max_new_tokens=64, max_image_tokens=1
    )
    assert set(found) == set(questions)
    for paths, question in questions[1:4]:
        prompt = encode_prompt(vlm.tokenizer, vlm.template, [f"<image>\n{question}"])
        slow = reference.generate(
            vlm.model, prompt, vlm.encode_images(paths), [], None, {vlm.tokenizer.eos}
        )
        assert found[paths, question] == vlm.tokenizer.decode(
            [id for id in slow if id != vlm.tokenizer.eos], strip_prefix=" "
        )
    assert answer_questions(vlm, questions, "test", max_new_tokens=64) == found


def test_questions_without_a_picture_and_about_two(vlm, records):
    """Asked together, each answer is plain's to that question alone."""
    (one,), (other,) = (record.paths for record in records[:2])
    questions = [
        ((), "Is there a cup?"),
        ((), "Which things are there, in a street?"),
        ((one, other), "Is there a cup?"),
    ]
    found = answer_questions(vlm, questions, "test", max_new_tokens=8)
    for paths, question in questions:
        prompt = encode_prompt(vlm.tokenizer, vlm.template, ["<image>\n" * len(paths) + question])
        slow = reference.generate(
            vlm.model, prompt, vlm.encode_images(paths), [], None, {vlm.tokenizer.eos}
        )[:8]
        assert found[paths, question] == vlm.tokenizer.decode(
            [id for id in slow if id != vlm.tokenizer.eos], strip_prefix=" "
        )
    assert len({found[key] for key in questions}) > 1


def test_a_set_is_scored_whole(vlm, folder, monkeypatch):
    """What is asked and what is expected come together: with answers put in its mouth, the scores are those by hand."""
    said = {
        "What can be seen?": "A red cup and a dog.",
        "Is there a cup?": "Yes.",
        "Is there a dog in the picture?": "No.",
    }
    monkeypatch.setattr(
        "minialign.evaluation.report.answer_questions",
        lambda vlm, questions, *_, **__: {key: said[key[1]] for key in questions},
    )
    scores = evaluate_set(vlm, read_folder(folder))[0]
    assert (scores["chair_i"], scores["recall"], scores["colour"], scores["words"]) == (
        0.5,
        1.0,
        1.0,
        6.0,
    )
    assert scores["pope"] == {
        "random": pytest.approx(
            {"accuracy": 2 / 3, "precision": 0.5, "recall": 1.0, "f1": 2 / 3, "yes": 2 / 3, "n": 3}
        )
    }


@pytest.mark.parametrize("name", ["typical", "shifted", "balanced"])
def test_the_shipped_sets_are_read_and_their_names_are_known(name):
    """All three splits, every annotated object in the vocabulary (else recall could never reach 1), every picture there."""
    for part in ("tune", "final"):
        held = read_folder(TINY / part / name)
        known = set(held.vocabulary.names.values())
        assert set(held.pope) == {"random", "popular", "adversarial"} and len(held.captions) >= 200
        assert all(
            thing["name"] in known and thing["colour"] in held.vocabulary.colors
            for row in held.captions
            for thing in row["objects"]
        )
        assert all((held.images / row["image"]).is_file() for row in held.captions)


def test_bad_evaluation_sets_are_named(folder, tmp_path):
    """One line that names the file and, where there is one, the record."""
    (tmp_path / "empty").mkdir()
    cases = [
        (dict(folder=tmp_path / "empty"), "neither"),
        (dict(folder=tmp_path / "none"), "neither"),
    ]
    for name, text, told in (
        ("list.json", "[]", "captions"),
        ("vocabulary.json", '{"captions": []}', "vocabulary"),
        ("half.json", '{"capt', "complete"),
    ):
        (tmp_path / name).write_text(text)
        cases.append((dict(captions_file=tmp_path / name, images=tmp_path), told))
    for name, text, told in (
        ("label.jsonl", '{"image": "a", "text": "b", "label": "maybe"}', "record 1"),
        ("text.jsonl", '{"image": "a", "label": "yes"}', "record 1"),
    ):
        (tmp_path / name).write_text(text)
        cases.append((dict(pope_files=[tmp_path / name], images=tmp_path), told))
    for arguments, told in cases:
        with pytest.raises(InputError, match=told) as error:
            read_folder(**arguments) if "folder" in arguments else read_set(
                **{"captions_file": None, "pope_files": ()} | arguments
            )
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "name, text",
    [
        ("pope_random.jsonl", "3\n"),
        ("pope_random.jsonl", ""),
        ("captions.json", json.dumps({"vocabulary": RAW, "captions": [{"image": "a.png"}]})),
        ("captions.json", json.dumps({"vocabulary": {"objects": {}}, "captions": []})),
    ],
)
def test_records_that_are_none_are_refused(folder, name, text):
    (folder / name).write_text(text)
    with pytest.raises(InputError):
        read_folder(folder)


@pytest.mark.parametrize(
    "vocabulary",
    [
        3,
        {},
        {"objects": ["cup"]},
        *({"objects": {"cup": synonyms}} for synonyms in ("cup", 3, None, [], [3], [""])),
        *(RAW | {"colours": colours} for colours in (3, None, "red", [3], [["red"]])),
    ],
)
def test_a_vocabulary_of_another_shape_is_refused(folder, vocabulary):
    """A synonym that is a text and no list would be read letter by letter, an empty one found nowhere."""
    path = folder / "captions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocabulary": vocabulary}))
    with pytest.raises(InputError, match='captions.json: no "vocabulary".*synonyms.*colours'):
        read_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": 3},
        {"prompt": None},
        {"prompt": ["What?"]},
        {"image": 3},
        {"image": []},
        {"objects": {"name": "cup"}},
        {"objects": [["cup"]]},
        *(
            {"objects": [{"name": "cup", key: value}]}
            for key in ("colour", "place")
            for value in (3, [], {})
        ),
    ],
)
def test_a_caption_of_another_shape_is_named(folder, changes):
    path = folder / "captions.json"
    raw = json.loads(path.read_text())
    raw["captions"][1] |= changes
    path.write_text(json.dumps(raw))
    with pytest.raises(
        InputError, match='captions.json, record 2: .*"prompt": text.*fix or remove'
    ):
        read_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [{"text": 3}, {"text": None}, {"text": []}, {"label": []}, {"label": {}}, {"image": 3}],
)
def test_a_question_of_another_shape_is_named(folder, changes):
    path = folder / "pope_random.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[1] |= changes
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError, match='pope_random.jsonl, record 2: .*"text": text.*fix or remove'
    ):
        read_folder(folder)


def test_a_picture_that_is_cut_short_is_found_before_any_question(folder, monkeypatch, capfd):
    last = json.loads((folder / "captions.json").read_text())["captions"][1]["image"]
    (folder / "images" / last).write_bytes((folder / "images" / last).read_bytes()[:-300])
    monkeypatch.setattr(evaluate, "evaluate_set", lambda *_, **__: pytest.fail("it was asked"))
    monkeypatch.setattr(
        sys,
        "argv",
        list(
            map(
                str,
                [
                    "evaluate.py",
                    "--model",
                    TINY / "model",
                    "--captions",
                    folder / "captions.json",
                    "--images",
                    folder / "images",
                ],
            )
        ),
    )
    assert cli.run_script(evaluate.main) == 2
    assert last in capfd.readouterr().err


def test_a_missing_picture_is_found_before_any_work(folder):
    next((folder / "images").iterdir()).unlink()
    with pytest.raises(InputError):
        read_folder(folder)


def test_the_command_line(folder, tmp_path):
    """The JSON on standard output, the table on standard error; --dtype is understood; --out writes the same JSON."""
    words = [
        sys.executable,
        "-m",
        "minialign.evaluate",
        "--model",
        TINY / "model",
        "--captions",
        folder / "captions.json",
        "--pope",
        folder / "pope_random.jsonl",
        "--images",
        folder / "images",
        "--dtype",
        "bfloat16",
    ]
    done = subprocess.run(list(map(str, words)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    scores = json.loads(done.stdout)
    assert (
        set(scores) == {"chair_i", "chair_s", "recall", "colour", "words", "repeats", "pope"}
        and scores["pope"]["random"]["n"] == 3
    )
    assert "| CHAIR_i |" in done.stderr


def test_contrast_on_the_command_line_changes_the_captions(tmp_path, vlm, monkeypatch, capfd):
    """Four pictures, three of whose captions depend on it: what is asked with --contrast is answered as `ask` answers with that contrast, not as without."""
    own, raw = (
        TINY / "final" / "balanced",
        json.loads((TINY / "final" / "balanced" / "captions.json").read_text()),
    )
    (tmp_path / "captions.json").write_text(json.dumps(raw | {"captions": raw["captions"][4:8]}))
    words, heard, real = (
        [
            "evaluate.py",
            "--model",
            TINY / "model",
            "--captions",
            tmp_path / "captions.json",
            "--images",
            own / "images",
        ],
        [],
        answer_questions,
    )
    monkeypatch.setattr(
        report,
        "answer_questions",
        lambda *given, **named: heard.append(real(*given, **named)) or heard[-1],
    )
    for more in ((), ("--contrast", "0.5"), ("--contrast", "0")):
        monkeypatch.setattr(sys, "argv", list(map(str, (*words, *more))))
        assert cli.run_script(evaluate.main) == 0
        assert 0 < json.loads(capfd.readouterr().out)["recall"] <= 1
    without, contrasted, zero = heard
    assert (
        len(without) == 4 and all(contrasted.values()) and contrasted != without and zero == without
    )
    half, whole = (real(vlm, list(contrasted), "test", contrast=a) for a in (0.5, 1.0))
    assert contrasted == half != whole


@pytest.mark.parametrize("value", ["-1", "inf", "much"])
def test_a_contrast_that_is_none_is_one_line_and_status_2(folder, monkeypatch, capfd, value):
    monkeypatch.setattr(
        sys,
        "argv",
        list(
            map(
                str,
                [
                    "evaluate.py",
                    "--model",
                    TINY / "model",
                    "--captions",
                    folder / "captions.json",
                    "--images",
                    folder / "images",
                    "--contrast",
                    value,
                ],
            )
        ),
    )
    with pytest.raises(SystemExit) as left:
        cli.run_script(evaluate.main)
    out, err = capfd.readouterr()
    assert (
        left.value.code == 2
        and out == ""
        and len(err.splitlines()) == 1
        and "--contrast" in err
        and value in err
    )


def test_colours_are_compared_whatever_their_case():
    vocabulary = Vocabulary({"objects": {"cup": ["Cup"]}, "colours": ["Brown", "red"]}, "here")
    counts = [
        caption_counts("A brown cup.", [{"name": "cup", "colour": colour}], vocabulary)
        for colour in ("BROWN", "red", None)
    ]
    assert [chair_scores([one])["colour"] for one in counts[:2]] == [1.0, 0.0]
    assert caption_counts("A brown cup.", [{"name": "cup"}], vocabulary) == counts[2]


def test_pope_files_are_told_apart_by_what_stands_after_pope(tmp_path):
    """As POPE names its own; two of one split are refused rather than one of them dropped."""
    line = (TINY / "tune" / "balanced" / "pope_random.jsonl").read_text().split("\n")[0] + "\n"
    files = [
        tmp_path / "coco_pope_random.json",
        tmp_path / "coco_pope_popular.json",
        tmp_path / "pope_random.jsonl",
    ]
    for file in files:
        file.write_text(line)
    assert set(read_set(None, files[:2], TINY / "tune" / "balanced" / "images").pope) == {
        "random",
        "popular",
    }
    with pytest.raises(InputError, match="two files of one split"):
        read_set(None, files, TINY / "tune" / "balanced" / "images")
