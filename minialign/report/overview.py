"""Say in sentences what ran, how to repeat it, and whether it worked."""

import shlex
from pathlib import Path

from minialign.methods.registry import COMMON_OPTIONS, METHODS
from minialign.options import TINY_WORLD, is_tiny_model
from minialign.report.markup import Markup, element, join
from minialign.report.method_words import describe_loss, describe_responses
from minialign.report.number_texts import counted, duration_text
from minialign.report.outcome import describe_outcome
from minialign.report.run_files import RunFiles, is_tiny_file
from minialign.report.terms import explain_terms
from minialign.training.option_rules import has_effect
from minialign.training.options import parse_options
from minialign.utils.cli import flag

# What the phases of summary.json do.
PHASES = {
    "load": "to load the model and the data",
    "sample": "to sample answers",
    "reference": "to prepare training",
    "train": "to train",
    "evaluate": "to measure",
}
# Methods as an option names them, and what the names are short for.
METHOD_NAMES = {"bdhs": "bdhs (Bias-Driven Hallucination Sampling)"}
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
    if run.summary:
        data = f"{counted(run.summary['pairs'], 'example')} of {data}"
    seed = settings.get("seed")
    method = METHOD_NAMES.get(run.method, run.method)
    sentence = f"{model} was trained by the method {method} on {data}, with seed {seed}."
    spec = METHODS.get(run.method)
    if spec is not None:
        sentence += f" It learned from these answers: {describe_responses(spec, settings)}."
        sentence += f" It minimized this loss: {describe_loss(spec, settings)}."
    return sentence


def data_name(path) -> str:
    """Return how a file of data is called: by its path, or as a file of the tiny world."""
    if is_tiny_file(path):
        return f"the tiny world ({Path(path).relative_to(TINY_WORLD)})"
    return str(path)


def describe_time(run: RunFiles) -> str:
    """Return one sentence: steps, batch size, time and memory, or that the run has not ended."""
    if not run.summary:
        return f"The run is not finished. It has done {counted(len(run.log), 'step')}."
    seconds = run.summary["seconds"]
    phases = [
        f"{duration_text(value)} {PHASES.get(name, name)}"
        for name, value in seconds.items()
        if value >= 1
    ]
    return (
        f"It took {counted(run.summary['steps'], 'step')} of "
        f"{counted(run.settings['batch_size'], 'record')} and "
        f"{duration_text(sum(seconds.values()))} in all ({', '.join(phases)}), with up to "
        f"{run.summary['peak_memory_mb']:,} MB of memory."
    )


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
    for name in (*COMMON_OPTIONS, *METHODS[settings["method"]].options):
        is_known = name in settings and name not in NOT_TYPED
        if is_known and has_effect(defaults | settings, name):
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


def option_words(name, value) -> list:
    """Return the words that give an option a value."""
    if isinstance(value, bool):
        return [flag(name) if value else flag(f"no_{name}")]
    if isinstance(value, list):
        return [flag(name), *value]
    return [flag(name), value]
