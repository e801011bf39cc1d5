"""Answers that an evaluation keeps: their mentions and scores, and files of another form."""

import json

import pytest
from evaluation_helpers import write_evaluation_set, write_jsonl

from minialign.evaluation.evaluation_sets import read_folder
from minialign.evaluation.kept_answers import (
    KeptAnswers,
    read_answers_at,
    read_answers_of_run,
    read_captions,
)
from minialign.evaluation.results import SetAnswers, score_set
from minialign.utils.files import InputError

FIRST_CAPTION = "A red cup and a Puppy\u2019s be\u0301d, a blue cup."
ANSWERS = {
    "base": SetAnswers([FIRST_CAPTION, "Nothing."], {"random": ["Yes.", "Nothing.", "No"]}),
    "aligned": SetAnswers(["", "2 teddy-bears, cups"], {"random": ["No", "No", "no dog"]}),
}


@pytest.fixture()
def evaluation_sets(tmp_path, records):
    """Return {name: EvaluationSet} of one small set: two images and three questions."""
    (tmp_path / "small").mkdir()
    return {"small": read_folder(write_evaluation_set(tmp_path / "small", records))}


@pytest.fixture()
def kept(evaluation_sets):
    """Return the ANSWERS of two models to the small set."""
    kept = KeptAnswers.of_sets(evaluation_sets)
    for model_name, answers in ANSWERS.items():
        kept.add(model_name, "small", evaluation_sets["small"], answers)
    return kept


def test_kept_answers_give_the_scores_of_the_table(tmp_path, evaluation_sets, kept):
    """Scores from the files are those of `score_set`, number for number."""
    expected = {}
    for model_name, answers in ANSWERS.items():
        scores, _ = score_set(evaluation_sets["small"], answers)
        expected[model_name] = {"small": scores}

    kept.write(tmp_path)

    assert read_answers_at(tmp_path).scores() == expected
    assert expected["base"]["small"]["chair_i"] == 1 / 3
    assert expected["base"]["small"]["colour"] == 1 / 2
    assert expected["base"]["small"]["pope"]["random"]["unparsed"] == 1


def test_a_line_of_a_caption_shows_its_mentions(kept):
    """Each mention is the text between its start and end, whatever letters stand before it."""
    line = kept.captions[0]

    assert line["set"] == "small"
    assert line["prompt"] == "What can be seen?"
    assert line["objects"] == ["cup"]
    answer = line["answers"]["base"]
    assert answer["mentions"] == [
        {
            "start": 6,
            "end": 9,
            "object": "cup",
            "present": True,
            "colour": "red",
            "right_colour": True,
        },
        {"start": 16, "end": 21, "object": "dog", "present": False},
        {
            "start": 37,
            "end": 40,
            "object": "cup",
            "present": True,
            "colour": "blue",
            "right_colour": False,
        },
    ]
    texts = [FIRST_CAPTION[item["start"] : item["end"]] for item in answer["mentions"]]
    assert texts == ["cup", "Puppy", "cup"]
    assert answer["missed"] == []
    assert line["answers"]["aligned"] == {"text": "", "mentions": [], "missed": ["cup"]}


def test_a_line_of_a_question_shows_truth_and_answers(kept, evaluation_sets):
    line = kept.questions[1]

    assert line == {
        "set": "small",
        "split": "random",
        "folder": str(evaluation_sets["small"].images),
        "image": line["image"],
        "question": "Is there a dog in the picture?",
        "truth": "no",
        "answers": {"base": "Nothing.", "aligned": "No"},
    }


def test_a_file_may_hold_captions_and_questions(tmp_path, kept):
    path = tmp_path / "all.jsonl"
    write_jsonl(path, [*kept.captions, *kept.questions])

    assert read_answers_at(path).scores() == kept.scores()


def test_a_run_finds_what_it_has_kept(tmp_path, evaluation_sets, kept):
    """A missing file has no answers, and one of other sets is refused."""
    kept.write(tmp_path)

    found = read_answers_of_run(tmp_path, evaluation_sets)
    assert found.captions == kept.captions
    assert found.has("base")
    assert not found.has("control")

    (tmp_path / "captions.jsonl").unlink()
    assert not read_answers_of_run(tmp_path, evaluation_sets).has("base")

    write_jsonl(tmp_path / "answers.jsonl", kept.questions[1:])
    with pytest.raises(InputError, match="answers.jsonl: not the answers of this run; remove it"):
        read_answers_of_run(tmp_path, evaluation_sets)


def change(line, path, value):
    """Set the value at a path of keys in a line, or remove the last key if the value is None."""
    *keys, last = path
    for key in keys:
        line = line[key]
    if value is None:
        del line[last]
    else:
        line[last] = value


MENTION = ("answers", "base", "mentions", 1)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (["set"], 3, "not of the form"),
        (["objects"], ["cup", "cup"], "listed twice"),
        (["objects"], "cup", "not of the form"),
        (["answers"], [], "not of the form"),
        (["answers"], {}, "has answers of no model, but"),
        (["answers", "base"], None, "has answers of aligned, but"),
        (["answers", "base"], "A cup.", "the caption of 'base': has no"),
        (["answers", "base", "mentions"], None, "has no"),
        ([*MENTION, "start"], 7, "not behind the one before it"),
        ([*MENTION, "end"], 2000, "not in the text"),
        ([*MENTION, "end"], 20.5, "not of the form"),
        ([*MENTION, "present"], 1, "not of the form"),
        ([*MENTION, "present"], True, "contradicts the list of objects"),
        ([*MENTION, "object"], None, "not of the form"),
    ],
)
def test_a_line_of_another_form_is_refused(tmp_path, kept, path, value, message):
    """One line names the file, the record and what to do. Here it is the second record."""
    lines = [json.loads(json.dumps(kept.captions[0])) for _ in range(2)]
    change(lines[1], path, value)
    write_jsonl(tmp_path / "captions.jsonl", lines)

    with pytest.raises(InputError, match=message) as error:
        read_captions(tmp_path / "captions.jsonl")

    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'captions.jsonl'}, record 2")
    assert text.endswith("; restore it, or measure again")
    assert "\n" not in text


@pytest.mark.parametrize(
    "path, value", [(["truth"], "maybe"), (["answers", "base"], 3), (["split"], None)]
)
def test_a_question_of_another_form_is_refused(tmp_path, kept, path, value):
    change(kept.questions[0], path, value)
    write_jsonl(tmp_path / "answers.jsonl", kept.questions)

    with pytest.raises(InputError, match="record 1: not of the form"):
        read_answers_at(tmp_path)


def test_a_folder_without_answers_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds neither captions.jsonl nor answers.jsonl"):
        read_answers_at(tmp_path)
