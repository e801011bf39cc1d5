"""Curation: which pairs are kept, what their scores are, and what is written."""

import copy
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY

from minialign import reference
from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.records import read_records
from minialign.models.policy import Policy
from minialign.pairs import curation
from minialign.pairs.curation import (
    PolicyScorer,
    RewardScorer,
    ScoringSampler,
    best_pairs,
    dropped_path,
    sample_best_pairs,
)
from minialign.pairs.pair_files import preference_pair
from minialign.pairs.reward_model import RewardModel
from minialign.utils.files import InputError


def scored_pairs(scores):
    """Return a pair for each score, with letters as ids. None stands for a pair without a score."""
    pairs = []
    for name, score in zip("abcdefghijkl", scores, strict=False):
        pair = {"id": name, "image": "a.png", "prompt": "Q?", "chosen": "Yes.", "rejected": name}
        if score is not None:
            pair["score"] = score
        pairs.append(pair)
    return pairs


def kept_ids(pairs, share, seed=0):
    """Return the ids of the pairs that are kept."""
    return "".join(pairs[i]["id"] for i in best_pairs(pairs, share, seed))


# --- which pairs are kept


@pytest.mark.parametrize(
    "share, expected",
    [
        (0.25, "d"),
        (0.5, "bd"),
        (0.6, "bd"),  # 2.4 of 4
        (0.75, "bde"),
        (1.0, "abde"),
        (0.01, "d"),  # at least one
    ],
)
def test_the_highest_scores_are_kept_in_the_order_of_the_file(share, expected):
    """The third pair has no score, so it is not among the four to choose from."""
    pairs = scored_pairs([-2.0, 1.5, None, 3.0, 0.0])

    assert kept_ids(pairs, share) == expected


def test_the_seed_decides_between_equal_scores():
    """Of 12 equal pairs 6 are kept. Two of five seeds agree by chance with odds of 10 in 924."""
    pairs = scored_pairs([1.0] * 12)

    choices = [kept_ids(pairs, 0.5, seed) for seed in range(5)]

    assert len(set(choices)) == 5
    assert kept_ids(pairs, 0.5, seed=3) == choices[3]


def test_a_higher_score_comes_before_any_tie():
    for seed in range(5):
        kept = kept_ids(scored_pairs([1.0, 1.0, 1.0, 2.0]), 0.5, seed)
        assert len(kept) == 2
        assert kept[-1] == "d"


def test_the_order_of_the_records_does_not_matter():
    pairs = scored_pairs([1.0, 1.0, 0.0, 1.0, 2.0, 1.0, None])
    reversed_pairs = pairs[::-1]

    for seed in range(5):
        kept = kept_ids(pairs, 0.5, seed)
        assert len(kept) == 3
        assert kept_ids(reversed_pairs, 0.5, seed) == kept[::-1]


# --- scores


@pytest.fixture
def some_records(records):
    """Return six records, with ids that are letters."""
    return [replace(record, id=name) for record, name in zip(records, "abcdef", strict=False)]


@torch.no_grad()
def test_the_policy_scores_by_the_mean_log_prob_of_a_token(vlm, records):
    """Against the slow log-prob of each response, over its tokens with the end token."""
    texts = [[records[0].chosen, "No."], ["Yes.", records[1].chosen]]

    scores = PolicyScorer(vlm).score(records[:2], texts)

    for record, record_texts, record_scores in zip(records, texts, scores, strict=False):
        prompt_ids = encode_prompt(vlm.tokenizer, vlm.template, record.turns)
        features = vlm.encode_images(record.paths)
        for text, score in zip(record_texts, record_scores, strict=True):
            response = encode_response(vlm.tokenizer, vlm.template, text)
            logp = reference.response_logp(vlm.model, prompt_ids, features, response)
            assert score == pytest.approx(logp.item() / len(response), abs=1e-5)


@torch.no_grad()
def test_a_reward_model_scores_as_it_does_elsewhere(vlm, records):
    policy = Policy(vlm.model, 2, 4)
    policy.add_scalar_head()
    policy.scalar_head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    reward_model = RewardModel(vlm, policy.scalar_head)
    texts = [["A cup.", "No."], ["Yes.", "A dog."]]

    scores = RewardScorer(reward_model, "reward:DIR").score(records[:2], texts)

    assert scores == reward_model.score(records[:2], texts).tolist()
    assert scores[0][0] != scores[0][1]


