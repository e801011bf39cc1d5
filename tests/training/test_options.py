"""The command line of train.py: its defaults, and where each option arrives."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import TINY

from minialign import options as shared_options
from minialign.generation.decoding import SamplingParams
from minialign.methods import builders
from minialign.methods.base import Method
from minialign.methods.builders import MethodInputs
from minialign.methods.registry import build_method
from minialign.pairs.bdhs import BdhsConfig
from minialign.training import options as train_options
from minialign.training import run
from minialign.training.loop import Schedule
from minialign.training.options import parse_options, reward_model_options
from minialign.training.run_folder import RunFolder

RECIPE = json.loads((TINY / "recipe.json").read_text())
OWN_MODEL = ["--model", "elsewhere", "--data", "file"]


# --- defaults ---


def test_without_a_model_the_defaults_are_those_of_the_recipe():
    options = vars(parse_options([]))

    for name, value in RECIPE.items():
        if name != "methods":
            assert options[name] == value, name
    assert options["model"] == str(TINY / "model")
    assert options["control"]  # the recipe's for bdhs


def test_with_a_model_the_defaults_are_those_of_the_paper():
    """Sec. 4.1 and App. A of the paper."""
    options = parse_options(OWN_MODEL)

    assert (options.lora_rank, options.lora_alpha) == (128, 256)
    assert (options.lr, options.projector_lr) == (1e-6, 2e-6)
    assert (options.batch_size, options.epochs) == (16, 3)
    assert (options.loss, options.beta) == ("dpo", 0.1)
    assert (options.rho, options.rounds, options.epsilon) == (0.99, 5, 0.97)
    assert options.noise_steps == 500
    assert options.mix == 0.5
    assert (options.temperature, options.top_p) == (1.0, 1.0)
    assert options.steps is None
    assert options.schedule == "cosine"
    assert options.eval is None
    assert not options.control


@pytest.mark.parametrize(
    "method, expected",
    [
        ("reward", {"lr": 2e-5, "batch_size": 32, "steps": 4000, "schedule": "constant"}),
        ("rloo", {"lr": 3e-4, "batch_size": 256, "epochs": 2, "beta": 0.4, "schedule": "cosine"}),
        ("ppo", {"lr": 1.41e-5, "batch_size": 32, "epochs": 3, "schedule": "constant"}),
        ("grpo", {"lr": 3e-4, "batch_size": 256, "epochs": 2, "beta": 0.04, "passes": None}),
        ("distortion", {"gamma": 0.5, "noise_steps": 500, "lr": 1e-6}),
    ],
)
def test_the_papers_defaults_of_a_method(method, expected):
    """App. A, and Eq. 5 for distortion. The projector keeps its rate."""
    options = parse_options([*OWN_MODEL, "--method", method])

    actual = {name: getattr(options, name) for name in expected}
    assert actual == expected
    assert options.projector_lr == 2e-6


def test_the_reward_model_of_rloo_has_the_papers_defaults():
    """App. A: rate, batch and steps are those of --method reward, not those of RLOO."""
    options = reward_model_options(parse_options([*OWN_MODEL, "--method", "rloo"]))

    assert (options.lr, options.batch_size, options.steps) == (2e-5, 32, 4000)
    assert options.schedule == "constant"


def test_bdhs_without_a_command_line_has_the_papers_settings():
    """Sec. 3.4 and App. E.3, with completions of up to 256 tokens."""
    config = BdhsConfig()

    assert (config.rho, config.rounds, config.epsilon) == (0.99, 5, 0.97)
    assert (config.temperature, config.top_p, config.max_new_tokens) == (1.0, 1.0, 256)
    assert config.guided and not config.noise


@pytest.mark.parametrize("module", [shared_options, train_options])
def test_the_comments_beside_the_defaults_are_the_recipe(module):
    """Lines such as `"rho": 0.99,  # tiny: 0.97` show the defaults of paper and tiny world."""
    source = Path(module.__file__).read_text()
    commented = re.findall(r'^    "(\w+)": .*,  # tiny: (.*)$', source, re.MULTILINE)

    assert commented
    for name, value in commented:
        assert str(RECIPE[name]) == value, name


def test_every_default_of_the_recipe_stands_in_a_comment():
    sources = [Path(module.__file__).read_text() for module in (shared_options, train_options)]
    commented = re.findall(r'"(\w+)": .*# tiny: ', "".join(sources))

    assert sorted(commented) == sorted(set(RECIPE) - {"methods"})


def shown_defaults(monkeypatch, capsys, *words):
    """Return option -> default, as --help shows them."""
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as exit_info:
        parse_options([*words, "--help"])
    assert exit_info.value.code == 0
    defaults = {}
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  --") and "(default: " in line:
            defaults[line.split()[0]] = line.rpartition("(default: ")[2].rstrip(")")
    return defaults


def test_help_shows_the_defaults_of_the_recipe(monkeypatch, capsys):
    defaults = shown_defaults(monkeypatch, capsys)

    assert defaults["--steps"] == str(RECIPE["steps"])
    assert defaults["--beta"] == str(RECIPE["beta"])


def test_help_shows_the_recipe_of_a_method(monkeypatch, capsys):
    defaults = shown_defaults(monkeypatch, capsys, "--method", "rloo")

    assert defaults["--steps"] == str(RECIPE["methods"]["rloo"]["steps"])
    assert defaults["--steps"] != str(RECIPE["steps"])


def test_help_shows_the_papers_defaults_of_a_method(monkeypatch, capsys):
    """App. A, for a reward model."""
    defaults = shown_defaults(monkeypatch, capsys, "--model", "some", "--method", "reward")

    assert defaults["--lr"] == "2e-05"
    assert defaults["--steps"] == "4000"


@pytest.mark.parametrize("words", [[], ["--method", "reward"], ["--method", "reward", *OWN_MODEL]])
def test_epochs_replace_the_default_steps(words):
    """A number of steps in the recipe or in the paper gives way to --epochs."""
    assert parse_options([*words, "--epochs", "2"]).steps is None


@pytest.mark.parametrize(
    "words, file",
    [
        ("--method sft", "instruct.json"),
        ("--method bdhs", "instruct.json"),
        ("--method bdhs --gamma .5", "povid.json"),
        ("--method dpo", "povid.json"),
        ("--method online-dpo", "povid.json"),
        ("--method rloo", "povid.json"),
    ],
)
def test_the_default_data_has_what_the_method_needs(words, file):
    """instruct.json has chosen responses only, povid.json rejected ones as well."""
    assert parse_options(words.split()).data == [str(TINY / "train" / file)]


def test_distortion_averages_over_two_rejected_responses():
    """Sec. 3.3. Other methods do so only with --gamma."""
    assert parse_options(["--method", "distortion"]).gamma == 0.5
    assert parse_options(["--method", "online-bdhs"]).gamma is None


def test_a_model_of_the_user_needs_data(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(["--model", "elsewhere"])

    assert exit_info.value.code == 2
    assert "--model needs --data" in capsys.readouterr().err


def test_the_reward_model_of_rloo_has_the_defaults_of_a_reward_model():
    """Options that were given hold for it too, such as the batch size here."""
    options = parse_options(["--method", "rloo", "--batch-size", "7"])

    reward_options = reward_model_options(options)

    assert reward_options.method == "reward"
    assert reward_options.batch_size == 7
    assert reward_options.steps == RECIPE["methods"]["reward"]["steps"]
    assert reward_options.lr == RECIPE["methods"]["reward"]["lr"]
    assert options.method == "rloo"


@pytest.mark.parametrize(
    "words, steps",
    [([], RECIPE["methods"]["reward"]["steps"]), (OWN_MODEL, 4000), (["--reward-steps", "7"], 7)],
)
def test_the_steps_of_the_reward_model_of_ppo(words, steps):
    """They are not those of --steps: 4,000 in the paper (App. A), or --reward-steps."""
    options = parse_options(["--method", "ppo", "--steps", "2", *words])

    assert reward_model_options(options).steps == steps
    assert options.steps == 2


@pytest.mark.parametrize("words", [[], ["--model", str(TINY / "model")]])
def test_naming_the_tiny_model_is_said_to_change_the_defaults(words, capsys):
    """With --model the defaults are the paper's, for the shipped model too."""
    options = parse_options(words)

    printed = capsys.readouterr().err
    assert (options.lora_rank == 128) == bool(words)
    assert ("the defaults are the paper's" in printed) == bool(words)


