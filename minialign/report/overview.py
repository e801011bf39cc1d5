"""Say in sentences what ran, how to repeat it, and whether it worked."""

import argparse
import shlex
from pathlib import Path

from minialign.methods.registry import COMMON_OPTIONS, METHODS
from minialign.options import TINY_WORLD, flag, is_tiny_model
from minialign.report.markup import Markup, element, join
from minialign.report.outcome import describe_outcome
from minialign.report.run_files import RunFiles
from minialign.report.terms import explain_terms
from minialign.training.option_rules import CONDITIONS
from minialign.training.options import parse_options

# What the phases of summary.json do.
PHASES = {
    "load": "to load the model and the data",
    "sample": "to sample answers",
    "reference": "to prepare the reference, which is the model before training",
    "train": "to train",
    "evaluate": "to measure",
}
# The long forms of short names.
LONG_NAMES = {
    "bdhs": "Bias-Driven Hallucination Sampling",
    "DPO": "Direct Preference Optimization",
}
# What a command has typed already, and what follows from other options.
NOT_TYPED = ("method", "model", "data", "first_reward")


def overview_section(run: RunFiles) -> Markup:
    """Return what ran, the command that repeats it, and the outcome."""
    parts = [element("p", describe_run(run))]
    parts.append(element("p", describe_time(run)))
    command = repeat_command(run.settings)
    if command:
        parts.append(element("p", "This command repeats it, in the folder where it was started:"))
        parts.append(element("pre", command))
    if run.set_names() and run.method != "reward":
        terms = [element("li", term) for term in explain_terms(run)]
        parts.append(element("h3", "What the names mean"))
        parts.append(element("ul", *terms, class_="small"))
    outcomes = describe_outcome(run)
    if outcomes:
        parts.append(element("h3", "Did it work?"))
        parts.append(element("ul", *[element("li", outcome) for outcome in outcomes]))
    return join(*parts)


def describe_run(run: RunFiles) -> str:
    """Say in sentences which model was trained how, on what."""
    settings = run.settings
    model = settings["model"]
    if is_tiny_model(model):
        model = "The shipped tiny LLaVA (a language model that is given the features of an image)"
    data = ", ".join(data_name(path) for path in settings.get("data") or [])
    size = f"{run.summary['pairs']:,} examples of {data}" if run.summary else data
    seed = settings.get("seed")
    method = with_long_name(run.method)
    sentence = f"{model} was trained by the method {method} on {size}, with seed {seed}."
    spec = METHODS.get(run.method)
    if spec is not None:
        loss = settings["loss"].upper() if "loss" in spec.options else spec.loss
        sentence += f" It learned from these answers: {describe_responses(spec)}."
        sentence += f" Its loss is {with_long_name(loss)}."
    return sentence


def with_long_name(name) -> str:
    """Return a name, and what it is short for if that is known."""
    return f"{name} ({LONG_NAMES[name]})" if name in LONG_NAMES else name


def describe_responses(spec) -> str:
    """Return which answers a method learns from."""
    if spec.responses.startswith("as "):  # as another method does
        return METHODS[spec.responses.removeprefix("as ")].responses
    if spec.responses.startswith("rejected "):
        return f"the chosen ones of the data, and {spec.responses}"
    return spec.responses


def data_name(path) -> str:
    """Return how a file of data is called: by its path, or as a file of the tiny world."""
    path = Path(path)
    if path.is_relative_to(TINY_WORLD):
        return f"the tiny world ({path.relative_to(TINY_WORLD)})"
    return str(path)


def describe_time(run: RunFiles) -> str:
    """Return one sentence: steps, batch size, time and memory, or that the run has not ended."""
    if not run.summary:
        return f"The run is not finished. It has done {len(run.log)} steps."
    seconds = run.summary["seconds"]
    phases = [
        f"{duration_text(value)} {PHASES.get(name, name)}"
        for name, value in seconds.items()
        if value >= 1
    ]
    return (
        f"It took {run.summary['steps']} steps of {run.settings.get('batch_size')} records and "
        f"{duration_text(sum(seconds.values()))} in all ({', '.join(phases)}), with up to "
        f"{run.summary['peak_memory_mb']:,} MB of memory."
    )


def duration_text(seconds) -> str:
    """Return a duration in words, such as "2 min 5 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


# --- the command


def repeat_command(settings: dict) -> str:
    """Return the command that repeats a run, with the options that differ from the defaults.

    It is empty for a run of a method that this version does not know.
    """
    if settings["method"] not in METHODS:
        return ""
    # 1. The model and the data, and the defaults that go with them.
    words = ["--method", settings["method"]]
    if not is_tiny_model(settings["model"]):
        words += ["--model", settings["model"], "--data", *settings["data"]]
    defaults = vars(parse_options(words))
    if defaults["data"] != settings["data"]:
        words += ["--data", *settings["data"]]

    # 2. The options that differ, apart from those that other options leave without effect.
    all_settings = argparse.Namespace(**defaults | settings)
    for name in (*COMMON_OPTIONS, *METHODS[settings["method"]].options):
        is_known = name in settings and name not in NOT_TYPED
        if is_known and has_effect(name, all_settings):
            words += words_if_not_default(name, settings[name], defaults)
    return shlex.join(["python", "train.py", *[str(word) for word in words]])


def words_if_not_default(name, value, defaults) -> list:
    """Return the words that give an option its value, or none if it is the default."""
    if name == "eval":
        value = value or []  # without sets, which differs from the default sets
    # A number of epochs is typed even if it is the default, in place of a number of steps.
    replaces_steps = name == "epochs" and defaults["steps"] is not None
    if value is None or (value == defaults[name] and not replaces_steps):
        return []
    return option_words(name, value)


def has_effect(name, settings) -> bool:
    """Return whether an option is read, with these values of the others."""
    return all(condition.holds(settings) for condition in CONDITIONS if name in condition.options)


def option_words(name, value) -> list:
    """Return the words that give an option a value."""
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, list):
        return [flag(name), *value]
    return [flag(name), value]
