"""MLLMAnnotator: how its answers are read, and what it is asked. Its model's answers are given."""

import re
from dataclasses import replace

import pytest
from annotator_helpers import make_record

from minialign.evaluation import answers as answers_module
from minialign.pairs import annotators
from minialign.pairs.annotators import MLLMAnnotator, pair_accuracy
from minialign.pairs.verdicts import parse_verdict
from minialign.utils.files import InputError

# --- how an answer is read ---


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
        # Of two responses in a sentence the first one is meant.
        ("Response 2 is better than Response 1.", 1),
        ("Response 1 is better than Response 2, which names a dog.", 0),
        # The first sentence that names one decides.
        (
            "Let me look at the picture. There is no dog. So Response 2 is better. "
            "Response 1 is not.",
            1,
        ),
        ("Response 2 is better. Both are equally long.", 1),
        ("I looked.\nresponse 1", 0),
        # Neither is preferred.
        ("Neither Response 1 nor Response 2.", None),
        ("Response 1 and Response 2 are equal.", None),
        ("Response 1 and Response 2 are equally good", None),
        ("It is a tie between Response 1 and Response 2.", None),
        ("Response 1 or Response 2", None),
        ('Begin your answer with "Response 1" or "Response 2"; then', None),  # the request
        ('"Response 1" or "Response 2"\nResponse 2', 1),
        # Both are named at once.
        ("Both Response 1 and Response 2 are accurate.", None),
        ("Response 1 and Response 2 are the same.", None),
        ("Both Response 1 and 2 name the cup. Response 2 has no errors.", 1),
        ("Is Response 1 or Response 2 better? Response 2.", 1),
        # A response that is blamed is the worse one.
        ("Response 1 is worse than Response 2.", 1),
        ("Response 2 is worse than Response 1.", 0),
        ("Response 2 is worse.", 0),
        ("The worse one is Response 1", 1),
        ("Response 1: the worst.", 1),
        ("Response 1 is better, Response 2 is worse.", 0),
        ("Response 2, since Response 1 is worse.", 1),  # the blame is for the other one
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
        # Other words of blame.
        ("Response 1 is incorrect.", 1),
        ("Response 2 is inaccurate: there is no dog.", 0),
        ("Response 1 is not correct, Response 2 is.", 1),
        ("Response 1 isn’t accurate.", 1),
        ("Response 1 hallucinates a dog.", 1),
        ("Response 1 contains errors, Response 2 does not.", 1),
        ("Response 2 makes more mistakes.", 0),
        ("Response 1 makes the worst mistakes.", 1),
        ("Response 1 falsely says that there is a dog.", 1),
        ("Response 1 contains a mistake.", 1),
        ("Response 2 has an obvious error.", 0),
        ("There is a mistake in Response 1.", 1),
        ("Response 1 isn't as good.", 1),
        ("Response 2 is not good.", 0),
        ("Response 1 does not name the correct color.", 1),
        ("Response 1 is not entirely accurate.", 1),
        ("Response 1 puts the cup on the right, which is wrong.", 1),
        # Behind praise, blame is for the other response, though it is not named.
        ("Response 1 is more accurate, whereas the other has errors.", 0),
        ("Response 1 is more accurate because the dog is falsely mentioned in Response 2.", 0),
        ("Response 2 is the correct one since nothing in it is false.", 1),
        ("Response 2 describes the cup correctly, and the other one is wrong.", 1),
        ("Response 1 is right, the other is wrong.", 0),
        ("Response 2 is preferred, for the other makes a mistake.", 1),
        # A fault that a response does not have is no blame.
        ("Response 1 has fewer mistakes.", 0),
        ("Response 1 has no errors.", 0),
        ("Response 2 does not mention the wrong colour.", 1),
        ("Response 2 doesn't contain any false statement.", 1),
        ("Response 1 is not wrong.", 0),
        ("Response 2 has less hallucinations than Response 1.", 1),
        ("Response 1, without any mistakes.", 0),
        ("Response 1 has the fewest mistakes.", 0),
        # The name of a response in marks.
        ('"Response 2" is better than "Response 1".', 1),
        ("**Response 1** is worse.", 1),
        ("Response #2", 1),
        # No response is named.
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
def test_a_verdict_is_read_from_an_answer(answer, verdict):
    assert parse_verdict(answer) == verdict


@pytest.mark.parametrize(
    "answer",
    [
        "Neither response is better. Response 1 is longer.",
        "Both responses are equally good. Response 1 and Response 2 name the cup.",
    ],
)
def test_a_tie_is_not_undone_by_a_later_sentence(answer):
    assert parse_verdict(answer) is None


def test_a_tie_that_somebody_wears_is_no_verdict():
    assert parse_verdict("Response 1 is better because it mentions the man's tie.") == 0


# --- what is asked, and what becomes of the verdicts ---