# --- where options arrive ---


class PolicyStub:
    """A policy that only notes whether it was given a scalar head."""

    def __init__(self):
        self.has_scalar_head = False

    def add_scalar_head(self):
        self.has_scalar_head = True


@pytest.fixture
def build(monkeypatch):
    """Return a function that parses options and builds the method, from stubs that cost no time."""

    def load_reward_model_stub(folder, base, dtype, device):
        return f"reward model of {folder}"

    def reward_statistics_stub(reward_model, records):
        assert records == ["record"]
        return 0.5, 2.0

    monkeypatch.setattr(builders, "load_annotator", lambda options, both_orders: "annotator")
    monkeypatch.setattr(builders, "load_reward_model", load_reward_model_stub)
    monkeypatch.setattr(builders, "reward_statistics", reward_statistics_stub)
    monkeypatch.setattr(builders, "bdhs_sampler", lambda options, vlm: "sampler")

    def parse_and_build(method_name, *words):
        options = parse_options(["--method", method_name, *words])
        examples = [SimpleNamespace(record="record")]
        inputs = MethodInputs(options, PolicyStub(), "vlm", examples, Path("out"))
        return build_method(method_name, inputs)

    return parse_and_build


SAMPLING = "--max-new-tokens 7 --temperature .8 --top-p .9 --seed 3".split()


