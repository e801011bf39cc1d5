"""Training of the tiny base model: vision tower, language model, and both together.

The first two stand for the pretraining of CLIP and of Llama, the third for LLaVA's supervised
training.
"""

import json
import math
import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from minialign.data.chat_templates import encode_prompt, encode_response
from minialign.data.packing import PackedExample
from minialign.data.tokenizer import Tokenizer
from minialign.generation.decoding import share_prefix
from minialign.logprobs import response_logps
from minialign.losses import sft_loss
from minialign.models.config_json import parse_config
from minialign.models.llava import Llava
from tiny_world.drawing import render
from tiny_world.files import draw_training_scenes
from tiny_world.model_files import IMAGE_MEAN, IMAGE_STD, PATCH_SIZE, PATCHES_PER_SIDE
from tiny_world.scenes import (
    COLORS,
    DISTRIBUTIONS,
    IMAGE_SIZE,
    OBJECTS,
    Item,
    Scene,
    draw_scene,
    perceive,
)
from tiny_world.texts import Turn, draw_caption_turn, draw_questions, draw_text_turns

NUM_SCENES = 12000  # training scenes of the vision tower, and of both together
NUM_TEXTS = 8  # texts without an image in each batch of both together


def fresh_model(folder: Path, seed: int) -> tuple[Llava, Tokenizer]:
    """Return an untrained model with its tokenizer, initialized as Llama and CLIP usually are."""
    path = folder / "config.json"
    model = Llava(parse_config(json.loads(path.read_text()), path))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = 0.01 if "patch_embedding" in name else 0.02
            nn.init.normal_(parameter, std=std, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model, Tokenizer.load(folder)


class StageOptimizer:
    """AdamW whose learning rate rises for 100 steps and follows a cosine."""

    def __init__(self, parameters, num_steps: int, lr: float = 1e-3):
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01
        )

        def lr_factor(step):
            """Return the learning rate of a step, as a share of `lr`."""
            warm_up = min(1, (step + 1) / 100)
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / num_steps)
            return warm_up * cosine + 0.01

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lr_factor)

    def step(self, loss: Tensor):
        """Take one step down the gradient of a loss."""
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1)
        self.optimizer.step()
        self.schedule.step()


# --- vision tower


def train_tower(model: Llava, seed: int, num_steps: int, batch_size: int = 64):
    """Train the vision tower to say which object and which color each patch shows."""
    # 1. Scenes, typical and balanced ones, with the labels of their patches.
    rng = random.Random(f"tiny tower {seed}")
    scenes = []
    for _ in range(NUM_SCENES):
        distribution = DISTRIBUTIONS[rng.choice(["typical", "balanced"])]
        scenes.append(draw_scene(rng, distribution))
    tiles = render_tiles(scenes)
    object_labels = []
    color_labels = []
    for scene in scenes:
        objects, colors = patch_labels(scene)
        object_labels.append(objects)
        color_labels.append(colors)
    object_labels = torch.stack(object_labels)  # (N, I)
    color_labels = torch.stack(color_labels)  # (N, I)

    # 2. A head for each kind of label. The tower's last layer and norm are never read.
    tower = model.vision_tower
    torch.manual_seed(seed)
    object_head = nn.Linear(128, len(OBJECTS) + 1)
    color_head = nn.Linear(128, len(COLORS) + 1)
    last_layer = len(tower.encoder["layers"]) - 1
    unused = (f"encoder.layers.{last_layer}.", "post_layernorm")
    parameters = []
    for name, parameter in tower.named_parameters():
        if not name.startswith(unused):
            parameters.append(parameter)
    parameters += [*object_head.parameters(), *color_head.parameters()]

    # 3. Training.
    optimizer = StageOptimizer(parameters, num_steps)
    generator = torch.Generator().manual_seed(seed)
    progress = tqdm(range(num_steps), "tower", mininterval=5)
    for step in progress:
        chosen = torch.randint(len(scenes), (batch_size,), generator=generator)
        features = tower(normalize(tiles[chosen])).flatten(0, 1)  # (B * I, D)
        objects = object_labels[chosen].flatten()  # (B * I,)
        colors = color_labels[chosen].flatten()
        object_logits = object_head(features)
        color_logits = color_head(features)
        loss = F.cross_entropy(object_logits, objects) + F.cross_entropy(color_logits, colors)
        optimizer.step(loss)
        if step % 50 == 0:
            shows_object = objects > 0
            progress.set_postfix(
                object=accuracy(object_logits, objects, shows_object),
                color=accuracy(color_logits, colors, shows_object),
            )


def accuracy(logits: Tensor, labels: Tensor, mask: Tensor) -> str:
    """Return the accuracy of logits (N, C) where the mask (N,) is true, as a text."""
    right = logits.argmax(-1) == labels
    return f"{right[mask].float().mean():.3f}"


def render_tiles(scenes: list[Scene]) -> Tensor:
    """Draw scenes as tiles (N, 3, S, S) of uint8. `normalize` makes floats of a batch of them."""
    images = np.stack([np.asarray(render(scene)) for scene in scenes])  # (N, S, S, 3)
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def normalize(tiles: Tensor) -> Tensor:
    """Normalize tiles (..., 3, S, S) of uint8 as CLIP does."""
    mean = torch.tensor(IMAGE_MEAN)[:, None, None]
    std = torch.tensor(IMAGE_STD)[:, None, None]
    return (tiles.float() / 255 - mean) / std


