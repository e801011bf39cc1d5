"""Every option of train.py is refused by a method, or it reaches the method."""

import argparse
import re
import sys

import pytest
from conftest import ROOT, TINY

from minialign.methods.registry import COMMON_OPTIONS, METHODS, SAMPLING_OPTIONS, TARGET_OPTIONS
from minialign.training.option_rules import has_effect
from minialign.training.options import build_parser, parse_options
from minialign.utils.cli import MEMORY_REMEDIES

sys.path.insert(0, str(ROOT))
import train  # noqa: E402

# A value to type for each option that not every method reads.
VALUES = {
    "loss": "ipo",
    "beta": "0.3",
    "smoothing": "0.1",
    "reference_adapter": "nowhere",
    "damage": "0.5",
    "damage_noise": "9",
    "gamma": "0.5",
    "control": None,
    "eval": str(TINY / "tune" / "typical"),
    "temperature": "0.5",
    "top_p": "0.9",
    "max_new_tokens": "8",
    "by": "noise",
    "mix": "0.9",
    "annotator": "truth",
    "one_order": None,
    "reward": "nowhere",
    "reward_steps": "2",
    "passes": "3",
    "rho": "0.5",
    "rounds": "2",
    "epsilon": "0.5",
    "similarity": "nowhere",
    "noise_steps": "9",
    "unguided": None,
    "group": "3",
    "contrast": "0.5",
    "plausibility": "0.2",
    "on": "policy",
    "divergence": "reverse",
    "distill_weight": "2",
}
# What an option needs beside it to have an effect.
COMPANIONS = {"one_order": ["--annotator", "judge"]}
NOISE = ["--by", "noise"]
ADDED_DISTILLATION = ["--distill-weight", "1"]


def typed(name):
    """Return the words that type an option with its value."""
    words = [f"--{name.replace('_', '-')}"]
    if VALUES[name] is not None:
        words.append(VALUES[name])
    return words


def refusal(capsys, words):
    """Return the one line with which the options are refused."""
    with pytest.raises(SystemExit) as exit_info:
        parse_options(words)
    assert exit_info.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_every_option_has_a_value_here():
    """A new option must be added above, so that the tests below cover it."""
    covered = {*VALUES, *COMMON_OPTIONS, "recipe", "recipes"}  # a recipe gives values to others
    assert covered == vars(build_parser().parse_args([])).keys()


@pytest.mark.parametrize("option", VALUES)
@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_does_not_read_is_refused(capsys, method, option):
    """The line names the methods that read it. Every other method accepts it."""
    words = ["--method", method, *typed(option)]
    if option in METHODS[method].options:
        if option == "noise_steps" and method != "distortion":
            words += NOISE
        if option.startswith("damage"):
            words += ["--loss", "mdpo"]
        if option in TARGET_OPTIONS and method != "distill":
            words += ADDED_DISTILLATION
        if option in SAMPLING_OPTIONS and method == "distill":
            words += ["--on", "policy"]
        parse_options([*words, *COMPANIONS.get(option, [])])
        return

    readers = [name for name, spec in METHODS.items() if option in spec.options]
    line = refusal(capsys, words)

    assert f"--{option.replace('_', '-')} is for --method {', '.join(readers)}; {method}" in line


class RecordingOptions(argparse.Namespace):
    """Options that note the name of each one that is read."""

    names_read = set()  # of the class: config.json holds all that is in the object

    def __getattribute__(self, name):
        """Note the name, and return the value."""
        RecordingOptions.names_read.add(name)
        return super().__getattribute__(name)


def names_read_by(monkeypatch, folder, method):
    """Return the names of the options that two short runs of a method read.

    The second one has all that makes other options have an effect.
    """
    more_words = []
    if "by" in METHODS[method].options:
        more_words += NOISE
    if "damage" in METHODS[method].options:
        more_words += ["--loss", "mdpo"]
    if "distill_weight" in METHODS[method].options:
        more_words += ADDED_DISTILLATION
    runs = [[], more_words] if more_words else [[]]
    monkeypatch.setattr(RecordingOptions, "names_read", set())
    for i, words in enumerate(runs):
        if method == "distill":
            words = [*words, "--on", "policy"]
        if "max_new_tokens" in METHODS[method].options:
            words = [*words, "--max-new-tokens", "8"]
        if "temperature" in METHODS[method].options:  # so hot that the two responses differ
            words = [*words, "--temperature", "2"]
        if "eval" in METHODS[method].options:
            words = [*words, "--eval"]
        if "reward_steps" in METHODS[method].options:
            words = [*words, "--reward-steps", "1"]
        brief = "--limit 4 --epochs 1 --batch-size 4 --lora-rank 2".split()
        options = parse_options(["--method", method, *brief, *words, "--out", str(folder / str(i))])
        recording = RecordingOptions(**vars(options))
        monkeypatch.setattr(train, "parse_options", lambda argv, recording=recording: recording)
        train.main()
    return RecordingOptions.names_read


@pytest.mark.parametrize("method", METHODS)
def test_an_option_that_a_method_reads_is_read_in_a_run(monkeypatch, tmp_path, method):
    """The whole table: what it names for a method is read between the start and the end of a run.

    Without this an option might stand in the table and be without effect.
    """
    names_read = names_read_by(monkeypatch, tmp_path, method)

    assert {*COMMON_OPTIONS, *METHODS[method].options} <= names_read


