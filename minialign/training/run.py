"""Train one variant of the model with one method, and save the result."""

import hashlib
import math
from pathlib import Path

import torch

from minialign.methods.base import add_reference_logps
from minialign.methods.builders import MethodInputs
from minialign.methods.registry import METHODS, build_method
from minialign.models.adapters import save_adapter
from minialign.models.checkpoint import save_model
from minialign.models.policy import Policy
from minialign.models.safetensors_files import open_tensors, save_tensors
from minialign.pairs.reward_model import save_reward_model
from minialign.training.loop import Schedule, train
from minialign.training.messages import check_learned, print_skipped_prompts
from minialign.training.run_folder import EXPORT_FILE
from minialign.training.second_reference import (
    adapter_digests,
    load_second_reference,
    merge_references,
)
from minialign.training.stored_targets import read_or_prepare_targets
from minialign.utils.digests import file_digest
from minialign.utils.distributed import barrier
from minialign.utils.files import write_json
from minialign.utils.messages import print_message


def train_variant(options, vlm, method_name, examples, *, run, folder) -> Policy:
    """Train the model of `vlm` in place with one method, and save the result in `folder`.

    The result is `folder`/adapter, or `folder`/model if all weights are trained. A state that an
    interrupted run has left in `folder` is resumed.
    """
    # 1. Make the model trainable: LoRA adapters, or all weights of decoder and projector.
    policy = Policy(
        vlm.model,
        rank=options.lora_rank,
        alpha=options.lora_alpha,
        seed=options.seed,
    )
    if not METHODS[method_name].reads_reference:
        policy.forget_reference()
    vlm.model.language_model.checkpointing = options.checkpoint_layers  # of activations

    # 2. Build the method. With fixed pairs the reference log-probs are computed once, in advance.
    with run.timer("reference"):
        inputs = MethodInputs(
            options=options,
            policy=policy,
            vlm=vlm,
            examples=examples,
            folder=folder,
        )
        method = build_method(method_name, inputs)
        if METHODS[method_name].stores_reference_logps:
            key = reference_key(run.checkpoint, vlm, examples)
            path = folder / "reference.safetensors"
            read_or_add_reference_logps(policy, vlm, examples, path=path, key=key)
            if options.reference_adapter:
                add_second_reference(options, vlm, examples, run=run, folder=folder)
        if method.stores_targets:
            key = reference_key(run.checkpoint, vlm, examples, method.settings())
            path = folder / "targets.safetensors"
            examples = read_or_prepare_targets(method, examples, path=path, key=key)

    # 3. Train, and save the result.
    with run.timer("train"):
        schedule = training_schedule(options, len(examples))
        title = "supervised" if method_name == "sft" else method_name
        train(policy, method, examples, schedule, folder, title)
        check_learned(method_name, folder / "metrics.jsonl")
        save_result(options, policy, vlm, method_name, folder)
        barrier()  # other processes may read the result as soon as the main process has written it
    print_skipped_prompts(folder / "metrics.jsonl")
    return policy


def training_schedule(options, num_examples) -> Schedule:
    """Return the schedule that the options ask for."""
    return Schedule(
        steps=num_steps(options, num_examples),
        batch_size=options.batch_size,
        lr=options.lr,
        projector_lr=options.projector_lr,
        seed=options.seed,
        max_tokens_per_microbatch=options.tokens_per_microbatch,
        constant=options.schedule == "constant",
    )


def num_steps(options, num_examples) -> int:
    """Return the number of optimizer steps: --steps, or as many as --epochs take."""
    if options.steps is not None:
        return options.steps
    return math.ceil(num_examples * options.epochs / options.batch_size)


def save_result(options, policy, vlm, method_name, folder):
    """Write the adapter or the model, and after it the scalar head of a reward model."""
    if options.lora_rank > 0:
        save_adapter(policy, folder / "adapter", options.model)
    else:
        policy.merge()
        save_model(vlm.model, options.model, folder / "model")
    if method_name == "reward":
        # Last, because a folder with a head is taken for a complete reward model.
        save_reward_model(policy, vlm.template, folder)


def export_model(options, policy, vlm, folder):
    """Write the model with its adapter merged, if --export asks for it.

    A note in `folder`, that of the run, says where: a resumed run may write there again.
    """
    if options.export:
        write_json(folder / EXPORT_FILE, str(Path(options.export).resolve()))
        policy.merge()
        save_model(vlm.model, options.model, options.export)


def reference_key(checkpoint, vlm, examples, settings="") -> str:
    """Return a hash of what reference log-probs, or targets made with `settings`, depend on.

    It covers a sample of the weights, the template, the image settings, the content of the images,
    the turns, the system texts and the responses.

    checkpoint: `fingerprint` of the weights before training, which are the reference.
    settings: text that names what else the targets depend on.
    """
    depends_on = [checkpoint, vlm.template, repr(vlm.image_processor), settings]
    for example in examples:
        record = example.record
        images = [file_digest(path) for path in record.paths]
        content = (record.id, images, record.turns, example.responses)
        if record.system is not None:
            content = (*content, record.system)
        depends_on.append(content)
    return hashlib.sha256(repr(depends_on).encode()).hexdigest()


def read_or_add_reference_logps(policy, vlm, examples, *, path, key):
    """Give every example its reference log-probs (k,), from `path` or computed and stored there."""
    if path.exists():
        logps = read_reference_logps(path, key)
        shape = (len(examples), len(examples[0].responses))
        if logps is not None and logps.shape == shape:
            for example, logps_of_example in zip(examples, logps, strict=True):
                example.ref_logps = logps_of_example
            return
        print_message(
            f"{path} was computed from other weights, data or settings, or is damaged; "
            "computing it again",
        )
    add_reference_logps(policy, vlm, examples)
    logps = torch.stack([example.ref_logps for example in examples])  # (N, k)
    save_tensors({"logps": logps}, path, {"key": key})


def add_second_reference(options, vlm, examples, *, run, folder):
    """Merge the reference log-probs of every example with those of --reference-adapter (MRPO)."""
    # 1. Keep the log-probs of the base, because those of the second reference will replace them.
    base_logps = torch.stack([example.ref_logps for example in examples])  # (N, 2)

    # 2. Read or compute those of the second reference.
    key = reference_key(run.checkpoint, vlm, examples, adapter_digests(options.reference_adapter))
    second_reference = load_second_reference(options, vlm)
    path = folder / "second_reference.safetensors"
    read_or_add_reference_logps(second_reference, vlm, examples, path=path, key=key)
    extra_logps = torch.stack([example.ref_logps for example in examples])  # (N, 2)

    # 3. Replace both by those of the merged reference.
    merge_references(examples, base_logps, extra_logps)


def read_reference_logps(path, key):
    """Return the log-probs (N, k) in a file, or None if they were computed from something else."""
    with open_tensors(path) as tensors:
        metadata = tensors.metadata() or {}
        if metadata.get("key") != key or "logps" not in tensors.keys():
            return None
        return tensors.get_tensor("logps")