class GivenResponses:
    """A sampler that knows the rejected response to each record, and needs no model for it."""

    vlm = SimpleNamespace(model=torch.nn.Linear(1, 1), template="none", file_digests={})

    def __init__(self, texts_of_ids):
        self.texts_of_ids = texts_of_ids

    def metadata(self):
        return {}

    def pairs(self, records):
        return [preference_pair(record, self.texts_of_ids[record.id]) for record in records]


class GivenScores:
    """A scorer that knows the score of each rejected response. Chosen ones have the score 10."""

    name = "given"

    def __init__(self, **scores):
        self.scores = scores
        self.nums_scored = []  # of records, in each call

    def metadata(self):
        return {}

    def score(self, records, texts):
        self.nums_scored.append(len(records))
        return [[10.0, self.scores[rejected]] for _, rejected in texts]


# The margins of a to f. The rejected response of c is empty, and that of e is the chosen one.
REJECTED = {"a": "A1", "b": "B1", "c": " ", "d": "D1", "e": None, "f": "F1"}
SCORES = {"A1": 7.0, "B1": 9.0, "D1": 12.5, "F1": 1.00004}
MARGINS = {"a": 3.0, "b": 1.0, "d": -2.5, "f": 9.0}


def make_sampler(records, *, share=0.5, seed=0, scorer=None):
    """Return a sampler of the responses above, which scores them."""
    texts = dict(REJECTED)
    for record in records:
        if texts[record.id] is None:
            texts[record.id] = record.chosen + " "
    return ScoringSampler(
        GivenResponses(texts), scorer or GivenScores(**SCORES), share=share, seed=seed
    )


def test_the_score_of_a_pair_is_its_margin(some_records):
    """It is rounded, as both scores are. Pairs without a usable rejected response get no score."""
    pairs = make_sampler(some_records).pairs(some_records)

    assert {pair["id"]: pair["score"] for pair in pairs if "score" in pair} == MARGINS
    assert pairs[5]["score_chosen"] == 10.0
    assert pairs[5]["score_rejected"] == 1.0
    assert pairs[5]["scored_by"] == "given"
    assert "scored_by" not in pairs[2]


def test_rounding_does_not_decide_between_equal_pairs(some_records):
    """The scores of two pairs differ by what a batch changes, so the seed decides."""
    two_records = [some_records[0], some_records[1]]
    scorer = GivenScores(A1=5.0, B1=5.000001)

    kept = set()
    for seed in range(20):  # all alike by chance with odds of 1 in 500,000
        sampler = make_sampler(two_records, seed=seed, scorer=scorer)
        pairs = sampler.pairs(two_records)
        kept.update(pairs[i]["id"] for i in best_pairs(pairs, 0.5, seed))

    assert kept == {"a", "b"}


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_refused(some_records, score):
    sampler = make_sampler(some_records, scorer=GivenScores(**SCORES | {"B1": score}))

    with pytest.raises(InputError, match="record 2 .id tiny-0002.*not finite"):
        sampler.pairs(some_records)


def test_many_pairs_are_scored_in_batches(vlm, records, monkeypatch):
    batch_sizes = []

    def response_logps(model, rows):
        batch_sizes.append(len(rows))
        return torch.full((len(rows), 2), -6.0), torch.tensor([[2, 3]])

    monkeypatch.setattr(curation, "response_logps", response_logps)
    responses = GivenResponses({record.id: "no" for record in records[:40]})
    sampler = ScoringSampler(responses, PolicyScorer(vlm), share=1.0, seed=0)

    pairs = sampler.pairs(records[:40])

    assert batch_sizes == [16, 16, 8]
    assert [pair["score"] for pair in pairs] == [-6 / 2 - -6 / 3] * 40


# --- files


def read_ids(path):
    """Return the ids of the pairs of a file, as one text."""
    return "".join(json.loads(line)["id"] for line in path.read_text().splitlines())


