"""These tests hold what online methods sample equal to its reference.

Responses are equal token for token: both sides sample with the same numbers. A number within
rounding (1e-6) of a boundary between two tokens could still give another token. Log-probs, values
and advantages agree within rounding.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from method_runs import BETA, VowelReward, count_vowels, make_run

from minialign import reference_online
from minialign.generation.decoding import SamplingParams
from minialign.methods.base import encode_example
from minialign.methods.online import OnlinePairs
from minialign.methods.policy_gradient import reward_statistics
from minialign.utils.seeding import seeded_generator

STEP = 3
REWARD_STATISTICS = (2.0, 1.5)


def draw_uniforms(record, sampling, k):
    """Return the numbers that sampling uses for k responses to a record in this step."""
    uniforms = []
    for i in range(k):
        generator = seeded_generator(sampling.seed, record.id, STEP, i)
        uniforms.append(torch.rand(sampling.max_new_tokens, generator=generator))
    return uniforms


# --- Online and mixed DPO


def prefer_vowels(record, first, second):
    """Annotate two texts: the one with more vowels is better."""
    if count_vowels(first) == count_vowels(second):
        return None
    return int(count_vowels(second) > count_vowels(first))


class VowelAnnotator:
    """The annotator `prefer_vowels` with the interface of pairs/annotators.py."""

    counters = Counter()  # it counts nothing

    def compare(self, records, firsts, seconds):
        verdicts = []
        for record, first, second in zip(records, firsts, seconds, strict=True):
            verdicts.append(prefer_vowels(record, first, second))
        return verdicts


@pytest.mark.parametrize("mix", [0.0, 0.5])
def test_online_and_mixed_pairs_equal_the_reference(vlm, records, mix):
    """Twelve prompts, among them ties, wins of either side and, if mixed, pairs of the data."""
    run = make_run("mixed-dpo", vlm, records)
    run.move_policy()
    sampling = SamplingParams(max_new_tokens=6, seed=7)
    preference_records = [replace(record, rejected="No cat.") for record in records[:12]]
    examples = []
    for record in preference_records:
        examples.append(encode_example(vlm, record, [record.chosen, record.rejected]))
    collector = OnlinePairs(run.policy, vlm, VowelAnnotator(), sampling, mix=mix)

    collected, metrics = collector.collect(examples, STEP)

    collected_responses = {example.record.id: example.responses for example in collected}
    num_offline = 0
    for record in preference_records:
        coin = torch.rand(1, generator=seeded_generator(sampling.seed, record.id, STEP, "mix"))
        num_offline += float(coin) < mix
        pair = reference_online.mixed_pair(
            vlm,
            record,
            prefer_vowels,
            draw_uniforms(record, sampling, 2),
            coin=float(coin),
            mix=mix,
        )
        if pair is None:
            assert record.id not in collected_responses
        else:
            assert collected_responses[record.id] == list(pair)
    assert metrics["offline"] == num_offline / 12
    assert (num_offline > 0) == (mix > 0)
    assert 0 < len(collected) < 12


@pytest.mark.parametrize(
    "first_text, second_text, expected",
    [
        ("A dog.", "An aloe.", ([2], [1])),  # the second has more vowels
        ("An aloe.", "A dog.", ([1], [2])),
        ("A dog.", "A cup.", None),  # as many
        ("A dog.", " A dog. ", None),  # equal but for white space
    ],
)
def test_online_pair_worked_by_hand(monkeypatch, first_text, second_text, expected):
    samples = [([1], first_text), ([2], second_text)]
    monkeypatch.setattr(reference_online, "sample_response", lambda *args: samples.pop(0))

    pair = reference_online.online_pair(None, None, prefer_vowels_of_different_texts, [None, None])

    assert pair == expected


def prefer_vowels_of_different_texts(record, first, second):
    """Annotate as `prefer_vowels`, and fail if the texts are equal."""
    assert first != second
    return prefer_vowels(record, first, second)


def test_image_placeholder_that_the_policy_spells_is_no_part_of_the_text(vlm, records, monkeypatch):
    ids = vlm.tokenizer.encode("A <") + vlm.tokenizer.encode("image> cup.", after="text")
    assert "<image>" in vlm.tokenizer.decode(ids)
    monkeypatch.setattr(reference_online, "generate", lambda *args: ids)

    sampled_ids, text = reference_online.sample_response(vlm, records[0], [])

    assert sampled_ids == ids
    assert text == "A  cup."


# --- Rollouts


def reference_rollouts(run, record, k, value_head=None):
    """Return the k rollouts of the reference for a record."""
    rollouts = []
    for uniforms in draw_uniforms(record, run.method.sampling, k):
        rollout = reference_online.sample_rollout(
            run.vlm,
            run.ref_model,
            record,
            uniforms,
            score=lambda record, text: float(count_vowels(text)),
            statistics=REWARD_STATISTICS,
            value_head=value_head,
        )
        rollouts.append(rollout)
    return rollouts


def test_reward_statistics_equal_the_reference(records):
    chosen_rewards = [float(count_vowels(record.chosen)) for record in records[:20]]

    statistics = reward_statistics(VowelReward(), records[:20])

    expected = reference_online.reward_statistics(chosen_rewards)
    assert statistics == pytest.approx(expected, rel=1e-6)  # fp32 against float64


def test_rloo_rollouts_equal_the_reference(vlm, records):
    run = make_run("rloo", vlm, records, num_records=3, reward_statistics=REWARD_STATISTICS)
    run.move_policy()

    examples, _ = run.method.collect(run.examples, STEP)

    for example in examples:
        rollouts = reference_rollouts(run, example.record, k=4)
        check_scores(example, rollouts)
        advantages = reference_online.rloo_rollout_advantages(rollouts, BETA)
        assert example.rollout.advantages.tolist() == pytest.approx(advantages, abs=1e-4)
        assert max(advantages) > 0.1


def test_ppo_rollouts_equal_the_reference(vlm, records):
    run = make_run("ppo", vlm, records, num_records=3, reward_statistics=REWARD_STATISTICS)
    run.move_policy()

    examples, _ = run.method.collect(run.examples, STEP)

    all_rollouts = []
    fast_advantages = []
    fast_returns = []
    for example in examples:
        rollouts = reference_rollouts(run, example.record, 1, run.policy.scalar_head)
        check_scores(example, rollouts)
        old_values = example.rollout.old_values[0].tolist()
        assert old_values == pytest.approx(rollouts[0].values, abs=1e-4)
        all_rollouts += rollouts
        fast_advantages += example.rollout.advantages[0].tolist()
        fast_returns += example.rollout.returns[0].tolist()
    advantages, returns = reference_online.ppo_rollout_advantages(all_rollouts, BETA)
    assert fast_advantages == pytest.approx(advantages, abs=1e-4)
    assert fast_returns == pytest.approx(returns, abs=1e-4)
    assert max(advantages) > 1  # they are whitened


def check_scores(example, rollouts):
    """Compare the responses, rewards and token log-probs of an example with the reference's."""
    for i, rollout in enumerate(rollouts):
        assert example.responses[i] == rollout.response
        assert float(example.rollout.normalized_rewards[i]) == pytest.approx(
            rollout.reward, abs=1e-6
        )
        old_logps = example.rollout.old_logps[i].tolist()
        ref_logps = example.rollout.ref_token_logps[i].tolist()
        # 1e-5 nats a token is the tolerance of log-probs everywhere.
        assert old_logps == pytest.approx(rollout.logps, abs=1e-5)
        assert ref_logps == pytest.approx(rollout.ref_logps, abs=1e-5)
        assert old_logps != pytest.approx(ref_logps, abs=1e-3)
