"""Plan the memory of a run before anything is loaded (`train.py --plan`).

The model of config.json is built on torch's "meta" device, where parameters have shapes and dtypes
but no memory, and it is made a Policy as in a run. So weights, adapters, and the copy that is the
reference are counted by the very code that makes them. What is computed with them is counted by the
formulas of models/memory.py, for the sizes in planned_shapes.py.

A run has phases that need different things. The plan is a table with a column for each, and the
largest sum is the peak. Not counted are what torch and CUDA take for themselves, about 1 GB, and
memory that an allocator holds without using it.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from minialign.methods.registry import METHODS
from minialign.models import memory
from minialign.models.adapter_checks import check_adapter_config
from minialign.models.config import LlavaConfig
from minialign.models.config_json import read_config
from minialign.models.llava import Llava
from minialign.models.memory import Computation
from minialign.models.policy import Policy
from minialign.models.split import part_config
from minialign.pairs.annotators import annotator_kind, model_folder_of
from minialign.training import planned_shapes as shapes
from minialign.utils.files import check, read_json

# What config.json may call a dtype, and what the model then computes in.
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The parts of a model in the table, and the names of their parameters. The first that fits counts.
MODEL_PARTS = {
    "vision tower": ("vision_tower.",),
    "projector": ("multi_modal_projector.", "image_newline"),
    "embeddings and head": ("language_model.embed_tokens.", "lm_head."),
    "decoder layers": ("language_model.",),
}
TRAINED = "trained parameters, fp32"
REFERENCE_COPY = "frozen copy (reference)"
GRADIENTS = "gradients, fp32"
MOMENTS = "Adam's moments, fp32"
FEATURES = "image features, cached"
OTHER_MODEL = "annotator or reward model"
SECOND_MODEL = "the model, loaded again"
SIMILARITY = "similarity of responses"
CACHE = "key-value cache"
ACTIVATIONS = "activations"
WORKING = "working memory"
ROWS = (
    *MODEL_PARTS,
    TRAINED,
    REFERENCE_COPY,
    GRADIENTS,
    MOMENTS,
    FEATURES,
    OTHER_MODEL,
    SECOND_MODEL,
    SIMILARITY,
    CACHE,
    ACTIVATIONS,
    WORKING,
)


@dataclass(frozen=True)
class Phase:
    """What a phase of a run holds in memory at its peak."""

    name: str
    bytes_of: dict[str, int]  # by a name in ROWS

    def total(self) -> int:
        """Return the bytes of all of it."""
        return sum(self.bytes_of.values())


@dataclass(frozen=True)
class MemoryPlan:
    """The phases of a run, in the memory of one process."""

    phases: list[Phase]

    def peak(self) -> Phase:
        """Return the phase that needs most."""
        return max(self.phases, key=Phase.total)

    def phase(self, name) -> Phase | None:
        """Return a phase by its name, or None if the run has none of it."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        return None


@dataclass
class PlannedModel:
    """A model without memory, before and after it is made a Policy, and what it computes in."""

    config: LlavaConfig
    dtype: torch.dtype  # of the checkpoint
    loaded: dict[str, int]  # bytes of each of MODEL_PARTS, as they are loaded
    frozen: dict[str, int]  # of these the bytes that stay frozen and in place
    policy: Policy
    held: dict[str, int] = field(init=False)  # what a policy holds between two steps

    def __post_init__(self):
        """Add up what a policy holds."""
        self.held = {
            **self.frozen,
            TRAINED: memory.trained_bytes(self.policy),
            REFERENCE_COPY: memory.reference_copy_bytes(self.policy),
        }

    @property
    def trained_dtype(self) -> torch.dtype:
        """Return what the policy computes in: fp32 if its decoder is trained in place."""
        return self.policy.model.vocab_head.dtype


# --- the model ---


def plan_model(directory, *, dtype, num_parts, rank) -> PlannedModel:
    """Build the model that a directory's config.json describes, and make it a Policy.

    dtype: the name of a torch dtype, or None for that of config.json.
    num_parts: how many processes hold the model together.
    """
    config, raw = read_config(directory)
    torch_dtype = planned_dtype(directory, raw, dtype)
    config = part_config(config, directory, num_parts)
    with torch.device("meta"):  # the adapters too, so that no random numbers are drawn
        model = Llava(config).to(torch_dtype)
        loaded = bytes_by_part(model)
        policy = Policy(model, rank, alpha=1)
    return PlannedModel(
        config=config,
        dtype=torch_dtype,
        loaded=loaded,
        frozen=bytes_by_part(model, only_frozen=True),
        policy=policy,
    )


