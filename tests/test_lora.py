"""Adapters and the reference: off is the base to the bit, before and after training; nothing but what is named is touched."""

import copy

import pytest
import torch
from torch.nn import functional as F

from minialign.data.packing import pack
from minialign.logprobs import response_logps
from minialign.methods.base import add_reference_logps, encode_example, pack_examples
from minialign.methods.preference import PreferenceMethod, SupervisedMethod
from minialign.models import decoder
from minialign.models.lora import LORA_TARGETS, LoRALinear, lora_linears
from minialign.models.policy import Policy
from minialign.training.loop import Schedule, train


def moved(policy, size=0.02):
    """Every trainable weight pushed away from where it began."""
    generator = torch.Generator().manual_seed(5)
    for p in policy.parameters().values():
        p.data += size * torch.randn(p.shape, generator=generator)
    return policy


def scores(vlm, records):
    """A few log-probs (2, 2): what the model in place says."""
    examples = [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:2]]
    with torch.no_grad():
        return response_logps(vlm.model, pack_examples(vlm, examples))[0]


def test_an_adapter_by_hand():
    """y = W x + (alpha / rank) B A x: W = 2, A = (1, 3), B = (1, -1)^T at rank 2 and alpha 8 give 2 x + 4 (1 - 3) x = -6 x; rsLoRA scales by alpha / sqrt(rank)."""
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(2.0)
    adapter = LoRALinear(linear, 2, 8, torch.Generator())
    adapter.lora_A.data, adapter.lora_B.data = (
        torch.tensor([[1.0], [3.0]]),
        torch.tensor([[1.0, -1.0]]),
    )
    assert adapter(torch.tensor([[1.0]])).item() == -6.0 and adapter.merged().weight.item() == -6.0
    adapter.enabled = False
    assert adapter(torch.tensor([[1.0]])).item() == 2.0
    assert LoRALinear(linear, 4, 8, torch.Generator(), rslora=True).scaling == 4.0


@pytest.mark.parametrize("again", [False, True])
def test_layers_of_one_input_are_what_they_are_alone(again):
    """Outputs and all gradients of three adapters that share x, one with a bias, against autograd over x W^T + b + scale (x A^T) B^T; x kept, or made again."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for out, bias, rank in ((5, True, 2), (7, False, 3), (5, False, 2)):
        layers.append(
            LoRALinear(
                torch.nn.Linear(6, out, bias=bias).requires_grad_(False), rank, 4, generator
            ).double()
        )
        layers[-1].lora_B.data.normal_(generator=generator)
    z = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    slopes = [
        torch.randn(2, 4, len(layer.lora_B), generator=generator, dtype=torch.float64)
        for layer in layers
    ]

    def gradients(outputs, z):
        loss = sum((y * slope).sum() for y, slope in zip(outputs, slopes))
        return torch.autograd.grad(
            loss, [z, *(weight for layer in layers for weight in (layer.lora_A, layer.lora_B))]
        )

    own, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    ours = lora_linears(own.tanh(), layers, (torch.tanh, own) if again else None)
    theirs = [
        F.linear(other.tanh(), layer.base.weight, layer.base.bias)
        + layer.scaling * other.tanh() @ layer.lora_A.T @ layer.lora_B.T
        for layer in layers
    ]
    for a, b in zip(
        [*ours, *gradients(ours, own)], [*theirs, *gradients(theirs, other)], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # A's and B's come by way of fp32


def test_the_second_gradient_is_not_silently_wrong():
    """backward is written by hand: asking to differentiate it again must not give a number."""
    adapter, x = LoRALinear(torch.nn.Linear(6, 5), 2, 4, torch.Generator()), torch.randn(3, 6)
    (slope,) = torch.autograd.grad(
        lora_linears(x, [adapter])[0].square().sum(), adapter.lora_B, create_graph=True
    )
    with pytest.raises(RuntimeError):
        torch.autograd.grad(slope.sum(), adapter.lora_A)


def gradients_and_memory(vlm, rows, policy):
    """All gradients of the summed log-probs of rows, and the bytes that their graph keeps."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: (
            kept.setdefault(t.untyped_storage().data_ptr(), (t.untyped_storage().nbytes(), t)) and t
        ),
        lambda t: t,
    ):
        loss = response_logps(vlm.model, rows)[0].sum()
    loss.backward()
    found = {name: p.grad for name, p in policy.parameters().items()}
    for p in policy.parameters().values():
        p.grad = None
    return found, sum(size for size, _ in kept.values())


