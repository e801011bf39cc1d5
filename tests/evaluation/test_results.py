"""The results: the scores of a whole evaluation set, and their table."""

import pytest
from evaluation_helpers import write_evaluation_set

from minialign.evaluation import results
from minialign.evaluation.evaluation_sets import read_folder, read_set
from minialign.evaluation.results import check_set, evaluate_set, results_table, results_text
from minialign.utils.files import InputError


def test_scores_of_a_set_with_given_answers(vlm, tmp_path, records, monkeypatch):
    """With answers that are known, the scores are those worked by hand."""
    evaluation_set = read_folder(write_evaluation_set(tmp_path, records))
    known_answers = {
        "What can be seen?": "A red cup and a dog.",
        "Is there a cup?": "Yes.",
        "Is there a dog in the picture?": "No.",
    }

    def give_known_answers(vlm, questions, title, **options):
        return {(paths, question): known_answers[question] for paths, question in questions}

    monkeypatch.setattr(results, "answer_questions", give_known_answers)

    scores, _ = evaluate_set(vlm, evaluation_set)

    assert scores["chair_i"] == 0.5
    assert scores["recall"] == 1.0
    assert scores["colour"] == 1.0
    assert scores["words"] == 6.0
    expected_pope = {
        "accuracy": 2 / 3,
        "precision": 0.5,
        "recall": 1.0,
        "f1": 2 / 3,
        "yes": 2 / 3,
        "n": 3,
        "unparsed": 0,
    }
    assert scores["pope"] == {"random": pytest.approx(expected_pope)}


@pytest.mark.parametrize("odd", ["USER: Why?", "Why? " * 600])
def test_a_question_that_cannot_be_asked_is_named(vlm, tmp_path, records, odd):
    """With several sets it would be asked after those of the first ones."""
    evaluation_set = read_folder(write_evaluation_set(tmp_path, records))
    check_set(vlm, evaluation_set)

    evaluation_set.pope["random"][1]["text"] = odd
    with pytest.raises(InputError, match=f"{tmp_path}/pope_random.jsonl, record 2: the question"):
        check_set(vlm, evaluation_set)

    evaluation_set.captions[0]["prompt"] = odd
    with pytest.raises(InputError, match="captions.json, record 1: the question"):
        check_set(vlm, evaluation_set)


def test_a_file_of_questions_is_named_wherever_it_lies(vlm, tmp_path, records):
    """As with --pope FILE. Its folder is not that of the images."""
    folder = write_evaluation_set(tmp_path, records)
    (tmp_path / "questions").mkdir()
    path = (folder / "pope_random.jsonl").rename(tmp_path / "questions" / "coco_pope_odd.json")
    evaluation_set = read_set(None, [str(path)], folder / "images")
    evaluation_set.pope["odd"][2]["text"] = "USER: Why?"

    with pytest.raises(InputError, match=f"^{path}, record 3: the question"):
        check_set(vlm, evaluation_set)


def test_the_table_of_results():
    """Shares are in percent, words are not, POPE is accuracy (yes). Not measured means empty."""
    scores = {
        "chair_i": 0.1234,
        "chair_s": 0.5,
        "recall": 1.0,
        "colour": 0.0,
        "words": 12.34,
        "repeats": 0.005,
        "pope": {"random": {"accuracy": 0.875, "yes": 0.5}},
    }
    results = {
        "base": {"typical": scores, "other": {"pope": {}}},
        "aligned": {"typical": scores | {"chair_i": 0.1}},
    }

    lines = results_table(results).split("\n")

    assert lines[0] == (
        "| set | model | CHAIR_i | CHAIR_s | recall | colour | words | repeats "
        "| POPE random (yes) | popular (yes) | adversarial (yes) |"
    )
    assert lines[2:] == [
        "| typical | base | 12.3 | 50.0 | 100.0 | 0.0 | 12.3 | 0.5 | 87.5 (50) |  |  |",
        "| typical | aligned | 10.0 | 50.0 | 100.0 | 0.0 | 12.3 | 0.5 | 87.5 (50) |  |  |",
        "| other | base |  |  |  |  |  |  |  |  |  |",
    ]
    assert {line.count("|") for line in lines} == {12}


