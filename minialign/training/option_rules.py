"""Refuse options that have no effect, options that contradict each other, and missing ones."""

import argparse

from minialign.methods.registry import COMMON_OPTIONS, METHODS, SAMPLING_OPTIONS
from minialign.options import (
    BDHS_CONDITIONS,
    Condition,
    is_tiny_model,
    refuse_switched_off_options,
    refuse_unread_options,
)
from minialign.pairs.annotators import ANNOTATORS, annotator_kind


def uses_smoothing(options):
    """Return whether the loss is the one that has label smoothing."""
    return options.loss == "dpo"


def damages_images(options):
    """Return whether the loss compares the image with a damaged one."""
    return options.loss == "mdpo"


def leaves_out_tokens(options):
    """Return whether an image is damaged by leaving out its tokens, and not by noise."""
    return options.damage_noise == 0


def has_one_rejected_response(options):
    """Return whether a pair has one rejected response. MRPO's weights are those of one pair."""
    return options.gamma is None


def reads_one_reference(options):
    """Return whether the loss reads a reference for the two responses, and for nothing else."""
    return options.loss not in ("slic-calibration", "mdpo")


def distills(options):
    """Return whether contrastive distillation is the loss, or a part of it."""
    return options.method == "distill" or options.distill_weight is not None


def masks_image_tokens(options):
    """Return whether the image is hidden by masking its tokens, and not by noise."""
    return options.by == "attention"


def adds_noise(options):
    """Return whether noise is added to the image."""
    return options.method == "distortion" or options.by == "noise"


def compares_responses(options):
    """Return whether a similarity is read. In one round only `bdhs` does, which writes it down."""
    return options.rounds > 1 or options.method == "bdhs"


def samples_pairs(options):
    """Return whether any pair is sampled. Mixed-DPO with p = 1 takes all of them from the data."""
    return options.method != "mixed-dpo" or options.mix < 1


def samples_responses(options):
    """Return whether responses are sampled. Distillation may read those of the data instead."""
    return options.method != "distill" or options.on != "chosen"


def asks_an_mllm(options):
    """Return whether a multimodal LLM ranks the responses."""
    return ANNOTATORS[annotator_kind(options.annotator)].is_asked_twice


def trains_a_reward_model_first(options):
    """Return whether a reward model is trained first, because none was named."""
    return options.reward is None


def trains_adapters(options):
    """Return whether LoRA adapters are trained, and not all weights."""
    return options.lora_rank > 0


def counts_epochs(options):
    """Return whether the number of steps follows from the number of epochs."""
    return options.steps is None


CONDITIONS = (
    *BDHS_CONDITIONS,
    Condition(("smoothing",), uses_smoothing, "--loss dpo"),
    Condition(("damage", "damage_noise"), damages_images, "--loss mdpo"),
    Condition(("damage",), leaves_out_tokens, "a run without --damage-noise"),
    Condition(("reference_adapter",), has_one_rejected_response, "a run without --gamma"),
    Condition(
        ("reference_adapter",), reads_one_reference, "--loss dpo, ipo, ipo-mean, mpo or slic"
    ),
    Condition(("contrast", "plausibility", "divergence"), distills, "a run with --distill-weight"),
    Condition(("rho",), masks_image_tokens, "--by attention"),
    Condition(("similarity",), compares_responses, "--rounds above 1"),
    Condition(("noise_steps",), adds_noise, "--by noise, or --method distortion"),
    Condition(
        ("annotator", "one_order", *SAMPLING_OPTIONS), samples_pairs, "a run with --mix below 1"
    ),
    Condition(SAMPLING_OPTIONS, samples_responses, "--on policy or --on reference"),
    Condition(("one_order",), asks_an_mllm, "--annotator DIR, a model that is asked"),
    Condition(("reward_steps",), trains_a_reward_model_first, "a run without --reward"),
    Condition(("lora_alpha",), trains_adapters, "--lora-rank above 0"),
    Condition(("epochs",), counts_epochs, "a run without --steps"),
)


def has_effect(settings: dict, name) -> bool:
    """Return whether the method reads an option, and no other option switches it off.

    settings: {option: value}. An option that is missing has no value.
    """
    # 1. The options that the method reads.
    if name not in (*COMMON_OPTIONS, *METHODS[settings["method"]].options):
        return False

    # 2. A condition may look at options that only other methods read.
    values = dict.fromkeys(COMMON_OPTIONS)
    for spec in METHODS.values():
        values |= dict.fromkeys(spec.options)
    options = argparse.Namespace(**(values | settings))
    return all(condition.holds(options) for condition in CONDITIONS if name in condition.options)


def check_options(parser, options, typed):
    """Exit with one line if a typed option has no effect, or if options do not fit together.

    typed: the names of the options that were typed or that a recipe holds.
    """
    # 1. Options that the method does not read.
    options_of_methods = {name: spec.options for name, spec in METHODS.items()}
    refuse_unread_options(
        parser, typed, "--method", chosen=options.method, table=options_of_methods
    )

    # 2. Options that the value of another option switches off.
    refuse_switched_off_options(parser, options, typed, conditions=CONDITIONS)

    # 3. Options that need another one.
    if options.resume and not options.out:
        parser.error("--resume needs --out, the folder of the run to resume")
    if options.data is None and not is_tiny_model(options.model) and not options.plan:
        parser.error("--model needs --data FILE...")
