"""The formulas of models/memory.py: what can be counted exactly, and what autograd keeps."""

import pytest
import torch
from model_helpers import pack_records
from torch.profiler import ProfilerActivity, profile

from minialign.generation.sample_tokens import sample_tokens
from minialign.logprobs import response_logps
from minialign.models import memory
from minialign.models.config import LlavaConfig, TextConfig, VisionConfig
from minialign.models.kv_cache import KVCache
from minialign.models.llava import Llava
from minialign.models.memory import BatchShape, Computation, SamplingShape
from minialign.models.policy import Policy

GB = 1e9


def config_of_7b():
    """Return the shapes of LLaVA-1.5-7B."""
    text = TextConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        norm_eps=1e-5,
        max_position_embeddings=4096,
        rope_theta=10000.0,
        rope_scaling=None,
        qkv_bias=False,
        out_bias=False,
        tie_word_embeddings=False,
    )
    vision = VisionConfig(
        family="clip",
        hidden_size=1024,
        intermediate_size=4096,
        num_layers=24,
        num_heads=16,
        image_size=336,
        patch_size=14,
        norm_eps=1e-5,
        activation="quick_gelu",
    )
    return LlavaConfig(
        text=text,
        vision=vision,
        image_token_id=32000,
        vision_feature_layer=-2,
        drop_class_token=True,
        projector_activation="gelu",
        projector_bias=True,
        image_grid_pinpoints=None,
    )


def policy_of_7b(rank):
    """Return a policy of LLaVA-1.5-7B's shape in bfloat16, without memory."""
    with torch.device("meta"):
        return Policy(Llava(config_of_7b()).bfloat16(), rank, alpha=256)


# --- what can be counted exactly ---


def test_the_weights_of_a_7b_are_those_worked_out_by_hand():
    """A layer has 4 x 4096^2 in attention, 3 x 4096 x 11008 in the MLP, and 2 x 4096 in its norms.

    That is 202,383,360. 32 of them, a norm and two tables of 32064 x 4096 make 6,738,939,904.
    """
    model = policy_of_7b(rank=128).model
    adapters_per_layer = 128 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096

    num_trained = 32 * adapters_per_layer + projector

    with torch.device("meta"):
        decoder = Llava(config_of_7b()).bfloat16()
    language_bytes = memory.module_bytes(decoder.language_model)
    assert language_bytes + memory.module_bytes(decoder.lm_head) == 2 * 6_738_939_904
    assert num_trained == 340_795_392
    assert memory.module_bytes(model.multi_modal_projector) == 4 * projector


@pytest.mark.parametrize("rank, num_trained", [(128, 340_795_392), (0, 6_759_919_616)])
def test_what_a_7b_trains_and_copies(rank, num_trained):
    """With LoRA the copy is the projector in bfloat16. With rank 0 it is all that is trained."""
    policy = policy_of_7b(rank)

    num_copied = num_trained if rank == 0 else 20_979_712
    assert memory.trained_bytes(policy) == 4 * num_trained
    assert memory.reference_copy_bytes(policy) == 2 * num_copied


def test_a_position_of_a_7b_takes_half_a_megabyte_of_cache():
    """2 (keys, values) x 32 layers x 32 heads x 128 numbers x 2 bytes."""
    text = config_of_7b().text
    assert memory.kv_cache_bytes(text, 1, 1, torch.bfloat16) == 524_288
    shape = SamplingShape(
        num_prompts=2,
        prompt_length=100,
        num_continuations=3,
        context_length=100,
        max_new_tokens=20,
    )
    total = memory.sampling_cache_bytes(text, shape, torch.bfloat16)
    assert total == (2 * 100 + 3 * 120) * 524_288


def test_the_bytes_of_a_cache_are_those_of_its_tensors(vlm):
    text = vlm.model.config.text
    cache = KVCache.empty(text, 3, num_positions=7, like=vlm.model.vocab_head)
    expected = cache.keys.nbytes + cache.values.nbytes
    assert memory.kv_cache_bytes(text, 3, 7, torch.float32) == expected


def test_the_bytes_of_image_features_are_those_of_their_tensors(vlm, records):
    (features,) = vlm.encode_images(records[0].paths)
    planned = memory.image_feature_bytes(vlm.model.config, 1, features.tiles.dtype)
    assert planned == features.tiles.nbytes


# --- what autograd keeps ---


