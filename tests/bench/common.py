"""What the benchmarks share: shapes, a random model and random pairs of a shape, sides that take turns, and the arithmetic of a step.

A size not given is the shape's: `--shape 7b --response 200` is LLaVA-1.5-7B with longer responses. Weights, pictures and ids are random.
Nothing is checkpointed, unless our side by `--checkpoint-layers 1`: on 80 GB give the 7B shapes `--pairs 2` (next7b 1), for the sides that hold every sequence twice.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minialign.data.anyres import count_image_tokens  # noqa: E402
from minialign.data.image_processor import ImageProcessor, preprocess  # noqa: E402
from minialign.models.config_json import DEFAULT_GRID_PINPOINTS, parse_config  # noqa: E402
from minialign.models.llava import Llava  # noqa: E402

BOS, END, IMAGE, PAD = 1, 2, 638, 639  # as in data/tiny's tokenizer
SMALL = dict(
    width=256,
    layers=4,
    head=64,
    inner=704,
    vocab=32000,
    tower=256,
    tower_layers=4,
    tile=336,
    height=336,
    breadth=336,
    anyres=0,
    rank=16,
    prompt=30,
    response=80,
    pairs=4,
)
MEDIUM = SMALL | dict(width=1024, layers=8, inner=2816, tower=384, tower_layers=6)
SEVEN = SMALL | dict(
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


def parse(doc, sizes=None, **extra):
    """The options of a script: a shape and its sizes (some of them the script's own), where to run, and further ones with their defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    for name in SMALL:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    for name, default in (
        dict(device="cpu", dtype="float32", repeats=5, checkpoint_layers=0) | extra
    ).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"default {default}",
        )
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    for name, size in (SHAPES[options.shape] | (sizes or {})).items():
        setattr(options, name, size if getattr(options, name) is None else getattr(options, name))
    return options


def varied(options, **sizes):
    """The options with other sizes."""
    return argparse.Namespace(**vars(options) | sizes)


def raw_config(options):
    """The config.json of the asked shape."""
    kind = (
        {"model_type": "llava_next", "image_grid_pinpoints": DEFAULT_GRID_PINPOINTS}
        if options.anyres
        else {"model_type": "llava"}
    )
    heads = options.width // options.head
    return kind | {
        "image_token_index": IMAGE,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "vocab_size": options.vocab,
            "hidden_size": options.width,
            "intermediate_size": options.inner,
            "num_hidden_layers": options.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "bos_token_id": BOS,
            "eos_token_id": END,
            "pad_token_id": PAD,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": options.tower,
            "intermediate_size": 4 * options.tower,
            "num_hidden_layers": options.tower_layers,
            "num_attention_heads": options.tower // 64,
            "image_size": options.tile,
            "patch_size": 14,
        },
    }


def make_model(options):
    """A random LLaVA of the asked shape."""
    torch.manual_seed(0)
    with torch.device(options.device):
        model = Llava(parse_config(raw_config(options), "bench"))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02) if parameter.ndim > 1 else None
    model.language_model.checkpointing = bool(options.checkpoint_layers)
    return model.to(getattr(torch, options.dtype)).requires_grad_(False)


def image_processor(options):
    """How a LLaVA of this shape wants its pictures."""
    pinpoints = tuple(map(tuple, DEFAULT_GRID_PINPOINTS)) if options.anyres else None
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
        grid_pinpoints=pinpoints,
    )


def vectors_of(options):
    """How many vectors a picture becomes."""
    return count_image_tokens(
        (options.height, options.breadth), image_processor(options), options.tile // 14
    )


def make_picture(options, seed):
    """A picture of noise."""
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (options.height, options.breadth, 3), np.uint8)
    )


@dataclasses.dataclass
class Pair:
    """A prompt with one placeholder (ids), its prepared picture, and k responses (ids), end tokens included."""

    prompt: list
    picture: tuple
    responses: list


