"""`train.py --plan`: the table agrees with tensors that exist, and nothing is loaded or written."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, TINY

from minialign.data.anyres import count_image_tokens
from minialign.generation.cache_limits import limits_that_fit
from minialign.methods.base import encode_example
from minialign.methods.preference import SupervisedMethod
from minialign.methods.registry import METHODS
from minialign.models.config_json import parse_config
from minialign.models.memory import BatchShape, forward_bytes, module_bytes
from minialign.models.policy import Policy
from minialign.training import memory_plan, memory_plan_text, planned_model
from minialign.training import planned_shapes as shapes
from minialign.training.memory_plan import GRADIENTS, MOMENTS, REFERENCE_COPY, TRAINED, plan_memory
from minialign.training.memory_plan_text import print_plan
from minialign.training.options import parse_options
from minialign.utils.cli import run_script
from minialign.utils.files import InputError

sys.path.insert(0, str(ROOT))
import train  # noqa: E402


@pytest.fixture()
def config_folder(tmp_path):
    """Return a folder that has only the config.json of the tiny model, which names float32."""
    folder = tmp_path / "only_config"
    folder.mkdir()
    (folder / "config.json").write_text((TINY / "model" / "config.json").read_text())
    return folder


@pytest.fixture()
def folder_of_7b(tmp_path):
    """Return a folder that has only a config.json, with the shapes of LLaVA-1.5-7B."""
    raw = json.loads((TINY / "model" / "config.json").read_text())
    raw["text_config"] |= {
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
    }
    raw["vision_config"] |= {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    }
    folder = tmp_path / "7b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def plan_of(folder, *words, device_memory=None):
    """Return the plan of a run on the model in a folder, without data."""
    options = parse_options(["--plan", "--model", str(folder), *map(str, words)])
    return plan_memory(options, device_memory=device_memory)


# --- the parts that can be counted exactly ---


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_has_the_bytes_of_a_policy_and_its_optimizer(
    vlm, records, config_folder, rank, dtype
):
    """After a step the weights, gradients, moments and copies are tensors, and can be counted."""
    # Arrange
    vlm.model.to(getattr(torch, dtype))
    policy = Policy(vlm.model, rank, 8)
    parameters = policy.parameters().values()
    optimizer = torch.optim.AdamW(parameters)

    # Act
    example = encode_example(vlm, records[0], [records[0].chosen])
    loss, _ = SupervisedMethod(vlm).loss([example], [example])
    loss.backward()
    optimizer.step()
    plan = plan_of(config_folder, "--method", "dpo", "--lora-rank", rank, "--dtype", dtype)

    # Assert
    held = plan.phase("update").bytes_of
    num_frozen_bytes = 0
    for parameter in vlm.model.parameters():
        if not parameter.requires_grad:
            num_frozen_bytes += parameter.nbytes
    moments = 0
    for state in optimizer.state.values():
        moments += state["exp_avg"].nbytes + state["exp_avg_sq"].nbytes
    copies = sum(module_bytes(module) for module in policy.reference_modules.values())
    assert sum(held[part] for part in planned_model.MODEL_PARTS) == num_frozen_bytes
    assert held[TRAINED] == sum(parameter.nbytes for parameter in parameters)
    assert held[GRADIENTS] == sum(parameter.grad.nbytes for parameter in parameters)
    assert held[MOMENTS] == moments
    assert held[REFERENCE_COPY] == copies


def test_the_plan_has_no_copy_where_a_method_reads_no_reference(config_folder):
    """With LoRA the projector is copied all the same."""
    held = {}
    for words in ("sft 0", "reward 0", "dpo 0", "sft 4", "dpo 4"):
        method, rank = words.split()
        plan = plan_of(config_folder, "--method", method, "--lora-rank", rank)
        held[words] = plan.phase("update").bytes_of[REFERENCE_COPY]

    assert held["sft 0"] == held["reward 0"] == 0
    assert held["sft 4"] == held["dpo 4"] > 0
    assert held["dpo 0"] > held["dpo 4"]


def test_the_parts_of_the_model_are_all_of_its_parameters(vlm, config_folder):
    sampling = plan_of(config_folder, "--method", "bdhs").phase("sampling").bytes_of

    planned = sum(sampling[part] for part in planned_model.MODEL_PARTS)

    assert planned == module_bytes(vlm.model)
    assert sampling["vision tower"] == module_bytes(vlm.model.vision_tower)


def test_the_feature_cache_is_that_of_the_images_or_of_the_budget(vlm, records, config_folder):
    """--keep-features is in MB of 2^20 bytes. --limit bounds the images."""
    (features,) = vlm.encode_images(records[0].paths)
    for words, expected in (
        (["--keep-features", 3], 3 << 20),
        (["--keep-features", 3, "--limit", 5], 5 * features.tiles.nbytes),
    ):
        training = plan_of(config_folder, "--method", "sft", *words).phase("training")
        assert training.bytes_of[memory_plan.FEATURES] == expected


# --- every option of the run acts on it ---


def test_each_option_moves_the_part_that_it_is_about(config_folder):
    base = ["--method", "dpo", "--lora-rank", 8]
    before = plan_of(config_folder, *base).phase("training").bytes_of
    activations = memory_plan.ACTIVATIONS
    for words, part, factor in (
        (["--dtype", "bfloat16"], "decoder layers", 1 / 2),
        (["--dtype", "bfloat16"], MOMENTS, 1),
        (["--split", 2], "vision tower", 1),
    ):
        after = plan_of(config_folder, *base, *words).phase("training").bytes_of
        assert after[part] == pytest.approx(factor * before[part])
    for words in (
        ["--checkpoint-layers"],
        ["--tokens-per-microbatch", 1024],
        ["--batch-size", 2],
        ["--dtype", "bfloat16"],
        ["--split", 2],
    ):
        after = plan_of(config_folder, *base, *words).phase("training").bytes_of
        assert after[activations] < 0.8 * before[activations], words


def test_a_split_model_has_half_of_each_layer(config_folder):
    """Its norms are whole in both processes: nine vectors of 128 numbers in fp32."""
    whole = plan_of(config_folder, "--method", "sft").phase("training").bytes_of
    half = plan_of(config_folder, "--method", "sft", "--split", 2).phase("training").bytes_of

    norms = 9 * 128 * 4
    assert half["decoder layers"] - norms == (whole["decoder layers"] - norms) / 2
    assert half["embeddings and head"] == whole["embeddings and head"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_its_phases(capsys, config_folder, method):
    """Sampling where responses are written, a reference where there is one, and a table of it."""
    words = ["--plan", "--model", str(config_folder), "--method", method, "--lora-rank", "2"]
    options = parse_options(words)

    print_plan(options)

    names = [phase.name for phase in plan_memory(options).phases]
    assert ("sampling" in names) == (method not in ("sft", "dpo", "reward", "distill"))
    assert ("reference" in names) == (method not in ("sft", "reward"))
    assert names[-2:] == ["training", "update"]
    printed = capsys.readouterr().out
    assert "peak: " in printed
    assert max(len(line) for line in printed.split("\n\n")[1].splitlines()) <= 100


@pytest.fixture()
def evaluation_set(tmp_path):
    """Return the folder of an evaluation set of two images, which need only names here."""
    images = tmp_path / "pictures" / "images"
    images.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        (images / name).touch()
    return images.parent


def test_without_data_the_images_are_those_of_limit_and_of_evaluation(
    vlm, records, config_folder, evaluation_set
):
    (features,) = vlm.encode_images(records[0].paths)
    words = ["--method", "sft", "--limit", 5, "--eval", evaluation_set]

    training = plan_of(config_folder, *words).phase("training")

    assert training.bytes_of[memory_plan.FEATURES] == (5 + 2) * features.tiles.nbytes


def test_an_evaluation_of_few_images_needs_a_small_cache(config_folder, evaluation_set):
    """Two images with a caption each: two rows of 64 + 40 positions, and two of 64 + 40 + 256.

    A position of the tiny model takes 2 x 4 layers x 128 numbers x 4 bytes of cache.
    """
    words = ["--method", "sft", "--eval", evaluation_set]

    evaluation = plan_of(config_folder, *words).phase("evaluation").bytes_of

    assert evaluation[memory_plan.CACHE] == 2 * (104 + 360) * 2 * 4 * 128 * 4


@pytest.mark.parametrize(("device", "num_answers"), [("cpu", 2), ("cuda", 1)])
def test_a_cpu_decodes_as_many_answers_as_fit_when_they_begin(
    vlm, config_folder, evaluation_set, device, num_answers
):
    """A device with space for 360 forked positions, and for 216 of prompts.

    On a CPU two rows begin with 64 + 40 + 32 positions and may grow to 64 + 40 + 256. On a GPU the
    first row has all of these at once.
    """
    position = 2 * 4 * 128 * 4
    device_memory = module_bytes(vlm.model) + 3 * 360 * position
    words = ["--method", "sft", "--lora-rank", 0, "--eval", evaluation_set, "--device", device]

    plan = plan_of(config_folder, *words, device_memory=device_memory)

    planned = plan.phase("evaluation").bytes_of[memory_plan.CACHE]
    assert planned == (2 * 104 + num_answers * 360) * position


@pytest.mark.parametrize("size", [24, 40, 48, 80])
@pytest.mark.parametrize("by", ["attention", "noise"])
def test_sampling_and_evaluation_of_a_7b_fit_gpus_of_common_sizes(folder_of_7b, size, by):
    """One GB is left at least, for what CUDA takes. Without limits both need more than 40 GB."""
    words = ["--device", "cuda", "--dtype", "bfloat16"]
    words += ["--method", "bdhs", "--by", by, "--limit", 1500]
    words += ["--eval", TINY / "final" / "balanced"]
    plan = plan_of(folder_of_7b, *words, device_memory=size * 10**9)
    unlimited = plan_of(folder_of_7b, *words)

    for phase in ("sampling", "evaluation"):
        assert plan.phase(phase).total() <= (size - 1) * 1e9
        assert unlimited.phase(phase).total() > 48e9


def test_a_large_gpu_samples_and_evaluates_a_7b_as_one_without_limit(folder_of_7b):
    words = ["--device", "cuda", "--dtype", "bfloat16"]
    words += ["--method", "bdhs", "--eval", TINY / "final" / "balanced"]

    assert plan_of(folder_of_7b, *words, device_memory=141 * 10**9) == plan_of(folder_of_7b, *words)


@pytest.mark.parametrize("method", ["bdhs", "online-bdhs", "online-dpo", "rloo"])
def test_a_device_without_memory_is_planned_with_a_prompt_and_a_continuation(config_folder, method):
    """A position takes 2 x 4 layers x 128 numbers x 4 bytes. The prompt is read and forked."""
    words = ["--method", method, "--max-new-tokens", 7]
    sampling = plan_of(config_folder, *words, device_memory=0).phase("sampling")

    num_visible = 1 if "bdhs" in method else 64  # of 64 image tokens, with rho 0.99
    prompt_length = num_visible + 40
    if "bdhs" in method:
        prompt_length += 100  # the chosen response
    num_positions = prompt_length + prompt_length + 7
    assert sampling.bytes_of[memory_plan.CACHE] == num_positions * 2 * 4 * 128 * 4


@pytest.mark.parametrize("batch_size, num_rows", [(2, 2), (1000, 80)])
def test_distortion_reads_the_chosen_responses_alone(vlm, config_folder, batch_size, num_rows):
    """Rows of 64 image tokens, 40 of the prompt and 100 of y+, though y- and y~- are scored.

    16,384 positions have space for 80 of them.
    """
    plan = plan_of(config_folder, "--method", "distortion", "--batch-size", batch_size)

    rows = BatchShape(
        num_rows=num_rows, prefix_length=104, num_response_tokens=100, num_features=64
    )
    expected = forward_bytes(vlm.model.config.text, rows, torch.float32)
    assert plan.phase("sampling").bytes_of[memory_plan.WORKING] == expected


@pytest.mark.parametrize("rank", [0, 4])
def test_the_plan_has_the_cache_limits_of_the_reference(vlm, config_folder, rank):
    """With rank 0 the policy is a model in fp32, and its reference one in bfloat16."""
    vlm.model.to(torch.bfloat16)
    policy = Policy(vlm.model, rank, alpha=1)
    device_memory = module_bytes(policy.model) + 10_000_000
    planned = planned_model.plan_model(
        config_folder, dtype="bfloat16", num_parts=1, rank=rank, device_memory=device_memory
    )

    with policy.reference() as reference_model:
        expected = limits_that_fit(
            reference_model.config.text,
            reference_model.vocab_head.dtype,
            weight_bytes=module_bytes(reference_model),
            device_memory=device_memory,
        )

    assert planned.reference_limits() == expected
    assert planned.reference_limits() != planned.policy_limits()


def test_an_evaluation_set_without_images_is_refused(config_folder):
    with pytest.raises(InputError, match="has no folder images/"):
        plan_of(config_folder, "--method", "sft", "--eval", config_folder)


def test_a_reward_model_that_is_trained_first_stays_in_memory(config_folder):
    """A model with its adapter and its projector in fp32, and the copy of the projector."""
    training = plan_of(config_folder, "--method", "rloo", "--lora-rank", 4).phase("training")

    parts = [*planned_model.MODEL_PARTS, TRAINED, REFERENCE_COPY]
    policy = sum(training.bytes_of[part] for part in parts)
    assert training.bytes_of[memory_plan.OTHER_MODEL] == policy


def test_an_added_distillation_has_activations_of_its_own(config_folder):
    """Those of the chosen responses, fewer than those of the pairs."""
    pairs = plan_of(config_folder, "--method", "dpo").phase("training").bytes_of
    both = plan_of(config_folder, "--method", "dpo", "--distill-weight", "1")
    chosen = plan_of(config_folder, "--method", "distill").phase("training").bytes_of

    added = both.phase("training").bytes_of["activations"] - pairs["activations"]

    assert 0 < added < pairs["activations"]
    # Rows of the chosen response alone are shorter, so `distill` has more of them.
    assert added <= chosen["activations"]


def test_the_damaged_images_of_mdpo_have_activations_of_their_own(config_folder):
    """Those of the chosen responses behind few image tokens, fewer than those of the pairs."""
    pairs = plan_of(config_folder, "--method", "dpo").phase("training").bytes_of["activations"]
    both = plan_of(config_folder, "--method", "dpo", "--loss", "mdpo").phase("training")

    assert 1.2 * pairs < both.bytes_of["activations"] < 1.8 * pairs


@pytest.mark.parametrize(
    "words, is_at_every_step",
    [
        ("--method distill --on chosen", False),
        ("--method distill --on policy", True),
        ("--method dpo", False),
        ("--method mixed-dpo", True),
        ("--method online-dpo", True),
    ],
)
def test_the_reference_reads_fixed_responses_before_the_optimizer(
    config_folder, words, is_at_every_step
):
    phase = plan_of(config_folder, *words.split()).phase("reference")

    assert (MOMENTS in phase.bytes_of) == is_at_every_step


@pytest.mark.parametrize(
    "words, name", [("--control", "control, reload"), ("--reference-adapter a", "reference")]
)
def test_a_model_that_is_loaded_again_is_held_twice(vlm, config_folder, words, name):
    """After the control, and where an adapter makes a second reference. Otherwise it is held once.

    The trained model is still in memory then.
    """
    method = ["--method", "dpo"]

    phase = plan_of(config_folder, *method, *words.split()).phase(name)

    assert phase.bytes_of[memory_plan.SECOND_MODEL] == module_bytes(vlm.model)
    for phase in plan_of(config_folder, *method).phases:
        assert memory_plan.SECOND_MODEL not in phase.bytes_of


@pytest.mark.parametrize(
    "device, num_numbers",
    [("cpu", 2 * 128 * 128), ("cuda", 2 * (128 * 128 + 128) + 4 * (4 * 256 + 3 * 480))],
)
def test_an_update_works_on_one_parameter_at_a_time_or_on_all(config_folder, device, num_numbers):
    """With adapters of rank 1 the largest parameter is a matrix of the projector, 128 x 128.

    A CPU needs two numbers for each of its weights, a GPU one for each weight that is trained. The
    projector has two matrices and biases, a layer has 4 adapters of 256 weights and 3 of 480.
    """
    words = ["--method", "dpo", "--lora-rank", 1, "--device", device]

    update = plan_of(config_folder, *words).phase("update").bytes_of

    assert update[memory_plan.WORKING] == 4 * num_numbers


@pytest.mark.parametrize("method", ["bdhs", "online-bdhs"])
def test_bdhs_compares_responses_by_a_table_of_embeddings(config_folder, method):
    """It has 640 tokens of 128 numbers, in fp32 whatever the model is in."""
    words = ["--method", method, "--dtype", "bfloat16"]
    sampling = plan_of(config_folder, *words).phase("sampling").bytes_of

    assert sampling[memory_plan.SIMILARITY] == 640 * 128 * 4


def test_an_annotator_in_a_folder_is_counted_from_its_config(vlm, config_folder):
    words = ["--method", "online-dpo", "--annotator", config_folder]
    training = plan_of(config_folder, *words).phase("training")
    assert training.bytes_of[memory_plan.OTHER_MODEL] == module_bytes(vlm.model)


def test_the_largest_anyres_image_has_as_many_tokens_as_the_checkpoint_gives_it():
    """672 x 672 pixels are four tiles of 24 x 24 patches, with a newline for each of 48 rows."""
    raw = json.loads((TINY / "model" / "config.json").read_text())
    raw |= {"model_type": "llava_next", "image_grid_pinpoints": [[336, 672], [672, 672]]}
    raw["vision_config"] |= {"image_size": 336, "patch_size": 14}
    config = parse_config(raw, "config.json")

    image = shapes.largest_image(config)

    grids = shapes.Grids(config.image_grid_pinpoints, 336)
    assert image.num_tokens == 576 + 48 * 49 == count_image_tokens((672, 672), grids, 24)
    assert image.num_tiles == 5
    assert image.num_features == 5 * 576


# --- the command ---


def test_the_command_prints_a_table_and_writes_nothing(
    monkeypatch, capsys, tmp_path, config_folder
):
    """Not even the folder that --out names. Without data the images fill --keep-features."""
    monkeypatch.chdir(tmp_path)
    words = ["train.py", "--plan", "--model", str(config_folder), "--out", "results"]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(train, "load_and_validate", None)  # would be called after the plan

    assert run_script(train.main) == 0

    printed = capsys.readouterr().out
    assert "sampling" in printed and "Adam's moments, fp32" in printed
    assert "smallest split that fits GPUs of 24 GB: --split 1" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["only_config"]


def test_the_plan_says_whose_memory_bounds_the_caches(monkeypatch, capsys, config_folder):
    """That of this machine, or of its GPU. Where there is no GPU, the caches are the largest."""
    words = ["--plan", "--model", str(config_folder)]
    monkeypatch.setattr(memory_plan_text, "total_memory", lambda device: 5_000_000_000)
    for device, is_available, expected in (
        ("cpu", False, "the key-value caches of this machine, which has 5.00 GB of memory"),
        ("cuda", True, "the key-value caches of this GPU, which has 5.00 GB of memory"),
        ("cuda", False, "the largest key-value caches; a small GPU gets smaller ones"),
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=is_available: answer)
        print_plan(parse_options([*words, "--device", device]))
        assert f"the table has {expected}\n" in capsys.readouterr().out


def test_the_splits_that_fit_gpus_are_planned_for_gpus(folder_of_7b):
    """On a CPU autograd keeps copies of what the norms read, so that 24 GB need --split 4."""
    words = ["--plan", "--model", str(folder_of_7b), "--dtype", "bfloat16", "--method", "dpo"]
    lines = set()
    for device in ("cpu", "cuda"):
        options = parse_options([*words, "--device", device])
        lines.add(memory_plan_text.fitting_line(options, records=None))

    (line,) = lines
    assert "24 GB: --split 2" in line


def test_the_dtype_is_that_of_the_option_or_of_config_json(config_folder):
    """Older checkpoints call it torch_dtype, newer ones dtype, some in text_config alone."""
    config_file = config_folder / "config.json"
    raw = json.loads(config_file.read_text())
    del raw["torch_dtype"]
    for section, expected in (
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "float16"}, torch.float16),
        ({"text_config": {"dtype": "bfloat16"}}, torch.bfloat16),
        ({"text_config": {}}, torch.float32),
    ):
        assert planned_model.planned_dtype(config_folder, section, None) == expected
        assert planned_model.planned_dtype(config_folder, section, "float32") == torch.float32
    for dtype in ("int8", 16, ["bfloat16"], {"": "bfloat16"}):
        with pytest.raises(InputError, match=rf"{re.escape(repr(dtype))} is not supported"):
            planned_model.planned_dtype(config_folder, raw | {"dtype": dtype}, None)


def test_a_split_that_does_not_divide_the_heads_is_refused(config_folder):
    with pytest.raises(InputError, match="4 attention heads, which 3 does not divide"):
        plan_of(config_folder, "--split", 3)


def test_the_shipped_model_is_planned_with_its_data(capsys):
    """The number of records is that of the file, and 10 of them with --limit."""
    print_plan(parse_options(["--plan", "--limit", "10", "--eval"]))
    assert "assumed: 10 records, 64 image tokens" in capsys.readouterr().out
