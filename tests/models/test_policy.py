"""The policy: it trains what it names and nothing else, and it is its own reference, to the bit."""

import copy

import pytest
import torch
from model_helpers import move_weights, pack_records

from minialign.generation.decoding import SamplingParams, generate
from minialign.logprobs import response_hidden_states, response_logps
from minialign.methods.base import add_reference_logps, encode_example
from minialign.methods.preference import PreferenceMethod, SupervisedMethod
from minialign.models.lora import LORA_TARGETS, LoRALinear
from minialign.models.policy import Policy
from minialign.training.loop import Schedule, train


def some_logps(vlm, records):
    """Return a few log-probs (2, 2) of the model as it is."""
    with torch.no_grad():
        logps, _ = response_logps(vlm.model, pack_records(vlm, records[:2], "No."))
    return logps


def copy_of_parameters(policy):
    """Return a copy of each trainable parameter by name."""
    copies = {}
    for name, parameter in policy.parameters().items():
        copies[name] = parameter.detach().clone()
    return copies


def num_bytes(module):
    """Return the bytes of all parameters of a module."""
    return sum(parameter.nbytes for parameter in module.parameters())


# --- what is trained ---


def test_only_the_seven_projections_of_the_decoder_get_adapters(vlm):
    """The vision tower has a q_proj, k_proj and v_proj too, which must not get one."""
    policy = Policy(vlm.model, 2, 4)

    expected_names = set()
    for layer_idx in range(vlm.model.config.text.num_layers):
        layer_name = f"language_model.layers.{layer_idx}"
        for target in LORA_TARGETS[:4]:
            expected_names.add(f"{layer_name}.self_attn.{target}")
        for target in LORA_TARGETS[4:]:
            expected_names.add(f"{layer_name}.mlp.{target}")
    names = set()
    for name, module in vlm.model.named_modules():
        if isinstance(module, LoRALinear):
            names.add(name)
    assert names == expected_names
    for name in policy.parameters():
        assert ".lora_" in name or name.startswith("multi_modal_projector.")


def test_rank_0_trains_decoder_head_and_projector_and_nothing_else(vlm):
    policy = Policy(vlm.model, 0, 1)

    trained = ("language_model.", "lm_head.", "multi_modal_projector.")
    expected_names = {name for name, _ in vlm.model.named_parameters() if name.startswith(trained)}
    assert set(policy.parameters()) == expected_names


def test_the_projector_has_its_own_learning_rate(vlm):
    policy = Policy(vlm.model, 2, 4)

    others, projector = policy.parameter_groups(1e-6, 2e-6)

    assert others["lr"] == 1e-6
    assert projector["lr"] == 2e-6
    expected_ids = [id(parameter) for parameter in vlm.model.multi_modal_projector.parameters()]
    assert [id(parameter) for parameter in projector["params"]] == expected_ids
    assert len(others["params"]) + len(projector["params"]) == len(policy.parameters())


def test_a_projector_that_is_not_trained_has_no_parameter_group(vlm):
    policy = Policy(vlm.model, 0, 1, train_projector=False)
    assert len(policy.parameter_groups(1.0, 1.0)) == 1


def test_a_trained_projector_computes_in_the_dtype_of_the_model(vlm, records):
    """Its weights are fp32, as those of adapters are. Its output is bfloat16 and has a gradient."""
    vlm.model.bfloat16()
    projector = Policy(vlm.model, 2, 4).model.multi_modal_projector

    features = vlm.encode_images(records[0].paths)
    (image_tokens,) = vlm.model.project_image_features(features)
    image_tokens.float().sum().backward()

    assert image_tokens.dtype == torch.bfloat16
    for parameter in projector.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32


# --- the reference ---


def test_before_training_the_policy_is_the_base_model_to_the_bit(vlm, records):
    logps_before = some_logps(vlm, records)
    Policy(vlm.model, 4, 8, seed=3)
    assert torch.equal(some_logps(vlm, records), logps_before)