def make_pairs(options, k=2):
    """Random pairs; responses are 4/5 to 6/5 of the asked length, so that padding is a part of the matter."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return torch.randint(PAD + 1, options.vocab, (n,), generator=generator).tolist()

    def response():
        return [*ids(int(options.response * (0.8 + 0.4 * torch.rand(1, generator=generator)))), END]

    return [
        Pair(
            [BOS, IMAGE, *ids(options.prompt - 2)],
            preprocess(make_picture(options, i), image_processor(options)),
            [response() for _ in range(k)],
        )
        for i in range(options.pairs)
    ]


def synchronise(options):
    """Wait for the GPU, if it is one."""
    if options.device == "cuda":
        torch.cuda.synchronize()


def clock(options):
    """The timer: on one CPU thread the process's own seconds, which other jobs on the machine hardly move; else the wall's."""
    return (
        time.process_time
        if options.device == "cpu" and torch.get_num_threads() == 1
        else time.perf_counter
    )


def alternate(sides, options):
    """Functions that take turns: {name: what it gave} of a first round, which warms up, and {name: seconds of each repeat}."""
    given, seconds, now = (
        {name: side() for name, side in sides.items()},
        {name: [] for name in sides},
        clock(options),
    )
    for _ in range(options.repeats):
        for name, side in sides.items():
            synchronise(options)
            began = now()
            side()
            synchronise(options)
            seconds[name].append(now() - began)
    return given, seconds


def ratio(seconds, slow, fast):
    """How many times as fast: the median over the rounds, each with its own quotient, so that a busy machine slows both."""
    return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast]))


def visible_pairs(options, pairs):
    """How many (query, key) pairs are visible in one row a pair: the prefix to itself, each branch to the prefix and to itself."""
    prefix = vectors_of(options) + options.prompt - 2
    return sum(
        prefix**2 / 2 + sum(len(own) * prefix + len(own) ** 2 / 2 for own in pair.responses)
        for pair in pairs
    )


def step_flops(options, pairs):
    """Multiplications and additions (2 each) that a DPO step needs: one row a pair, LoRA, frozen weights, features and reference at hand.

    Forward once and backward once over frozen weights, backward twice over trained ones; attention where it is visible.
    """
    c, vectors, lengths = (
        options,
        vectors_of(options),
        [[len(response) for response in pair.responses] for pair in pairs],
    )
    prefix = vectors + c.prompt - 2
    tokens, scored = sum(prefix + sum(own) for own in lengths), sum(map(sum, lengths))
    linear = c.layers * (4 * c.width**2 + 3 * c.width * c.inner)
    adapter = (
        c.layers * c.rank * (8 * c.width + 3 * (c.width + c.inner))
    )
    projector = len(pairs) * vectors * (c.tower * c.width + c.width**2)
    return (
        4 * linear * tokens
        + 6 * adapter * tokens
        + 12 * c.layers * c.width * visible_pairs(options, pairs)
        + 4 * scored * c.width * c.vocab
        + 6 * projector
    )


def matmul_ceiling(options, size=8192):
    """FLOP/s of one large square product in the asked dtype: what the device gives at best."""
    a, b = (
        torch.randn(size, size, device=options.device, dtype=getattr(torch, options.dtype))
        for _ in range(2)
    )
    _, seconds = alternate({"matmul": lambda: a @ b}, options)
    return 2 * size**3 / statistics.median(seconds["matmul"])


def about(options):
    """Machine, versions and every option."""
    if options.device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        info = Path("/", "proc", "cpuinfo")
        names = (
            [
                line.split(": ")[1]
                for line in info.read_text().splitlines()
                if line.startswith("model name")
            ]
            if info.exists()
            else []
        )
        name = f"{(names or [platform.processor() or platform.machine()])[0]}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "clock": clock(options).__name__,
        "options": {key: value for key, value in vars(options).items() if key != "out"},
    }


def heading(options):
    """The line above a table."""
    found = about(options)
    return (
        f"{found['device']}, torch {found['torch']}, {options.dtype}, shape {options.shape}, {vectors_of(options)} picture vectors, "
        f"{options.repeats} repeats, {found['clock']}"
    )


def write(options, figures):
    """The figures as JSON, if asked for."""
    if options.out:
        options.out.write_text(json.dumps(about(options) | figures, indent=1) + "\n")
