"""Name every method once: where its responses come from, what it needs, and how it is built.

Everything that must know a method by its name reads the table METHODS: the command line, the training
script and the README. To add a method, write its class and add one entry here.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minialign.methods.base import Example, Method
from minialign.methods.online import collect_distortion, collect_online, collect_online_bdhs
from minialign.methods.policy_gradient import ppo_method, reward_statistics, rloo_method
from minialign.methods.preference import (
    collect_offline,
    preference_method,
    reward_model_method,
    sft_method,
)
from minialign.generation.decoding import SamplingParams
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


@dataclass(frozen=True)
class MethodSpec:
    """What the rest of the project has to know of a method."""

    responses: str  # where a step's responses come from, in a few words (help and README show it)
    loss: str  # what it minimizes, in a few words
    # "chosen": it learns from chosen responses, so supervised records will do.
    # "pairs": every record needs a rejected response as well.
    # "prompts": it samples its own responses, so the records' prompts will do.
    data: str
    options: tuple[str, ...]  # options it reads beyond those that every method reads
    stores_reference: bool  # reference log-probs are computed once, before training, and stored
    build: Callable[[MethodInputs], Method]

    def needs_annotator(self):
        """Return whether an annotator ranks the sampled responses."""
        return "annotator" in self.options

    def needs_reward_model(self):
        """Return whether a reward model scores the sampled responses."""
        return "reward" in self.options

    def needs_pairs(self, options):
        """Return whether every record must have a rejected response, with these options."""
        if self.data == "pairs" or options.gamma is not None:
            return True
        # Without --reward a reward model is trained first, on the pairs of the data.
        return self.needs_reward_model() and not options.reward

    def keeps_rejected(self, options):
        """Return whether training uses the rejected responses of the data, with these options."""
        return self.data == "pairs" or options.gamma is not None


def build_method(name: str, inputs: MethodInputs) -> Method:
    """Build the method called `name` as the options ask for it."""
    return METHODS[name].build(inputs)


def build_sft(inputs):
    """Build supervised fine-tuning on the chosen responses."""
    return sft_method(inputs.vlm)


def build_preference(inputs, collect=collect_offline):
    """Build a loss on pairs (DPO, IPO or SLiC), by default on the pairs of the data."""
    options = inputs.options
    if options.gamma is None:
        rejected_weights = (1.0,)
    else:
        rejected_weights = (options.gamma, 1 - options.gamma)  # Eq. 5
    return preference_method(
        inputs.vlm, options.loss, options.beta, options.smoothing, rejected_weights, collect
    )


def build_online_dpo(inputs):
    """Build Online-DPO (Sec. 2.3)."""
    annotator = load_annotator(inputs.options, not inputs.options.one_order)
    sampling = sampling_params(inputs.options)
    return build_preference(inputs, collect_online(inputs.policy, inputs.vlm, annotator, sampling))


def build_mixed_dpo(inputs):
    """Build Mixed-DPO (Eq. 4)."""
    annotator = load_annotator(inputs.options, not inputs.options.one_order)
    sampling = sampling_params(inputs.options)
    return build_preference(
        inputs,
        collect_online(inputs.policy, inputs.vlm, annotator, sampling, inputs.options.mix),
    )


def build_online_bdhs(inputs):
    """Build online BDHS (Sec. 3.4)."""
    sampler = bdhs_sampler(inputs.options, inputs.vlm)
    return build_preference(inputs, collect_online_bdhs(inputs.policy, inputs.vlm, sampler))


def build_distortion(inputs):
    """Build the image distortion of Sec. 3.3."""
    options = inputs.options
    return build_preference(
        inputs, collect_distortion(inputs.policy, inputs.vlm, options.noise_steps, options.seed)
    )


def build_reward_model(inputs):
    """Build the training of a reward model (Eq. 1). The policy gets a scalar head."""
    inputs.policy.add_scalar_head()
    return reward_model_method(inputs.policy, inputs.vlm)


def build_rloo(inputs):
    """Build RLOO (App. A)."""
    return build_policy_gradient(inputs, rloo_method)


def build_ppo(inputs):
    """Build PPO (App. A). The policy gets a scalar head for the values."""
    inputs.policy.add_scalar_head()
    return build_policy_gradient(inputs, ppo_method)


def build_policy_gradient(inputs, method):
    """Build a method that learns from the rewards of a reward model."""
    options = inputs.options
    reward_model = load_reward_model(
        options.reward or inputs.folder / "reward", options.model, options.dtype, options.device
    )
    records = [example.record for example in inputs.examples]
    return method(
        inputs.policy,
        inputs.vlm,
        reward_model,
        reward_statistics(reward_model, records),
        sampling_params(options),
        options.beta,
    )


def sampling_params(options):
    """Return how the policy samples responses."""
    return SamplingParams(options.max_new_tokens, options.temperature, options.top_p, options.seed)


PAIR_OPTIONS = ("loss", "beta", "smoothing")
SAMPLING_OPTIONS = ("max_new_tokens", "temperature", "top_p")
BDHS_OPTIONS = ("rho", "rounds", "epsilon", "similarity", "by", "noise_steps", "unguided", "gamma")

METHODS: dict[str, MethodSpec] = {
    "sft": MethodSpec(
        responses="the chosen responses of the data",
        loss="negative log-likelihood",
        data="chosen",
        options=(),
        stores_reference=False,
        build=build_sft,
    ),
    "dpo": MethodSpec(
        responses="the pairs of the data",
        loss="DPO (Eq. 3), IPO or SLiC",
        data="pairs",
        options=PAIR_OPTIONS,
        stores_reference=True,
        build=build_preference,
    ),
    "online-dpo": MethodSpec(
        responses="two of the current policy, ranked by an annotator",
        loss="as dpo",
        data="prompts",
        options=(*PAIR_OPTIONS, *SAMPLING_OPTIONS, "annotator", "one_order"),
        stores_reference=False,
        build=build_online_dpo,
    ),
    "mixed-dpo": MethodSpec(
        responses="at random the pair of the data or a pair as in online-dpo",
        loss="as dpo (Eq. 4)",
        data="pairs",
        options=(*PAIR_OPTIONS, *SAMPLING_OPTIONS, "annotator", "one_order", "mix"),
        stores_reference=True,
        build=build_mixed_dpo,
    ),
    "bdhs": MethodSpec(
        responses="rejected ones sampled with the image masked, once, before training",
        loss="as dpo, with --gamma averaged (Eq. 5)",
        data="chosen",
        options=(*PAIR_OPTIONS, *SAMPLING_OPTIONS, *BDHS_OPTIONS, "group"),
        stores_reference=True,
        build=build_preference,
    ),
    "online-bdhs": MethodSpec(
        responses="rejected ones sampled with the image masked, at every step",
        loss="as dpo, with --gamma averaged (Eq. 5)",
        data="chosen",
        options=(*PAIR_OPTIONS, *SAMPLING_OPTIONS, *BDHS_OPTIONS),
        stores_reference=False,
        build=build_online_bdhs,
    ),
    "distortion": MethodSpec(
        responses="the pairs of the data, and what the policy predicts under a noisy image",
        loss="as dpo, averaged over both rejected ones (Eq. 5)",
        data="pairs",
        options=(*PAIR_OPTIONS, "noise_steps", "gamma"),
        stores_reference=False,
        build=build_distortion,
    ),
    "reward": MethodSpec(
        responses="the pairs of the data",
        loss="ranking loss of a scalar head (Eq. 1)",
        data="pairs",
        options=(),
        stores_reference=False,
        build=build_reward_model,
    ),
    "rloo": MethodSpec(
        responses="four of the current policy, scored by a reward model",
        loss="clipped surrogate, the mean of the other three as baseline (Eq. 2)",
        data="prompts",
        options=("beta", *SAMPLING_OPTIONS, "reward"),
        stores_reference=False,
        build=build_rloo,
    ),
    "ppo": MethodSpec(
        responses="one of the current policy, scored by a reward model",
        loss="clipped surrogate, a value head as baseline (Eq. 2)",
        data="prompts",
        options=("beta", *SAMPLING_OPTIONS, "reward"),
        stores_reference=False,
        build=build_ppo,
    ),
}
