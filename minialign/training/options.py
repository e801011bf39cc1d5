"""The command line of train.py.

An option that is not given takes its default from the first of these places that names it:
1. the defaults of the method: with --model METHOD_DEFAULTS, without it "methods" in
   data/tiny/recipe.json,
2. without --model, the defaults of the tiny world, in data/tiny/recipe.json,
3. the defaults of the paper, in PAPER_SAMPLING (minialign/options.py) and PAPER_DEFAULTS.
"""

import argparse

from minialign.losses import PAIR_LOSSES
from minialign.methods.registry import METHODS
from minialign.neighbor_losses import NEIGHBOR_LOSSES
from minialign.options import (
    PAPER_SAMPLING,
    TINY_WORLD,
    add_data_options,
    add_model_options,
    add_sampling_options,
    is_tiny_model,
    note_paper_defaults,
    typed_options,
)
from minialign.pairs.annotators import ANNOTATORS
from minialign.training.option_rules import check_options
from minialign.training.recipes import add_recipe_options, with_recipe
from minialign.utils.cli import Parser, number_type
from minialign.utils.files import read_json

# A comment gives the value in data/tiny/recipe.json, if the option is there. An option that is
# missing here has its default where it is added, or has none. Its help then says what happens
# without it.
PAPER_DEFAULTS = {
    **PAPER_SAMPLING,
    "method": "bdhs",  # tiny: bdhs
    "loss": "dpo",  # tiny: dpo
    "beta": 0.1,  # tiny: 0.5
    "smoothing": 0.0,
    "damage": 0.9,
    "damage_noise": 0,
    "steps": None,  # tiny: 100
    "epochs": 3,
    "batch_size": 16,  # tiny: 32
    "lr": 1e-6,  # tiny: 0.0002
    "projector_lr": 2e-6,  # tiny: 0.0001
    "schedule": "cosine",
    "lora_rank": 128,  # tiny: 32
    "lora_alpha": 256,  # tiny: 64
    "seed": 0,  # tiny: 0
    "tokens_per_microbatch": 4096,  # tiny: 16384
    "keep_features": 2048,
    "temperature": 1.0,
    "top_p": 1.0,
    "max_new_tokens": 256,  # tiny: 64
    "by": "attention",
    "mix": 0.5,
    "annotator": "truth",
    "contrast": 1.0,
    "plausibility": 0.1,
    "divergence": "forward",
    "on": "chosen",
}

# Defaults of single methods, which take precedence over PAPER_DEFAULTS (App. A).
METHOD_DEFAULTS = {
    "reward": {"lr": 2e-5, "batch_size": 32, "steps": 4000, "schedule": "constant"},
    "rloo": {"lr": 3e-4, "batch_size": 256, "epochs": 2, "beta": 0.4},
    "ppo": {"lr": 1.41e-5, "batch_size": 32, "schedule": "constant"},
    # Not the paper's. As rloo, with the beta of arXiv 2402.03300.
    "grpo": {"lr": 3e-4, "batch_size": 256, "epochs": 2, "beta": 0.04},
    # Not the paper's. The whole image is hidden, where BDHS leaves a few tokens visible.
    "distill": {"rho": 1.0},
}

DISTORTION_GAMMA = 0.5  # distortion always averages over two rejected responses (Eq. 5)


def parse_options(argv) -> argparse.Namespace:
    """Return the options of train.py. Exit with one line if they do not fit together."""
    parser = build_parser()
    argv = with_recipe(parser, argv)
    typed_words = {word.split("=")[0] for word in argv}

    # 1. Defaults: the paper's for a model of the user's, else those of the tiny world.
    method_defaults = METHOD_DEFAULTS
    if "--model" not in typed_words:
        recipe = read_json(TINY_WORLD / "recipe.json")
        method_defaults = recipe.pop("methods")
        parser.set_defaults(
            **recipe,
            model=str(TINY_WORLD / "model"),
            eval=[str(TINY_WORLD / "final" / name) for name in ("typical", "shifted", "balanced")],
        )

    # 2. Defaults of the method, which is therefore parsed first. Without --help, which would print
    #    the help before these defaults are in it. A reward model that is trained first
    #    takes as many steps as one that is trained alone.
    words_without_help = [word for word in argv if word not in ("-h", "--help")]
    first_options, _ = parser.parse_known_args(words_without_help)
    parser.set_defaults(**method_defaults.get(first_options.method, {}))
    parser.set_defaults(reward_steps=method_defaults["reward"]["steps"])

    # 3. The options themselves.
    options = parser.parse_args(argv)
    if "--epochs" in typed_words and "--steps" not in typed_words:
        options.steps = None  # or else a default number of steps would outweigh the epochs
    del options.recipe, options.recipes  # the recipe's values are in the other options by now
    typed = typed_options(argv, options)
    check_options(parser, options, typed)
    note_paper_defaults(options, typed)
    if options.data is None and is_tiny_model(options.model):  # else it is a plan without data
        options.data = [str(TINY_WORLD / "train" / default_data_file(options))]
    if options.method == "distortion" and options.gamma is None:
        options.gamma = DISTORTION_GAMMA

    # 4. For rloo, ppo and grpo: the defaults of the reward model that may have to be trained first.
    options.first_reward = method_defaults["reward"]
    return options


