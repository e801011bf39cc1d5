"""Answers to questions about images: shared images change nothing."""

from dataclasses import replace

import pytest
import torch
from conftest import set_device_memory
from evaluation_helpers import write_evaluation_set

from minialign import reference
from minialign.data.chat_templates import encode_prompt
from minialign.evaluation import answers
from minialign.evaluation.answers import answer_batch, answer_questions
from minialign.evaluation.evaluation_sets import read_folder
from minialign.generation.decoding import share_prefix
from minialign.methods.base import encode_example
from minialign.models.memory import kv_cache_bytes, module_bytes
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


def test_answers_equal_those_to_each_question_alone(vlm, questions, monkeypatch):
    """Questions about one image share a packed row, and one of them is asked twice."""
    # In one batch.
    answers = answer_questions(vlm, [*questions, questions[0]], "test", max_new_tokens=64)

    assert set(answers) == set(questions)
    for paths, question in questions[1:4]:
        assert answers[paths, question] == slow_answer(vlm, paths, question)

    # One image and one question at a time.
    set_device_memory(monkeypatch, 0)
    assert answer_questions(vlm, questions, "test", max_new_tokens=64) == answers


@pytest.mark.parametrize("contrast, sizes", [(0.0, [3, 3, 1]), (0.5, [1] * 7)])
def test_batches_shrink_to_what_the_device_holds(vlm, records, monkeypatch, contrast, sizes):
    """Of 15 rows beside the weights a fifth are prefilled: three, or one and its masked row.

    A row has 64 image tokens and the prompt without its last token.
    """
    questions = [(tuple(record.paths), "Is there a cup?") for record in records[:7]]
    prompt = encode_prompt(vlm.tokenizer, vlm.template, ["<image>\nIs there a cup?"])
    row_length = 64 + len(prompt) - 2
    row_bytes = kv_cache_bytes(vlm.model.config.text, 1, row_length, torch.float32)
    batch_sizes = []

    def recording_batch(vlm, batch, sampling):
        batch_sizes.append(len(batch))
        return answer_batch(vlm, batch, sampling)

    monkeypatch.setattr(answers, "answer_batch", recording_batch)
    settings = {"max_new_tokens": 4, "contrast": contrast}
    together = answer_questions(vlm, questions, "test", **settings)
    set_device_memory(monkeypatch, module_bytes(vlm.model) + 15 * row_bytes)
    in_batches = answer_questions(vlm, questions, "test", **settings)

    assert in_batches == together
    assert batch_sizes == [7, *sizes]


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
