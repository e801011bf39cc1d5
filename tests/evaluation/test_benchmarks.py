"""Several benchmarks in one command: asked, resumed, scored, and shown beside the paper's numbers.

The benchmark of these tests is a miniature one, of the images of the tiny world.
"""

import argparse
import json
import shutil
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import TINY

from minialign import evaluate
from minialign.evaluation import benchmark_answers, benchmarks
from minialign.evaluation.answers import answer_questions
from minialign.evaluation.benchmark_answers import check_same_settings
from minialign.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    benchmark_table,
    model_settings,
)
from minialign.evaluation.questions import Question, find_image
from minialign.models.loading import VLM
from minialign.utils.cli import run_script
from minialign.utils.files import InputError, check, read_jsonl, write_jsonl

IMAGES = TINY / "final" / "balanced" / "images"
SUFFIX = "\nAnswer briefly."


def read_mini(path, image_folder):
    """Read the miniature benchmark."""
    questions = []
    for i, record in enumerate(read_jsonl(path), start=1):
        image = find_image(image_folder, record["image"], f"{path}, record {i}")
        questions.append(Question(record["question_id"], image, record["text"] + SUFFIX, record))
    return questions


def score_mini(questions, answers):
    """Return the share of answers that are not empty."""
    return {"filled": sum(answer != "" for answer in answers) / len(questions)}


def submit_mini(questions, answers):
    """Return what a scorer reads, which needs the label of each question."""
    for question in questions:
        check("label" in question.record, f"question {question.id!r}: has no label")
    return answers


