"""This module is contrastive distillation in its most obvious form, beyond the paper.

As in reference.py, every token has a sequence of its own, and nothing is cached. The fast form is
in methods/distillation.py.

Shapes: V vocabulary.
"""

import torch

from minialign.reference import next_token_logits


def contrastive_target(ref_model, prompt_ids, image_features, context, contrast, plausibility):
    """Compute q (V,), the distribution that the policy learns for the token after `context`.

    q(v) ~ p(v) * (p(v) / p_hidden(v))^contrast   if v is plausible, else 0

    Here p is the reference with the image, and p_hidden the reference without it.
    """
    # 1. What the reference predicts with the image, and with all image tokens masked.
    with torch.no_grad():
        logits = next_token_logits(ref_model, prompt_ids, image_features, context)[-1]
        hidden_logits = next_token_logits(
            ref_model, prompt_ids, image_features, context, visible=set()
        )[-1]
    p = torch.softmax(logits.double(), dim=0)
    p_hidden = torch.softmax(hidden_logits.double(), dim=0)

    # 2. Sharpen what the image adds, among the tokens that are plausible with the image.
    weights = torch.zeros_like(p)
    for token in range(len(p)):
        if p[token] >= plausibility * p.max():
            weights[token] = p[token] * (p[token] / p_hidden[token]) ** contrast
    return weights / weights.sum()


def targets_and_predictions(policy, ref_model, examples, contrast, plausibility):
    """Return (q, pi), both (V,), of each token of all examples.

    An example is (prompt_ids, image_features, response). The target q of each token comes from the
    reference, which reads the same response up to there.
    """
    pairs = []
    for prompt_ids, image_features, response in examples:
        for t in range(len(response)):
            context = response[:t]
            q = contrastive_target(
                ref_model, prompt_ids, image_features, context, contrast, plausibility
            )
            logits = next_token_logits(policy, prompt_ids, image_features, context)[-1]
            pairs.append((q, torch.softmax(logits, dim=0)))
    return pairs


def distillation_loss(policy, ref_model, examples, contrast, plausibility):
    """Compute the mean of KL(q || pi) over all tokens of all examples."""
    divergences = []
    pairs = targets_and_predictions(policy, ref_model, examples, contrast, plausibility)
    for q, pi in pairs:
        divergence = 0.0
        for token in range(len(q)):
            if q[token] > 0:
                divergence += q[token] * (q[token].log() - pi[token].log())
        divergences.append(divergence)
    return sum(divergences) / len(divergences)


def reverse_distillation_loss(policy, ref_model, examples, contrast, plausibility):
    """Compute the mean of KL(pi_S || q) - log pi(S) over all tokens of all examples.

    S holds the tokens with q(v) > 0, and pi_S is the policy restricted to them.
    """
    divergences = []
    pairs = targets_and_predictions(policy, ref_model, examples, contrast, plausibility)
    for q, pi in pairs:
        mass = pi[q > 0].sum()  # pi(S)
        divergence = -mass.log()
        for token in range(len(q)):
            if q[token] > 0:
                share = pi[token] / mass  # pi_S(token)
                divergence += share * (share.log() - q[token].log())
        divergences.append(divergence)
    return sum(divergences) / len(divergences)
