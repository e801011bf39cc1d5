"""What the decoder leaves out or computes twice changes nothing: the last layer where it is read, checkpointed layers."""
import pytest
import torch

from minialign.logprobs import response_logps, token_logps
from minialign.lora import Policy
from minialign.methods import encode_example, rows_of
from minialign.rows import hidden_states, pack


@pytest.fixture()
def rows(subject, records):
    """Five rows of unequal length, two responses each."""
    return rows_of(subject, [encode_example(subject, record, [record.chosen, "A red cup is here."]) for record in records[:5]])


def test_the_last_layer_computed_where_it_is_read_equals_the_whole_one(subject, rows):
    """At any positions behind what all rows have as prefix, in any order, repeated ones included: states and gradients are those of the full computation."""
    policy, found = Policy(subject.model, 4, 8), []
    batch = pack(subject.model, rows)
    B, T = batch.ids.shape
    first = min(batch.prefix)
    read = torch.stack([first + torch.randperm(T - first, generator=torch.Generator().manual_seed(row))[:7] for row in range(B)])
    read[:, 3] = read[:, 0]
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=.02)
    for states in (hidden_states(subject.model, batch)[torch.arange(B)[:, None], read], hidden_states(subject.model, pack(subject.model, rows), read=read)):
        (states ** 2).sum().backward()
        found.append((states.detach(), torch.cat([p.grad.flatten() for p in policy.parameters().values()])))
        for p in policy.parameters().values():
            p.grad = None
    (whole, gradient), (part, other) = found
    assert part.shape == (B, 7, whole.shape[-1]) and (part - whole).abs().max() < 2e-5 and (gradient - other).norm() / gradient.norm() < 1e-5


def test_nothing_of_the_last_layer_is_computed_where_it_is_not_read(subject, rows):
    """The last layer's MLP meets as many positions as the row with the most response tokens has; the others meet all."""
    seen = []
    for layer in subject.model.language_model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    response_logps(subject.model, rows)
    T = pack(subject.model, rows).ids.shape[1]
    longest = max(sum(len(response) for _, response in row.branches) for row in rows)
    assert seen == [T] * (len(seen) - 1) + [longest] and longest < T


def test_log_probs_are_those_of_all_positions(subject, rows):
    """`response_logps` against the head on every position's state, picked afterwards."""
    batch = pack(subject.model, rows)
    scored = batch.targets != -100
    slow = token_logps(hidden_states(subject.model, batch)[scored], subject.model.head, batch.targets[scored])
    fast = torch.cat(response_logps(subject.model, rows, per_token=True))
    assert (slow - fast).abs().max() < 2e-5


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_layers_give_the_same_gradient_and_are_run_twice(subject, rows, rank):
    policy, found, runs = Policy(subject.model, rank, 8), [], []
    for adapter in policy.adapters:
        torch.nn.init.normal_(adapter.lora_B, std=.02)
    subject.model.language_model.layers[1].register_forward_pre_hook(lambda *_: runs.append(1))
    for subject.model.language_model.checkpointing in (False, True):
        runs.clear()
        response_logps(subject.model, rows)[0].sum().backward()
        found.append((torch.cat([p.grad.flatten() for p in policy.parameters().values()]), len(runs)))
        for p in policy.parameters().values():
            p.grad = None
    assert torch.allclose(found[0][0], found[1][0], rtol=1e-5, atol=1e-6) and [n for _, n in found] == [1, 2]
    with torch.no_grad():
        runs.clear()
        response_logps(subject.model, rows)
    assert len(runs) == 1  # without a gradient there is nothing to compute again