@pytest.fixture()
def give_answers(monkeypatch):
    """Return a function that replaces the model's answers by `answer(response 1, response 2)`.

    That model has room for every request. The function returns the list of (paths, text) that it
    is asked from then on.
    """

    def replace_model(answer):
        asked = []

        def answer_questions(vlm, questions, title, max_new_tokens):
            answers = {}
            for paths, text in questions:
                asked.append((paths, text))
                answers[paths, text] = answer(*shown_responses(text))
            return answers

        monkeypatch.setattr(annotators, "answer_questions", answer_questions)
        monkeypatch.setattr(answers_module, "leaves_room", lambda vlm, paths, text: True)
        return asked

    return replace_model


def shown_responses(text):
    """Return the two responses that a request shows, in its order."""
    return re.findall(r"^Response [12]: (.*)$", text, re.MULTILINE)


def prefer_good(first, second):
    """Answer as somebody who prefers the response "good"."""
    if first == "good":
        return "Response 1, it is good."
    return "Response 2, it is good."


def test_verdicts_that_agree_in_both_orders_stand(give_answers):
    asked = give_answers(prefer_good)
    annotator = MLLMAnnotator(None)

    verdicts = annotator.compare([make_record()] * 2, ["good", "bad"], ["bad", "good"])

    assert verdicts == [0, 1]
    assert len(asked) == 4
    assert annotator.counters == {
        "asked": 4,
        "too long": 0,
        "not understood": 0,
        "first is better": 2,
        "changed with the order": 0,
    }


def test_a_verdict_that_changes_with_the_order_is_a_tie(give_answers):
    def answer(first, second):
        if "stubborn" in first + second:
            return "Response 1"
        return prefer_good(first, second)

    give_answers(answer)
    annotator = MLLMAnnotator(None)

    firsts = ["good", "stubborn", "stubborn 2"]
    verdicts = annotator.compare([make_record()] * 3, firsts, ["bad"] * 3)

    assert verdicts == [0, None, None]
    assert annotator.counters["changed with the order"] == 2
    assert annotator.counters["not understood"] == 0


def test_an_answer_that_is_not_understood_is_a_tie(give_answers):
    """In both orders, or in one of them. The latter is no verdict that changes with the order."""

    def answer(first, second):
        if "odd" in (first, second):
            return "I like both."
        if (first, second) == ("good", "half"):
            return "No idea"
        return "Response 2"

    give_answers(answer)
    annotator = MLLMAnnotator(None)

    verdicts = annotator.compare([make_record()] * 2, ["odd", "good"], ["bad", "half"])

    assert verdicts == [None, None]
    assert annotator.counters == {
        "asked": 4,
        "too long": 0,
        "not understood": 3,
        "first is better": 0,
        "changed with the order": 0,
    }


def test_responses_too_long_for_the_context_are_a_tie(vlm, records, monkeypatch):
    """The policy may sample them at any step, so the run must go on. They are not shown."""

    def answer_questions(vlm, questions, title, max_new_tokens):
        return dict.fromkeys(questions, "Neither Response 1 nor Response 2.")

    monkeypatch.setattr(annotators, "answer_questions", answer_questions)
    annotator = MLLMAnnotator(vlm)

    verdicts = annotator.compare(records[:2], ["A cup.", "A cup. " * 99], ["A pen.", "A dog."])

    assert verdicts == [None, None]
    assert annotator.counters == {
        "asked": 2,
        "too long": 2,
        "not understood": 2,
        "first is better": 0,
        "changed with the order": 0,
    }


def test_a_question_too_long_for_the_context_is_refused_before_the_work(vlm, records):
    long_record = replace(records[0], turns=("<image>\n" + "Is there a cup? " * 99,))
    annotator = MLLMAnnotator(vlm)

    annotator.check_records(records[1:3])

    with pytest.raises(InputError, match="record 1 .*the annotator's context of 512 tokens"):
        annotator.check_records([records[1], long_record])


def test_the_request_shows_the_image_the_last_question_and_both_responses(give_answers):
    asked = give_answers(prefer_good)
    record = replace(make_record(), turns=("Is it day?", "Yes.", "<image>\nWhat {is} there?"))

    MLLMAnnotator(None, both_orders=False).compare([record], ["good"], ["bad"])

    ((paths, text),) = asked
    assert paths == record.paths
    assert "Question: What {is} there?\nResponse 1: good\nResponse 2: bad\n" in text
    assert "<image>" not in text
    assert "Is it day" not in text

    # In both orders the responses are swapped the second time.
    asked.clear()
    MLLMAnnotator(None).compare([record], ["good"], ["bad"])
    assert [shown_responses(text) for _, text in asked] == [["good", "bad"], ["bad", "good"]]


def test_a_bias_for_the_first_response_is_found(give_answers):
    """Asked once, the bias shows in `first`. Asked in both orders, all verdicts are ties."""
    give_answers(lambda first, second: "Response 1")
    records = [make_record()] * 3

    once = pair_accuracy(MLLMAnnotator(None, both_orders=False), records)
    twice = pair_accuracy(MLLMAnnotator(None), records)

    assert once == {"accuracy": 0.5, "ties": 0.0, "first": 1.0, "consistency": 0.0, "n": 3}
    assert twice["accuracy"] == 0.5
    assert twice["ties"] == 1.0
    assert twice["consistency"] == 1.0