def assert_sampling(sampling):
    """Assert that sampling parameters are those of SAMPLING."""
    assert sampling.max_new_tokens == 7
    assert sampling.temperature == 0.8
    assert sampling.top_p == 0.9
    assert sampling.seed == 3


@pytest.mark.parametrize("method_name", ["dpo", "bdhs", "mixed-dpo", "online-dpo"])
@pytest.mark.parametrize("loss_name, smoothing", [("dpo", 0.1), ("ipo", 0.0)])
def test_options_of_the_pair_loss(build, method_name, loss_name, smoothing):
    words = ["--loss", loss_name, "--beta", ".3"]
    if smoothing > 0:
        words += ["--smoothing", str(smoothing)]

    method = build(method_name, *words)

    assert method.vlm == "vlm"
    assert method.loss_name == loss_name
    assert method.beta == 0.3
    assert method.smoothing == smoothing
    assert method.rejected_weights == (1.0,)


@pytest.mark.parametrize("method_name", ["online-bdhs", "distortion", "bdhs"])
def test_gamma_weighs_the_rejected_response_of_the_data(build, method_name):
    """It comes before the sampled one (Eq. 5)."""
    assert build(method_name, "--gamma", ".25").rejected_weights == (0.25, 0.75)


def test_options_of_offline_pairs(build):
    assert build("dpo").collector is None
    assert build("bdhs").collector is None


def test_options_of_online_dpo(build):
    collector = build("online-dpo", *SAMPLING).collector

    assert collector.annotator == "annotator"
    assert collector.mix == 0.0
    assert_sampling(collector.sampling)


def test_options_of_mixed_dpo(build):
    collector = build("mixed-dpo", *SAMPLING, "--mix", ".4").collector

    assert collector.annotator == "annotator"
    assert collector.mix == 0.4
    assert_sampling(collector.sampling)