def test_the_seed_determines_the_first_lora_A(vlm):
    name = "language_model.layers.0.self_attn.q_proj.lora_A"
    first_weights = []
    for seed in (3, 3, 4):
        policy = Policy(copy.deepcopy(vlm.model), 4, 8, seed=seed)
        first_weights.append(policy.parameters()[name])
    assert torch.equal(first_weights[0], first_weights[1])
    assert not torch.equal(first_weights[0], first_weights[2])


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_is_the_base_model_to_the_bit_whatever_the_policy_became(vlm, records, rank):
    base_logps = some_logps(vlm, records)
    policy = Policy(vlm.model, rank, 8)
    move_weights(policy)
    policy_logps = some_logps(vlm, records)
    assert not torch.equal(policy_logps, base_logps)

    with policy.reference() as model:
        assert model is vlm.model
        assert not torch.is_grad_enabled()
        assert torch.equal(some_logps(vlm, records), base_logps)

    assert torch.is_grad_enabled()
    assert torch.equal(some_logps(vlm, records), policy_logps)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_reference_of_a_bfloat16_model_is_the_model_as_it_was_loaded(
    vlm, records, tmp_path, rank
):
    """Its hidden states and its log-probs are those from before training, to the bit.

    With rank 0 it once was an fp32 copy, which rounds differently and takes twice the memory.
    """
    # Arrange
    vlm.model.bfloat16()
    rows = pack_records(vlm, records[:2], "No.")
    with torch.no_grad():
        loaded_states, _, _ = response_hidden_states(vlm.model, rows)
        loaded_logits = loaded_states @ vlm.model.vocab_head.T
    loaded_logps = some_logps(vlm, records)
    loaded_bytes = {}
    for name in ("language_model", "lm_head", "multi_modal_projector"):
        loaded_bytes[name] = num_bytes(getattr(vlm.model, name))
    policy = Policy(vlm.model, rank, 8)

    # Act
    examples = [encode_example(vlm, record, [record.chosen]) for record in records[:2]]
    schedule = Schedule(steps=2, batch_size=2, lr=1e-3, projector_lr=1e-3, seed=0)
    train(policy, SupervisedMethod(vlm), examples, schedule, tmp_path)

    # Assert
    assert not torch.equal(some_logps(vlm, records), loaded_logps)
    with policy.reference() as model:
        states, _, _ = response_hidden_states(model, rows)
        assert states.dtype == torch.bfloat16
        assert torch.equal(states @ model.vocab_head.T, loaded_logits)
        assert torch.equal(some_logps(vlm, records), loaded_logps)
    for name, module in policy.reference_modules.items():
        assert num_bytes(module) == loaded_bytes[name]
        assert num_bytes(getattr(vlm.model, name)) == 2 * loaded_bytes[name]  # trained in fp32


def test_with_lora_a_bfloat16_policy_starts_at_its_reference_to_the_bit(vlm, records):
    vlm.model.bfloat16()
    policy = Policy(vlm.model, 4, 8)
    first_logps = some_logps(vlm, records)
    with policy.reference():
        assert torch.equal(some_logps(vlm, records), first_logps)


def test_with_rank_0_a_bfloat16_policy_starts_near_its_reference(vlm, records):
    """The policy computes in fp32. Rounding to bfloat16 moves each log-prob by less than 2 %."""
    vlm.model.bfloat16()
    policy = Policy(vlm.model, 0, 8)
    first_logps = some_logps(vlm, records)
    with policy.reference():
        ref_logps = some_logps(vlm, records)
    assert not torch.equal(ref_logps, first_logps)
    torch.testing.assert_close(first_logps, ref_logps, rtol=0.02, atol=0.1)


def test_the_reference_of_a_bfloat16_model_with_rank_0_writes_text(vlm, records):
    """Its key-value cache has its dtype. A cache in fp32 would refuse its keys."""
    vlm.model.bfloat16()
    (row,) = pack_records(vlm, records[:1])
    greedy = SamplingParams(max_new_tokens=4, temperature=0)
    loaded_ids = generate(vlm.model, [row], greedy, stop_ids=set())
    policy = Policy(vlm.model, 0, 8)
    move_weights(policy)

    with policy.reference() as model:
        assert generate(model, [row], greedy, stop_ids=set()) == loaded_ids

    assert len(generate(vlm.model, [row], greedy, stop_ids=set())[0]) == 4


@pytest.mark.parametrize("rank", [0, 4])
def test_the_policy_is_back_after_an_exception_in_the_reference(vlm, records, rank):
    policy = Policy(vlm.model, rank, 8)
    move_weights(policy)
    policy_logps = some_logps(vlm, records)

    with pytest.raises(RuntimeError, match="on purpose"):
        with policy.reference():
            raise RuntimeError("on purpose")

    assert torch.is_grad_enabled()
    assert torch.equal(some_logps(vlm, records), policy_logps)


