"""Choose the next token of each row from its logits."""

import torch


def contrast_logits(logits, contrast):
    """Combine logits (B, V) of paired rows, image and image masked, as `SamplingParams` says."""
    log_probs = torch.log_softmax(logits, -1).unflatten(0, (-1, 2))  # (B / 2, 2, V)
    with_image, without_image = log_probs.unbind(1)
    contrasted = (1 + contrast) * with_image - contrast * without_image
    # Both rows of a pair go on with the same token.
    return contrasted.repeat_interleave(2, 0)


def sample_tokens(logits, uniforms, *, temperature=1.0, top_p=1.0):
    """Sample a token for each row of logits (B, V) with given random numbers (B,) from U(0, 1).

    The cumulative probabilities divide [0, 1) into intervals, one for each token and as long as
    its probability. The token whose interval holds the random number is taken. The numbers are the
    only source of randomness, so that a restart, or another batch around it, samples the same
    response again, up to rounding of the logits. Without numbers, or at temperature 0, the most
    likely token is taken.
    """
    if uniforms is None or temperature == 0:
        return logits.argmax(-1)
    # The largest logit becomes 0, which no temperature, however low, makes infinite.
    below_largest = logits.double() - logits.amax(-1, keepdim=True)  # (B, V)
    probs = torch.softmax(below_largest / temperature, -1)  # (B, V)
    if top_p < 1:
        probs = keep_nucleus(probs, top_p)
    cumulative = probs.cumsum(-1)
    # The total is not exactly 1, because of rounding and of top_p.
    targets = uniforms.to(probs)[:, None] * cumulative[:, -1:]  # (B, 1)
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


def keep_nucleus(probs, top_p):
    """Zero all probabilities (B, V) but the smallest set of largest ones that sums to `top_p`."""
    ranked, order = probs.sort(-1, descending=True)
    sum_before = ranked.cumsum(-1) - ranked  # of all tokens that are more likely
    ranked = ranked.masked_fill(sum_before >= top_p, 0)
    return torch.zeros_like(probs).scatter(-1, order, ranked)