@pytest.mark.parametrize(
    "words, option, wanted",
    [
        ("--loss ipo --smoothing .1", "--smoothing", "--loss dpo"),
        ("--reference-adapter a --gamma .5", "--reference-adapter", "without --gamma"),
        ("--reference-adapter a --loss mdpo", "--reference-adapter", "--loss dpo"),
        ("--damage .5", "--damage", "--loss mdpo"),
        ("--loss mpo --damage-noise 9", "--damage-noise", "--loss mdpo"),
        ("--loss mdpo --damage .5 --damage-noise 9", "--damage", "without --damage-noise"),
        ("--by noise --rho .9", "--rho", "--by attention"),
        ("--rounds 1 --epsilon .5", "--epsilon", "--rounds above 1"),
        ("--method online-bdhs --rounds 1 --similarity d", "--similarity", "--rounds above 1"),
        ("--noise-steps 9", "--noise-steps", "--by noise"),
        ("--method online-bdhs --noise-steps 9", "--noise-steps", "--by noise"),
        ("--method online-dpo --one-order", "--one-order", "--annotator DIR"),
        ("--method online-dpo --annotator reward:r --one-order", "--one-order", "--annotator DIR"),
        ("--method mixed-dpo --mix 1 --annotator m", "--annotator", "--mix below 1"),
        ("--method mixed-dpo --mix 1 --top-p .5", "--top-p", "--mix below 1"),
        ("--contrast .5", "--contrast", "--distill-weight"),
        ("--method dpo --divergence reverse", "--divergence", "--distill-weight"),
        ("--method distill --top-p .5", "--top-p", "--on policy or --on reference"),
        ("--method rloo --reward r --reward-steps 9", "--reward-steps", "without --reward"),
        ("--lora-rank 0 --lora-alpha 8", "--lora-alpha", "--lora-rank above 0"),
        ("--steps 3 --epochs 2", "--epochs", "without --steps"),
        ("--epochs=2 --steps=3", "--epochs", "without --steps"),
    ],
)
def test_an_option_that_another_one_switches_off_is_refused(capsys, words, option, wanted):
    line = refusal(capsys, words.split())

    assert f"{option} has no effect here" in line
    assert wanted in line


@pytest.mark.parametrize(
    "settings, option, expected",
    [
        ({"method": "bdhs", "loss": "mdpo", "damage_noise": 0}, "damage", True),
        ({"method": "bdhs", "loss": "mdpo", "damage_noise": 9}, "damage", False),
        ({"method": "bdhs", "loss": "dpo", "damage_noise": 0}, "damage", False),
        ({"method": "bdhs", "by": "attention"}, "rho", True),
        ({"method": "bdhs", "by": "noise"}, "rho", False),
        ({"method": "sft", "by": "attention"}, "rho", False),  # it does not read it
        ({"method": "sft"}, "lr", True),
        ({"method": "dpo", "reference_adapter": "a"}, "reference_adapter", True),
        ({"method": "dpo"}, "contrast", False),  # of a version without --distill-weight
    ],
)
def test_a_setting_has_an_effect_unless_another_one_switches_it_off(settings, option, expected):
    assert has_effect(settings, option) == expected


@pytest.mark.parametrize(
    "words",
    [
        "--method sft --no-control",
        "--method reward --eval",
        "--method mixed-dpo --mix 1",
        "--method distortion --noise-steps 9",
        "--method bdhs --gamma 0",
        "--method bdhs --rounds 1 --similarity d",  # pairs.jsonl has the similarities
        "--lora-rank 0",
    ],
)
def test_an_option_that_asks_for_nothing_is_accepted(words):
    """A default is never refused, nor is an option that only says that there is nothing to do."""
    parse_options(words.split())


@pytest.mark.parametrize("method", ["rloo", "ppo", "grpo"])
@pytest.mark.parametrize("option", ["--temperature", "--top-p"])
def test_policy_gradients_sample_from_the_policy_itself(capsys, method, option):
    """Samples of a sharper distribution would be scored by another one."""
    assert f"{method} does not use it" in refusal(capsys, ["--method", method, option, ".5"])


def test_resume_needs_a_folder(capsys):
    assert "--resume needs --out" in refusal(capsys, ["--resume"])


def test_a_model_of_the_user_needs_data(capsys):
    assert "--model needs --data" in refusal(capsys, ["--model", "elsewhere"])


def test_a_remedy_for_too_little_memory_names_options_that_are_read():
    """Every method reads them. Of --group and --max-new-tokens the line says that not all do."""
    remedy = MEMORY_REMEDIES["train.py"].replace("-", "_")
    every_method, _, some_methods = remedy.partition("if the method reads them, ")
    some_methods, _, every_method_too = some_methods.partition(", or ")

    names = re.findall("__([a-z_]+)", every_method + every_method_too)

    assert len(names) == 4
    assert set(names) <= set(COMMON_OPTIONS)
    assert re.findall("__([a-z_]+)", some_methods) == ["group", "max_new_tokens"]
