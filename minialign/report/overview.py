"""Say in sentences what ran, how to repeat it, and whether it worked."""

import argparse
import shlex
from pathlib import Path

from minialign.methods.registry import COMMON_OPTIONS, METHODS
from minialign.options import TINY_WORLD, flag, is_tiny_model
from minialign.report.markup import Markup, element, join
from minialign.report.measures import (
    CAPTION_MEASURES,
    find_change,
    has_intervals,
    measures_of,
    signed,
)
from minialign.report.run_files import RunFiles
from minialign.training.option_rules import CONDITIONS
from minialign.training.options import parse_options

CHAIR_I, _, RECALL, *_ = CAPTION_MEASURES
# What a verdict on the wrong mentions is called.
VERDICTS = {
    "better": "fewer wrong mentions.",
    "worse": "more wrong mentions.",
    "not clear": "no clear change.",
    "the same": "no change.",
    "": "",
}
# What the phases of summary.json do.
PHASES = {
    "load": "to load the model and the data",
    "sample": "to sample answers",
    "reference": "for the log-probs of the reference, which is the model before training",
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


# --- the outcome


def describe_outcome(run: RunFiles) -> list[Markup]:
    """Return what became of the scores: of each evaluation set, and what is clearly worse."""
    if run.method == "reward":
        return describe_ranking(run)
    sentences = []
    for set_name in run.set_names():
        change = find_change(run, CHAIR_I, set_name, before="base", after="aligned")
        if change is not None:
            outcome = VERDICTS[change.verdict(CHAIR_I)]
            sentence = f" {describe_chair(run, set_name)} {describe_recall(run, set_name)}"
            sentences.append(join(element("strong", f"{set_name}: {outcome}"), sentence))
    worse = clearly_worse(run)
    if worse:
        sentences.append(join(element("strong", "Clearly worse than before: "), ", ".join(worse)))
    elif sentences and has_intervals(run):
        sentences.append(join("No score is clearly worse than before."))
    return sentences


def describe_chair(run, set_name) -> str:
    """Return how the wrong mentions changed on a set, and how the control did."""
    before = CHAIR_I.value(run.scores["base"][set_name])
    after = CHAIR_I.value(run.scores["aligned"][set_name])
    sentence = (
        f"Of the objects that the model mentions, {percent(after)} are not in the picture, against "
        f"{percent(before)} before"
    )
    scores = run.scores.get("control", {}).get(set_name)
    value = CHAIR_I.value(scores) if scores else None
    if value is not None:
        sentence += f" and {percent(value)} for the control"
    return f"{sentence}."


def describe_recall(run, set_name) -> str:
    """Return what became of recall: a model that says less is wrong less often."""
    if find_change(run, RECALL, set_name, before="base", after="aligned") is None:
        return ""
    before = RECALL.value(run.scores["base"][set_name])
    after = RECALL.value(run.scores["aligned"][set_name])
    return f"It names {percent(after)} of the objects that are there, against {percent(before)}."


def clearly_worse(run) -> list[str]:
    """Return the measures that are worse than before, with an interval that leaves out 0."""
    names = []
    for set_name in run.set_names():
        for measure in measures_of(run, set_name):
            change = find_change(run, measure, set_name, before="base", after="aligned")
            if change is not None and change.verdict(measure) == "worse":
                names.append(f"{measure.title} on {set_name} ({signed(change.value)})")
    return names


def percent(value) -> str:
    """Return a share in percent. The space before the sign breaks no line."""
    return f"{value:.1f}\u00a0%"


def describe_ranking(run) -> list[str]:
    """Return how a reward model ranks the pairs that it was not trained on."""
    scores = run.scores.get("aligned", {}).get("held-out")
    if not scores:
        return []
    return [
        f"The reward model scores the chosen answer higher in {100 * scores['accuracy']:.1f} % of "
        f"{scores['n']} pairs that it was not trained on. Chance is 50 %."
    ]