def planned_dtype(directory, raw, dtype) -> torch.dtype:
    """Return the dtype that a model is loaded in: that of --dtype, or the one of config.json.

    A run without --dtype takes that of most weights, which are not read here.
    """
    text_config = raw.get("text_config", {})
    names = [dtype]
    for section in (raw, text_config):
        names += [section.get("dtype"), section.get("torch_dtype")]
    named = [name for name in names if name is not None]
    name = named[0] if named else "float32"
    check(
        name in DTYPES,
        f"{Path(directory) / 'config.json'}: the dtype {name!r:.40} is not supported; "
        "give --dtype float32 or bfloat16",
    )
    return DTYPES[name]


def bytes_by_part(model, only_frozen=False) -> dict[str, int]:
    """Return the bytes of the parameters of each of MODEL_PARTS, all or only frozen ones."""
    totals = dict.fromkeys(MODEL_PARTS, 0)
    for name, parameter in model.named_parameters():
        if only_frozen and parameter.requires_grad:
            continue
        totals[part_of(name)] += parameter.nbytes
    return totals


def part_of(name) -> str:
    """Return which of MODEL_PARTS a parameter belongs to."""
    for part, prefixes in MODEL_PARTS.items():
        if name.startswith(prefixes):
            return part
    raise ValueError(f"{name} is not a parameter of Llava")


def other_model_bytes(options, num_parts) -> int:
    """Return the bytes of the annotator or the reward model that stays loaded during training."""
    spec = METHODS[options.method]
    if spec.needs_annotator() and annotator_kind(options.annotator) != "truth":
        folder = Path(model_folder_of(options))
        if annotator_kind(options.annotator) == "reward:DIR":
            return reward_model_bytes(options, folder, num_parts)
        annotator = plan_model(folder, dtype=options.dtype, num_parts=num_parts, rank=1)
        return sum(annotator.loaded.values())
    if spec.needs_reward_model():
        return reward_model_bytes(options, options.reward, num_parts)
    return 0


def reward_model_bytes(options, folder, num_parts) -> int:
    """Return the bytes of the reward model in a folder, or of the one that is trained first."""
    # 1. All weights of a model.
    if folder is not None and (Path(folder) / "model").is_dir():
        reward = plan_model(
            Path(folder) / "model", dtype=options.dtype, num_parts=num_parts, rank=1
        )
        return sum(reward.loaded.values())

    # 2. An adapter on the model of the run.
    rank = options.lora_rank
    if folder is not None:
        config_file = Path(folder) / "adapter" / "adapter_config.json"
        adapter_config = read_json(config_file, dict)
        check_adapter_config(adapter_config, config_file)
        rank = adapter_config["r"]
    reward = plan_model(options.model, dtype=options.dtype, num_parts=num_parts, rank=rank)
    if rank == 0:  # it was written as a model in the dtype of its checkpoint
        return sum(reward.loaded.values())
    return sum(reward.held.values())


def similarity_bytes(options, config) -> int:
    """Return the bytes of what BDHS compares responses by: an encoder, or a table of embeddings."""
    if options.similarity:
        weights = Path(options.similarity) / "model.safetensors"
        check(weights.is_file(), f"{weights}: no such file; give another --similarity")
        return weights.stat().st_size
    text = config.text
    return text.vocab_size * text.hidden_size * memory.FP32_BYTES


# --- the phases ---


def plan_memory(options, num_parts=None, records=None) -> MemoryPlan:
    """Return what a run with these options needs in each phase.

    num_parts: how many processes hold a model together, that of --split by default.
    records: those of --data, or None if no data is named.
    """
    if num_parts is None:
        num_parts = options.split
    model = plan_model(
        options.model, dtype=options.dtype, num_parts=num_parts, rank=options.lora_rank
    )
    if options.method in ("reward", "ppo"):
        model.held[TRAINED] += (model.config.text.hidden_size + 1) * memory.FP32_BYTES

    # 1. What stays through all phases, and what stays from the first training step on.
    always = {
        FEATURES: planned_feature_bytes(options, model, shapes.count_images(options, records))
    }
    trains = {MOMENTS: 2 * model.held[TRAINED]}
    other = other_model_bytes(options, num_parts)
    if other:
        trains[OTHER_MODEL] = other

    # 2. The phases.
    num_records = options.limit if records is None else len(records)
    phases = [
        *sampling_phases(options, model, always, trains, num_records=num_records),
        *reference_phases(options, model, always, trains, num_records=num_records),
        Phase("training", model.held | always | trains | training_parts(options, model)),
        Phase("update", model.held | always | trains | update_parts(options, model)),
    ]
    if getattr(options, "control", False) and options.method != "sft":
        again = {SECOND_MODEL: sum(model.loaded.values())}
        phases.append(Phase("control, reload", model.held | always | again))
    if options.eval:
        answering = decoding_parts(options, model, shapes.answer_shape(model.config), model.dtype)
        phases.append(Phase("evaluation", model.held | always | answering))
    return MemoryPlan(phases)


