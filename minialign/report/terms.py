"""Explain the models, the evaluation sets and the scores of a run, a sentence each."""

from minialign.methods.registry import METHODS
from minialign.report.measures import (
    CHAIR_I,
    CHAIR_S,
    MIN_IMAGES,
    has_intervals,
    measures_of_run,
)
from minialign.report.method_words import describe_not_in_control
from minialign.report.run_files import RunFiles, is_tiny_file

BASE = "base: the model before this run."
CONTROL = "control: the same model, trained on the chosen answers alone."
ALIGNED = "aligned: the model that this run made."
TINY_SETS = (
    "The sets are drawings of the tiny world. Typical ones show what their place suggests, such as "
    "a pot in a kitchen. Shifted ones show less of it, and balanced ones show any objects."
)
CHAIR = (
    "CHAIR counts the objects that a caption mentions and that are not in the picture. CHAIR_i is "
    "their share of all mentions, and CHAIR_s is the share of captions that have one."
)
POPE = (
    "POPE asks yes-or-no questions: is this object in the picture? Its kinds differ in how the "
    "absent objects are picked: random ones, popular ones that are frequent in the data, and "
    "adversarial ones that usually appear beside what the picture shows."
)
CLEARLY = (
    "clearly better or worse: the 95 % interval of the change, over other images of this kind, "
    "leaves out 0. A change has an interval only if each model has something to score (for "
    f"CHAIR_i: a mention) on {MIN_IMAGES} or more images. A change without an interval has no "
    "verdict."
)


def explain_terms(run: RunFiles) -> list[str]:
    """Return what the names mean that the scores of a run use."""
    measures = measures_of_run(run)
    control = describe_control(run)
    set_folders = run.settings.get("eval") or []
    is_used = {
        BASE: True,
        control: "control" in run.variants(),
        ALIGNED: True,
        TINY_SETS: any(is_tiny_file(folder) for folder in set_folders),
        CHAIR: CHAIR_I in measures or CHAIR_S in measures,
        POPE: any(measure.split for measure in measures),
        CLEARLY: has_intervals(run),
    }
    return [sentence for sentence in is_used if is_used[sentence]]


def describe_control(run: RunFiles) -> str:
    """Say what the control is, and what a comparison with it shows about the method of a run."""
    spec = METHODS.get(run.method)
    if spec is None or not spec.not_in_control:  # a method of another version, or without a control
        return CONTROL
    not_in_control = describe_not_in_control(spec, run.settings)
    return f"{CONTROL} What the aligned model gains beyond the control comes from {not_in_control}."
