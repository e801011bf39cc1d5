"""Plan the memory of a run before anything is loaded (`train.py --plan`).

Weights are those of planned_model.py. What is computed with them is counted by the formulas of
models/memory.py, for the sizes in planned_shapes.py.

A run has phases that need different things. The plan is a table with a column for each, and the
largest sum is the peak. Not counted are what torch and CUDA take for themselves, about 1 GB, and
memory that an allocator holds without using it. Nor is the training of the reward model that RLOO,
PPO and GRPO may begin with: `--method reward --plan` shows that.
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


def plan_memory(options, num_parts=None, records=None, *, device_memory=None) -> MemoryPlan:
    """Return what a run with these options needs in each phase.

    num_parts: how many processes hold a model together, that of --split by default.
    records: those of --data, or None if no data is named.
    device_memory: bytes of the device, which limit the caches, or None for a device without limit.
    """
    if num_parts is None:
        num_parts = options.split
    model = plan_model(
        options.model,
        dtype=options.dtype,
        num_parts=num_parts,
        rank=options.lora_rank,
        device_memory=device_memory,
    )
    if options.method in ("reward", "ppo"):
        model.policy.add_scalar_head()
    if not METHODS[options.method].reads_reference:
        model.policy.forget_reference()

    # 1. What stays through all phases, and what stays from the first training step on.
    num_images = shapes.count_images(options, records)
    always = {FEATURES: planned_feature_bytes(options, model, num_images)}
    while_training = {
        MOMENTS: 2 * model.held[TRAINED],
        OTHER_MODEL: other_model_bytes(options, num_parts),
    }

    # 2. The phases before training, or within a step of it.
    num_records = options.limit if records is None else len(records)
    phases = sampling_phases(options, model, always, while_training, num_records=num_records)
    phases += reference_phases(options, model, always, while_training, num_records=num_records)

    # 3. Learning. A step ends with the update of the weights.
    training = model.held | always | while_training
    phases.append(Phase("training", training | training_parts(options, model)))
    phases.append(Phase("update", training | update_parts(options, model)))

    # 4. What follows training, without an optimizer. After the control, the model is loaded again
    #    while the trained one is still held. A model that was trained in place has the dtype of its
    #    checkpoint again when it is measured.
    after_training = model.held | always
    if getattr(options, "control", False) and options.method != "sft":
        reloaded = {SECOND_MODEL: sum(model.loaded.values())}
        phases.append(Phase("control, reload", after_training | reloaded))
    if options.eval:
        limits = model.loaded_limits()
        if options.lora_rank > 0:
            limits = model.policy_limits()
        shape = shapes.answer_shape(options, model.config, limits)
        answering = decoding_parts(options, model, shape, model.dtype)
        phases.append(Phase("evaluation", after_training | answering))
    return MemoryPlan(phases)


def planned_feature_bytes(options, model, num_images) -> int:
    """Return the bytes of cached image features: of all images, but at most --keep-features."""
    budget = options.keep_features << 20  # the option counts MB of 2^20 bytes
    if num_images is None:
        return budget
    num_tiles = shapes.largest_image(model.config).num_tiles
    bytes_of_image = memory.image_feature_bytes(model.config, num_tiles, model.dtype)
    return min(budget, num_images * bytes_of_image)


def sampling_phases(options, model, always, while_training, *, num_records) -> list[Phase]:
    """Return the phase in which responses are written, if the method writes any."""
    if not shapes.samples(options):
        return []
    spec = METHODS[options.method]

    # 1. BDHS before training: the model as it was loaded, and a group of records.
    if spec.samples_before_training:
        group = options.group if num_records is None else min(options.group, num_records)
        limits = model.loaded_limits()
        shape = shapes.bdhs_shape(options, model.config, limits, group)
        parts = decoding_parts(options, model, shape, model.dtype)
        parts[SIMILARITY] = similarity_bytes(options, model.config)
        return [Phase("sampling", model.loaded | always | parts)]

    # 2. The reference of `distill --on reference`, before there is an optimizer.
    if options.method == "distill" and options.on == "reference":
        limits = model.reference_limits()
        shape = shapes.response_shape(options, model.config, limits, num_records)
        parts = decoding_parts(options, model, shape, model.dtype)
        return [Phase("sampling", model.held | always | parts)]

    # 3. Every other method samples from the policy at every step. "distortion" decodes nothing: a
    #    single forward pass under the noisy image predicts all tokens.
    dtype = model.trained_dtype
    limits = model.policy_limits()
    if options.method == "distortion":
        batch = shapes.distortion_shape(options, model.config)
        parts = {WORKING: memory.forward_bytes(model.config.text, batch, dtype)}
    elif options.method == "online-bdhs":
        shape = shapes.bdhs_shape(options, model.config, limits, options.batch_size)
        parts = decoding_parts(options, model, shape, dtype)
        parts[SIMILARITY] = similarity_bytes(options, model.config)
    else:
        shape = shapes.response_shape(options, model.config, limits, options.batch_size)
        parts = decoding_parts(options, model, shape, dtype)
    return [Phase("sampling", model.held | always | while_training | parts)]


def decoding_parts(options, model, shape, dtype) -> dict[str, int]:
    """Return the caches of a round of sampling, and its working memory.

    Encoding the images, the prefill and decoding follow each other, so the largest of them counts.
    The vision tower is never trained. It stays in the dtype of the checkpoint.
    """
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
        memory.decoding_bytes(text, shape, dtype, top_p=options.top_p),
    )
    return {CACHE: memory.sampling_cache_bytes(text, shape, dtype), WORKING: working}


def reference_phases(options, model, always, while_training, *, num_records) -> list[Phase]:
    """Return the phase in which the reference scores responses, if the method has a reference."""
    if not METHODS[options.method].reads_reference:
        return []

    # 1. Fixed responses are read once, before there is an optimizer. New ones are read at every
    #    step. Mixed-DPO does both, and the plan shows what it does at every step.
    is_before_training = METHODS[options.method].stores_reference_logps
    if options.method == "mixed-dpo":
        is_before_training = False
    if options.method == "distill":
        is_before_training = options.on != "policy"

    # 2. A forward pass, and the log-probs of its responses.
    num_examples = num_records if is_before_training else options.batch_size
    shape = shapes.reference_shape(options, model.config, num_examples)
    working = memory.forward_bytes(model.config.text, shape, model.dtype)
    working += memory.logits_bytes(shape.num_scored, model.config.text, model.dtype)

    # 3. What is held at that time.
    parts = model.held | always | {WORKING: working}
    if not is_before_training:
        parts |= while_training
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

    # All forward passes of a micro-batch come before its backward pass. Their activations add up.
    forward_shapes = [shapes.training_shape(options, model.config)]
    if getattr(options, "loss", None) == "mdpo":
        forward_shapes.append(shapes.damaged_shape(options, model.config))
    if getattr(options, "distill_weight", None) is not None:
        forward_shapes.append(shapes.chosen_shape(options, model.config))
    activations = 0
    for shape in forward_shapes:
        activations += memory.training_activation_bytes(
            model.config, model.policy, shape, computation
        )
    return {GRADIENTS: model.held[TRAINED], ACTIVATIONS: activations}


def update_parts(options, model) -> dict[str, int]:
    """Return the gradients, and what AdamW needs beside them while it updates the weights."""
    if options.device == "cuda":
        # All parameters are updated together: the roots of all second moments.
        working = model.held[TRAINED]
    else:
        # One parameter after the other: the root of a moment, and a quotient.
        largest = max(parameter.nbytes for parameter in model.policy.parameters().values())
        working = 2 * largest
    return {GRADIENTS: model.held[TRAINED], WORKING: working}
