"""Test the table of methods: what each needs, and that its options reach the object it builds."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

from minialign.generation.decoding import SamplingParams
from minialign.methods import builders
from minialign.methods.builders import MethodInputs
from minialign.methods.distillation import DistillationConfig, DistillationMethod
from minialign.methods.distilled_preference import DistilledPreferenceMethod
from minialign.methods.grpo import GrpoMethod
from minialign.methods.mdpo import ImageDamage, MdpoMethod
from minialign.methods.mpo import MpoMethod
from minialign.methods.online import DistortionPairs, OnlineBdhsPairs, OnlinePairs
from minialign.methods.policy_gradient import PpoMethod, RlooMethod
from minialign.methods.preference import PreferenceMethod, RewardModelMethod, SupervisedMethod
from minialign.methods.registry import COMMON_OPTIONS, METHODS, build_method
from minialign.training.options import build_parser

OPTIONS = {
    "loss": "ipo",
    "distill_weight": None,
    "beta": 0.3,
    "smoothing": 0.1,
    "damage": 0.8,
    "damage_noise": 13,
    "gamma": None,
    "max_new_tokens": 7,
    "temperature": 0.8,
    "top_p": 0.9,
    "seed": 3,
    "mix": 0.4,
    "noise_steps": 11,
    "reward": None,
    "passes": None,
    "one_order": True,
    "model": "MODEL",
    "dtype": "bfloat16",
    "device": "cpu",
}
SAMPLING = SamplingParams(max_new_tokens=7, temperature=0.8, top_p=0.9, seed=3)


@dataclass
class CountingPolicy:
    """A policy that counts the scalar heads it is given."""

    num_heads: int = 0

    def add_scalar_head(self):
        """Count a head."""
        self.num_heads += 1


@pytest.fixture()
def policy(monkeypatch):
    """Return a policy. What a method would load is replaced by a text that says what was asked."""
    monkeypatch.setattr(
        builders,
        "load_annotator",
        lambda options, both_orders: f"annotator, both orders: {both_orders}",
    )
    monkeypatch.setattr(builders, "bdhs_sampler", lambda options, vlm: f"sampler of {vlm}")
    monkeypatch.setattr(
        builders,
        "load_reward_model",
        lambda folder, base, dtype, device: f"{folder} on {base} in {dtype} on {device}",
    )
    monkeypatch.setattr(
        builders, "reward_statistics", lambda reward_model, records: (len(records), 2.0)
    )
    return CountingPolicy()


def build(name, policy, **changed_options):
    """Build a method over two examples for the folder OUT."""
    options = SimpleNamespace(**OPTIONS | changed_options)
    examples = [SimpleNamespace(record="first"), SimpleNamespace(record="second")]
    inputs = MethodInputs(options, policy, "VLM", examples, Path("OUT"))
    return build_method(name, inputs)


def preference_method(collector=None, rejected_weights=(1.0,)):
    """Return the PreferenceMethod that the options ask for."""
    return PreferenceMethod(
        vlm="VLM",
        loss_name="ipo",
        beta=0.3,
        smoothing=0.1,
        rejected_weights=rejected_weights,
        collector=collector,
    )


def test_sft_needs_only_the_model(policy):
    """It reads none of the options."""
    assert build("sft", policy) == SupervisedMethod("VLM")
    assert policy.num_heads == 0


@pytest.mark.parametrize("name", ["dpo", "bdhs"])
def test_offline_methods_have_no_collector(policy, name):
    """They learn from the pairs that they are given."""
    assert build(name, policy) == preference_method()


def test_losses_that_read_more_than_a_pair_have_classes_of_their_own(policy):
    """mDPO damages images with --damage, --damage-noise and --seed."""
    mpo = build("dpo", policy, loss="mpo")
    mdpo = build("dpo", policy, loss="mdpo")

    assert type(mpo) is MpoMethod
    assert (mpo.loss_name, mpo.beta, mpo.collector) == ("mpo", 0.3, None)
    assert mdpo == MdpoMethod(
        vlm="VLM",
        loss_name="mdpo",
        beta=0.3,
        smoothing=0.1,
        policy=policy,
        damage=ImageDamage(share=0.8, noise_steps=13, seed=3),
    )


@pytest.mark.parametrize("name, mix", [("online-dpo", 0.0), ("mixed-dpo", 0.4)])
def test_online_methods_sample_and_rank(policy, name, mix):
    """Only mixed-dpo reads --mix. With --one-order the annotator is not asked in both orders."""
    collector = OnlinePairs(policy, "VLM", "annotator, both orders: False", SAMPLING, mix)
    assert build(name, policy) == preference_method(collector)


def test_online_bdhs_averages_with_gamma(policy):
    """The data's own rejected response comes first, so gamma is its weight (Eq. 5)."""
    collector = OnlineBdhsPairs(policy, "VLM", "sampler of VLM")
    assert build("online-bdhs", policy) == preference_method(collector)
    averaged = build("online-bdhs", policy, gamma=0.25)
    assert averaged == preference_method(collector, rejected_weights=(0.25, 0.75))


