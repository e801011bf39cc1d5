"""Test what RLOO and PPO share: how rewards are normalized, the KL at step 0, and the log."""

import math

import pytest
import torch
from method_runs import count_vowels, make_run, script_responses, sum_over_microbatches

from minialign import reference
from minialign.methods.policy_gradient import reward_statistics


class FixedReward:
    """A reward model with known scores, which remembers the question."""

    def __init__(self, scores):
        self.scores = scores
        self.questions = []

    def score(self, records, texts):
        """Return the known scores (n, 1)."""
        self.questions.append((records, texts))
        return torch.tensor(self.scores)[:, None]


def test_reward_statistics_by_hand(records):
    """Scores 1, 2, 6 of the chosen responses: mean 3, variance (4 + 1 + 9) / 3.

    A reward that never varies, or by rounding alone, has no scale. Divided by 1e-6, rewards of
    a few hundredths once became 45,000, beside which the KL penalty was nothing.
    """
    reward_model = FixedReward([1.0, 2.0, 6.0])
    constant_reward_model = FixedReward([1.0, 1.0, 1.0 + 2e-7])

    statistics = reward_statistics(reward_model, records[:3])
    constant_statistics = reward_statistics(constant_reward_model, records[:3])

    chosen_texts = [[record.chosen] for record in records[:3]]
    assert statistics == (3.0, pytest.approx(math.sqrt(14 / 3)))
    assert reward_model.questions == [(records[:3], chosen_texts)]
    assert constant_statistics == (pytest.approx(1.0), 1.0)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("name", ["rloo", "ppo", "grpo"])
def test_there_is_no_kl_at_step_0(vlm, records, rank, name):
    """Policy and reference agree to the bit, although the policy's scores come from the cache.

    Advantages add up to 0, so the loss of RLOO and GRPO is 0 and PPO's is that of its values.
    """
    run = make_run(name, vlm, records, rank=rank)
    examples, metrics = run.method.collect(run.examples, step=0)

    loss, loss_metrics = sum_over_microbatches(run.method, examples)

    assert metrics["kl"] == 0.0
    value_loss = loss_metrics.get("value_loss", 0.0)
    assert loss.item() == pytest.approx(0.1 * value_loss, abs=1e-6)


@pytest.mark.parametrize("name, k, num_ended", [("rloo", 4, 6), ("ppo", 1, 1)])
def test_metrics_of_rollouts_by_hand(vlm, records, monkeypatch, name, k, num_ended):
    """Rewards raw and normalized, KL a response, entropy a token, length, and how many ended."""
    run = make_run(name, vlm, records, num_records=2, reward_statistics=(2.0, 4.0))
    run.move_policy()
    first, second = (example.record.id for example in run.examples)
    texts = {
        first: ["A cup.", "[No", "A red dog.", "Yes."][:k],
        second: ["[Two", "A pen.", "A", "No."][:k],
    }
    script_responses(monkeypatch, vlm, texts)

    examples, metrics = run.method.collect(run.examples, step=0)

    num_responses = 2 * k
    num_tokens = 0
    policy_logp = 0.0
    ref_logp = 0.0
    with torch.no_grad():
        for question, example in zip(run.questions(examples), examples, strict=True):
            for ids in example.responses:
                num_tokens += len(ids)
                policy_logp += float(reference.response_logp(vlm.model, *question, ids))
                ref_logp += float(reference.response_logp(run.ref_model, *question, ids))
    all_texts = [*texts[first], *texts[second]]
    raw_reward = sum(count_vowels(text) for text in all_texts) / num_responses
    assert metrics["reward_raw"] == pytest.approx(raw_reward)
    assert metrics["reward"] == pytest.approx((raw_reward - 2) / 4)
    assert metrics["kl"] == pytest.approx((policy_logp - ref_logp) / num_responses, rel=1e-4)
    assert abs(metrics["kl"]) > 0.01
    assert metrics["entropy"] == pytest.approx(-policy_logp / num_tokens, rel=1e-5)
    assert metrics["length"] == num_tokens / num_responses
    assert metrics["ended"] == num_ended / num_responses
