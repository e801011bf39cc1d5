"""The setting of all benchmarks: shapes and options, a random model, and random pairs for it.

A size that is not given is that of the shape. For example, `--shape 7b --response 200` is
LLaVA-1.5-7B with longer responses. Weights, images and token ids are random.

Nothing is checkpointed, except our side with `--checkpoint-layers 1`. On a GPU of 80 GB the 7B
shapes need `--pairs 2` (next7b: 1) where a side holds every sequence twice.
"""

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # so that a script finds minialign, wherever it is started

from minialign.data.anyres import count_image_tokens  # noqa: E402
from minialign.data.image_processor import ImageProcessor, preprocess  # noqa: E402
from minialign.models.config_json import DEFAULT_GRID_PINPOINTS, parse_config  # noqa: E402
from minialign.models.llava import Llava  # noqa: E402

# Token ids, as in the tokenizer of data/tiny.
BOS = 1
END = 2
IMAGE = 638
PAD = 639

PATCH_SIZE = 14  # pixels
TOWER_HEAD_DIM = 64

SMALL = dict(
    width=256,  # of the decoder
    layers=4,
    head=64,  # width of an attention head
    inner=704,  # width inside the MLP
    vocab=32000,
    tower=256,  # width of the vision tower
    tower_layers=4,
    tile=336,  # side of what the tower takes, in pixels
    height=336,  # of the images, in pixels
    breadth=336,
    anyres=0,  # 1: AnyRes, as in LLaVA-1.6
    rank=16,  # of LoRA
    prompt=30,  # tokens, of which one is the image placeholder
    response=80,  # tokens, on average
    pairs=4,
)
MEDIUM = dict(SMALL, width=1024, layers=8, inner=2816, tower=384, tower_layers=6)
SEVEN = dict(
    SMALL,
    width=4096,
    layers=32,
    head=128,
    inner=11008,
    vocab=32064,
    tower=1024,
    tower_layers=24,
    rank=128,
    response=100,
)
ANYRES = dict(anyres=1, height=480, breadth=640)
SHAPES = {
    "small": SMALL,
    "medium": MEDIUM,
    "next": SMALL | ANYRES,
    "7b": SEVEN,
    "next7b": SEVEN | ANYRES,
}

# --- Options


def parse_options(description, script_sizes=None, **script_options):
    """Parse the command line of a script.

    script_sizes: sizes that replace those of every shape in this script.
    script_options: further options of this script, and their defaults.
    """
    # 1. The shape and its sizes.
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name in SMALL:
        parser.add_argument(option_flag(name), type=int)

    # 2. Options that have a default of their own.
    defaults = {"device": "cpu", "dtype": "float32", "repeats": 5, "checkpoint_layers": 0}
    defaults.update(script_options)
    for name, default in defaults.items():
        help_text = f"default {default}"
        parser.add_argument(option_flag(name), type=type(default), default=default, help=help_text)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()

    # 3. A size that was not given is that of the shape.
    sizes = dict(SHAPES[options.shape])
    sizes.update(script_sizes or {})
    for name, size in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, size)
    return options


def option_flag(name):
    """Return how an option is written on the command line."""
    return "--" + name.replace("_", "-")


def with_sizes(options, **sizes):
    """Return the options with other sizes."""
    values = dict(vars(options))
    values.update(sizes)
    return argparse.Namespace(**values)


def is_skipped(options, name):
    """Tell whether the name of a side matches the regular expression `--skip`."""
    if not options.skip:
        return False
    return re.search(options.skip, name) is not None


def torch_dtype(options):
    """Return the torch dtype that `--dtype` names."""
    return getattr(torch, options.dtype)


# --- Model


def raw_config(options):
    """Return the config.json of a LLaVA of this shape, as a dictionary."""
    num_heads = options.width // options.head
    text_config = {
        "model_type": "llama",
        "vocab_size": options.vocab,
        "hidden_size": options.width,
        "intermediate_size": options.inner,
        "num_hidden_layers": options.layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_heads,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "bos_token_id": BOS,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "hidden_size": options.tower,
        "intermediate_size": 4 * options.tower,
        "num_hidden_layers": options.tower_layers,
        "num_attention_heads": options.tower // TOWER_HEAD_DIM,
        "image_size": options.tile,
        "patch_size": PATCH_SIZE,
    }
    config = {
        "model_type": "llava",
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": text_config,
        "vision_config": vision_config,
    }
    if options.anyres:
        config["model_type"] = "llava_next"
        config["image_grid_pinpoints"] = DEFAULT_GRID_PINPOINTS
    return config


def make_model(options):
    """Make a frozen LLaVA of this shape with random weights."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Llava(parse_config(raw_config(options), "bench"))
    for parameter in model.parameters():
        if parameter.ndim > 1:  # biases and the weights of norms stay as they are
            torch.nn.init.normal_(parameter, std=0.02)
    model.language_model.checkpointing = bool(options.checkpoint_layers)
    model = model.to(torch_dtype(options))
    return model.requires_grad_(False)


# --- Images and pairs


def make_image_processor(options):
    """Return the settings by which a LLaVA of this shape takes its images."""
    grid_pinpoints = None
    if options.anyres:
        grid_pinpoints = tuple(tuple(size) for size in DEFAULT_GRID_PINPOINTS)
    return ImageProcessor(
        tile_size=options.tile,
        shortest_edge=options.tile,
        exact_size=None,
        center_crop=True,
        pad_to_square=False,
        resample=Image.Resampling.BICUBIC,
        rescale=1 / 255,
        mean=(0.48, 0.46, 0.41),
        std=(0.27, 0.26, 0.28),
        grid_pinpoints=grid_pinpoints,
    )


def num_image_tokens(options):
    """Return how many image tokens an image becomes."""
    size = (options.height, options.breadth)
    return count_image_tokens(size, make_image_processor(options), options.tile // PATCH_SIZE)


def prefix_length(options):
    """Return how many positions all responses of a row share.

    The image placeholder is replaced by image tokens. The last token of the prompt belongs to the
    responses, each of which reads it first.
    """
    return num_image_tokens(options) + options.prompt - 2


def make_image(options, seed):
    """Make an image of noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (options.height, options.breadth, 3), np.uint8)
    return Image.fromarray(pixels)


@dataclass
class Pair:
    """A prompt with its image and its k responses. Two of them make a preference pair."""

    prompt: list[int]  # token ids, with one image placeholder
    image: tuple  # (tiles, size), as `preprocess` returns it
    responses: list[list[int]]  # k lists of token ids, end tokens included


def make_pairs(options, num_responses=2):
    """Make random pairs.

    A response has 4/5 to 6/5 of `--response` tokens, so that the cost of padding is measured too.
    """
    generator = torch.Generator().manual_seed(0)
    image_processor = make_image_processor(options)
    pairs = []
    for i in range(options.pairs):
        prompt = [BOS, IMAGE] + random_ids(options, options.prompt - 2, generator)
        responses = []
        for _ in range(num_responses):
            factor = 0.8 + 0.4 * torch.rand(1, generator=generator)
            length = int(options.response * factor)
            responses.append(random_ids(options, length, generator) + [END])
        image = preprocess(make_image(options, seed=i), image_processor)
        pairs.append(Pair(prompt, image, responses))
    return pairs


def random_ids(options, length, generator):
    """Draw ids of ordinary tokens."""
    return torch.randint(PAD + 1, options.vocab, (length,), generator=generator).tolist()