def test_distortion_averages_with_gamma(policy):
    """As above, with the noise of --noise-steps and --seed."""
    collector = DistortionPairs(policy, "VLM", noise_steps=11, seed=3)
    averaged = build("distortion", policy, gamma=0.25)
    assert averaged == preference_method(collector, rejected_weights=(0.25, 0.75))


def test_a_reward_model_gets_a_scalar_head(policy):
    """The head is added to the policy that the method trains."""
    assert build("reward", policy) == RewardModelMethod(policy, "VLM")
    assert policy.num_heads == 1


@pytest.mark.parametrize(
    "name, method_class, num_heads",
    [("rloo", RlooMethod, 0), ("ppo", PpoMethod, 1), ("grpo", GrpoMethod, 0)],
)
@pytest.mark.parametrize("reward, folder", [(None, "OUT/reward"), ("GIVEN", "GIVEN")])
def test_policy_gradients_load_a_reward_model(
    policy, name, method_class, num_heads, reward, folder
):
    """It is the one of --reward, or else the one that was trained in the run's own folder.

    Rewards are normalized by the statistics of all examples. Only PPO has a value head. Both
    sample from the policy itself, whatever the temperature of other methods is.
    """
    method = build(name, policy, reward=reward)

    assert method == method_class(
        policy=policy,
        vlm="VLM",
        reward_model=f"{folder} on MODEL in bfloat16 on cpu",
        reward_mean=2,
        reward_std=2.0,
        sampling=SamplingParams(max_new_tokens=7, seed=3),
        beta=0.3,
    )
    assert policy.num_heads == num_heads


@pytest.mark.parametrize(
    "name, reward, gamma, needs_pairs, keeps_rejected",
    [
        ("sft", None, None, False, False),
        ("dpo", None, None, True, True),
        ("online-dpo", None, None, False, False),
        ("mixed-dpo", None, None, True, True),
        ("bdhs", None, None, False, False),
        ("bdhs", None, 0.5, True, True),
        ("online-bdhs", None, None, False, False),
        ("online-bdhs", None, 0.5, True, True),
        ("distortion", None, 0.5, True, True),
        ("reward", None, None, True, True),
        ("rloo", None, None, True, False),  # a reward model is trained first
        ("rloo", "DIR", None, False, False),
        ("ppo", None, None, True, False),
        ("ppo", "DIR", None, False, False),
    ],
)
def test_which_methods_need_rejected_responses(name, reward, gamma, needs_pairs, keeps_rejected):
    """It depends on the method, on --gamma and on --reward."""
    options = SimpleNamespace(gamma=gamma, reward=reward)

    assert METHODS[name].needs_pairs(options) == needs_pairs
    assert METHODS[name].keeps_rejected(options) == keeps_rejected


@pytest.mark.parametrize("name", METHODS)
def test_the_options_of_a_method_exist(name):
    """Every option that the table names is one of train.py, and it is named once."""
    options = vars(build_parser().parse_args([]))
    names = [*COMMON_OPTIONS, *METHODS[name].options]

    assert set(names) <= options.keys()
    assert len(set(names)) == len(names)


def test_every_option_is_in_the_table():
    """An option of train.py concerns every method, or the methods that read it name it."""
    named = set(COMMON_OPTIONS)
    for spec in METHODS.values():
        named.update(spec.options)

    # A recipe gives values to other options.
    assert named | {"recipe", "recipes"} == vars(build_parser().parse_args([])).keys()


@pytest.mark.parametrize("by, rho, noise_steps", [("attention", 0.9, 0), ("noise", 0.0, 11)])
def test_distillation_gets_its_options(policy, by, rho, noise_steps):
    """Noise takes the place of the mask, and a mask that of the noise."""
    options = {"contrast": 2.0, "plausibility": 0.2, "divergence": "reverse"}

    method = build("distill", policy, **options, on="policy", by=by, rho=0.9)

    assert method == DistillationMethod(
        policy=policy,
        vlm="VLM",
        config=DistillationConfig(
            contrast=2.0,
            plausibility=0.2,
            responses="policy",
            rho=rho,
            noise_steps=noise_steps,
            seed=3,
        ),
        sampling=SAMPLING,
        divergence="reverse",
    )


@pytest.mark.parametrize("name", ["dpo", "bdhs"])
def test_distillation_is_added_to_a_loss_on_fixed_pairs(policy, name):
    """It reads the chosen responses and hides the whole image, whatever --rho of BDHS is."""
    options = {"contrast": 2.0, "plausibility": 0.2, "divergence": "reverse"}

    method = build(name, policy, **options, distill_weight=0.7, rho=0.9)

    distillation = DistillationMethod(
        policy=policy,
        vlm="VLM",
        config=DistillationConfig(contrast=2.0, plausibility=0.2),
        sampling=None,
        divergence="reverse",
    )
    assert method == DistilledPreferenceMethod(preference_method(), distillation, weight=0.7)
    assert method.distillation.config.responses == "chosen"
    assert method.distillation.config.rho == 1.0
