"""Plan the memory of a run before anything is loaded (`train.py --plan`).

Weights are those of planned_model.py. What is computed with them is counted by the formulas of
models/memory.py, for the sizes in planned_shapes.py.

A run has phases that need different things. The plan is a table with a column for each, and the
largest sum is the peak. Not counted are what torch and CUDA take for themselves, about 1 GB, and
memory that an allocator holds without using it.
"""

from dataclasses import dataclass

from minialign.methods.registry import METHODS
from minialign.models import memory
from minialign.models.memory import Computation
from minialign.training import planned_shapes as shapes
from minialign.training.planned_model import (
    MODEL_PARTS,
    REFERENCE_COPY,
    TRAINED,
    other_model_bytes,
    plan_model,
    similarity_bytes,
)

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
        answering = decoding_parts(
            options, model, shapes.answer_shape(options, model.config), model.dtype
        )
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
    # Mixed-DPO does both.
    is_before_training = METHODS[options.method].stores_reference_logps
    if options.method == "mixed-dpo":
        is_before_training = False
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
