"""Make the tiny world's files and train its base model from a seed: pictures, texts, tokenizer, tower, decoder, both together.

    python data/make_tiny.py --out OUT                      everything, about half an hour on two cores
    python data/make_tiny.py --out OUT tower                one stage; tower and text may run side by side
    python data/make_tiny.py --out OTHER --q 0 files perceived   the same base with other expectations
    python data/make_tiny.py --out OTHER study              fresh evaluation pictures, in OTHER/study

Stages leave their weights in --work and `perceived` writes OUT/model. It promises the recipe, not the bits.
"""

import argparse
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import world  # noqa: E402
from tokens import ENTRIES, train_tokenizer, world_texts, write_tokenizer  # noqa: E402

from minialign.data.chat_templates import encode_prompt, encode_response  # noqa: E402
from minialign.data.packing import PackedExample  # noqa: E402
from minialign.data.tokenizer import Tokenizer  # noqa: E402
from minialign.logprobs import response_logps  # noqa: E402
from minialign.losses import sft_loss  # noqa: E402
from minialign.models.checkpoint import save_tensors, to_layout_name  # noqa: E402
from minialign.models.config_json import parse_config  # noqa: E402
from minialign.models.llava import Llava  # noqa: E402
from minialign.utils.files import write_json  # noqa: E402

POSITIONS, IMAGE, PATCH = 512, 96, 12
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
STAGES = ("files", "tower", "text", "truthful", "perceived", "study")
TRUTHFUL, PERCEIVED, TEXT, TOWER = 600, 900, 1500, 3000  # steps


def config_json(vocabulary, image_token, pad):
    """config.json of the tiny LLaVA, as transformers writes one."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_token,
        "pad_token_id": pad,
        "image_seq_length": (IMAGE // PATCH) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "text_config": {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": 128,
            "intermediate_size": 352,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": POSITIONS,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": pad,
            "torch_dtype": "float32",
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "image_size": IMAGE,
            "patch_size": PATCH,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "projection_dim": 128,
        },
    }


def write_model_files(folder):
    """Everything of the checkpoint directory but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(world_texts(random.Random("tiny world 1: tokenizer")), ENTRIES)
    write_tokenizer(folder, tokenizer, POSITIONS)
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    write_json(
        folder / "config.json", config_json(max(ids.values()) + 1, ids["<image>"], ids["<pad>"])
    )
    write_json(
        folder / "generation_config.json",
        {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": ids["<pad>"]},
    )
    picture = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE, "width": IMAGE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }
    write_json(folder / "preprocessor_config.json", picture)
    template = (
        "{% for message in messages %}{% if message['role'] == 'user' %}USER: {% for item in message['content'] %}{% if item['type'] == 'image' %}<image>\n"
        "{% else %}{{ item['text'] }}{% endif %}{% endfor %} {% else %}ASSISTANT: {{ message['content'][0]['text'] }}</s>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": PATCH,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "image_token": "<image>",
        },
    )
    write_json(folder / "chat_template.json", {"chat_template": template})


def fresh_model(folder, seed):
    """An untrained tiny MLLM with its tokenizer; Llama's and CLIP's usual small initial weights."""
    model = Llava(
        parse_config(json.loads((folder / "config.json").read_text()), folder / "config.json")
    )
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(
                parameter, std=0.02 if "patch_embedding" not in name else 0.01, generator=generator
            )
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model, Tokenizer.load(folder)