def planned_feature_bytes(options, model, num_images) -> int:
    """Return the bytes of cached image features: of all images, but at most --keep-features."""
    budget = options.keep_features << 20
    if num_images is None:
        return budget
    num_tiles = shapes.largest_image(model.config).num_tiles
    return min(
        budget, num_images * memory.image_feature_bytes(model.config, num_tiles, model.dtype)
    )


def sampling_phases(options, model, always, trains, *, num_records) -> list[Phase]:
    """Return the phase in which responses are written, if the method writes any."""
    if not shapes.samples(options):
        return []
    spec = METHODS[options.method]

    # 1. BDHS before training: the model as it was loaded, and a group of records.
    if spec.samples_before_training:
        group = options.group if num_records is None else min(options.group, num_records)
        parts = decoding_parts(
            options, model, shapes.bdhs_shape(options, model.config, group), model.dtype
        )
        parts[SIMILARITY] = similarity_bytes(options, model.config)
        return [Phase("sampling", model.loaded | always | parts)]

    # 2. The reference of `distill --on reference`, before there is an optimizer.
    if options.method == "distill" and options.on == "reference":
        shape = shapes.response_shape(options, model.config, num_records)
        parts = decoding_parts(options, model, shape, model.dtype)
        return [Phase("sampling", model.held | always | parts)]

    # 3. Every other method samples from the policy at every step.
    dtype = model.trained_dtype
    if options.method == "distortion":
        batch = shapes.example_shape(options, model.config, options.batch_size)
        parts = {WORKING: memory.forward_bytes(model.config.text, batch, dtype)}
    elif options.method == "online-bdhs":
        shape = shapes.bdhs_shape(options, model.config, options.batch_size)
        parts = decoding_parts(options, model, shape, dtype)
        parts[SIMILARITY] = similarity_bytes(options, model.config)
    else:
        shape = shapes.response_shape(options, model.config, options.batch_size)
        parts = decoding_parts(options, model, shape, dtype)
    return [Phase("sampling", model.held | always | trains | parts)]


def decoding_parts(options, model, shape, dtype) -> dict[str, int]:
    """Return the caches of a round of sampling, and its working memory."""
    text = model.config.text
    image = shapes.largest_image(model.config)
    prefill = memory.BatchShape(
        num_rows=shape.num_prompts,
        prefix_length=shape.prompt_length,
        num_response_tokens=0,
        num_features=image.num_features,
    )
    num_tiles = min(shapes.tiles_per_call(options), shape.num_prompts * image.num_tiles)
    working = max(
        memory.vision_tower_bytes(model.config.vision, num_tiles, model.dtype),
        memory.forward_bytes(text, prefill, dtype),
        memory.decoding_bytes(text, shape, dtype),
    )
    return {CACHE: memory.sampling_cache_bytes(text, shape, dtype), WORKING: working}


def reference_phases(options, model, always, trains, *, num_records) -> list[Phase]:
    """Return the phase in which the reference scores responses, if the method has a reference."""
    if options.method in ("sft", "reward"):
        return []
    # Fixed pairs are scored once, before there is an optimizer. Else it is done at every step.
    is_before_training = METHODS[options.method].stores_reference_logps
    num_examples = num_records if is_before_training else options.batch_size
    shape = shapes.reference_shape(options, model.config, num_examples)
    working = memory.forward_bytes(model.config.text, shape, model.dtype)
    working += memory.logits_bytes(shape.num_scored, model.config.text, model.dtype)
    parts = model.held | always | {WORKING: working}
    if not is_before_training:
        parts |= trains
    if getattr(options, "reference_adapter", None):
        parts[SECOND_MODEL] = sum(model.loaded.values())
    return [Phase("reference", parts)]


def training_parts(options, model, checkpointing=None) -> dict[str, int]:
    """Return the activations of a micro-batch, and the gradients of the micro-batches before it.

    checkpointing: whether activations of layers are computed again, as --checkpoint-layers says by
        default.
    """
    if checkpointing is None:
        checkpointing = options.checkpoint_layers
    computation = Computation(
        dtype=model.trained_dtype,
        rank=options.lora_rank,
        device=options.device,
        checkpointing=checkpointing,
    )
    batches = [shapes.training_shape(options, model.config)]
    if getattr(options, "loss", None) == "mdpo":
        batches.append(shapes.damaged_shape(options, model.config))
    activations = 0
    for shape in batches:
        activations += memory.training_activation_bytes(
            model.config, model.policy, shape, computation
        )
    return {GRADIENTS: model.held[TRAINED], ACTIVATIONS: activations}


def update_parts(options, model) -> dict[str, int]:
    """Return the gradients, and what AdamW needs beside them while it updates the weights."""
    largest = max(parameter.nbytes for parameter in model.policy.parameters().values())
    working = 2 * largest  # one parameter after the other: the root of a moment, and its quotient
    if options.device == "cuda":
        working = model.held[TRAINED]  # all parameters together: the roots of all moments
    return {GRADIENTS: model.held[TRAINED], WORKING: working}
