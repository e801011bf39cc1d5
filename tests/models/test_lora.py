"""LoRA layers: the formula by hand, and a whole model of them against the plain formula."""

import pytest
import torch
from model_helpers import flatten, gradients_of, move_weights, pack_records, relative_distance

from minialign.data.packing import pack
from minialign.logprobs import response_logps
from minialign.models import decoder
from minialign.models.fused_ops import lora_linears_plain
from minialign.models.lora import LoRALinear, lora_linears
from minialign.models.policy import Policy


@pytest.fixture()
def adapter():
    """One input, one output: W = 2, A = (1, 3), B = (1, -1)^T, rank 2, alpha 8."""
    linear = torch.nn.Linear(1, 1, bias=False)
    linear.weight.data.fill_(2.0)
    adapter = LoRALinear(linear, 2, 8, torch.Generator())
    adapter.lora_A.data = torch.tensor([[1.0], [3.0]])
    adapter.lora_B.data = torch.tensor([[1.0, -1.0]])
    return adapter


def test_an_adapter_by_hand(adapter):
    """W x + (alpha / rank) B A x = 2 x + 4 (1 - 3) x = -6 x, in all its forms."""
    x = torch.tensor([[1.0]])
    plain = adapter(x)
    (fused,) = lora_linears(x, [adapter])
    merged = adapter.merged()
    assert plain.item() == -6.0
    assert fused.item() == -6.0
    assert merged.weight.item() == -6.0


def test_an_adapter_that_is_off_is_the_frozen_layer(adapter):
    adapter.enabled = False
    output = adapter(torch.tensor([[1.0]]))
    assert output.item() == 2.0


def test_rslora_divides_alpha_by_the_root_of_the_rank():
    linear = torch.nn.Linear(1, 1, bias=False)
    adapter = LoRALinear(linear, 4, 8, torch.Generator(), rslora=True)
    assert adapter.scaling == 4.0


def test_an_adapter_computes_in_the_dtype_of_its_input():
    """Its weights stay in fp32. Both forms agree to the precision of bfloat16, 2^-8."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5).bfloat16()
    adapter = LoRALinear(linear, 2, 4, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(adapter.lora_B)
    x = torch.randn(3, 6).bfloat16()

    plain = adapter(x)
    (fused,) = lora_linears(x, [adapter])

    assert plain.dtype == fused.dtype == torch.bfloat16
    assert adapter.lora_A.dtype == adapter.lora_B.dtype == torch.float32
    torch.testing.assert_close(plain, fused, rtol=2**-6, atol=2**-6)


def gradients_and_stored_bytes(vlm, rows, policy):
    """Return the gradients of the summed log-probs of rows, and the bytes that the graph stores."""
    stored = {}  # address -> (bytes, tensor); the tensor is kept so that no address is used twice

    def remember(tensor):
        storage = tensor.untyped_storage()
        stored[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logps, _ = response_logps(vlm.model, rows)
    num_bytes = sum(size for size, _ in stored.values())
    return gradients_of(policy, logps.sum()), num_bytes


def test_a_model_of_fused_layers_has_the_gradients_of_plain_ones(vlm, records, monkeypatch):
    """Every projection of the decoder, fused and recomputed, against LoRALinear's own formula."""
    policy = Policy(vlm.model, 4, 8)
    move_weights(policy)
    rows = pack_records(vlm, records[:3], "No.")
    gradients, _ = gradients_and_stored_bytes(vlm, rows, policy)

    def plain(x, layers, recompute_from=None):
        return lora_linears_plain(x, layers)

    monkeypatch.setattr(decoder, "lora_linears", plain)
    expected_gradients, _ = gradients_and_stored_bytes(vlm, rows, policy)

    for name, expected in expected_gradients.items():
        assert relative_distance(gradients[name], expected) < 1e-5, name


def test_recomputing_inputs_saves_the_memory_of_these_inputs(vlm, records, monkeypatch):
    """The same fused layers, with and without `recompute_from`.

    For each position it saves the output of the first norm of every layer. Of all layers but the
    last it also saves the attention's output, the output of the second norm and the gated product.
    Of the last layer only the scored positions are computed, which is little.
    """
    policy = Policy(vlm.model, 4, 8)
    move_weights(policy)
    rows = pack_records(vlm, records[:3], "No.")
    gradients, num_bytes = gradients_and_stored_bytes(vlm, rows, policy)

    def without_recomputation(x, layers, recompute_from=None):
        return lora_linears(x, layers)

    monkeypatch.setattr(decoder, "lora_linears", without_recomputation)
    expected_gradients, expected_num_bytes = gradients_and_stored_bytes(vlm, rows, policy)

    config = vlm.model.config.text
    num_positions = pack(vlm.model, rows).ids.numel()
    of_every_layer = config.hidden_size
    of_all_but_the_last = 2 * config.hidden_size + config.intermediate_size
    num_floats = config.num_layers * of_every_layer + (config.num_layers - 1) * of_all_but_the_last
    assert expected_num_bytes - num_bytes >= 4 * num_positions * num_floats
    assert torch.equal(flatten(gradients), flatten(expected_gradients))