def test_kept_and_dropped_pairs_are_written(some_records, tmp_path, capsys):
    """Training reads the kept ones, in the order of the records."""
    path = tmp_path / "pairs.jsonl"
    sampler = make_sampler(some_records)

    kept_records, kept_pairs = sample_best_pairs(sampler, some_records, path, group_size=4)

    assert read_ids(path) == "af"
    assert read_ids(tmp_path / "pairs.dropped.jsonl") == "bcde"
    assert [record.id for record in kept_records] == ["a", "f"]
    assert [pair["id"] for pair in kept_pairs] == ["a", "f"]
    assert len(list(tmp_path.iterdir())) == 2
    assert (
        "2 pairs kept of 4 with a usable rejected response, the lowest score is 3.0 by given; "
        f"4 dropped to {tmp_path / 'pairs.dropped.jsonl'}\n" in capsys.readouterr().err
    )

    read = read_records([path], TINY / "train" / "images")
    assert [record.rejected for record in read] == ["A1", "F1"]
    assert capsys.readouterr().err == ""


def test_without_a_dropped_pair_there_is_no_second_file(some_records, tmp_path, capsys):
    two_records = some_records[:2]
    path = tmp_path / "pairs.jsonl"

    sample_best_pairs(make_sampler(two_records, share=1.0), two_records, path, group_size=4)

    assert read_ids(path) == "ab"
    assert [file.name for file in tmp_path.iterdir()] == ["pairs.jsonl"]
    assert "; 0 dropped\n" in capsys.readouterr().err


def test_the_group_does_not_matter(some_records, tmp_path):
    contents = []
    for group_size in (1, 4, 6):
        path = tmp_path / f"{group_size}.jsonl"
        sampler = make_sampler(some_records)
        sample_best_pairs(sampler, some_records, path, group_size=group_size)
        contents.append(path.read_bytes() + dropped_path(path).read_bytes())

    assert contents[0] == contents[1] == contents[2]


def interrupt(records, path):
    """Sample in groups of two, and fail in the second group."""
    sampler = make_sampler(records)
    sampler.scorer.scores = {"A1": 7.0, "B1": 9.0}

    with pytest.raises(KeyError):
        sample_best_pairs(sampler, records, path, group_size=2)


def test_a_restart_gives_the_same_files(some_records, tmp_path):
    """Until all pairs are scored, neither file is there."""
    whole = tmp_path / "whole.jsonl"
    sample_best_pairs(make_sampler(some_records), some_records, whole, group_size=2)
    path = tmp_path / "pairs.jsonl"
    interrupt(some_records, path)
    assert not path.exists()
    assert not dropped_path(path).exists()

    sampler = make_sampler(some_records)
    sample_best_pairs(sampler, some_records, path, group_size=2, resume=True)

    assert sampler.scorer.nums_scored == [1, 1]  # d and f: the first group was done
    assert path.read_bytes() == whole.read_bytes()
    assert dropped_path(path).read_bytes() == dropped_path(whole).read_bytes()


@pytest.mark.parametrize("change", ["share", "seed", "scorer"])
def test_a_restart_with_other_settings_is_refused(some_records, tmp_path, change):
    path = tmp_path / "pairs.jsonl"
    interrupt(some_records, path)
    sampler = make_sampler(some_records)
    if change == "scorer":
        sampler.scorer.name = "another"
    else:
        setattr(sampler, change, 1)

    with pytest.raises(InputError, match="begun with other settings"):
        sample_best_pairs(sampler, some_records, path, group_size=2, resume=True)


def test_a_restart_with_another_reward_model_is_noticed(vlm):
    """What is compared covers the adapter and the scalar head."""
    policy = Policy(vlm.model, 2, 4)
    policy.add_scalar_head()
    scorer = RewardScorer(RewardModel(vlm, policy.scalar_head), "reward:DIR")
    metadata = scorer.metadata()

    other_head = copy.deepcopy(policy.scalar_head)
    other_head.weight.data += 1
    other_scorer = RewardScorer(RewardModel(vlm, other_head), "reward:DIR")
    assert other_scorer.metadata() != metadata

    next(iter(policy.parameters().values())).data += 1
    assert scorer.metadata() != metadata


def test_pairs_of_which_none_is_usable_are_refused(some_records, tmp_path):
    """Two records, whose rejected responses are empty and the chosen one."""
    unusable = [some_records[2], some_records[4]]
    path = tmp_path / "pairs.jsonl"

    with pytest.raises(InputError, match="none of 2 pairs has a usable rejected response"):
        sample_best_pairs(make_sampler(unusable), unusable, path, group_size=2)

    assert not path.exists()
