"""Name every method once: where its responses come from, what it needs, and how it is built.

Everything that must know a method by its name reads the table METHODS: the command line, the
training script and the README. To add a method, write its class and add one entry here. Tests
then ask for its row in the README, in the guided tour and in data/tiny/methods.md. Its defaults, if
they are not those of all methods, go into METHOD_DEFAULTS (training/options.py) and
data/tiny/recipe.json. An entry names the options that its method reads. The command line refuses
them for a method that does not name them.

Two names are also used outside this table: `sft` trains the control, and `reward` makes a reward
model instead of an aligned model (train.py, training/run.py).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minialign.generation.decoding import SamplingParams
from minialign.methods.base import Example, Method
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


@dataclass(frozen=True)
class MethodSpec:
    """What the rest of the project has to know about a method."""

    responses: str  # where a step's responses come from, in words that the help and READMEs show
    loss: str  # what it minimizes, in a few words
    # Which responses of the data it uses. Every record has a chosen one.
    # "chosen": it learns from the chosen responses, so supervised records are enough.
    # "pairs": it learns from pairs, so every record needs a rejected response as well.
    # "prompts": it learns from responses that it samples to the prompts.
    data: str
    # Options that it reads beyond COMMON_OPTIONS. The command line refuses all others. `gamma`,
    # `annotator`, `reward` and `similarity` also decide what is checked and loaded.
    options: tuple[str, ...]
    stores_reference_logps: bool  # computes those of fixed pairs once, before training
    build: Callable[[MethodInputs], Method]
    samples_before_training: bool = False  # BDHS samples all rejected responses in advance

    def needs_annotator(self):
        """Return whether an annotator ranks the sampled responses."""
        return "annotator" in self.options

    def needs_reward_model(self):
        """Return whether a reward model scores the sampled responses."""
        return "reward" in self.options

    def keeps_rejected(self, options):
        """Return whether training uses the rejected responses of the data, with these options."""
        return self.data == "pairs" or options.gamma is not None

    def needs_pairs(self, options):
        """Return whether every record must have a rejected response, with these options."""
        if self.keeps_rejected(options):
            return True
        # Without --reward a reward model is trained first, on the pairs of the data.
        return self.needs_reward_model() and not options.reward


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


# The options that every method reads. Any other option of train.py is read by the methods below
# that name it.
COMMON_OPTIONS = (
    *("method", "model", "template", "system", "dtype", "device", "split"),
    *("data", "format", "images", "skip_text_only", "limit"),
    *("out", "resume", "export", "plan", "seed"),
    *("steps", "epochs", "batch_size", "lr", "projector_lr", "schedule"),
    *("lora_rank", "lora_alpha"),
    *("tokens_per_microbatch", "keep_features", "checkpoint_layers"),
)
PAIR_OPTIONS = ("loss", "beta", "smoothing", "damage", "damage_noise")
SAMPLING_OPTIONS = ("max_new_tokens", "temperature", "top_p")
BDHS_OPTIONS = ("rho", "rounds", "epsilon", "similarity", "by", "noise_steps", "unguided", "gamma")
ANNOTATOR_OPTIONS = ("annotator", "one_order")
REWARD_OPTIONS = ("beta", "max_new_tokens", "passes", "reward", "reward_steps")
TARGET_OPTIONS = ("contrast", "plausibility", "divergence")
DISTILLATION_OPTIONS = (*TARGET_OPTIONS, "on", "rho", "by", "noise_steps")
ADDED_DISTILLATION_OPTIONS = ("distill_weight", *TARGET_OPTIONS)
# How an aligned model is measured, and what it is compared with.
RESULT_OPTIONS = ("eval", "control")

METHODS: dict[str, MethodSpec] = {}

METHODS["sft"] = MethodSpec(
    responses="the chosen responses of the data",
    loss="negative log-likelihood",
    data="chosen",
    options=("eval",),
    stores_reference_logps=False,
    build=build_sft,
)

METHODS["dpo"] = MethodSpec(
    responses="the pairs of the data",
    loss="DPO (Eq. 3), IPO or SLiC",
    data="pairs",
    options=(
        *RESULT_OPTIONS,
        *PAIR_OPTIONS,
        "reference_adapter",
        *ADDED_DISTILLATION_OPTIONS,
    ),
    stores_reference_logps=True,
    build=build_preference_on_fixed_pairs,
)

METHODS["online-dpo"] = MethodSpec(
    responses="two of the current policy, ranked by an annotator",
    loss="as dpo",
    data="prompts",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, *SAMPLING_OPTIONS, *ANNOTATOR_OPTIONS),
    stores_reference_logps=False,
    build=build_online_dpo,
)

METHODS["mixed-dpo"] = MethodSpec(
    responses="at random the pair of the data or a pair as in online-dpo",
    loss="as dpo (Eq. 4)",
    data="pairs",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, *SAMPLING_OPTIONS, *ANNOTATOR_OPTIONS, "mix"),
    stores_reference_logps=True,
    build=build_mixed_dpo,
)

# The examples that it is built from already hold its pairs: `build_examples` (training/inputs.py)
# samples them, or reads those that an interrupted run sampled.
METHODS["bdhs"] = MethodSpec(
    responses="rejected ones sampled with the image masked, once, before training",
    loss="as dpo, with --gamma averaged (Eq. 5)",
    data="chosen",
    options=(
        *RESULT_OPTIONS,
        *PAIR_OPTIONS,
        "reference_adapter",
        *SAMPLING_OPTIONS,
        *BDHS_OPTIONS,
        "group",
        *ADDED_DISTILLATION_OPTIONS,
    ),
    stores_reference_logps=True,
    build=build_preference_on_fixed_pairs,
    samples_before_training=True,
)

METHODS["online-bdhs"] = MethodSpec(
    responses="rejected ones sampled with the image masked, at every step",
    loss="as dpo, with --gamma averaged (Eq. 5)",
    data="chosen",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, *SAMPLING_OPTIONS, *BDHS_OPTIONS),
    stores_reference_logps=False,
    build=build_online_bdhs,
)

METHODS["distortion"] = MethodSpec(
    responses="the pairs of the data, and what the policy predicts under a noisy image",
    loss="as dpo, averaged over both rejected ones (Eq. 5)",
    data="pairs",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, "noise_steps", "gamma"),
    stores_reference_logps=False,
    build=build_distortion,
)

METHODS["reward"] = MethodSpec(
    responses="the pairs of the data",
    loss="ranking loss of a scalar head (Eq. 1)",
    data="pairs",
    options=(),
    stores_reference_logps=False,
    build=build_reward_model,
)

METHODS["rloo"] = MethodSpec(
    responses="four of the current policy, scored by a reward model",
    loss="policy gradient, the mean of the other three as baseline (Eq. 2)",
    data="prompts",
    options=(*RESULT_OPTIONS, *REWARD_OPTIONS),
    stores_reference_logps=False,
    build=build_rloo,
)

METHODS["ppo"] = MethodSpec(
    responses="one of the current policy, scored by a reward model",
    loss="clipped surrogate, a value head as baseline (Eq. 2)",
    data="prompts",
    options=(*RESULT_OPTIONS, *REWARD_OPTIONS),
    stores_reference_logps=False,
    build=build_ppo,
)

METHODS["grpo"] = MethodSpec(
    responses="as rloo",
    loss="as ppo, rewards standardized among the four",
    data="prompts",
    options=(*RESULT_OPTIONS, *REWARD_OPTIONS),
    stores_reference_logps=False,
    build=build_grpo,
)

METHODS["distill"] = MethodSpec(
    responses="the chosen responses of the data, or with --on sampled ones",
    loss="divergence from a target that contrasts the reference with and without the image",
    data="chosen",
    options=(*RESULT_OPTIONS, *SAMPLING_OPTIONS, *DISTILLATION_OPTIONS),
    stores_reference_logps=False,
    build=build_distillation,
)


def build_method(name: str, inputs: MethodInputs) -> Method:
    """Build the method called `name` as the options ask for it."""
    return METHODS[name].build(inputs)
