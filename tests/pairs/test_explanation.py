"""The explanation of a pair: it shows what the sampler did in each round."""

from dataclasses import replace

import pytest
from bdhs_helpers import NOISE, QUICK, GivenCosines, make_sampler, script_completions

from minialign.pairs.explanation import (
    explain_pair,
    explain_record,
    explain_round,
    find_group,
)
from minialign.utils.files import InputError

WIDTH = 80


def explain(sampler, record):
    """Sample the pair of a record, and return the text of each of its rounds."""
    rounds = []
    for result in sampler.rounds([record]):
        rounds.append("\n".join(explain_round(sampler, record, result, WIDTH)))
    return rounds


def test_the_rounds_of_a_pair_are_explained(vlm, records, monkeypatch):
    """The first round is too similar, and the last one writes a whole answer."""
    script_completions(monkeypatch, vlm, " red kite.")
    record = replace(records[0], chosen="There is a cup at the top. Here is a dog.")
    config = replace(QUICK, rounds=2)
    sampler = make_sampler(vlm, config, GivenCosines(0.98, 0.99))
    first_result, last_result = sampler.rounds([record])
    sampler.similarity = GivenCosines(0.98, 0.99)

    first_round, last_round = explain(sampler, record)

    visible = ", ".join(str(token) for token in first_result.choices.visible)
    assert f"Visible: {len(first_result.choices.visible)} of 64, namely {visible}." in first_round
    assert first_round.count("#") == len(first_result.choices.visible) + 1  # one is in the legend
    for sentence in first_result.choices.sentences:
        after = record.chosen[sentence.cut : sentence.end]
        assert f"{sentence.kept} | {after}" in first_round
        assert f"{sentence.kept} [red kite.]" in first_round
    assert first_result.response.text in first_round
    assert "0.980000" in first_round
    assert "This is not below eps_s = 0.97" in " ".join(first_round.split())
    assert "Round 2 draws again." in first_round
    assert "[red kite.]" in last_round
    assert "No cut" in last_round
    assert "taken as it is" in " ".join(last_round.split())
    assert last_result.is_taken


@pytest.mark.parametrize("record_id, outcome", [("a", "It stays."), ("b", "It is swapped")])
def test_the_yes_no_rule_is_explained(vlm, records, monkeypatch, record_id, outcome):
    """The id decides the draws of a record."""
    script_completions(monkeypatch, vlm, ".")
    record = replace(records[0], id=record_id, chosen="Yes.")

    (text,) = explain(make_sampler(vlm), record)

    text = " ".join(text.split())
    assert outcome in text
    assert "(1) Yes | ." in text
    assert ("(1) Yes [.]" in text) == (outcome == "It stays.")
    assert ("(1) No [.]" in text) == (outcome != "It stays.")
    assert ("It equals the chosen answer" in text) == (outcome == "It stays.")


def test_noise_takes_the_place_of_the_mask(vlm, records, monkeypatch):
    script_completions(monkeypatch, vlm, ".")

    (text,) = explain(make_sampler(vlm, NOISE), records[0])

    assert "500 of 1,000 steps" in text
    assert "the noisy image" in text
    assert "Eq. 6" not in text


def test_no_line_is_wider_than_the_terminal(vlm, records, monkeypatch):
    """An id of a data set may hold control characters, and a word may be as long as a line."""
    script_completions(monkeypatch, vlm, " red kite.")
    record = replace(records[0], id="a\x1b[2J", chosen=f"{120 * 'x'} is\nhere.")
    sampler = make_sampler(vlm)

    lines = explain_record(sampler, record, WIDTH)
    for text in explain(sampler, record):
        lines += text.splitlines()
    (pair,) = sampler.pairs([record])
    lines += explain_pair(pair, WIDTH)[:-1]  # the last one is JSON

    assert max(len(line) for line in lines) <= WIDTH
    assert "\x1b" not in "".join(lines)
    assert "is\\nhere." in "".join(lines)


def test_words_that_differ_have_stars():
    pair = {"chosen": "A cup at the top.", "rejected": "A dog at the top. Here"}

    lines = explain_pair(pair, WIDTH)

    assert "Chosen:   A *cup* at the top." in lines
    assert "Rejected: A *dog* at the top. *Here*" in lines


def test_a_record_is_sampled_in_its_group(records):
    group, index = find_group(records[:7], records[5].id, group_size=3)

    assert group == records[3:6]
    assert index == 2


def test_an_unknown_id_is_refused(records):
    with pytest.raises(InputError, match="--explain nobody: none of the 7 records has this id"):
        find_group(records[:7], "nobody", group_size=3)
