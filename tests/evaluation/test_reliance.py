"""Reliance on the image: what it sums to, and what the model would say with the image hidden."""

import pytest

from minialign import reference
from minialign.data.chat_templates import decode_response, encode_prompt, encode_response, stop_ids
from minialign.data.packing import PackedExample
from minialign.evaluation.reliance import (
    WordReliance,
    group_tokens,
    reliance_table,
    token_reliance,
)
from minialign.logprobs import response_logps


def summed_logp(vlm, record, response_ids, visible=None):
    """Return the log-prob of a response as `sample.py score` computes it."""
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
    features = vlm.encode_images(record.paths)
    example = PackedExample.of(prompt_ids, features, [response_ids], visible)
    return response_logps(vlm.model, [example])[0].item()


@pytest.mark.parametrize("with_end_token", [True, False])
def test_all_words_together_are_the_difference_of_the_log_probs(vlm, records, with_end_token):
    """An answer that `--max-new-tokens` cut off has no end token."""
    record = records[0]
    response_ids = encode_response(vlm.tokenizer, vlm.template, record.chosen)
    if not with_end_token:
        response_ids = response_ids[:-1]
    seen = summed_logp(vlm, record, response_ids)
    hidden = summed_logp(vlm, record, response_ids, visible=[])

    words = token_reliance(vlm, record.paths, record.turns[-1], response_ids)

    # The tolerance of log-probs, for two of them.
    tolerance = max(1e-6 * abs(hidden), 2 * 1e-5 * len(response_ids))
    assert sum(word.nats for word in words) == pytest.approx(seen - hidden, abs=tolerance)
    assert seen - hidden > 10
    assert "".join(word.text for word in words) == record.chosen
    assert (words[-1].text == "") == with_end_token


def test_what_the_model_would_say_is_what_the_slow_reference_writes_there(vlm, records):
    record = records[0]
    response_ids = encode_response(vlm.tokenizer, vlm.template, record.chosen)
    prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
    features = vlm.encode_images(record.paths)

    reliances = token_reliance(vlm, record.paths, record.question, response_ids)

    words = group_tokens(vlm.tokenizer, vlm.template, response_ids)
    changed = 0
    for word, reliance in zip(words, reliances, strict=True):
        context = response_ids[: word.start]
        logits = reference.next_token_logits(
            vlm.model, prompt_ids, features, context, visible=set()
        )
        likeliest_token = int(logits[-1].argmax())
        text = decode_response(vlm.tokenizer, vlm.template, [*context, likeliest_token])
        text = text.removeprefix(decode_response(vlm.tokenizer, vlm.template, context))
        assert reliance.instead.startswith(text)
        changed += reliance.instead != reliance.text
    assert changed > 3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("A red-brown cup, isn't it?", ["A", " red-brown", " cup", ",", " isn't", " it", "?", ""]),
        ("Two.\n\n- One", ["Two", ".", "\n\n-", " One", ""]),
        ("", [""]),
    ],
)
def test_words_are_cut_at_white_space_and_before_punctuation(vlm, text, expected):
    response_ids = encode_response(vlm.tokenizer, vlm.template, text)

    words = group_tokens(vlm.tokenizer, vlm.template, response_ids)

    assert [word.text for word in words] == expected


def test_every_token_belongs_to_one_word(vlm):
    """Characters that the vocabulary lacks take several tokens each, here of bytes."""
    text = "一只猫 🙂 A cup."
    response_ids = encode_response(vlm.tokenizer, vlm.template, text)

    words = group_tokens(vlm.tokenizer, vlm.template, response_ids)

    assert "".join(word.text for word in words) == text
    starts = [word.start for word in words]
    ends = [word.end for word in words]
    assert starts == [0, *ends[:-1]]
    assert ends[-1] == len(response_ids)
    assert response_ids[-1] in stop_ids(vlm.tokenizer, vlm.template)


def test_the_table_shows_another_word_only_where_there_is_one():
    """The bar has a mark for each nat, at most 20. Control characters become escapes."""
    words = [
        WordReliance("A", -0.001, "A"),
        WordReliance(" cup\x1b", 2.6, " dog"),
        WordReliance(".", -1.2, "."),
        WordReliance("\n", 0.0, ""),
        WordReliance("", 40.0, " There"),
    ]

    lines = reliance_table(words)

    assert [line.split() for line in lines[-8:]] == [
        ["A", "0.00"],
        ["cup\\x1b", "+2.60", "###", "dog"],
        [".", "-1.20", "-"],
        ["\\n", "0.00", "(end)"],
        ["(end)", "+40.00", 20 * "#", "There"],
        ["the", "whole", "answer", "+41.40"],
        [],
        "With the image hidden, the model would choose another word in 3 of 5 places.".split(),
    ]
    assert max(len(line) for line in lines) <= 80
