"""Build each method from the options of train.py.

The table METHODS (registry.py) names the function of each method.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from minialign.generation.decoding import SamplingParams
from minialign.methods.base import Example
from minialign.methods.distillation import DistillationConfig, DistillationMethod
from minialign.methods.distilled_preference import DistilledPreferenceMethod
from minialign.methods.grpo import GrpoMethod
from minialign.methods.mdpo import ImageDamage, MdpoMethod
from minialign.methods.mpo import MpoMethod
from minialign.methods.online import DistortionPairs, OnlineBdhsPairs, OnlinePairs
from minialign.methods.policy_gradient import PpoMethod, RlooMethod, reward_statistics
from minialign.methods.preference import PreferenceMethod, RewardModelMethod, SupervisedMethod
from minialign.models.loading import VLM
from minialign.models.policy import Policy
from minialign.pairs.annotators import load_annotator
from minialign.pairs.bdhs import bdhs_sampler
from minialign.pairs.reward_model import load_reward_model


@dataclass
class MethodInputs:
    """What a method is built from."""

    options: argparse.Namespace
    policy: Policy
    vlm: VLM
    examples: list[Example]
    folder: Path  # where this variant writes: OUT or OUT/control


def build_sft(inputs):
    """Build supervised fine-tuning on the chosen responses."""
    return SupervisedMethod(inputs.vlm)


def build_preference(inputs, collector=None):
    """Build a loss on preference pairs.

    Without a collector it learns from the responses that the examples already hold: those of the
    data, or those that BDHS sampled before training.
    """
    options = inputs.options
    if options.gamma is None:
        rejected_weights = (1.0,)
    else:
        rejected_weights = (options.gamma, 1 - options.gamma)  # Eq. 5
    fields = {
        "vlm": inputs.vlm,
        "loss_name": options.loss,
        "beta": options.beta,
        "smoothing": options.smoothing,
        "rejected_weights": rejected_weights,
        "collector": collector,
    }

    # Losses that need more than the log-probs of a pair have a class of their own.
    if options.loss == "mpo":
        return MpoMethod(**fields)
    if options.loss == "mdpo":
        damage = ImageDamage(
            share=options.damage,
            noise_steps=options.damage_noise,
            seed=options.seed,
        )
        return MdpoMethod(**fields, policy=inputs.policy, damage=damage)
    return PreferenceMethod(**fields)


def build_preference_on_fixed_pairs(inputs):
    """Build a loss on the pairs of the examples, with --distill-weight plus distillation."""
    options = inputs.options
    preference = build_preference(inputs)
    if options.distill_weight is None:
        return preference
    config = DistillationConfig(contrast=options.contrast, plausibility=options.plausibility)
    distillation = DistillationMethod(
        policy=inputs.policy,
        vlm=inputs.vlm,
        config=config,
        sampling=None,
        divergence=options.divergence,
    )
    return DistilledPreferenceMethod(preference, distillation, options.distill_weight)


def build_online_dpo(inputs, mix=0.0):
    """Build Online-DPO (Sec. 2.3)."""
    options = inputs.options
    collector = OnlinePairs(
        policy=inputs.policy,
        vlm=inputs.vlm,
        annotator=load_annotator(options, not options.one_order),
        sampling=sampling_params(options),
        mix=mix,
    )
    return build_preference(inputs, collector)


def build_mixed_dpo(inputs):
    """Build Mixed-DPO (Eq. 4)."""
    return build_online_dpo(inputs, mix=inputs.options.mix)


def build_online_bdhs(inputs):
    """Build online BDHS (Sec. 3.4)."""
    collector = OnlineBdhsPairs(
        policy=inputs.policy,
        vlm=inputs.vlm,
        sampler=bdhs_sampler(inputs.options, inputs.vlm),
    )
    return build_preference(inputs, collector)


def build_distortion(inputs):
    """Build the image distortion of Sec. 3.3."""
    collector = DistortionPairs(
        policy=inputs.policy,
        vlm=inputs.vlm,
        noise_steps=inputs.options.noise_steps,
        seed=inputs.options.seed,
    )
    return build_preference(inputs, collector)


def build_reward_model(inputs):
    """Build the training of a reward model (Eq. 1). The policy gets a scalar head."""
    inputs.policy.add_scalar_head()
    return RewardModelMethod(inputs.policy, inputs.vlm)


def build_rloo(inputs):
    """Build RLOO (App. A)."""
    return RlooMethod(**policy_gradient_fields(inputs))


def build_grpo(inputs):
    """Build GRPO (beyond the paper)."""
    return GrpoMethod(**policy_gradient_fields(inputs))


def build_ppo(inputs):
    """Build PPO (App. A). The policy gets a scalar head for the values."""
    inputs.policy.add_scalar_head()
    return PpoMethod(**policy_gradient_fields(inputs))


def policy_gradient_fields(inputs):
    """Return the fields that RLOO, PPO and GRPO share, with the reward model and its statistics."""
    options = inputs.options
    reward_folder = options.reward or inputs.folder / "reward"
    reward_model = load_reward_model(reward_folder, options.model, options.dtype, options.device)
    records = [example.record for example in inputs.examples]
    reward_mean, reward_std = reward_statistics(reward_model, records)
    fields = {
        "policy": inputs.policy,
        "vlm": inputs.vlm,
        "reward_model": reward_model,
        "reward_mean": reward_mean,
        "reward_std": reward_std,
        # Temperature 1 and no nucleus: the log-probs that these methods learn from are those of the
        # policy itself. Samples of a sharper distribution would be scored by the wrong one.
        "sampling": SamplingParams(max_new_tokens=options.max_new_tokens, seed=options.seed),
        "beta": options.beta,
    }
    if options.passes is not None:  # else the method's own number
        fields["passes"] = options.passes
    return fields


def build_distillation(inputs):
    """Build contrastive distillation (beyond the paper)."""
    options = inputs.options
    # As in BDHS, noise takes the place of the mask: all tokens of the noisy image stay visible.
    uses_noise = options.by == "noise"
    config = DistillationConfig(
        contrast=options.contrast,
        plausibility=options.plausibility,
        responses=options.on,
        rho=0.0 if uses_noise else options.rho,
        noise_steps=options.noise_steps if uses_noise else 0,
        seed=options.seed,
    )
    return DistillationMethod(
        policy=inputs.policy,
        vlm=inputs.vlm,
        config=config,
        sampling=sampling_params(options),
        divergence=options.divergence,
    )


def sampling_params(options):
    """Return how responses are sampled, as the options ask for it."""
    return SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
