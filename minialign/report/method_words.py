"""Say in words what a run learned from, and what it minimized."""

import re

from minialign.methods.registry import METHODS, MethodSpec
from minialign.report.number_texts import percent
from minialign.training.option_rules import has_effect
from minialign.training.options import PAPER_DEFAULTS

# Losses as an option names them, and what the names are short for.
LOSS_NAMES = {
    "dpo": "DPO (Direct Preference Optimization)",
    "ipo": "IPO (Identity Preference Optimization)",
    "ipo-mean": "IPO (Identity Preference Optimization) on log-probs per token",
    "slic": "SLiC (Sequence Likelihood Calibration) with a reference",
    "slic-calibration": "SLiC (Sequence Likelihood Calibration) without a reference",
    "mpo": "MPO (Mixed Preference Optimization)",
    "mdpo": "mDPO (conditional preference optimization)",
}
# Options that change a loss unless they are 0 or not given, and what they make of it.
LOSS_CHANGES = {
    "smoothing": "with label smoothing {}",
    "gamma": "averaged over two rejected answers, where that of the data has the weight {}",
    "reference_adapter": "with a reference that merges the model with the adapter {}",
    "distill_weight": "plus {} times the distillation of the chosen answers",
}
# The keys are texts of METHODS. The values say the same with the options of a run in it. A text
# that has no entry here is used as it is.
RESPONSES = {
    METHODS["bdhs"].responses: (
        "{of_data}, and rejected ones sampled with {hidden_image}, once, before training"
    ),
    METHODS["online-bdhs"].responses: (
        "{of_data}, and rejected ones sampled with {hidden_image}, at every step"
    ),
    METHODS["grpo"].responses: METHODS["rloo"].responses,
}
LOSSES = {
    METHODS["grpo"].loss: "that of ppo, rewards standardized among the four",
    METHODS["distill"].loss: (
        "divergence from a target that contrasts the reference with the image and with "
        "{hidden_image}"
    ),
}
# Where the responses of distillation come from, by the value of --on.
RESPONSES_OF_ON = {
    "chosen": "the chosen responses of the data",
    "policy": "answers that the policy samples at every step",
    "reference": "answers that the model before training sampled once",
}
EQUATION = re.compile(r" \(Eq\. \d+\)")  # of the paper, which a reader of the page need not have


def used_spec(spec: MethodSpec, settings: dict) -> MethodSpec:
    """Return the method itself, or DPO for Mixed-DPO that takes every pair from the data."""
    takes_all_from_data = "mix" in spec.options and settings.get("mix") == 1
    return METHODS["dpo"] if takes_all_from_data else spec


def describe_responses(spec: MethodSpec, settings: dict) -> str:
    """Return which answers a method learns from, with the settings of a run."""
    if "on" in spec.options:
        on = (PAPER_DEFAULTS | settings)["on"]
        return RESPONSES_OF_ON.get(on, on)
    keeps_pairs = bool(settings.get("gamma"))  # 0 gives the data's rejected ones no weight
    of_data = "the pairs of the data" if keeps_pairs else "the chosen ones of the data"
    words = used_spec(spec, settings).responses
    template = RESPONSES.get(words, words)
    return template.format(of_data=of_data, hidden_image=describe_hidden_image(settings))


def describe_loss(spec: MethodSpec, settings: dict) -> str:
    """Return what a method minimizes: the loss that was chosen, or the method's only one."""
    if "loss" in spec.options:
        all_settings = PAPER_DEFAULTS | settings
        name = all_settings["loss"]
        return ", ".join([LOSS_NAMES.get(name, name), *describe_loss_changes(all_settings)])
    template = LOSSES.get(spec.loss, EQUATION.sub("", spec.loss))
    return template.format(hidden_image=describe_hidden_image(settings))


def describe_loss_changes(settings: dict) -> list[str]:
    """Return how the options of a run change the loss that is named."""
    changes = []
    for option, words in LOSS_CHANGES.items():
        value = settings.get(option)
        if value and has_effect(settings, option):
            changes.append(words.format(value))
    return changes


def describe_not_in_control(spec: MethodSpec, settings: dict) -> str:
    """Return what the aligned model learned from and the control did not."""
    sources = [used_spec(spec, settings).not_in_control]
    if "loss" in spec.options and settings.get("loss") == "mdpo":
        sources.append("the damaged images")
    if settings.get("distill_weight"):
        sources.append("the distillation")
    return ", or ".join(sources)


def describe_hidden_image(settings: dict) -> str:
    """Return how a run hid images: by noise, or by masking all or a share of an image."""
    if settings.get("by") == "noise":
        return "noise added to the image"
    share = settings.get("rho")
    if share is None:
        return "the image masked"
    if share == 1:
        return "the whole image masked"
    return f"{percent(100 * share)} of the image masked"