def kept_by_autograd(policy, rows):
    """Return the bytes of the storages that autograd keeps of log-probs, without the weights."""
    weights = set()
    for parameter in policy.model.parameters():
        weights.add(parameter.untyped_storage().data_ptr())
    kept = {}

    def keep(tensor):
        """Note the storage of a tensor that is saved for the backward pass."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps, _ = response_logps(policy.model, rows)
    del logps  # until here the storages stay where they are
    return sum(storage.nbytes() for storage in kept.values())


def shape_of(rows, num_image_tokens):
    """Return the BatchShape of packed examples of one prompt length, padded to the longest."""
    prefix_length = len(rows[0].prefix) - 1 + num_image_tokens
    lengths = [sum(len(response) for _, response in row.branches) for row in rows]
    return BatchShape(len(rows), prefix_length, max(lengths), num_image_tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("other_response", ["No.", "A long answer. " * 12])
def test_the_activations_are_those_that_autograd_keeps(vlm, records, rank, dtype, other_response):
    """Within 15 %. Cosines, norms' scales and the kernels' sums are left out of the formulas."""
    vlm.model.to(dtype)
    policy = Policy(vlm.model, rank, 16)
    same_prompt = [records[0], records[0]]
    rows = pack_records(vlm, same_prompt, other_response)
    shape = shape_of(rows, vlm.num_image_tokens(records[0].paths[0]))
    computation = Computation(vlm.model.vocab_head.dtype, rank, device="cpu")

    kept = kept_by_autograd(policy, rows)

    planned = memory.kept_activations(vlm.model.config, policy, shape, computation).total()
    assert planned == pytest.approx(kept, rel=0.15)


@pytest.mark.parametrize(
    "num_rows, prefix_length, num_response_tokens, num_features, above_gradients",
    [(4, 604, 232, 576, 9.4 * GB), (2, 2368, 218, 2880, 15.0 * GB)],
    ids=["LLaVA-1.5-7B", "LLaVA-1.6-7B"],
)
def test_the_peak_of_a_7b_is_that_measured_on_a_gpu(
    num_rows, prefix_length, num_response_tokens, num_features, above_gradients
):
    """The figures of tests/bench/README.md are above weights, adapters and gradients.

    A step frees the gradients of the one before, which so were part of what was there before.
    """
    policy = policy_of_7b(rank=128)
    shape = BatchShape(num_rows, prefix_length, num_response_tokens, num_features)
    computation = Computation(torch.bfloat16, rank=128, device="cuda")

    planned = memory.training_activation_bytes(config_of_7b(), policy, shape, computation)

    assert planned - memory.trained_bytes(policy) == pytest.approx(above_gradients, rel=0.15)


def test_checkpointing_holds_the_inputs_of_the_layers_and_one_layer():
    """Of 3,344 tokens an input takes 27 MB, and all that is kept of a layer more than ten times."""
    policy = policy_of_7b(rank=128)
    shape = BatchShape(4, 604, 232, 576)
    planned = {}
    for checkpointing in (False, True):
        computation = Computation(torch.bfloat16, 128, "cuda", checkpointing)
        planned[checkpointing] = memory.training_activation_bytes(
            config_of_7b(), policy, shape, computation
        )
    kept = memory.kept_activations(config_of_7b(), policy, shape, computation)

    inputs = 30 * 3344 * 4096 * 2
    assert planned[True] > inputs + kept.full_layer
    assert planned[True] < 0.25 * planned[False]


# --- what torch's profiler sees ---


def peak_of(function, *arguments, **options):
    """Return the most bytes that a call holds at a time, beside those that were there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function(*arguments, **options)
    allocations = []
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocations.append((event.start_ns(), event.nbytes()))  # negative if it is freed
    num_bytes = 0
    peak = 0
    for _, change in sorted(allocations):
        num_bytes += change
        peak = max(peak, num_bytes)
    return peak


@pytest.mark.parametrize("rank, checkpointing", [(8, False), (8, True), (0, False)])
def test_the_peak_of_a_step_is_the_one_that_a_profiler_sees(vlm, records, rank, checkpointing):
    """Within 10 %, with gradients in fp32 that may be there before the peak or come after it."""
    policy = Policy(vlm.model, rank, 16)
    vlm.model.language_model.checkpointing = checkpointing
    rows = pack_records(vlm, [records[0]] * 6, "A long answer. " * 6)
    shape = shape_of(rows, vlm.num_image_tokens(records[0].paths[0]))
    computation = Computation(torch.float32, rank, "cpu", checkpointing)

    def step():
        logps, _ = response_logps(policy.model, rows)
        logps.sum().backward()

    planned = memory.training_activation_bytes(vlm.model.config, policy, shape, computation)
    assert planned == pytest.approx(peak_of(step), rel=0.1)


@torch.no_grad()
def test_the_peak_of_the_vision_tower_is_the_one_that_a_profiler_sees(vlm):
    config = vlm.model.config.vision
    tiles = torch.zeros(4, 3, config.image_size, config.image_size)

    peak = peak_of(vlm.model.vision_tower, tiles)

    assert memory.vision_tower_bytes(config, 4, torch.float32) == pytest.approx(peak, rel=0.02)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_peak_of_sampling_is_the_one_that_a_profiler_sees(vlm, top_p):
    """The logits themselves are there before."""
    text = vlm.model.config.text
    logits = torch.randn(50, text.vocab_size, generator=torch.Generator().manual_seed(0))
    shape = SamplingShape(
        num_prompts=50,
        prompt_length=1,
        num_continuations=50,
        context_length=1,
        max_new_tokens=1,
    )

    peak = peak_of(sample_tokens, logits, torch.full((50,), 0.5), top_p=top_p)

    planned = memory.decoding_bytes(text, shape, torch.float32, top_p=top_p)
    assert planned - logits.nbytes == pytest.approx(peak, rel=0.02)


def test_the_peak_of_a_fork_is_the_one_that_a_profiler_sees(vlm):
    """The new cache, and the values that are gathered before they are copied to their place."""
    text = vlm.model.config.text
    cache = KVCache.empty(text, 2, num_positions=100, like=vlm.model.vocab_head)
    rows = torch.arange(8) % 2
    shape = SamplingShape(
        num_prompts=2,
        prompt_length=100,
        num_continuations=8,
        context_length=90,
        max_new_tokens=10,
    )

    peak = peak_of(cache.fork, rows, torch.arange(90).expand(8, -1), 10)

    caches = memory.sampling_cache_bytes(text, shape, torch.float32)
    planned = caches + memory.decoding_bytes(text, shape, torch.float32)
    assert planned - cache.keys.nbytes - cache.values.nbytes == pytest.approx(peak, rel=0.02)