def test_options_of_online_bdhs(build):
    assert build("online-bdhs").collector.sampler == "sampler"


def test_options_of_distortion(build):
    collector = build("distortion", "--noise-steps", "11", "--seed", "3").collector

    assert collector.noise_steps == 11
    assert collector.seed == 3


def test_options_of_sft(build):
    assert build("sft").vlm == "vlm"


def test_options_of_a_reward_model(build):
    method = build("reward")

    assert method.vlm == "vlm"
    assert method.policy.has_scalar_head


@pytest.mark.parametrize("words, passes", [("", {"rloo": 1, "ppo": 2, "grpo": 1}), ("4", None)])
def test_passes_over_the_responses_of_a_step(build, words, passes):
    """Each method has its own number, unless --passes gives one."""
    for method_name in ("rloo", "ppo", "grpo"):
        typed = ["--passes", words] if words else []
        expected = passes[method_name] if passes else 4
        assert build(method_name, *typed).passes == expected


@pytest.mark.parametrize(
    "method_name, has_value_head", [("rloo", False), ("ppo", True), ("grpo", False)]
)
def test_options_of_policy_gradients(build, method_name, has_value_head):
    """Without --reward the reward model is the one that was trained in OUT/reward.

    Both sample from the policy itself, at temperature 1 and without a nucleus.
    """
    method = build(method_name, *"--max-new-tokens 7 --seed 3 --beta .3".split())

    assert method.beta == 0.3
    assert method.reward_model == "reward model of out/reward"
    assert (method.reward_mean, method.reward_std) == (0.5, 2.0)
    assert method.policy.has_scalar_head == has_value_head
    assert method.sampling == SamplingParams(max_new_tokens=7, seed=3)
    assert (method.sampling.temperature, method.sampling.top_p) == (1.0, 1.0)


def test_a_given_reward_model_is_used(build):
    assert build("rloo", "--reward", "given").reward_model == "reward model of given"


class TrainingStubs:
    """Takes the place of everything that `train_variant` calls, and notes what it was given."""

    def __init__(self, monkeypatch):
        for name in ("Policy", "train"):
            monkeypatch.setattr(run, name, partial(self.note, name))
        monkeypatch.setattr(run, "build_method", lambda name, inputs: Method())
        for name in ("save_adapter", "print_skipped_prompts", "check_learned"):
            monkeypatch.setattr(run, name, partial(self.note, name))
        self.arguments = {}
        self.named_arguments = {}

    def note(self, name, *arguments, **named_arguments):
        self.arguments[name] = arguments
        self.named_arguments[name] = named_arguments
        return Mock()


def test_options_of_the_training(monkeypatch, tmp_path):
    """3 epochs of 5 examples are 15 examples, and 2 a step make 8 steps."""
    stubs = TrainingStubs(monkeypatch)
    model = SimpleNamespace(language_model=SimpleNamespace(checkpointing=False))
    options = parse_options(
        [
            *"--lora-rank 4 --lora-alpha 9 --seed 3 --checkpoint-layers".split(),
            *"--epochs 3 --batch-size 2 --lr .1 --projector-lr .2 --schedule constant".split(),
            *"--tokens-per-microbatch 77".split(),
        ]
    )
    run_folder = RunFolder(tmp_path, options)

    run.train_variant(
        options,
        SimpleNamespace(model=model),
        "sft",
        [None] * 5,
        run=run_folder,
        folder=tmp_path,
    )

    assert stubs.arguments["Policy"] == (model,)
    assert stubs.named_arguments["Policy"] == {"rank": 4, "alpha": 9, "seed": 3}
    assert model.language_model.checkpointing
    _, _, _, schedule, folder, title = stubs.arguments["train"]
    assert schedule == Schedule(
        steps=8,
        batch_size=2,
        lr=0.1,
        projector_lr=0.2,
        seed=3,
        max_tokens_per_microbatch=77,
        constant=True,
    )
    assert folder == tmp_path
    assert title == "supervised"
