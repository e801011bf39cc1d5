"""Sampling a token by inverting the cumulative distribution, worked by hand."""

import torch

from minialign.generation.sample_tokens import keep_nucleus, sample_tokens

BELOW_ONE = 1 - 2**-24  # the largest float32 that a uniform random number can be


def test_the_token_is_the_one_whose_interval_holds_the_number():
    """Probabilities 0.5, 0.3, 0.2: below 0.5 it is token 0, below 0.8 token 1, then token 2."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().double().expand(6, 3)
    uniforms = torch.tensor([0.0, 0.499, 0.501, 0.799, 0.801, BELOW_ONE])

    assert sample_tokens(logits, uniforms).tolist() == [0, 0, 1, 1, 2, 2]
    # Greedy: without numbers, or at temperature 0.
    assert sample_tokens(logits, None).tolist() == [0] * 6
    assert sample_tokens(logits, uniforms, temperature=0).tolist() == [0] * 6


def test_a_token_of_probability_zero_is_never_sampled():
    """The largest and the smallest random number, at a distribution with zeros at both ends."""
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]]).expand(2, 4)

    tokens = sample_tokens(logits, torch.tensor([0.0, BELOW_ONE]))

    assert tokens.tolist() == [1, 2]


def test_temperature_by_hand():
    """Odds of 4 : 1 are 2 : 1 at temperature 2: the boundary moves from 0.8 to 2/3."""
    logits = torch.tensor([[4.0, 1.0]]).log().expand(2, 2)

    at_1 = sample_tokens(logits, torch.tensor([0.7, 0.7]))
    at_2 = sample_tokens(logits, torch.tensor([0.66, 0.67]), temperature=2.0)

    assert at_1.tolist() == [0, 0]
    assert at_2.tolist() == [0, 1]


def test_the_lowest_temperature_is_greedy():
    """Divided by it, the logits themselves would be infinite."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])

    assert sample_tokens(logits, torch.tensor([0.9]), temperature=1e-310).tolist() == [1]


def test_top_p_by_hand():
    """Probabilities 0.2, 0.5, 0.3 with top_p 0.6: 0.5 alone is too little, 0.5 + 0.3 is enough.

    What is kept is renormalized to 0, 5/8, 3/8.
    """
    logits = torch.tensor([[0.2, 0.5, 0.3]]).log().expand(4, 3)

    two_kept = sample_tokens(logits, torch.tensor([0.0, 0.62, 0.63, 0.99]), top_p=0.6)
    one_kept = sample_tokens(logits, torch.tensor([0.0, 0.5, 0.9, 0.99]), top_p=0.4)
    all_kept = sample_tokens(logits, torch.tensor([0.1, 0.3, 0.75, 0.99]), top_p=1.0)

    assert two_kept.tolist() == [1, 1, 2, 2]
    assert one_kept.tolist() == [1, 1, 1, 1]
    assert all_kept.tolist() == [0, 1, 2, 2]


def test_frequencies_follow_softmax():
    """40,000 samples: each of six counts is within 5 standard deviations of its expectation.

    False alarm for another seed: 6 * 5.7e-7, about 1 in 290,000.
    """
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    logits = torch.randn(6, generator=generator)
    uniforms = torch.rand(n, generator=generator)

    tokens = sample_tokens(logits.expand(n, 6), uniforms, temperature=0.7)

    probs = torch.softmax(logits / 0.7, 0)
    counts = torch.bincount(tokens, minlength=6)
    deviations = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() <= 5 * deviations).all()


def test_top_p_reached_exactly_keeps_no_further_token():
    """These probabilities and their sums are exact: 1/2 is enough for 1/2, 1/2 + 1/4 for 3/4."""
    probs = torch.tensor([[0.125, 0.5, 0.0625, 0.25, 0.0625]], dtype=torch.float64)

    assert keep_nucleus(probs, 0.5).tolist() == [[0, 0.5, 0, 0, 0]]
    assert keep_nucleus(probs, 0.75).tolist() == [[0, 0.5, 0, 0.25, 0]]
    assert keep_nucleus(probs, 0.876).tolist()[0][:2] == [0.125, 0.5]