def test_the_reference_keeps_the_names_and_the_order_of_parameters(vlm):
    """Optimizers and checkpoints rely on both, although modules are swapped."""
    policy = Policy(vlm.model, 0, 1)
    names_before = list(policy.parameters())

    with policy.reference():
        assert not policy.parameters()

    assert list(policy.parameters()) == names_before


def test_a_policy_of_rank_0_can_forget_its_reference(vlm):
    """Its copy is a second model. With LoRA it is the projector, which is kept."""
    vlm.model.bfloat16()
    lora = Policy(copy.deepcopy(vlm.model), 4, 8)
    in_place = Policy(vlm.model, 0, 8)

    lora.forget_reference()
    in_place.forget_reference()

    assert list(lora.reference_modules) == ["multi_modal_projector"]
    with lora.reference():
        pass
    assert in_place.reference_modules == {}
    with pytest.raises(RuntimeError, match="forgotten its reference"):
        with in_place.reference():
            pass
    in_place.merge()
    assert {parameter.dtype for parameter in vlm.model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("rank", [0, 4])
def test_a_merged_model_is_a_plain_one_with_the_weights_of_the_policy(vlm, records, rank):
    """Log-probs are the same up to rounding: the product B A is now part of each weight."""
    names_before = [name for name, _ in vlm.model.named_parameters()]
    policy = Policy(vlm.model, rank, 8)
    move_weights(policy)
    policy_logps = some_logps(vlm, records)

    policy.merge()

    assert [name for name, _ in vlm.model.named_parameters()] == names_before
    torch.testing.assert_close(some_logps(vlm, records), policy_logps, rtol=1e-5, atol=1e-4)


# --- training ---


@pytest.mark.parametrize("rank", [0, 4])
def test_training_moves_the_policy_alone(vlm, records, tmp_path, rank):
    """Three DPO steps move every trainable weight (A from the second step on).

    The reference and the vision tower are the same to the bit.
    """
    # Arrange: pairs with reference log-probs, and copies of everything.
    base_logps = some_logps(vlm, records)
    tower = copy.deepcopy(vlm.model.vision_tower.state_dict())
    policy = Policy(vlm.model, rank, 8)
    parameters_before = copy_of_parameters(policy)
    examples = []
    for record in records[:4]:
        examples.append(encode_example(vlm, record, [record.chosen, "A red cup is here."]))
    add_reference_logps(policy, vlm, examples)
    ref_logps_before = [example.ref_logps for example in examples]

    # Act
    schedule = Schedule(steps=3, batch_size=4, lr=1e-3, projector_lr=1e-3, seed=0)
    train(policy, PreferenceMethod(vlm, "dpo", 0.3), examples, schedule, tmp_path)

    # Assert: the policy has moved.
    for name, parameter in policy.parameters().items():
        assert not torch.equal(parameter, parameters_before[name]), name
    assert not torch.equal(some_logps(vlm, records), base_logps)

    # The reference has not.
    with policy.reference():
        assert torch.equal(some_logps(vlm, records), base_logps)
    add_reference_logps(policy, vlm, examples)
    for example, ref_logps in zip(examples, ref_logps_before, strict=True):
        assert torch.equal(example.ref_logps, ref_logps)

    # Nor has the vision tower.
    for name, tensor in vlm.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower[name]), name
    for parameter in vlm.model.vision_tower.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad


@pytest.mark.parametrize("rank", [0, 4])
def test_small_steps_move_a_bfloat16_model(vlm, records, tmp_path, rank):
    """The learning rates of the paper move most weights of a bfloat16 model in five steps.

    In bfloat16 the next number after 0.02 is 0.00012 away, so that each update of 2e-6 would be
    rounded away. What is trained must therefore be stored in fp32.
    """
    vlm.model.bfloat16()
    policy = Policy(vlm.model, rank, 8)
    parameters_before = copy_of_parameters(policy)
    examples = [encode_example(vlm, record, ["A cup."]) for record in records[:2]]

    schedule = Schedule(steps=5, batch_size=2, lr=1e-6, projector_lr=2e-6, seed=0)
    train(policy, SupervisedMethod(vlm), examples, schedule, tmp_path)

    num_moved = 0
    num_weights = 0
    for name, parameter in policy.parameters().items():
        if "lora" not in name:
            num_moved += int((parameter != parameters_before[name]).sum())
            num_weights += parameter.numel()
    assert num_moved > 0.5 * num_weights