def default_data_file(options):
    """Return the name of the tiny world's training file that the method needs."""
    learns_from_chosen = METHODS[options.method].data == "chosen"
    if learns_from_chosen and options.gamma is None:
        return "instruct.json"
    return "povid.json"


def reward_model_options(options) -> argparse.Namespace:
    """Return the options for training a reward model before rloo, ppo or grpo."""
    changed = {**options.first_reward, "method": "reward", "steps": options.reward_steps}
    return argparse.Namespace(**vars(options) | changed)


def build_parser():
    """Return the parser, with the defaults of the paper."""
    parser = Parser(
        prog="train.py",
        description="Align a multimodal language model and measure hallucination before and after.",
        epilog="The defaults are those of the tiny world, or with --model those of the paper. "
        "Some methods have their own: --method NAME --help shows them.",
    )
    add_recipe_options(parser)
    add_method_options(parser)
    add_model_options(parser)
    without_pairs = [
        name
        for name, spec in METHODS.items()
        if spec.data != "pairs" and not spec.needs_reward_model()
    ]
    add_data_options(
        parser,
        f"records: preference pairs, or for {', '.join(without_pairs)} supervised records as well",
    )
    add_output_options(parser)
    add_training_options(parser)
    add_memory_options(parser)
    add_response_options(parser)
    add_distillation_options(parser)
    add_judge_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(**PAPER_DEFAULTS)
    return parser


def add_method_options(parser):
    """Add --method and the options of its loss."""
    where_from = "; ".join(f"{name}: {spec.responses}" for name, spec in METHODS.items())
    group = parser.add_argument_group("method")
    group.add_argument(
        "--method",
        choices=tuple(METHODS),
        help=f"training method; its responses are, for {where_from}",
    )
    group.add_argument(
        "--loss",
        choices=sorted((*PAIR_LOSSES, *NEIGHBOR_LOSSES)),
        help="loss on preference pairs; ipo-mean: ipo on log-probs per token; slic: hinge; "
        "slic-calibration: without a reference; mpo: dpo + bco + sft; mdpo: dpo + a preference "
        "for the image over a damaged one",
    )
    group.add_argument(
        "--beta",
        type=number_type(float, 0, above=True),
        help="how strongly the policy is held to the reference",
    )
    group.add_argument(
        "--smoothing",
        type=number_type(float, 0, 0.5),
        help="label smoothing of the DPO loss: share of pairs that are taken to be mislabeled",
    )
    group.add_argument(
        "--damage",
        type=number_type(float, 0, 1, above=True),
        help="--loss mdpo: chance that a token of the damaged image is left out",
    )
    group.add_argument(
        "--damage-noise",
        type=number_type(int, 0, 999),
        help="--loss mdpo: steps of forward diffusion that damage the image instead; 0 for none",
    )
    group.add_argument(
        "--reference-adapter",
        metavar="DIR",
        help="dpo, bdhs: adapter that makes a second reference of the model, merged with the first "
        "(MRPO)",
    )
    group.add_argument(
        "--gamma",
        type=number_type(float, 0, 1),
        help="weight of the data's rejected response beside the sampled one (Eq. 5); if not given, "
        f"{DISTORTION_GAMMA} for distortion, and only the sampled one for other methods",
    )
    group.add_argument(
        "--control",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also train a supervised control on the same chosen responses",
    )


def add_output_options(parser):
    """Add the options for what is measured and where results go."""
    group = parser.add_argument_group("evaluation and output")
    group.add_argument(
        "--eval",
        nargs="*",
        metavar="DIR",
        help="folders with images/ and captions.json or pope_*.jsonl, in place of the default sets",
    )
    group.add_argument(
        "--out",
        metavar="DIR",
        help="folder for the results; if not given, a new numbered folder under runs/",
    )
    group.add_argument("--resume", action="store_true", help="resume the run in --out")
    group.add_argument(
        "--plan",
        action="store_true",
        help="print how much memory the run needs in each of its phases, and end. Only config.json "
        "of --model is read, and the records of --data, which may be left out",
    )
    group.add_argument(
        "--export",
        metavar="DIR",
        help="also write the model with the adapter merged into it to this folder, "
        "for engines that do not read an adapter with a projector",
    )


