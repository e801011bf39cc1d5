"""The peers: transformers' LLaVA on the very weights of our model, and TRL's DPOTrainer around it. Needs transformers, peft, trl and datasets."""

import contextlib
import importlib.util
import warnings
from unittest import mock

import torch
from common import IMAGE, PAD, ROOT, raw_config, vectors_of

from minialign.models.adapters import ADAPTER_PREFIX, save_adapter
from minialign.models.checkpoint import to_layout_name


def missing(*names):
    """Those of these packages that are not installed."""
    return [name for name in names if importlib.util.find_spec(name) is None]


def peer_model(options, model):
    """transformers' model; it shares our tensors, apart from the projector, which is trained in place."""
    import transformers

    raw, next_ = raw_config(options), "Next" * options.anyres
    config = getattr(transformers, f"Llava{next_}Config")(**raw)
    with torch.device(options.device):
        peer = getattr(transformers, f"Llava{next_}ForConditionalGeneration")._from_config(
            config, dtype=getattr(torch, options.dtype)
        )
    tensors = {
        to_layout_name(name, "memory"): tensor.clone() if "projector" in name else tensor
        for name, tensor in model.state_dict().items()
    }
    peer.load_state_dict(tensors, strict=True, assign=True)
    return peer.requires_grad_(False).eval()


def trainer_of(options, peer, policy, folder):
    """TRL's DPOTrainer on the peer with the policy's adapter, written by save_adapter and loaded by PEFT; no gradient checkpointing.

    The trainer's constructor wants a dataset and a tokenizer, which the steps never touch: they are given whole batches. It
    copies a loaded adapter as the reference; without that copy it switches the adapter off, as it does for a fresh one.
    """
    from datasets import Dataset, disable_progress_bars
    from peft import PeftModel
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar
    from trl import DPOConfig, DPOTrainer

    disable_progress_bar()
    disable_progress_bars()
    warnings.simplefilter("ignore")
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
    trainer = DPOTrainer(
        PeftModel.from_pretrained(peer, folder, is_trainable=True),
        args=config,
        processing_class=AutoTokenizer.from_pretrained(ROOT / "data" / "tiny" / "model"),
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
    )
    trainer.model.delete_adapter("ref")
    trainer.accelerator.prepare_model(
        trainer.model
    )  # as `train` does: casts under bf16, to the device
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def trl_batch(options, pairs):
    """The batch that TRL's vision collator makes of pairs: all chosen, then all rejected, whole sequences padded on the right."""
    sequences = [
        (
            [
                token
                for id in pair.prompt
                for token in [id] * (vectors_of(options) if id == IMAGE else 1)
            ],
            pair.responses[side],
        )
        for side in (0, 1)
        for pair in pairs
    ]
    T = max(len(prompt) + len(response) for prompt, response in sequences)

    def padded(rows, fill):
        return torch.tensor([row + [fill] * (T - len(row)) for row in rows], device=options.device)

    tiles = torch.stack([pair.picture[0] for pair in pairs] * 2).to(options.device)
    sizes = (
        {
            "image_sizes": torch.tensor(
                [pair.picture[1] for pair in pairs] * 2, device=options.device
            )
        }
        if options.anyres
        else {}
    )
    return sizes | {
        "pixel_values": (tiles if options.anyres else tiles[:, 0]).to(
            getattr(torch, options.dtype)
        ),
        "input_ids": padded([prompt + response for prompt, response in sequences], PAD),
        "attention_mask": padded(
            [[1] * len(prompt + response) for prompt, response in sequences], 0
        ),
        "completion_mask": padded(
            [[0] * len(prompt) + [1] * len(response) for prompt, response in sequences], 0
        ),
    }


@contextlib.contextmanager
def compact_head():
    """Within: TRL applies the head to response positions alone, as it does on CUDA; on a CPU it leaves it at all positions."""
    with mock.patch("trl.trainer.utils._use_triton", lambda device: True):
        yield


def peer_name(name):
    """What PEFT calls our trained parameter `name`."""
    theirs = ADAPTER_PREFIX + to_layout_name(name, "memory")
    return (
        theirs.replace("projector.", "projector.modules_to_save.default.")
        if "projector." in theirs
        else theirs + ".default.weight"
    )
