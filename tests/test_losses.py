"""Objectives: values worked by hand, limits, step 0, and the step's loss and gradient against the slow twins."""
import copy
import math

import pytest
import torch

from minialign import plain
from minialign.logprobs import response_logps
from minialign.lora import Policy
from minialign.losses import PAIR_LOSSES, dpo, ipo, margin, sft, slic
from minialign.methods import add_references, encode_example, preference, rows_of, supervised

LN2 = math.log(2)


def test_margin_by_hand():
    """Policy (-10, -12), reference (-11, -11.5): gains 1 and -0.5, h = 1.5."""
    assert margin(torch.tensor([[-10.0, -12.0]]), torch.tensor([[-11.0, -11.5]])).tolist() == [1.5]


@pytest.mark.parametrize("loss, beta, h, value, slope", [
    (dpo, .5, 2.0, math.log(1 + math.exp(-1)), -.5 / (1 + math.e)),  # -log s(1); derivative -beta (1 - s(1))
    (dpo, .1, 0.0, LN2, -.05),
    (ipo, .5, 3.0, 4.0, 4.0),  # (3 - 1)^2, 2 (3 - 1)
    (ipo, .1, 0.0, 25.0, -10.0),  # (0 - 5)^2, 2 (0 - 5)
    (slic, .5, 1.0, .5, -.5),
    (slic, .5, 3.0, 0.0, 0.0),  # beyond the hinge
    (slic, .2, 0.0, 1.0, -.2),
])
def test_values_and_slopes_by_hand(loss, beta, h, value, slope):
    h = torch.tensor([h], requires_grad=True)
    out = loss(h, beta)
    out.sum().backward()
    assert out.item() == pytest.approx(value, abs=1e-6) and h.grad.item() == pytest.approx(slope, abs=1e-6)


def test_limits():
    """Finite with finite gradients at margins of +-10,000 nats; DPO's loss tends to ln 2 for beta -> 0 and to -beta h far out."""
    for loss in PAIR_LOSSES.values():
        h = torch.tensor([-1e4, 1e4], requires_grad=True)
        out = loss(h, .1)
        out.sum().backward()
        assert out.isfinite().all() and h.grad.isfinite().all()
    assert dpo(torch.tensor([-1e4, 1e4]), .1).tolist() == [1e3, 0.0]
    assert dpo(torch.tensor([50.0]), 1e-9).item() == pytest.approx(LN2, abs=1e-6)


def test_sft_is_the_mean_over_tokens_not_over_responses():
    """(6 + 2) / (5 + 3) = 1; the mean of the responses' own means would be (6/5 + 2/3) / 2 = .93."""
    assert sft(torch.tensor([[-6.0], [-2.0]]), torch.tensor([[5], [3]])).item() == 1.0


def pairs(subject, records, n=3):
    """Examples of a true and a made-up response, with pictures."""
    return [encode_example(subject, record, [record.chosen, text]) for record, text in zip(records, ("A red cup is here.", "No.", "There is a dog. " * 4))][:n]


@pytest.mark.parametrize("rank", [0, 4])
def test_step_0(subject, records, rank):
    """Policy = reference: in the same layout the margin is exactly 0 and the loss ln 2; with cached references within the tolerance."""
    policy, examples = Policy(subject.model, rank, 8), pairs(subject, records)
    with policy.reference() as model:
        reference, _ = response_logps(model, rows_of(subject, examples))
    logps, counts = response_logps(subject.model, rows_of(subject, examples))
    assert torch.equal(margin(logps, reference), torch.zeros(3))
    assert torch.equal(dpo(margin(logps, reference), .1), -torch.nn.functional.logsigmoid(torch.zeros(3)))
    add_references(policy, subject, examples, batch=2)  # another layout than the step's
    loss, means = preference(subject, "dpo", 1.0)(examples, examples)
    tolerance = torch.maximum(1e-6 * reference.abs(), 1e-5 * counts).sum()
    assert abs(means["margin"]) <= tolerance and abs(loss.item() - LN2) <= tolerance
    assert means["logp_chosen"] == pytest.approx(means["ref_logp_chosen"], abs=float(tolerance))


def gradients(policy, value):
    parameters = list(policy.parameters().values())
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten()
                      for g, p in zip(torch.autograd.grad(value, parameters, allow_unused=True), parameters)])


def moved(policy, size):
    """Push every trainable weight away from the reference."""
    generator = torch.Generator().manual_seed(5)
    for p in policy.parameters().values():
        p.data += size * torch.randn(p.shape, generator=generator)
    return policy


@pytest.mark.parametrize("rank", [0, 4])
def test_a_dpo_step_equals_the_slow_twin(subject, records, rank):
    """Loss and gradient of a step with cached references against plain.dpo_loss: two models, four sequences a pair."""
    reference = copy.deepcopy(subject.model)
    policy, examples = moved(Policy(subject.model, rank, 8), .003), pairs(subject, records)
    for example in examples:  # short responses: the twin runs a sequence for every token
        example.responses = [response[-6:] for response in example.responses]
    add_references(policy, subject, examples)
    loss, means = preference(subject, "dpo", .3)(examples, examples)
    slow = plain.dpo_loss(subject.model, reference, [(e.prompt, subject.look(e.paths), *e.responses) for e in examples], .3)
    assert abs(means["margin"]) > 1e-4  # the policy has moved: not a comparison of ln 2 with ln 2
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    ours, theirs = gradients(policy, loss), gradients(policy, slow)
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def test_a_supervised_step_equals_the_slow_twin(subject, records):
    policy, examples = Policy(subject.model, 0, 1), pairs(subject, records)
    for example in examples:
        example.responses = [response[-6:] for response in example.responses]
    examples[0].responses[0] = examples[0].responses[0][-2:]  # unequal lengths: a mean over tokens
    loss, _ = supervised(subject)(examples, examples)
    slow = plain.sft_loss(subject.model, [(e.prompt, subject.look(e.paths), e.responses[0]) for e in examples])
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    ours, theirs = gradients(policy, loss), gradients(policy, slow)
    assert (ours - theirs).norm() / theirs.norm() <= 1e-5


def test_what_a_step_logs_is_the_mean_over_its_pairs(subject, records):
    """By hand from the log-probs themselves: margin is beta h, accuracy counts h > 0 and a tie as half."""
    policy, examples = Policy(subject.model, 0, 1), pairs(subject, records)
    logps, _ = response_logps(subject.model, rows_of(subject, examples))
    for example, own, shift in zip(examples, logps.detach(), (2.0, -1.0, 0.0)):
        example.reference = own - torch.tensor([shift, 0.0])  # h = 2, -1, 0
    loss, means = preference(subject, "slic", .5)(examples, examples)
    assert means["margin"] == pytest.approx(.5 / 3, abs=1e-4)
    assert loss.item() == pytest.approx((0 + 1.5 + 1) / 3, abs=1e-4)
    assert means["logp_chosen"] == pytest.approx(logps[:, 0].mean().item(), rel=1e-5)
    assert means["ref_logp_chosen"] == pytest.approx(logps[:, 0].mean().item() - 1 / 3, rel=1e-5)
    examples[2].reference = logps[2].detach()
    assert preference(subject, "dpo", .5)(examples[:2], examples[:2])[1]["accuracy"] == pytest.approx(.5)