def test_the_whole_model_is_its_plain_expressions_and_keeps_less(vlm, records, monkeypatch):
    """The gradients of a model whose every projection is x W^T + scale (x A^T) B^T for itself; and, of the same shared ones, what is kept if nothing is made again.

    That is, for each slot, the first norm's output of every layer, and the joined attention, the second norm's output and the gated product of all but the
    last, of which only what is read is computed.
    """
    policy, c = moved(Policy(vlm.model, 4, 8)), vlm.model.config.text
    rows = pack_examples(
        vlm, [encode_example(vlm, record, [record.chosen, "No."]) for record in records[:3]]
    )
    plain = lambda x, layers, recompute_from=None: [
        layer.base(x) + layer.scaling * x @ layer.lora_A.T @ layer.lora_B.T for layer in layers
    ]  # noqa: E731
    found, size = gradients_and_memory(vlm, rows, policy)
    monkeypatch.setattr(decoder, "lora_linears", plain)
    wanted, _ = gradients_and_memory(vlm, rows, policy)
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() < 1e-5 * gradient.norm(), name
    monkeypatch.setattr(
        decoder, "lora_linears", lambda x, layers, recompute_from=None: lora_linears(x, layers)
    )
    _, whole = gradients_and_memory(vlm, rows, policy)
    slots = pack(vlm.model, rows).ids.numel()
    assert whole - size >= 4 * slots * (
        c.num_layers * c.hidden_size
        + (c.num_layers - 1) * (2 * c.hidden_size + c.intermediate_size)
    )


def test_what_can_be_made_again_is_not_kept():
    """Of x (N, in), the input that an adapter's gradient needs, nothing is saved where it can be made from something else."""
    adapter, x = (
        LoRALinear(torch.nn.Linear(64, 8), 2, 4, torch.Generator()),
        torch.randn(50, 64, requires_grad=True),
    )
    for again, kept in ((None, True), ((torch.tanh, x), False)):
        saved, y = [], x.tanh()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: saved.append(tensor.data_ptr()) or tensor, lambda tensor: tensor
        ):
            lora_linears(y, [adapter], again)
        assert (y.data_ptr() in saved) == kept and (x.data_ptr() in saved) != kept


def test_only_the_decoders_seven_projections_get_adapters(vlm):
    """The vision tower has a q_proj, k_proj and v_proj too: it must not get one by its suffix."""
    policy = Policy(vlm.model, 2, 4)
    names = {name for name, module in vlm.model.named_modules() if isinstance(module, LoRALinear)}
    layers = range(vlm.model.config.text.num_layers)
    blocks = dict.fromkeys(LORA_TARGETS[:4], "self_attn") | dict.fromkeys(LORA_TARGETS[4:], "mlp")
    assert names == {
        f"language_model.layers.{n}.{block}.{name}"
        for n in layers
        for name, block in blocks.items()
    }
    assert all(
        ".lora_" in name or name.startswith("multi_modal_projector.")
        for name in policy.parameters()
    )


def test_rank_0_trains_decoder_head_and_projector_and_nothing_else(vlm):
    names = set(Policy(vlm.model, 0, 1).parameters())
    assert names == {
        name
        for name, _ in vlm.model.named_parameters()
        if name.startswith(("language_model.", "lm_head.", "multi_modal_projector."))
    }


def test_step_0_is_the_base_to_the_bit_and_the_seed_decides_a(vlm, records):
    before, other = scores(vlm, records), copy.deepcopy(vlm.model)
    policy = Policy(vlm.model, 4, 8, seed=3)
    assert torch.equal(scores(vlm, records), before)
    same, another = (
        Policy(model, 4, 8, seed=seed).parameters()
        for model, seed in ((copy.deepcopy(other), 3), (other, 4))
    )
    name = "language_model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(policy.parameters()[name], same[name]) and not torch.equal(
        same[name], another[name]
    )


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_base_to_the_bit_whatever_the_policy_became(vlm, records, rank):
    """And the policy comes back as it was, also after an exception, with gradients recorded outside only."""
    before = scores(vlm, records)
    policy = moved(Policy(vlm.model, rank, 8))
    after = scores(vlm, records)
    assert not torch.equal(before, after)
    with policy.reference() as model:
        assert model is vlm.model and not torch.is_grad_enabled()
        assert torch.equal(scores(vlm, records), before)
    with pytest.raises(RuntimeError, match="on purpose"):
        with policy.reference():
            raise RuntimeError("on purpose")
    assert torch.is_grad_enabled() and torch.equal(scores(vlm, records), after)