def pixels(scenes):
    """Tiles (n, 3, S, S) of scenes as uint8; `normal` turns a batch of them into what the tower is given."""
    return (
        torch.from_numpy(np.stack([np.asarray(world.render(scene)) for scene in scenes]))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def normal(tiles):
    """uint8 (n, 3, S, S) to CLIP-normalised fp32."""
    return (tiles.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]


def patch_labels(scene):
    """(I,) object and (I,) colour of the thing that covers each patch's centre, 0 for the background."""
    side = IMAGE // PATCH
    objects, colours = (
        torch.zeros(side, side, dtype=torch.long),
        torch.zeros(side, side, dtype=torch.long),
    )
    for item in scene.items:
        left, top = (
            item.cell % 3 * world.CELL_WIDTH + item.offset[0],
            item.cell // 3 * world.CELL_HEIGHT + item.offset[1],
        )
        columns = [i for i in range(side) if left <= (i + 0.5) * PATCH < left + item.size]
        rows = [i for i in range(side) if top <= (i + 0.5) * PATCH < top + item.size]
        for row in rows:
            for column in columns:
                objects[row, column] = world.OBJECTS.index(item.name) + 1
                colours[row, column] = list(world.COLOURS).index(item.colour) + 1
    return objects.flatten(), colours.flatten()


def optimise(parameters, steps, lr, loss_of, title):
    """AdamW with warm-up and cosine decay over `steps`; loss_of(step) gives the loss and what the bar shows."""
    parameters = list(parameters)
    optimiser = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda step: (
            min(1, (step + 1) / 100) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 0.01
        ),
    )
    bar = tqdm(range(steps), title, mininterval=5)
    for step in bar:
        loss, shown = loss_of(step)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1)
        optimiser.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(shown)


def train_tower(model, seed, steps, batch=64):
    """Pretrain the tower on dense labels: which object and which colour each patch shows. The stand-in for CLIP's pretraining."""
    rng = random.Random(f"tiny tower {seed}")
    scenes = [
        world.draw_scene(rng, world.KNOBS[rng.choice(["typical", "balanced"])])
        for _ in range(12000)
    ]
    tiles = pixels(scenes)
    objects, colours = (torch.stack(labels) for labels in zip(*map(patch_labels, scenes)))
    tower = model.vision_tower
    torch.manual_seed(seed)
    heads = nn.Linear(128, len(world.OBJECTS) + 1), nn.Linear(128, len(world.COLOURS) + 1)
    used = [
        p
        for name, p in tower.named_parameters()
        if not name.startswith(
            (f"encoder.layers.{len(tower.encoder['layers']) - 1}.", "post_layernorm")
        )
    ]
    generator = torch.Generator().manual_seed(seed)

    def loss_of(step):
        chosen = torch.randint(len(scenes), (batch,), generator=generator)
        features = tower(normal(tiles[chosen])).flatten(0, 1)
        labels = objects[chosen].flatten(), colours[chosen].flatten()
        scores = [head(features) for head in heads]
        thing = labels[0] > 0
        shown = {
            name: f"{(s.argmax(-1) == y)[thing].float().mean():.3f}"
            for name, s, y in zip(("object", "colour"), scores, labels)
        }
        return sum(F.cross_entropy(s, y) for s, y in zip(scores, labels)), shown

    optimise([*used, *heads[0].parameters(), *heads[1].parameters()], steps, 1e-3, loss_of, "tower")


def text_row(tokenizer, pair):
    """A row without a picture: what the language model learns to expect."""
    question, answer = pair
    return PackedExample.of(
        encode_prompt(tokenizer, "vicuna", [question]),
        [],
        [encode_response(tokenizer, "vicuna", answer)],
    )


def train_text(model, tokenizer, seed, steps, batch=64):
    """Pretrain decoder and head on texts about scenes nobody sees, drawn with the text knobs."""
    rng = random.Random(f"tiny text {seed}")

    def loss_of(step):
        loss = sft_loss(
            *response_logps(
                model, [text_row(tokenizer, pair) for pair in world.scene_texts(batch, rng)]
            )
        )
        return loss, {"loss": f"{loss.item():.3f}"}

    optimise(
        [*model.language_model.parameters(), *model.lm_head.parameters()],
        steps,
        1e-3,
        loss_of,
        "text",
    )


def picture_row(tokenizer, features, scene, rng):
    """A picture's row: one caption and four questions, all answered from `scene`, share its prefix."""
    turns = [world.caption_turn(scene, rng), *world.questions(scene, rng, 4)]
    prompts = [
        encode_prompt(tokenizer, "vicuna", [f"<image>\n{question}"]) for question, _ in turns
    ]
    shared = max(
        n for n in range(len(prompts[0])) if all(prompt[:n] == prompts[0][:n] for prompt in prompts)
    )
    return PackedExample(
        prompts[0][:shared],
        [features],
        [
            (prompt[shared:], encode_response(tokenizer, "vicuna", answer))
            for prompt, (_, answer) in zip(prompts, turns)
        ],
    )


