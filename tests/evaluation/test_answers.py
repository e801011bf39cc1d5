"""Answers to questions about images: shared images change nothing."""

from dataclasses import replace

import pytest
from evaluation_helpers import write_evaluation_set

from minialign import reference
from minialign.data.chat_templates import encode_prompt
from minialign.evaluation import answers
from minialign.evaluation.answers import answer_questions
from minialign.evaluation.evaluation_sets import read_folder
from minialign.generation.decoding import share_prefix
from minialign.methods.base import encode_example
from minialign.utils.files import InputError


def slow_answer(vlm, paths, question, max_new_tokens=None):
    """Answer one question alone, by the slow greedy decoding of the reference."""
    prompt = encode_prompt(vlm.tokenizer, vlm.template, ["<image>\n" * len(paths) + question])
    ids = reference.generate(
        vlm.model, prompt, vlm.encode_images(paths), [], None, {vlm.tokenizer.eos}
    )
    ids = [token for token in ids[:max_new_tokens] if token != vlm.tokenizer.eos]
    return vlm.tokenizer.decode(ids, strip_prefix=" ")


@pytest.fixture()
def questions(tmp_path, records):
    """Return the questions of a small evaluation set, as (paths, question) pairs."""
    evaluation_set = read_folder(write_evaluation_set(tmp_path, records))
    questions = []
    for row in evaluation_set.captions:
        questions.append(((str(evaluation_set.images / row["image"]),), row["prompt"]))
    for row in evaluation_set.pope["random"]:
        questions.append(((str(evaluation_set.images / row["image"]),), row["text"]))
    return questions


def test_answers_equal_those_to_each_question_alone(vlm, questions):
    """Questions about one image share a packed row, and one of them is asked twice."""
    answers = answer_questions(
        vlm, [*questions, questions[0]], "test", max_new_tokens=64, max_image_tokens=1
    )

    assert set(answers) == set(questions)
    for paths, question in questions[1:4]:
        assert answers[paths, question] == slow_answer(vlm, paths, question)

    # In one batch instead of one image at a time.
    assert answer_questions(vlm, questions, "test", max_new_tokens=64) == answers


def test_questions_about_no_image_and_about_two(vlm, records):
    """Asked together, each answer equals that to the question alone."""
    first = records[0].paths[0]
    second = records[1].paths[0]
    questions = [
        ((), "Is there a cup?"),
        ((), "Which things are there, in a street?"),
        ((first, second), "Is there a cup?"),
    ]

    answers = answer_questions(vlm, questions, "test", max_new_tokens=8)

    for paths, question in questions:
        assert answers[paths, question] == slow_answer(vlm, paths, question, max_new_tokens=8)
    assert len({answers[question] for question in questions}) > 1


def test_a_question_that_fills_the_context_is_refused_by_name(vlm, records):
    """The message names the image and the beginning of the question, before any is answered."""
    paths = tuple(records[0].paths)
    questions = [(paths, "Is there a cup?"), (paths, "Is there a very " + "long " * 1000 + "cup?")]

    with pytest.raises(InputError, match="'Is there a very long .* about .*png takes .* context"):
        answer_questions(vlm, questions, "test")


def test_questions_are_asked_under_the_system_text_of_the_model(vlm, records, monkeypatch):
    """The prompt of each is that of a record with this system text."""
    prompts = []

    def note_prompts(prompts_of_image, features):
        """Note what is asked about an image."""
        prompts.extend(prompts_of_image)
        return share_prefix(prompts_of_image, features)

    monkeypatch.setattr(answers, "share_prefix", note_prompts)
    vlm.system = "Answer briefly."
    answer_questions(vlm, [(records[0].paths, records[0].question)], "test", max_new_tokens=1)

    record = replace(records[0], system="Answer briefly.")
    assert prompts == [encode_example(vlm, record, ["A cup."]).prompt_ids]
    assert prompts != [encode_example(vlm, records[0], ["A cup."]).prompt_ids]