@pytest.fixture()
def mini(monkeypatch, tmp_path):
    """Make "mini" a benchmark, and return its file: six questions about three images in turn."""
    benchmark = Benchmark(
        column="Mini",
        paper=64.25,
        read=read_mini,
        max_new_tokens=4,
        prompt=SUFFIX,
        score=score_mini,
        result="filled",
        submission=submit_mini,
    )
    monkeypatch.setitem(BENCHMARKS, "mini", benchmark)
    monkeypatch.setattr(benchmark_answers, "IMAGES_PER_GROUP", 2)
    path = tmp_path / "mini.jsonl"
    lines = []
    for i in range(6):
        record = {
            "question_id": f"q{i}",
            "image": f"000{i % 3 + 1}.png",
            "text": f"What is {i}?",
            "label": "red",
        }
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture()
def run_command(monkeypatch):
    """Return a function that runs the command in this process and returns its exit status."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        return run_script(evaluate.main)

    return run


@pytest.fixture()
def ask(run_command, mini, tmp_path):
    """Return a function that asks the tiny model and writes to the folder OUT of the test."""
    words = ["--model", TINY / "model", "--benchmark", f"mini={mini}", "--images", IMAGES]
    return partial(run_command, *words, "--out", tmp_path / "out")


def table_row(text, model_name):
    """Return the cells of the row of a model in a printed table."""
    (line,) = [line for line in text.splitlines() if line.startswith(model_name)]
    return line.removeprefix(model_name).split()


def test_answers_are_kept_in_the_order_of_the_questions(ask, vlm, tmp_path, capfd):
    assert ask() == 0

    records = read_jsonl(tmp_path / "out" / "mini.answers.jsonl")
    assert [record["question_id"] for record in records] == ["q0", "q1", "q2", "q3", "q4", "q5"]
    assert records[4]["prompt"] == "What is 4?" + SUFFIX
    question = ((str(IMAGES / "0002.png"),), "What is 4?" + SUFFIX)
    answer = answer_questions(vlm, [question], "test", max_new_tokens=4)[question]
    assert records[4]["text"] == answer.strip()
    assert json.loads((tmp_path / "out" / "scores.json").read_text()) == {"mini": {"filled": 1.0}}
    out, err = capfd.readouterr()
    assert out == ""
    assert "mini: 6 questions, greedy, up to 4 new tokens" in err
    assert table_row(err, "this model") == ["100.00"]
    assert "64.25" in table_row(err, benchmarks.BASE_MODEL)


@pytest.mark.parametrize("cut", [0, 30])
def test_a_killed_run_asks_only_the_rest_and_gives_the_same_file(
    ask, tmp_path, monkeypatch, capfd, cut
):
    # Arrange: the file of a run that nothing stopped.
    out = tmp_path / "out"
    path = out / "mini.answers.jsonl"
    assert ask() == 0
    expected = {file.name: file.read_bytes() for file in out.iterdir()}
    assert not (out / ".lock").exists()
    for file in out.iterdir():
        file.unlink()
    out.rmdir()

    # Act: a run is stopped in its second group, and perhaps while it writes a line. It is resumed.
    asked = []

    def stop(vlm, questions, title, **decoding):
        if asked:
            raise KeyboardInterrupt
        asked.extend(questions)
        return answer_questions(vlm, questions, title, **decoding)

    def count(vlm, questions, title, **decoding):
        asked.extend(questions)
        return answer_questions(vlm, questions, title, **decoding)

    monkeypatch.setattr(benchmark_answers, "answer_questions", stop)
    assert ask() == 130
    assert f"--out {out} and --resume" in capfd.readouterr().err
    assert len(asked) == 4
    path.write_bytes(path.read_bytes() + b'{"question_id": "q2", "image": "0003.png"'[:cut])
    monkeypatch.setattr(benchmark_answers, "answer_questions", count)
    assert ask("--resume") == 0

    # Assert.
    assert len(asked) == 6
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected
    assert ask("--resume") == 0
    assert len(asked) == 6
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected


def test_a_run_is_not_resumed_with_other_settings(ask, tmp_path, capfd):
    assert ask() == 0
    capfd.readouterr()

    assert ask() == 2
    assert "exists already; give --resume" in capfd.readouterr().err
    assert ask("--resume", "--max-new-tokens", "mini=5") == 2
    assert "another max_new_tokens (4, now 5)" in capfd.readouterr().err
    assert ask("--resume", "--prompt", "mini=Why?") == 2
    assert "another digest" in capfd.readouterr().err
    assert ask("--resume", "--system", "Be brief.") == 2
    assert "another system (None, now 'Be brief.')" in capfd.readouterr().err


def test_a_submission_that_cannot_be_written_costs_no_score(ask, mini, tmp_path, capfd):
    """It is announced before anything is asked. What was asked is scored and kept."""
    mini.write_text(mini.read_text().replace('"label"', '"other"'))

    assert ask() == 0

    out = tmp_path / "out"
    assert json.loads((out / "scores.json").read_text()) == {"mini": {"filled": 1.0}}
    assert not (out / "mini.submission.json").exists()
    err = capfd.readouterr().err
    note = "mini: no submission will be written: question 'q0': has no label\n"
    assert err.count(note) == 1
    assert err.index(note) < err.index("6 questions, greedy")


@pytest.mark.parametrize("function", ["score", "submission"])
def test_an_error_about_real_answers_is_not_dropped(ask, tmp_path, monkeypatch, capfd, function):
    """Empty answers were fine, so nobody was told that a score or a submission would be missing."""

    def refuse(questions, answers):
        check(not any(answers), "an answer cannot be read")
        return answers

    mini = replace(BENCHMARKS["mini"], **{function: refuse})
    monkeypatch.setitem(BENCHMARKS, "mini", mini)

    assert ask() == 2

    assert "an answer cannot be read" in capfd.readouterr().err.splitlines()[-1]
    assert len(read_jsonl(tmp_path / "out" / "mini.answers.jsonl")) == 6


def test_answers_that_cannot_be_scored_are_found_before_a_model_is_asked(
    ask, mini, tmp_path, monkeypatch, capfd
):
    """Another benchmark would be asked for hours, and its scores would not be written."""

    def refuse(questions, answers):
        raise InputError("no right answers")

    monkeypatch.setitem(BENCHMARKS, "given", replace(BENCHMARKS["mini"], score=refuse))
    monkeypatch.setattr(evaluate, "load_vlm", lambda *args, **kwargs: pytest.fail("was loaded"))
    answers = tmp_path / "answers.jsonl"
    write_jsonl(answers, [{"question_id": f"q{i}", "text": "x"} for i in range(6)])

    assert ask("--benchmark", f"given={mini}", "--answers", f"given={answers}") == 2

    assert capfd.readouterr().err.splitlines()[-1] == "evaluate.py: no right answers"
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_with_other_files_of_the_model(ask, tmp_path, capfd):
    """The weights are the same, but each pixel has another value."""
    model = tmp_path / "model"
    shutil.copytree(TINY / "model", model)
    assert ask("--model", model) == 0
    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"image_mean": [0.1, 0.2, 0.3]}))
    capfd.readouterr()

    assert ask("--model", model, "--resume") == 2

    last_line = capfd.readouterr().err.splitlines()[-1]
    assert f"mini.settings.json: was begun with another {path}; give the same" in last_line


@pytest.mark.parametrize(
    ("now", "message"),
    [
        (
            {"model": "m"},
            "was begun with m/tokenizer.json, which is missing now; restore it, or give another ",
        ),
        (
            {"model": "m", "m/tokenizer.json": "2"},
            "was begun with another m/tokenizer.json; give the same options and files, or another ",
        ),
        ({"model": "n", "m/tokenizer.json": "2"}, "was begun with another model ('m', now 'n'); "),
        (
            {"model": "m", "m/tokenizer.json": "1", "m/chat_template.jinja": "3"},
            "was begun without m/chat_template.jinja, or by a version that did not note it; ",
        ),
    ],
)
def test_a_file_that_is_changed_new_or_gone_is_named(tmp_path, now, message):
    path = tmp_path / "mini.settings.json"
    check_same_settings(path, {"model": "m", "m/tokenizer.json": "1"})
    check_same_settings(path, {"model": "m", "m/tokenizer.json": "1"})

    with pytest.raises(InputError) as error:
        check_same_settings(path, now)

    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


def test_the_scale_of_an_adapter_is_among_the_settings(tmp_path):
    """It is in adapter_config.json, and no weight shows it."""
    vlm = VLM(torch.nn.Linear(1, 1), tokenizer=None, template="none", image_processor=None)
    options = argparse.Namespace(model="m", adapter=str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text('{"lora_alpha": 16}')
    settings = model_settings(vlm, options)

    path.write_text('{"lora_alpha": 32}')

    changed = {key for key, value in model_settings(vlm, options).items() if settings[key] != value}
    assert changed == {str(path)}


@pytest.mark.parametrize("line", ["[1]", "{", '{"question_id": 1}', "null", '{"text": 3}'])
def test_a_damaged_answer_file_is_one_line(ask, tmp_path, capfd, line):
    assert ask() == 0
    path = tmp_path / "out" / "mini.answers.jsonl"
    path.write_text(path.read_text().replace("\n", f"\n{line}\n", 1))
    capfd.readouterr()

    assert ask("--resume") == 2

    last_line = capfd.readouterr().err.splitlines()[-1]
    assert f"{path}: " in last_line and "remove it" in last_line


def test_answers_of_other_questions_are_not_resumed(ask, tmp_path, capfd):
    assert ask() == 0
    path = tmp_path / "out" / "mini.answers.jsonl"
    path.write_text(path.read_text().replace('"q1"', '"q9"'))
    capfd.readouterr()

    assert ask("--resume") == 2
    assert "answers other questions; remove it" in capfd.readouterr().err

    (tmp_path / "out" / "mini.settings.json").unlink()
    assert ask("--resume") == 2
    assert "was not written by this command" in capfd.readouterr().err


def test_lengths_and_prompts_can_be_changed(ask, tmp_path, capfd):
    assert ask("--max-new-tokens", "mini=2", "--prompt", "mini=Say yes.") == 0

    assert "up to 2 new tokens" in capfd.readouterr().err
    records = read_jsonl(tmp_path / "out" / "mini.answers.jsonl")
    assert records[0]["prompt"] == "What is 0?\nSay yes."


def test_an_empty_prompt_leaves_the_question_alone(ask, tmp_path):
    assert ask("--prompt", "mini=") == 0

    records = read_jsonl(tmp_path / "out" / "mini.answers.jsonl")
    assert records[0]["prompt"] == "What is 0?"


def test_answers_are_scored_without_a_model_and_without_images(
    run_command, mini, tmp_path, monkeypatch, capfd
):
    monkeypatch.setattr(evaluate, "load_vlm", lambda *args, **kwargs: pytest.fail("was loaded"))
    answers = tmp_path / "answers.jsonl"
    records = [{"question_id": f"q{i}", "text": "x" if i else ""} for i in (3, 2, 1, 0, 4, 5)]
    answers.write_text("\n".join(map(json.dumps, records)))

    status = run_command("--benchmark", f"mini={mini}", "--answers", f"mini={answers}")

    assert status == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"mini": {"filled": 5 / 6}}
    assert table_row(err, "this model") == ["83.33"]


def test_answers_of_a_run_can_be_scored_again(ask, run_command, mini, tmp_path, capfd):
    assert ask() == 0
    answers = tmp_path / "out" / "mini.answers.jsonl"
    capfd.readouterr()

    assert run_command("--benchmark", f"mini={mini}", "--answers", f"mini={answers}") == 0

    assert json.loads(capfd.readouterr().out) == {"mini": {"filled": 1.0}}


def test_a_folder_of_given_answers_is_not_resumed(run_command, mini, tmp_path, capfd):
    """--resume would be refused, so the error does not name it."""
    answers = tmp_path / "answers.jsonl"
    write_jsonl(answers, [{"question_id": f"q{i}", "text": "x"} for i in range(6)])
    words = ["--benchmark", f"mini={mini}", "--answers", f"mini={answers}"]

    assert run_command(*words, "--out", tmp_path / "out") == 0
    capfd.readouterr()
    assert run_command(*words, "--out", tmp_path / "out") == 2

    assert capfd.readouterr().err == (
        f"evaluate.py: {tmp_path / 'out'}: exists already; give another --out\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--benchmark", "mini"], "not NAME=VALUE"),
        (["--benchmark", "none=FILE"], "no benchmark; there are"),
        (["--benchmark", "mini="], "--benchmark mini= has no value"),
        (["--benchmark", "mini=A", "--images", "mini="], "--images mini= has no value"),
        (["--benchmark", "mini=A", "mini=B"], "names a benchmark twice"),
        (["--benchmark", "mini=A", "--pope", "F"], "does not go with --pope"),
        (["--benchmark", "mini=A"], "give --model DIR, or --answers mini=FILE"),
        (["--benchmark", "mini=A", "--model", "M"], "give --out DIR"),
        (["--benchmark", "mini=A", "--model", "M", "--out", "O"], "give --images mini=DIR"),
        (["--benchmark", "mini=A", "--images", "I", "J"], "several folders"),
        (["--benchmark", "mini=A", "--answers", "mmvet=F"], "needs --benchmark mmvet=PATH"),
        (["--benchmark", "mini=A", "--images", "mmvet=F"], "needs --benchmark mmvet=PATH"),
        (["--benchmark", "mini=A", "--answers", "mini=F", "--model", "M"], "--model has no effect"),
        (["--benchmark", "mini=A", "--answers", "mini=F", "--resume"], "--resume has no effect"),
        (["--benchmark", "mini=A", "--answers", "mini=F", "--system", "S"], "--system has no eff"),
        (
            ["--benchmark", "mini=A", "--answers", "mini=F", "--prompt", "mini=Why?"],
            "--prompt mini=... has no effect, as the answers of mini are given; leave it out",
        ),
        (
            ["--benchmark", "mini=A", "--answers", "mini=F", "--max-new-tokens", "mini=7"],
            "--max-new-tokens mini=... has no effect, as the answers of mini are given; leave it",
        ),
        (
            ["--benchmark", "mini=A", "--answers", "mini=F", "--images", "I"],
            "--images I has no effect, as no benchmark needs it",
        ),
        (
            ["--benchmark", "mini=A", "--coco-list", "F"],
            "--coco-list has no effect, as coco is not asked; leave it out",
        ),
        (
            ["--benchmark", "mini=A", "--images", "mini=I", "J"],
            "--images J has no effect, as no benchmark needs it",
        ),
        (["--benchmark", "mini=A", "--max-new-tokens", "mini=0"], "whole number from 1"),
        (["--model", "M", "--answers", "mini=F"], "--answers mini=F is for --benchmark mini"),
        (["--benchmark", "mini=A", "--answers", "F"], "--answers: 'F' is not NAME=VALUE"),
        (["--pope", "F", "--images", "I"], "give --model DIR"),
        (["--model", "M", "--images", "I"], "nothing to measure"),
        (["--model", "M", "--pope", "F"], "give --images DIR"),
    ],
)
def test_options_that_do_not_fit_are_one_line(mini, run_command, capfd, words, message):
    with pytest.raises(SystemExit) as exit_info:
        run_command(*words)

    assert exit_info.value.code == 2
    err = capfd.readouterr().err
    assert len(err.splitlines()) == 1
    assert message in err


@pytest.mark.parametrize("odd", ["USER: Why?", "Why? " * 600])
def test_a_question_that_cannot_be_asked_is_found_before_any_is(ask, mini, tmp_path, capfd, odd):
    """It is the last one of the second benchmark. The first might take hours."""
    lines = mini.read_text().splitlines()
    last = json.loads(lines[-1]) | {"text": odd}
    path = tmp_path / "second.jsonl"
    path.write_text("\n".join([*lines[:-1], json.dumps(last)]))
    BENCHMARKS["second"] = BENCHMARKS["mini"]

    try:
        status = ask("--benchmark", f"second={path}", "--images", f"second={IMAGES}")
    finally:
        del BENCHMARKS["second"]

    assert status == 2
    last_line = capfd.readouterr().err.splitlines()[-1]
    assert last_line.startswith(f"evaluate.py: {path}, question 'q5': the question")
    assert not (tmp_path / "out" / "mini.answers.jsonl").exists()


def test_a_missing_image_is_found_before_the_model_is_loaded(ask, mini, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_vlm", lambda *args, **kwargs: pytest.fail("was loaded"))
    mini.write_text(mini.read_text().replace("0003.png", "none.png"))

    assert ask() == 2
    assert not (tmp_path / "out").exists()


def test_the_table_has_an_empty_cell_for_what_was_not_measured(mini):
    heading, model, paper = benchmark_table({}).splitlines()

    assert heading.split()[0] == "model"
    assert model == "this model"
    assert len(paper) == len(heading)
    assert benchmarks.BASE_MODEL in paper
