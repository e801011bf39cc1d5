"""The peers: transformers' LLaVA on the very weights of our model, and TRL's DPOTrainer around it.

They need the packages transformers, peft, trl and datasets.
"""

import contextlib
import importlib.util
import warnings
from unittest import mock

import torch
from common import IMAGE, PAD, ROOT, num_image_tokens, raw_config, torch_dtype

from minialign.models.adapters import ADAPTER_PREFIX, save_adapter
from minialign.models.checkpoint import to_layout_name


def missing_packages(*names):
    """Return those of these packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def make_peer(options, model):
    """Make transformers' model of this shape.

    It shares our tensors, except those of the projector, which each side trains in place.
    """
    import transformers

    # 1. A model of the same architecture.
    config_class = transformers.LlavaConfig
    model_class = transformers.LlavaForConditionalGeneration
    if options.anyres:
        config_class = transformers.LlavaNextConfig
        model_class = transformers.LlavaNextForConditionalGeneration
    config = config_class(**raw_config(options))
    with torch.device(options.device):
        peer = model_class._from_config(config, dtype=torch_dtype(options))

    # 2. Our tensors under its names.
    tensors = {}
    for name, tensor in model.state_dict().items():
        if "projector" in name:
            tensor = tensor.clone()
        tensors[to_layout_name(name, "memory")] = tensor
    peer.load_state_dict(tensors, strict=True, assign=True)
    peer.requires_grad_(False)
    return peer.train(False)


def make_trainer(options, peer, policy, *, folder):
    """Make TRL's DPOTrainer on the peer with the policy's adapter, without gradient checkpointing.

    `save_adapter` writes the adapter to `folder`, and PEFT loads it from there.
    """
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer

    # 1. No output but ours.
    disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")

    # 2. The trainer. Its constructor needs a dataset and a tokenizer, which no step uses, because
    # the steps get whole batches.
    save_adapter(policy, folder, "")
    config = DPOConfig(
        output_dir=str(folder),
        beta=0.1,
        bf16=options.dtype == "bfloat16",
        gradient_checkpointing=False,
        report_to=[],
        max_length=None,
        use_cpu=options.device == "cpu",
        per_device_train_batch_size=options.pairs,
    )
    placeholder_row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    trainer = DPOTrainer(
        PeftModel.from_pretrained(peer, folder, is_trainable=True),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(ROOT / "data" / "tiny" / "model"),
        train_dataset=Dataset.from_list([placeholder_row]),
    )

    # 3. The trainer copies a loaded adapter as the reference. Without that copy it switches the
    # adapter off, as it does for a new one.
    trainer.model.delete_adapter("ref")

    # 4. What `train` does before its first step: it casts under bf16, and moves to the device.
    trainer.accelerator.prepare_model(trainer.model)
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_trl_batch(options, pairs):
    """Make the batch that TRL's vision collator makes of pairs.

    All chosen responses come first, then all rejected ones: whole sequences, padded on the right.
    """
    # 1. One sequence a response, and a mask that tells prompt (0) from response (1).
    sequences = []
    completion_masks = []
    for side in (0, 1):
        for pair in pairs:
            prompt = repeat_placeholder(pair.prompt, num_image_tokens(options))
            response = pair.responses[side]
            sequences.append(prompt + response)
            completion_masks.append([0] * len(prompt) + [1] * len(response))
    attention_masks = [[1] * len(sequence) for sequence in sequences]

    # 2. The tiles of all images, once for each sequence.
    tiles = torch.stack([pair.image[0] for pair in pairs] * 2)  # (2B, n, 3, S, S)
    if not options.anyres:
        tiles = tiles[:, 0]  # (2B, 3, S, S)
    batch = {
        "pixel_values": tiles.to(options.device, torch_dtype(options)),
        "input_ids": pad_rows(sequences, PAD, options.device),
        "attention_mask": pad_rows(attention_masks, 0, options.device),
        "completion_mask": pad_rows(completion_masks, 0, options.device),
    }
    if options.anyres:
        sizes = [pair.image[1] for pair in pairs] * 2
        batch["image_sizes"] = torch.tensor(sizes, device=options.device)
    return batch


def repeat_placeholder(prompt, count):
    """Repeat the image placeholder of a prompt, as transformers expects it."""
    index = prompt.index(IMAGE)
    return prompt[:index] + [IMAGE] * count + prompt[index + 1 :]


def pad_rows(rows, fill, device):
    """Pad lists on the right, and return them as a tensor (B, T)."""
    longest = max(len(row) for row in rows)
    padded = [row + [fill] * (longest - len(row)) for row in rows]
    return torch.tensor(padded, device=device)


@contextlib.contextmanager
def compact_head():
    """Let TRL apply the vocabulary head to response positions alone inside a `with` block.

    It does so on CUDA. On a CPU it applies the head to all positions.
    """
    with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
        yield


def peft_name(name):
    """Return the name that PEFT's model in memory gives to our trained parameter `name`."""
    peer_name = ADAPTER_PREFIX + to_layout_name(name, "memory")
    if "projector." in peer_name:
        return peer_name.replace("projector.", "projector.modules_to_save.default.")
    return peer_name + ".default.weight"
