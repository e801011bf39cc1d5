"""Write tests/golden/trl_losses.json: losses and gradients of TRL's own code on given log-probs.

Run it by hand with trl: `python tests/golden/make_trl_losses.py`. TRL has no function for a loss
alone. So its method is called on a stand-in for the trainer, which returns the log-probs.
"""

import json
import platform
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from trl import DPOTrainer, GRPOTrainer
from trl.trainer.utils import nanstd

OUT = Path(__file__).parent / "trl_losses.json"
PACKAGES = ("trl", "transformers", "torch")
# Two prompts with four responses each: how many tokens each response has, and its reward.
LENGTHS = (5, 2, 7, 1, 3, 3, 6, 4)
REWARDS = (0.5, -1.0, 2.0, 0.25, 1.0, 1.0, 1.0, -3.0)
BETA = 0.3
SHIFT = 0.7  # of BCO


def draw_logps():
    """Return log-probs (8, 7) of the policy, of the one that sampled, and of the reference.

    They are so far apart that many tokens are clipped.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (len(LENGTHS), max(LENGTHS))
    old_logps = -3 * torch.rand(shape, generator=generator) - 0.1
    logps = old_logps + 0.3 * torch.randn(shape, generator=generator)
    ref_logps = old_logps + torch.randn(shape, generator=generator)
    return logps, old_logps, ref_logps


def stand_in(logps):
    """Return what GRPOTrainer._compute_loss reads of its trainer, with the loss of the paper."""
    accelerator = SimpleNamespace(
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
        num_processes=1,
        sync_gradients=True,
    )
    return SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logps, torch.zeros_like(logps), None),
        accelerator=accelerator,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        aux_loss_enabled=False,
        beta=BETA,
        current_gradient_accumulation_steps=1,
        epsilon_high=0.2,
        epsilon_low=0.2,
        importance_sampling_level="token",
        loss_type="grpo",
        model=SimpleNamespace(training=True),
        off_policy_mask_threshold=None,
        top_entropy_quantile=1.0,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )


def grpo():
    """Return the inputs of GRPO's loss, and what TRL makes of them. Lists leave out padding."""
    # 1. The advantages. TRL computes them inside of a long method, in these lines.
    rewards = torch.tensor(REWARDS).view(2, 4)
    deviations = rewards - rewards.mean(dim=1, keepdim=True)
    advantages = deviations / (nanstd(rewards, dim=1, keepdim=True) + 1e-4)

    # 2. The loss.
    logps, old_logps, ref_logps = draw_logps()
    logps.requires_grad_()
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).int()
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "old_per_token_logps": old_logps,
        "ref_per_token_logps": ref_logps,
    }
    loss = GRPOTrainer._compute_loss(stand_in(logps), None, inputs)
    loss.backward()

    # 3. As lists.
    is_real = mask.bool()
    return {
        "lengths": list(LENGTHS),
        "rewards": rewards.tolist(),
        "beta": BETA,
        "logps": logps[is_real].tolist(),
        "old_logps": old_logps[is_real].tolist(),
        "ref_logps": ref_logps[is_real].tolist(),
        "advantages": advantages.tolist(),
        "loss": loss.item(),
        "gradient": logps.grad[is_real].tolist(),
    }


def dpo_stand_in():
    """Return what DPOTrainer._compute_loss reads of its trainer, with the three losses of MPO."""
    accelerator = SimpleNamespace(
        device="cpu",
        gather=lambda tensor: tensor,
        gather_for_metrics=lambda tensor: tensor,
    )
    return SimpleNamespace(
        accelerator=accelerator,
        aux_loss_enabled=False,
        beta=BETA,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def mpo(shift):
    """Return the inputs of MPO's loss, and what TRL makes of them. Lists leave out padding.

    TRL's BCO has no shift. But reference log-probs that are higher by shift / beta lower every
    reward by the shift, and leave the other losses as they are.
    """
    # 1. The first half of the responses is chosen, the second half rejected.
    logps, _, ref_logps = draw_logps()
    logps.requires_grad_()
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).int()
    summed_ref_logps = (ref_logps * mask).sum(dim=1)
    ref_chosen_logps, ref_rejected_logps = summed_ref_logps.chunk(2)

    # 2. The loss. TRL drops the first position, of which there is no log-prob.
    first_column = torch.zeros(len(LENGTHS), 1, dtype=torch.int)
    completion_mask = torch.cat([first_column, mask], dim=1)
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": ref_chosen_logps + shift / BETA,
        "ref_rejected_logps": ref_rejected_logps + shift / BETA,
    }
    outputs = SimpleNamespace(
        log_probs=logps * mask,
        entropy=torch.zeros_like(logps),
        mean_logits=torch.zeros_like(logps),
        is_top1=mask.bool(),
    )
    loss = DPOTrainer._compute_loss(dpo_stand_in(), lambda **_: outputs, inputs, False)
    loss.backward()

    # 3. As lists.
    is_real = mask.bool()
    return {
        "lengths": list(LENGTHS),
        "beta": BETA,
        "shift": shift,
        "logps": logps[is_real].tolist(),
        "ref_chosen_logps": ref_chosen_logps.tolist(),
        "ref_rejected_logps": ref_rejected_logps.tolist(),
        "loss": loss.item(),
        "gradient": logps.grad[is_real].tolist(),
    }


def main():
    """Write the file."""
    versions = {name: version(name) for name in PACKAGES}
    golden = {
        "made_with": {"python": platform.python_version(), **versions},
        "grpo": grpo(),
        "mpo": [mpo(shift=0.0), mpo(shift=SHIFT)],
    }
    OUT.write_text(json.dumps(golden) + "\n")


if __name__ == "__main__":
    main()