def patch_labels(scene: Scene) -> tuple[Tensor, Tensor]:
    """Return the object and the color that each patch's center shows, both (I,).

    Labels count from 1. The background has label 0.
    """
    objects = torch.zeros(PATCHES_PER_SIDE, PATCHES_PER_SIDE, dtype=torch.long)
    colors = torch.zeros(PATCHES_PER_SIDE, PATCHES_PER_SIDE, dtype=torch.long)
    for item in scene.items:
        object_label = OBJECTS.index(item.name) + 1
        color_label = COLORS.index(item.color) + 1
        for row in range(PATCHES_PER_SIDE):
            for column in range(PATCHES_PER_SIDE):
                if covers_patch(item, row, column):
                    objects[row, column] = object_label
                    colors[row, column] = color_label
    return objects.flatten(), colors.flatten()


def covers_patch(item: Item, row: int, column: int) -> bool:
    """Return whether the square of an object covers the center of a patch."""
    x = (column + 0.5) * PATCH_SIZE
    y = (row + 0.5) * PATCH_SIZE
    return item.left <= x < item.left + item.size and item.top <= y < item.top + item.size


# --- language model


def train_text(model: Llava, tokenizer: Tokenizer, seed: int, num_steps: int, batch_size: int = 64):
    """Train decoder and vocabulary head on texts about scenes without an image."""
    rng = random.Random(f"tiny text {seed}")
    parameters = [*model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = StageOptimizer(parameters, num_steps)
    progress = tqdm(range(num_steps), "text", mininterval=5)
    for step in progress:
        turns = draw_text_turns(batch_size, rng)
        examples = [pack_text_turn(tokenizer, turn) for turn in turns]
        loss = sft_loss(*response_logps(model, examples))
        optimizer.step(loss)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def pack_text_turn(tokenizer: Tokenizer, turn: Turn) -> PackedExample:
    """Pack a turn without an image."""
    prompt = encode_prompt(tokenizer, "vicuna", [turn.question])
    response = encode_response(tokenizer, "vicuna", turn.answer)
    return PackedExample.of(prompt, [], [response])


# --- both together


def train_joint(
    model: Llava,
    tokenizer: Tokenizer,
    seed: int,
    num_steps: int,
    *,
    title: str,
    caption_noise: float,
    batch_size: int = 32,
):
    """Train projector, decoder and head on images and what is said of them, the tower frozen.

    The answers follow scenes as they are perceived with `caption_noise`. 0 gives true answers. The
    scenes include those of the shipped training images. Each batch also has a few texts without an
    image, so that the model does not forget what to expect.
    """
    # 1. (true, perceived) scenes: those of the training images, and more of their kind.
    rng = random.Random(f"tiny joint {seed}")
    scene_pairs = draw_training_scenes(caption_noise)
    num_more = NUM_SCENES - len(scene_pairs)
    more_scenes = [draw_scene(rng, DISTRIBUTIONS["typical"]) for _ in range(num_more)]
    rng = random.Random(f"tiny joint {seed}, {title}")
    scene_pairs += [(scene, perceive(scene, rng, caption_noise)) for scene in more_scenes]

    # 2. Image features. The tower is frozen, so they are computed once.
    tiles = render_tiles([true_scene for true_scene, _ in scene_pairs])
    features = []
    for some_tiles in tiles.split(200):
        images = [(normalize(tile)[None], (IMAGE_SIZE, IMAGE_SIZE)) for tile in some_tiles]
        features += model.encode_images(images)

    # 3. Training.
    parameters = [*model.multi_modal_projector.parameters()]
    parameters += [*model.language_model.parameters(), *model.lm_head.parameters()]
    optimizer = StageOptimizer(parameters, num_steps)
    progress = tqdm(range(num_steps), title, mininterval=5)
    for step in progress:
        chosen = [rng.randrange(len(scene_pairs)) for _ in range(batch_size)]
        examples = []
        for i in chosen:
            _, perceived_scene = scene_pairs[i]
            examples.append(pack_image(tokenizer, features[i], perceived_scene, rng))
        for turn in draw_text_turns(NUM_TEXTS, rng):
            examples.append(pack_text_turn(tokenizer, turn))
        loss = sft_loss(*response_logps(model, examples))
        optimizer.step(loss)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")


def pack_image(tokenizer: Tokenizer, features, scene: Scene, rng: random.Random) -> PackedExample:
    """Pack an image with a caption and the answers to four questions, which share its prefix."""
    turns = [draw_caption_turn(scene, rng), *draw_questions(scene, rng, num_questions=4)]
    prompts = []
    responses = []
    for turn in turns:
        prompts.append(encode_prompt(tokenizer, "vicuna", [f"<image>\n{turn.question}"]))
        responses.append(encode_response(tokenizer, "vicuna", turn.answer))
    example = share_prefix(prompts, [features])
    leads = [lead for lead, _ in example.branches]
    example.branches = list(zip(leads, responses, strict=True))
    return example