def test_unparsed_answers_are_counted(vlm, tmp_path, records, monkeypatch):
    """The same answers, without a clear one about the dog: it counts as yes."""
    evaluation_set = read_folder(write_evaluation_set(tmp_path, records))

    def give_no_clear_answer(vlm, questions, title, **options):
        return {(paths, question): "Nothing." for paths, question in questions}

    monkeypatch.setattr(results, "answer_questions", give_no_clear_answer)

    scores, _ = evaluate_set(vlm, evaluation_set)

    assert scores["pope"]["random"]["unparsed"] == 3
    assert scores["pope"]["random"]["yes"] == 1.0
    assert scores["chair_i"] is None
    row = results_table({"base": {"set": scores}}).split("\n")[-1]
    assert row == "| set | base | - | 0.0 | 0.0 | - | 1.0 | - | 33.3 (100, 3 unparsed) |  |  |"


@pytest.mark.parametrize(
    "answer, yes",
    [("No\n", 0.0), ("\nNo", 0.0), (" \t no \n", 0.0), ("\n\nYes\n", 1.0), ("No\nA dog", 1.0)],
)
def test_white_space_around_an_answer_does_not_count(
    vlm, tmp_path, records, monkeypatch, answer, yes
):
    """By POPE's rule "No" and a line break would be a yes."""
    evaluation_set = read_folder(write_evaluation_set(tmp_path, records))

    def give_answer(vlm, questions, title, **options):
        return {(paths, question): answer for paths, question in questions}

    monkeypatch.setattr(results, "answer_questions", give_answer)

    scores, _ = evaluate_set(vlm, evaluation_set)

    assert scores["pope"]["random"]["yes"] == yes


def test_every_split_has_a_column():
    """Other splits stand behind the published ones, and a bar in a name does not end the cell."""
    pope = {"random": {"accuracy": 0.5, "yes": 0.5}, "odd|one": {"accuracy": 1.0, "yes": 0.25}}
    results = {"base": {"a": {"pope": {}}, "b": {"pope": pope}}}

    lines = results_table(results).split("\n")

    assert lines[0].endswith("| popular (yes) | adversarial (yes) | odd\\|one (yes) |")
    assert lines[2].endswith("|  |  |  |  |")
    assert lines[3].endswith("| 50.0 (50) |  |  | 100.0 (25) |")


def test_a_share_of_nothing_is_a_dash():
    scores = {"chair_i": None, "chair_s": 0.0, "recall": None, "words": 0.0, "pope": {}}

    row = results_table({"base": {"set": scores}}).split("\n")[-1]

    assert row == "| set | base | - | 0.0 | - |  | 0.0 |  |  |  |  |"


def test_the_table_for_the_terminal_is_aligned_and_fits_100_columns():
    """POPE stands below the other scores, and what was not measured is left out."""
    pope = {"accuracy": 0.838, "yes": 0.51, "unparsed": 14}
    scores = {"chair_i": 0.258, "words": 27.8, "pope": dict.fromkeys(("random", "popular"), pope)}
    results = {"base": {"balanced": scores}, "aligned": {"balanced": scores | {"chair_i": None}}}

    lines = results_text(results).splitlines()

    assert lines == [
        "set       model    CHAIR_i  words",
        "balanced  base        25.8   27.8",
        "balanced  aligned        -   27.8",
        "",
        "set       model    POPE random (yes)       POPE popular (yes)",
        "balanced  base     83.8 (51, 14 unparsed)  83.8 (51, 14 unparsed)",
        "balanced  aligned  83.8 (51, 14 unparsed)  83.8 (51, 14 unparsed)",
    ]