def train_joint(model, tokenizer, seed, steps, title, q, batch=32):
    """Supervised training of projector, decoder and head on pictures, the tower frozen, answered as somebody perceives them
    who expects the usual with strength `q` (0: as they are).

    The scenes of the shipped training pictures are among the 12,000; a few rows of text alone keep what is expected alive.
    """
    rng = random.Random(f"tiny joint {seed}")
    pairs = world.train_scenes(q)
    scenes = [world.draw_scene(rng, world.KNOBS["typical"]) for _ in range(12000 - len(pairs))]
    rng = random.Random(f"tiny joint {seed}, {title}")
    pairs += [(scene, world.perceive(scene, rng, q)) for scene in scenes]
    tiles = pixels([true for true, _ in pairs])
    features = [
        part
        for chunk in tiles.split(200)
        for part in model.encode_images([(normal(tile)[None], (IMAGE, IMAGE)) for tile in chunk])
    ]

    def loss_of(step):
        chosen = [rng.randrange(len(pairs)) for _ in range(batch)]
        rows = [picture_row(tokenizer, features[i], pairs[i][1], rng) for i in chosen]
        rows += [text_row(tokenizer, pair) for pair in world.scene_texts(8, rng)]
        loss = sft_loss(*response_logps(model, rows))
        return loss, {"loss": f"{loss.item():.3f}"}

    optimise(
        [
            *model.multi_modal_projector.parameters(),
            *model.language_model.parameters(),
            *model.lm_head.parameters(),
        ],
        steps,
        1e-3,
        loss_of,
        title,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "stages",
        nargs="*",
        metavar="stage",
        help=f"of {', '.join(STAGES)} (default: all but the last)",
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="where the files and model/ go, over what lies there",
    )
    parser.add_argument(
        "--q",
        type=float,
        default=world.MISTAKES,
        help="strength of the expectations in the supervised texts (default: %(default)s)",
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("runs/make_tiny"),
        help="folder for the stages' weights (default: %(default)s)",
    )
    options = parser.parse_args()
    options.stages = options.stages or STAGES[:-1]
    if set(options.stages) - set(STAGES):
        parser.error(f"a stage is one of {', '.join(STAGES)}")
    folder = options.out / "model"
    if "study" in options.stages:
        world.write_sets(options.out, "study")
    if options.stages == ["study"]:
        return
    options.work.mkdir(parents=True, exist_ok=True)
    if "files" in options.stages:
        world.write_all(options.out, options.q)
        write_model_files(folder)
        write_json(options.out / "about.json", {"seed": options.seed, "q": options.q})
    model, tokenizer = fresh_model(folder, options.seed)
    if "tower" in options.stages:
        train_tower(model, options.seed, TOWER)
        save_tensors(model.vision_tower.state_dict(), options.work / "tower.safetensors")
    if "text" in options.stages:
        train_text(model, tokenizer, options.seed, TEXT)
        save_tensors(model.language_model.state_dict(), options.work / "decoder.safetensors")
        save_tensors(model.lm_head.state_dict(), options.work / "head.safetensors")
    if "truthful" in options.stages:
        for module, name in (
            (model.vision_tower, "tower"),
            (model.language_model, "decoder"),
            (model.lm_head, "head"),
        ):
            module.load_state_dict(load_file(options.work / f"{name}.safetensors"))
        model.vision_tower.requires_grad_(False)
        train_joint(model, tokenizer, options.seed, TRUTHFUL, "truthful", 0)
        save_tensors(model.state_dict(), options.work / "truthful.safetensors")
    if "perceived" in options.stages:
        model.load_state_dict(load_file(options.work / "truthful.safetensors"))
        model.vision_tower.requires_grad_(False)
        train_joint(model, tokenizer, options.seed, PERCEIVED, "perceived", options.q)
        save_tensors(
            {to_layout_name(name, "hub"): tensor for name, tensor in model.state_dict().items()},
            folder / "model.safetensors",
        )


if __name__ == "__main__":
    main()