def add_training_options(parser):
    """Add the options of the training loop."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--steps", type=number_type(int, 1), help="training steps, a batch each; not with --epochs"
    )
    group.add_argument("--epochs", type=number_type(int, 1), help="passes over data, not --steps")
    group.add_argument(
        "--passes",
        type=number_type(int, 1),
        help="rloo, ppo, grpo: optimizer steps on each batch of sampled responses, clipped from "
        "the second on; if not given, 2 for ppo and 1 for the others",
    )
    group.add_argument("--batch-size", type=number_type(int, 1), help="records in a step")
    group.add_argument("--limit", type=number_type(int, 1), help="use a random subset of the data")
    group.add_argument("--lr", type=number_type(float, 0, above=True), help="peak learning rate")
    group.add_argument(
        "--projector-lr", type=number_type(float, 0), help="peak learning rate of the projector"
    )
    group.add_argument(
        "--schedule", choices=("cosine", "constant"), help="learning rate after the warm-up"
    )
    group.add_argument(
        "--lora-rank",
        type=number_type(int, 0, 1 << 16),
        help="rank of the LoRA adapters; 0 trains all weights of decoder and projector",
    )
    group.add_argument(
        "--lora-alpha",
        type=number_type(float, 0, above=True),
        help="LoRA adapters are scaled by alpha / rank",
    )
    group.add_argument(
        "--seed", type=number_type(int, 0, 2**32 - 1), help="seed of everything that is random"
    )


def add_memory_options(parser):
    """Add the options that trade memory for time."""
    group = parser.add_argument_group("memory of training")
    group.add_argument(
        "--tokens-per-microbatch",
        type=number_type(int, 1),
        help="tokens that are computed together, padding and image tokens included",
    )
    group.add_argument(
        "--keep-features",
        type=number_type(int, 0),
        metavar="MB",
        help="memory budget in MB for caching image features between epochs",
    )
    group.add_argument(
        "--checkpoint-layers",
        action="store_true",
        help="recompute the decoder's activations in the backward pass: "
        "less memory, about a third more time",
    )


def add_response_options(parser):
    """Add the options for how responses are sampled."""
    group = parser.add_argument_group("sampled responses")
    group.add_argument(
        "--temperature",
        type=number_type(float, 0, above=True),
        help="sampling temperature (rloo, ppo and grpo always sample at 1)",
    )
    group.add_argument(
        "--top-p", type=number_type(float, 0, 1, above=True), help="nucleus sampling"
    )
    group.add_argument(
        "--max-new-tokens",
        type=number_type(int, 1, 1 << 16),
        help="maximum length of a response or of the end of a sentence",
    )
    group.add_argument(
        "--by",
        choices=("attention", "noise"),
        help="bdhs, online-bdhs, distill: hide the image by masking its tokens or by noise",
    )
    group.add_argument(
        "--mix",
        type=number_type(float, 0, 1),
        help="mixed-dpo: probability of using the pair of the data (p of Eq. 4)",
    )


def add_distillation_options(parser):
    """Add the options of contrastive distillation."""
    group = parser.add_argument_group("contrastive distillation")
    group.add_argument(
        "--contrast",
        type=number_type(float, 0, above=True),
        help="how strongly to sharpen what the image adds to a token (a); "
        "it corresponds to 1 / beta of DPO",
    )
    group.add_argument(
        "--plausibility",
        type=number_type(float, 0, 1),
        help="only tokens at least this share as likely as the likeliest are taught",
    )
    group.add_argument(
        "--divergence",
        choices=("forward", "reverse"),
        help="whether the policy is to have all that the target has, KL(target || policy), or "
        "nothing that it lacks, KL(policy || target) among the plausible tokens",
    )
    group.add_argument(
        "--distill-weight",
        type=number_type(float, 0, above=True),
        metavar="W",
        help="dpo, bdhs: add W times the distillation of the chosen responses, with the image "
        "hidden wholly; if not given, nothing is added",
    )
    group.add_argument(
        "--on",
        choices=("chosen", "policy", "reference"),
        help="distill: whose responses are read: the chosen ones of the data, new ones of the "
        "policy at every step, or those of the reference, sampled once",
    )


def add_judge_options(parser):
    """Add the options for what ranks or scores sampled responses."""
    group = parser.add_argument_group("who ranks or scores responses")
    group.add_argument(
        "--annotator",
        metavar="|".join(ANNOTATORS),
        help="online-dpo, mixed-dpo: what ranks two responses. truth: the objects in captions.json "
        "beside --data; DIR: a multimodal language model; reward:DIR: a reward model",
    )
    group.add_argument(
        "--one-order",
        action="store_true",
        help="ask a model that ranks only once, not again with the responses swapped "
        "(disagreement is a tie)",
    )
    group.add_argument(
        "--reward",
        metavar="DIR",
        help="rloo, ppo, grpo: folder of a run with --method reward; "
        "if not given, a reward model is trained first, in OUT/reward",
    )
    group.add_argument(
        "--reward-steps",
        type=number_type(int, 1),
        help="rloo, ppo, grpo without --reward: training steps of the reward model",
    )