def test_the_reference_keeps_parameter_names_and_order(vlm, records):
    """Swapping modules in and out must not reorder or rename what an optimiser and a checkpoint rely on."""
    policy = Policy(vlm.model, 0, 1)
    before = list(policy.parameters())
    with policy.reference():
        assert not policy.parameters()
    assert list(policy.parameters()) == before


@pytest.mark.parametrize("rank", [0, 4])
def test_training_moves_the_policy_alone(vlm, records, tmp_path, rank):
    """Three DPO steps: every trainable weight moves (A from step 2 on), the reference and the tower are bit-equal to before."""
    before, tower = scores(vlm, records), copy.deepcopy(vlm.model.vision_tower.state_dict())
    policy = Policy(vlm.model, rank, 8)
    start = {name: p.detach().clone() for name, p in policy.parameters().items()}
    examples = [
        encode_example(vlm, record, [record.chosen, "A red cup is here."]) for record in records[:4]
    ]
    add_reference_logps(policy, vlm, examples)
    cached = torch.stack([example.ref_logps for example in examples])
    train(
        policy,
        PreferenceMethod(vlm, "dpo", 0.3),
        examples,
        Schedule(3, 4, 1e-3, 1e-3, 0),
        tmp_path,
    )
    assert all(not torch.equal(start[name], p) for name, p in policy.parameters().items())
    with policy.reference():
        assert torch.equal(scores(vlm, records), before)
    assert not torch.equal(scores(vlm, records), before)
    add_reference_logps(policy, vlm, examples)
    assert torch.equal(torch.stack([example.ref_logps for example in examples]), cached)
    assert all(
        torch.equal(tower[name], value)
        for name, value in vlm.model.vision_tower.state_dict().items()
    )
    assert all(p.grad is None and not p.requires_grad for p in vlm.model.vision_tower.parameters())


def test_layers_behind_the_feature_layer_get_no_gradient(vlm, records):
    """Feature layer -2: even with the tower set free, its last layer and the final norm are never computed."""
    tower, config = vlm.model.vision_tower.requires_grad_(True), vlm.model.config.vision
    tower(torch.randn(1, 3, config.image_size, config.image_size)).square().sum().backward()
    unused = {name for name, p in tower.named_parameters() if p.grad is None}
    assert unused == {
        name
        for name, _ in tower.named_parameters()
        if name.startswith((f"encoder.layers.{config.num_layers - 1}.", "post_layernorm."))
    }


def test_the_projector_has_its_own_rate_in_its_own_group(vlm):
    policy = Policy(vlm.model, 2, 4)
    rest, projector = policy.parameter_groups(1e-6, 2e-6)
    assert (rest["lr"], projector["lr"]) == (1e-6, 2e-6)
    assert [id(p) for p in projector["params"]] == [
        id(p) for p in vlm.model.multi_modal_projector.parameters()
    ]
    assert len(rest["params"]) + len(projector["params"]) == len(policy.parameters())
    assert (
        len(
            Policy(copy.deepcopy(vlm.model), 0, 1, train_projector=False).parameter_groups(1.0, 1.0)
        )
        == 1
    )


def test_a_trained_projector_computes_in_the_models_dtype(vlm, records):
    """Its weights are fp32 masters, as adapters' are; what it computes is bfloat16, and has a gradient."""
    vlm.model.bfloat16()
    projector = Policy(vlm.model, 2, 4).model.multi_modal_projector
    (vectors,) = vlm.model.project_image_features(vlm.encode_images(records[0].paths))
    vectors.float().sum().backward()
    assert vectors.dtype == torch.bfloat16 and {
        (p.dtype, p.grad.dtype) for p in projector.parameters()
    } == {(torch.float32, torch.float32)}


@pytest.mark.parametrize("rank", [0, 4])
def test_small_steps_move_a_bfloat16_model(vlm, records, tmp_path, rank):
    """The paper's rates in bfloat16, its usual dtype: the next number after 0.02 is 0.00012 away, so in bfloat16 itself
    updates of 2e-6 would be rounded off for good: what is trained must be kept in fp32."""
    vlm.model.bfloat16()
    policy = Policy(vlm.model, rank, 8)
    before = {
        name: p.detach().clone() for name, p in policy.parameters().items() if "lora" not in name
    }
    examples = [encode_example(vlm, record, [record.chosen]) for record in records[:2]]
    train(policy, SupervisedMethod(vlm), examples, Schedule(20, 2, 1e-6, 2e-6, 0), tmp_path)
    moved = sum(
        int((before[name] != p).sum()) for name, p in policy.parameters().items() if name in before
    )
    assert moved > 0.5 * sum(p.numel() for p in before.values())
