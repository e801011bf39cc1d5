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

from collections.abc import Callable
from dataclasses import dataclass

from minialign.methods import builders
from minialign.methods.base import Method
from minialign.methods.builders import MethodInputs


@dataclass(frozen=True)
class MethodSpec:
    """What the rest of the project has to know about a method."""

    responses: str  # where a step's responses come from, in words that the help and READMEs show
    loss: str  # what it minimizes, in a few words
    # What it learns from that a control has not seen, in words for the page about a run. A control
    # learns from the chosen responses of the data alone. Empty for a method without a control.
    not_in_control: str
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
    reads_reference: bool = True  # compares the policy with the model before training

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
POLICY_GRADIENT_OPTIONS = ("beta", "max_new_tokens", "passes", "reward", "reward_steps")
TARGET_OPTIONS = ("contrast", "plausibility", "divergence")
DISTILLATION_OPTIONS = (*TARGET_OPTIONS, "on", "rho", "by", "noise_steps")
ADDED_DISTILLATION_OPTIONS = ("distill_weight", *TARGET_OPTIONS)
# How an aligned model is measured, and what it is compared with.
RESULT_OPTIONS = ("eval", "control")

METHODS: dict[str, MethodSpec] = {}

METHODS["sft"] = MethodSpec(
    responses="the chosen responses of the data",
    loss="negative log-likelihood",
    not_in_control="",
    data="chosen",
    options=("eval",),
    stores_reference_logps=False,
    build=builders.build_sft,
    reads_reference=False,
)

METHODS["dpo"] = MethodSpec(
    responses="the pairs of the data",
    loss="DPO (Eq. 3), IPO or SLiC",
    not_in_control="the rejected answers",
    data="pairs",
    options=(
        *RESULT_OPTIONS,
        *PAIR_OPTIONS,
        "reference_adapter",
        *ADDED_DISTILLATION_OPTIONS,
    ),
    stores_reference_logps=True,
    build=builders.build_preference_on_fixed_pairs,
)

METHODS["online-dpo"] = MethodSpec(
    responses="two of the current policy, ranked by an annotator",
    loss="as dpo",
    not_in_control="the ranking of its own answers",
    data="prompts",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, *SAMPLING_OPTIONS, *ANNOTATOR_OPTIONS),
    stores_reference_logps=False,
    build=builders.build_online_dpo,
)

METHODS["mixed-dpo"] = MethodSpec(
    responses="at random the pair of the data or a pair as in online-dpo",
    loss="as dpo (Eq. 4)",
    not_in_control="the rejected answers and the ranking of its own answers",
    data="pairs",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, *SAMPLING_OPTIONS, *ANNOTATOR_OPTIONS, "mix"),
    stores_reference_logps=True,
    build=builders.build_mixed_dpo,
)

# The examples that it is built from already hold its pairs: `build_examples` (training/inputs.py)
# samples them, or reads those that an interrupted run sampled.
METHODS["bdhs"] = MethodSpec(
    responses="rejected ones sampled with the image masked, once, before training",
    loss="as dpo, with --gamma averaged (Eq. 5)",
    not_in_control="the rejected answers",
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
    build=builders.build_preference_on_fixed_pairs,
    samples_before_training=True,
)

METHODS["online-bdhs"] = MethodSpec(
    responses="rejected ones sampled with the image masked, at every step",
    loss="as dpo, with --gamma averaged (Eq. 5)",
    not_in_control="the rejected answers",
    data="chosen",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, *SAMPLING_OPTIONS, *BDHS_OPTIONS),
    stores_reference_logps=False,
    build=builders.build_online_bdhs,
)

METHODS["distortion"] = MethodSpec(
    responses="the pairs of the data, and what the policy predicts under a noisy image",
    loss="as dpo, averaged over both rejected ones (Eq. 5)",
    not_in_control="the rejected answers",
    data="pairs",
    options=(*RESULT_OPTIONS, *PAIR_OPTIONS, "noise_steps", "gamma"),
    stores_reference_logps=False,
    build=builders.build_distortion,
)

METHODS["reward"] = MethodSpec(
    responses="the pairs of the data",
    loss="ranking loss of a scalar head (Eq. 1)",
    not_in_control="",
    data="pairs",
    options=(),
    stores_reference_logps=False,
    build=builders.build_reward_model,
    reads_reference=False,
)

METHODS["rloo"] = MethodSpec(
    responses="four of the current policy, scored by a reward model",
    loss="policy gradient, the mean of the other three as baseline (Eq. 2)",
    not_in_control="the rewards of its own answers",
    data="prompts",
    options=(*RESULT_OPTIONS, *POLICY_GRADIENT_OPTIONS),
    stores_reference_logps=False,
    build=builders.build_rloo,
)

METHODS["ppo"] = MethodSpec(
    responses="one of the current policy, scored by a reward model",
    loss="clipped surrogate, a value head as baseline (Eq. 2)",
    not_in_control="the rewards of its own answers",
    data="prompts",
    options=(*RESULT_OPTIONS, *POLICY_GRADIENT_OPTIONS),
    stores_reference_logps=False,
    build=builders.build_ppo,
)

METHODS["grpo"] = MethodSpec(
    responses="as rloo",
    loss="as ppo, rewards standardized among the four",
    not_in_control="the rewards of its own answers",
    data="prompts",
    options=(*RESULT_OPTIONS, *POLICY_GRADIENT_OPTIONS),
    stores_reference_logps=False,
    build=builders.build_grpo,
)

METHODS["distill"] = MethodSpec(
    responses="the chosen responses of the data, or with --on sampled ones",
    loss="divergence from a target that contrasts the reference with and without the image",
    not_in_control="the targets of the distillation",
    data="chosen",
    options=(*RESULT_OPTIONS, *SAMPLING_OPTIONS, *DISTILLATION_OPTIONS),
    stores_reference_logps=False,
    build=builders.build_distillation,
)


def build_method(name: str, inputs: MethodInputs) -> Method:
    """Build the method called `name` as the options ask for it."""
    return METHODS[name].build(inputs)
